"""The backward kernel, interpreted, against float64: every gradient by name, at tiles whose sizes fit nothing."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moc_jax.attention.layout import Tiles
from moc_jax.attention.pallas_tpu.device import Chip
from moc_jax.attention.pallas_tpu.flash_backward import GradientTiling, gradients
from tests.attention.interpreter import interpreted

ROWS, BLOCK, DIM = 32, 16, 16
NAMES = ("dq", "dk", "dv")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Lines of the table, one list for each head, or one for all."""

    lines: tuple[tuple[tuple[int, ...], ...], ...]
    queries: int = 48
    keys: int = 96
    batch: int = 1
    heads: int = 2
    all_heads: int = 2
    first_head: int = 0
    accumulate: bool = True
    dtype: str = "float32"
    scale: float = 1.0
    at_once: int = 16
    transposed: bool = False
    silent: tuple[int, ...] = ()
    """Queries whose log-sum-exp is +inf."""


CASES = {
    "one block that every tile reads": Case(
        lines=(((0, 0, 32, 3, 9), (32, 32, 64, 2, 16), (64, 64, 96, 0, 16)),), queries=16
    ),
    "two blocks that every tile reads": Case(
        lines=(((0, 0, 32, 0, 32), (32, 32, 64, 0, 32), (64, 64, 96, 5, 30)),), queries=32
    ),
    "three blocks that every tile reads": Case(lines=(((0, 0, 32, 0, 48), (32, 32, 64, 1, 47), (64, 64, 90, 0, 48)),)),
    "there and back": Case(
        lines=(((0, 0, 32, 0, 32, 3, 7), (32, 32, 64, 16, 30, 0, 16), (64, 64, 96, 0, 16, 16, 48)),)
    ),
    "runs and keys off the grid": Case(
        lines=(((8, 11, 37, 0, 5, 20, 43), (40, 40, 47, 7, 7, 3, 48), (56, 56, 57, 3, 9, 9, 9)),)
    ),
    "unused tiles": Case(lines=(((0, 5, 32, 0, 0), (16, 16, 48, 20, 40), (0, 0, 0, 0, 0), (8, 9, 30, 40, 33)),)),
    "some of the heads, a table for each": Case(
        lines=(((0, 0, 32, 0, 20), (32, 32, 64, 20, 48)), ((24, 30, 50, 1, 48), (0, 0, 0, 0, 0))),
        transposed=True,
        all_heads=4,
        first_head=1,
    ),
    "picks": Case(
        lines=(((0, 0, 30, 0, 16), (32, 32, 32, 16, 16), (24, 30, 50, 16, 40)),),
        accumulate=False,
        silent=(13, 14, 15, 30),
    ),
    "picks, a table for each head, two scenes, keys at once": Case(
        lines=(((0, 0, 30, 16, 48), (24, 30, 50, 0, 10)), ((64, 70, 90, 0, 10), (40, 40, 72, 16, 33))),
        accumulate=False,
        batch=2,
        at_once=32,
    ),
    "two scenes": Case(lines=(((0, 0, 32, 3, 9), (24, 32, 56, 2, 16)),), batch=2, queries=16, heads=1),
    "huge logits": Case(lines=(((0, 0, 32, 0, 48), (32, 35, 60, 7, 40)),), scale=40.0),
    "bfloat16": Case(lines=(((0, 0, 32, 0, 48), (32, 35, 60, 7, 40)),), dtype="bfloat16", silent=(0, 1)),
    "bfloat16 picks": Case(
        lines=(((0, 0, 32, 0, 16), (32, 35, 60, 17, 40)),), dtype="bfloat16", accumulate=False, transposed=True
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_gradients(case: Case, interpreter):
    arrays, table = _inputs(case), _table(case)
    found = _run(case, arrays, table)
    expected, read = _oracle(case, arrays, table)
    tolerance = 4e-6 * case.scale**0.5 if case.dtype == "float32" else 2e-2  # rounded scores
    for name, mine, right in zip(NAMES, found, expected, strict=True):
        mine = np.asarray(mine, np.float64)
        if name == "dq" and not case.accumulate:
            mine = np.where(read, mine, 0)
        assert mine.shape == right.shape, name
        assert np.all((mine == 0) | (right != 0)), f"{name}: where nothing is due there is something"
        error = np.max(np.abs(mine - right)) / max(np.max(np.abs(right)), 1e-30)
        assert error <= tolerance, f"{name}: {error:.2e}"


@pytest.mark.long
def test_same_bits_again_and_with_eager_copies(interpreter):
    case = dataclasses.replace(CASES["two blocks that every tile reads"], heads=1)
    arrays, table = _inputs(case), _table(case)
    first = _run(case, arrays, table)
    for mode in ("on_wait", "eager"):
        with interpreted(dataclasses.replace(interpreter, dma_execution_mode=mode)):
            again = _run(case, arrays, table)
        for name, mine, other in zip(NAMES, first, again, strict=True):
            assert np.asarray(mine).tobytes() == np.asarray(other).tobytes(), name


@pytest.mark.parametrize("name", [name for name in CASES if "every tile reads" in name or name == "there and back"])
def test_a_block_read_soon_again(name: str, interpreter):
    """Copies that happen at once, and those that happen as late as they may, see the same sums."""
    case = CASES[name]
    arrays, table = _inputs(case), _table(case)
    with interpreted(dataclasses.replace(interpreter, dma_execution_mode="eager")):
        found = _run(case, arrays, table)
    expected, _ = _oracle(case, arrays, table)
    np.testing.assert_allclose(found[0], expected[0], rtol=0, atol=4e-6 * np.max(np.abs(expected[0])))


def test_sizes_that_do_not_fit():
    with pytest.raises(ValueError, match="multiples of 8"):
        GradientTiling(block=12, at_once=16)
    case = Case(lines=(((0, 0, 32, 0, 48),),), at_once=24)
    with pytest.raises(ValueError, match="32 keys are not a multiple of the 24"):
        _run(case, _inputs(case), _table(case))
    case = Case(lines=(((0, 0, 32, 0, 48),),), queries=40)
    with pytest.raises(ValueError, match="40 queries are not a multiple of the 16"):
        _run(case, _inputs(case), _table(case))
    case = Case(lines=(((0, 0, 32, 0, 48),),))
    with pytest.raises(ValueError, match="divisible by 8 and 128"):
        jax.jit(lambda *x: _run(case, x, _table(case))).trace(*_inputs(case)).lower(lowering_platforms=("tpu",))


def _run(case: Case, arrays, table):
    return gradients(
        *arrays,
        Tiles(jnp.asarray(table, jnp.int32)),
        first_head=jnp.int32(case.first_head),
        rows=ROWS,
        tiling=GradientTiling(block=BLOCK, at_once=case.at_once, transposed=case.transposed),
        accumulate=case.accumulate,
        chip=Chip("v5e"),
    )


def _table(case: Case) -> np.ndarray:
    """The second scene has its tiles in reverse order."""
    table = np.asarray(case.lines)
    return np.stack([table, table[:, ::-1]][: case.batch])


def _inputs(case: Case):
    """q, k, v, d_out, log-sum-exp and delta of a softmax over all keys: gradients don't ask where those are from."""
    rng = np.random.default_rng(5)
    query, key = (case.batch, case.heads, case.queries, DIM), (case.batch, case.all_heads, case.keys, DIM)
    q, k, v, d_out = (jnp.asarray(rng.normal(size=shape), case.dtype) for shape in (query, key, key, query))
    q = q * case.scale
    mine = slice(case.first_head, case.first_head + case.heads)
    scores = _scores(q, k[:, mine])
    lse = np.logaddexp2.reduce(scores, axis=-1)
    delta = np.sum(np.asarray(d_out, np.float64) * (np.exp2(scores - lse[..., None]) @ np.asarray(v[:, mine])), axis=-1)
    lse[:, :, list(case.silent)], delta[:, :, list(case.silent)] = np.inf, np.nan
    return q, k, v, d_out, jnp.asarray(lse, jnp.float32), jnp.asarray(delta, jnp.float32)


def _scores(q, k):
    return np.asarray(q, np.float64) @ np.asarray(k, np.float64).swapaxes(-1, -2) * (math.log2(math.e) / math.sqrt(DIM))


def _oracle(case: Case, arrays, table):
    """Tile by tile in float64; which queries' dq some tile writes."""
    q, k, v, d_out, lse, delta = (np.asarray(x, np.float64) for x in arrays)
    d_q, read = np.zeros_like(q), np.zeros(q.shape, bool)
    d_k = np.zeros((case.batch, case.heads, table.shape[2] * ROWS, DIM))
    d_v = np.zeros_like(d_k)
    for scene, head, tile in np.ndindex(case.batch, case.heads, table.shape[2]):
        row, begin, end, *runs = table[scene, head if table.shape[1] > 1 else 0, tile]
        where, keys, out = (scene, head), (scene, case.first_head + head), slice(tile * ROWS, (tile + 1) * ROWS)
        loaded = slice(row, row + ROWS)
        is_key = (np.arange(row, row + ROWS) >= begin) & (np.arange(row, row + ROWS) < end)
        for first, last in zip(runs[0::2], runs[1::2], strict=True):
            index = np.arange(first, max(first, last))
            speaks = np.isfinite(lse[*where, index])[:, None]
            p = np.exp2(
                _scores(q[*where, index], k[*keys, loaded]) - np.where(speaks[:, 0], lse[*where, index], 0)[:, None]
            )
            p = np.where(is_key & speaks, p, 0)
            d_out_part, part_delta = d_out[*where, index], np.where(speaks[:, 0], delta[*where, index], 0)
            d_s = p * (d_out_part @ v[*keys, loaded].T - part_delta[:, None]) / math.sqrt(DIM)
            d_v[*where, out] += p.T @ d_out_part
            d_k[*where, out] += d_s.T @ q[*where, index]
            d_q[*where, index] += d_s @ k[*keys, loaded]
            read[*where, index] = True
    return (d_q, d_k, d_v), read
