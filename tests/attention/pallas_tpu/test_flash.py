"""The forward kernel by itself, in the interpreter, against plain attention in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moc_jax.attention.layout import Tiles
from moc_jax.attention.pallas_tpu import flash, packing
from moc_jax.attention.pallas_tpu.device import Chip
from tests.attention.tolerances import assert_close

BATCH, HEADS, DIM, KEYS = 2, 2, 16, 96

# Two runs, one run, none; runs of a key, at multiples of 8 and not, longer than a block and shorter.
SHARED = np.array([[[0, 5, 13, 40], [0, 0, 20, 37], [3, 4, 0, 0], [0, 0, 0, 0]],
                   [[0, 0, 0, 0], [1, 9, 9, 50], [0, 0, 8, 24], [16, 32, 32, 64]]])[:, None]  # fmt: skip
PER_HEAD = np.array([[[[0, 5], [20, 28]], [[3, 4], [0, 0]]], [[[0, 0], [1, 9]], [[8, 17], [0, 9]]]])


def inputs(tiles, rows, seed=0, heads=HEADS, scale=1.0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    q = scale * rng.standard_normal(
        (BATCH, tiles.shape[1] if tiles.shape[1] > 1 else heads, tiles.shape[2] * rows, DIM)
    )
    k, v = rng.standard_normal((2, BATCH, heads, KEYS, DIM))
    return tuple(jnp.asarray(x, dtype) for x in (q, k, v))


def plain(q, k, v, tiles, rows, first_head=0):
    """Output and base-2 log-sum-exp; NaN in rows of unused tiles."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out, lse = np.full(q.shape, np.nan), np.full(q.shape[:3], np.nan)
    for b, h, g in np.ndindex(q.shape[0], q.shape[1], tiles.shape[2]):
        line = tiles[b, h if tiles.shape[1] > 1 else 0, g].reshape(-1, 2)
        keys = np.concatenate([np.arange(begin, end) for begin, end in line]).astype(int)
        if len(keys) == 0:
            continue
        here = slice(g * rows, (g + 1) * rows)
        scores = q[b, h, here] @ k[b, first_head + h, keys].T / np.sqrt(DIM)
        largest = scores.max(axis=1, keepdims=True)
        weights = np.exp(scores - largest)
        total = weights.sum(axis=1, keepdims=True)
        out[b, h, here] = weights @ v[b, first_head + h, keys] / total
        lse[b, h, here] = ((largest + np.log(total)) * np.log2(np.e))[:, 0]
    return out, lse


def run(q, k, v, tiles, *, first_head=0, **options):
    call = jax.jit(
        lambda q, k, v, table: flash.forward(
            q, k, v, Tiles(table), first_head=jnp.int32(first_head), chip=Chip("v5e"), **options
        )
    )
    return call(q, k, v, jnp.asarray(tiles))


def hold(got, want, scale=1.0, dtype=None):
    used = ~np.isnan(want[1])
    for g, w, which in zip(got, want, ("output", "log-sum-exp")):
        assert_close(np.asarray(g)[used], w[used], which, scale=scale, dtype=dtype)


@pytest.mark.parametrize("scale", [1, 64], ids=["unit", "huge"])
@pytest.mark.parametrize(
    "tiling",
    [
        flash.ForwardTiling(queries=16, keys=16, compute_queries=8, compute_keys=8, ahead=1),
        flash.ForwardTiling(queries=16, keys=48, compute_queries=16, compute_keys=16, ahead=0),
    ],
    ids=str,
)
def test_runs(interpreter, tiling, scale):
    """Where later scores leave the reference far behind, blocks are computed again: to the same numbers."""
    q, k, v = inputs(SHARED, 16, scale=scale)
    hold(run(q, k, v, SHARED, tiling=tiling), plain(q, k, v, SHARED, 16), scale)


@pytest.mark.parametrize("scale", [1, 64], ids=["unit", "huge"])
@pytest.mark.parametrize(("compute_keys", "short"), [(8, None), (16, None), (16, (8, 8))])
def test_single_blocks_of_some_heads(interpreter, scale, compute_keys, short):
    q, k, v = inputs(PER_HEAD, 16, heads=3, scale=scale)
    tiling = flash.ForwardTiling(queries=16, keys=16, compute_queries=8, compute_keys=compute_keys, short=short)
    got = run(q, k, v, PER_HEAD, first_head=1, longest_run=9, tiling=tiling)
    hold(got, plain(q, k, v, PER_HEAD, 16, first_head=1), scale)


def test_scores_that_grow_by_more_than_float32_holds(interpreter):
    """The reference comes from keys that are hundreds of powers of two below the largest."""
    q, k, v = (np.array(x) for x in inputs(SHARED, 16))
    q[..., 0], k[..., 0] = 100.0, np.linspace(-40, 40, KEYS)
    tiling = flash.ForwardTiling(queries=16, keys=16, compute_queries=16, compute_keys=8)
    hold(run(*map(jnp.asarray, (q, k, v)), SHARED, tiling=tiling), plain(q, k, v, SHARED, 16), 1024)


@pytest.mark.parametrize("longest_run", [None, 20], ids=["several", "single"])
def test_blocks_end_where_keys_do(interpreter, longest_run):
    """The last block starts before its keys, if there are no rows behind them."""
    tiles = np.array([[[[90, 96], [75, 95], [88, 89], [0, 96 if longest_run is None else 3]]]] * BATCH)
    q, k, v = inputs(tiles, 16)
    tiling = flash.ForwardTiling(queries=16, keys=32, compute_queries=16, compute_keys=16)
    got = run(q, k, v, tiles, longest_run=longest_run, tiling=tiling)
    hold(got, plain(q, k, v, tiles, 16))


@pytest.mark.long
def test_other_queries_stay(interpreter):
    """Two calls fill one array: tiles of 8 before tiles of 16."""
    q, k, v = inputs(SHARED[:, :, :2], 16)
    late = run(q, k, v, SHARED[:, :, 1:2], first_tile=1, tiling=flash.ForwardTiling(16, 16, 16, 16))
    early = SHARED[:, :, :2]
    out = run(q, k, v, early, into=late, tiling=flash.ForwardTiling(8, 16, 8, 16))
    want = plain(q, k, v, np.concatenate([early, SHARED[:, :, [1, 1]]], axis=2), 8)
    hold(out, want)


def test_a_nan_query_spoils_no_other(interpreter):
    q, k, v = (np.array(x) for x in inputs(SHARED, 16))
    q[..., 0], k[..., 0] = 100.0, np.linspace(-40, 40, KEYS)  # blocks are computed again
    q[:, :, 1::16] = np.nan
    tiling = flash.ForwardTiling(queries=16, keys=16, compute_queries=16, compute_keys=8)
    out, _ = run(*map(jnp.asarray, (q, k, v)), SHARED, tiling=tiling)
    want, _ = plain(np.nan_to_num(q), k, v, SHARED, 16)
    want[:, :, 1::16] = np.nan
    used = ~np.isnan(want)
    assert_close(np.asarray(out)[used], want[used], "output", scale=1024)
    assert np.isnan(
        np.asarray(out)[:, :, 17::16][..., 0][~np.isnan(plain(np.nan_to_num(q), k, v, SHARED, 16)[1])[:, :, 17::16]]
    ).all()


@pytest.mark.long
def test_bfloat16_packed(interpreter):
    """Outputs and log-sum-exps in one array: the outputs to bfloat16, the log-sum-exps to float32."""
    q, k, v = inputs(SHARED, 16, dtype=jnp.bfloat16)
    tiling = flash.ForwardTiling(queries=16, keys=16, compute_queries=16, compute_keys=16)
    (packed,) = run(q, k, v, SHARED, packed=True, tiling=tiling)
    bits = np.asarray(packed).view(np.uint32)
    out = (bits & 0xFFFF0000).view(np.float32)
    lse = ((bits[..., 0] << 16) | (bits[..., -1] & 0xFFFF)).view(np.float32)
    hold((out, lse), plain(q, k, v, SHARED, 16), dtype="bfloat16")
    apart = run(q, k, v, SHARED, tiling=tiling)
    used = ~np.isnan(plain(q, k, v, SHARED, 16)[1])
    np.testing.assert_array_equal(out[used], np.asarray(apart[0], np.float32)[used])
    np.testing.assert_array_equal(lse[used], np.asarray(apart[1])[used])
    assert packing.packed_width(DIM, jnp.bfloat16) == packed.shape[-1] == DIM


def test_a_second_run_is_bitwise_equal(interpreter):
    q, k, v = inputs(SHARED, 16)
    tiling = flash.ForwardTiling(queries=16, keys=16, compute_queries=8, compute_keys=16)
    used = ~np.isnan(plain(q, k, v, SHARED, 16)[1])
    for first, second in zip(*(run(q, k, v, SHARED, tiling=tiling) for _ in range(2))):
        np.testing.assert_array_equal(np.asarray(first)[used], np.asarray(second)[used])


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (dict(queries=100, keys=128), "must divide"),
        (dict(queries=0, keys=128), "positive"),
        (dict(queries=20, keys=128, compute_queries=20, compute_keys=128), "multiples of 8"),
    ],
)
def test_sizes_that_cannot_be_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        flash.ForwardTiling(**sizes)
