"""Runs of rows and of columns moved in the interpreter: the same bits as numpy's copies."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moc_jax.attention.pallas_tpu import moves
from moc_jax.attention.pallas_tpu.device import Chip
from tests.attention.interpreter import interpreted

BATCH, HEADS, LINES = 2, 2, 5
CHIP = Chip("v5e")
RUNS = 13  # of a scene; empty ones behind the last, so that many tests share a program
LENGTH, ROWS, TILE = 168, 170, 32  # six tiles of rows, the last of 10
WIDTH, COLUMNS, LANES = 896, 800, 256  # four tiles of columns

# runs of each scene as (source, target, size)
ROW_RUNS = {
    "one": ([(0, 0, 160)], [(8, 0, 160)]),
    "odd offsets": ([(3, 0, 7), (21, 9, 90), (0, 101, 1)], [(8, 5, 3), (40, 8, 24), (5, 169, 1)]),
    "even offsets": ([(2, 0, 8), (20, 10, 30), (100, 96, 64)], [(7, 5, 13), (40, 32, 24)]),
    "many in a tile": ([(7 * i, 5 * i + 1, 1 + i % 4) for i in range(12)], [(i, 2 * i, 1) for i in range(12)]),
    "over many tiles": ([(1, 3, 167)], [(7, 0, 161)]),
    "empty": ([(10**6, -9, 0), (5, 40, 9), (3, 0, 0)], [(0, 0, 0), (0, 999, 0), (-1, 1, 0)]),
    "tiles without any": ([(0, 100, 20)], [(9, 70, 2), (0, 165, 5)]),
}
COLUMN_RUNS = {
    "one": ([(0, 0, 768)], [(128, 0, 768)]),
    "any offsets": ([(3, 0, 70), (300, 90, 300), (0, 400, 1)], [(127, 255, 2), (40, 300, 150), (890, 799, 1)]),
    "over many tiles": ([(130, 3, 700)], [(0, 129, 600)]),
    "empty": ([(10**6, -9, 0), (5, 40, 9), (3, 0, 0)], [(0, 0, 0), (0, 9999, 0), (-1, 1, 0)]),
}


@functools.cache
def rows_program(rows=ROWS, tile=TILE):
    return jax.jit(functools.partial(moves.move, rows=rows, tile=tile, chip=CHIP))


@functools.cache
def columns_program(columns=COLUMNS):
    return jax.jit(functools.partial(moves.move_lanes, columns=columns, fill=-1, tile=LANES, chip=CHIP))


def arrays(scenes):
    """[B, S] each."""
    runs = np.array([[*runs, *[(7, 0, 0)] * (RUNS - len(runs))] for runs in scenes], np.int32)
    return tuple(runs[..., i] for i in range(3))


def moved(x, runs, size, fill, axis):
    want = np.full((*x.shape[:axis], size, *x.shape[axis + 1 :]), fill, x.dtype)
    for b, (sources, targets, sizes) in enumerate(zip(*runs)):
        for source, target, count in zip(sources, targets, sizes):
            if count:
                to, of = (np.moveaxis(a[b], axis - 1, 0) for a in (want, x))
                to[target : target + count] = of[source : source + count]
    return want


def bits(x):
    return np.asarray(x).view(f"u{x.dtype.itemsize}")


def draw(length=LENGTH, dim=16, dtype=jnp.bfloat16, heads=HEADS):
    x = jax.random.normal(jax.random.key(0), (BATCH, heads, length, dim)).astype(dtype)
    return x.at[0, 0, 3, 1].set(jnp.nan).at[1, 0, 2, 0].set(-jnp.inf)


def check_rows(x, runs, rows=ROWS, program=None):
    got = (program or rows_program(rows))(x, *runs)
    np.testing.assert_array_equal(bits(got), bits(moved(np.asarray(x), runs, rows, 0, 2)))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("case", ROW_RUNS)
def test_rows(interpreter, case, dtype):
    check_rows(draw(dtype=dtype), arrays(ROW_RUNS[case]))


@pytest.mark.parametrize("seed", range(10))
def test_random_runs(interpreter, seed):
    rng = np.random.default_rng(seed)
    check_rows(draw(), arrays([draw_runs(rng) for _ in range(BATCH)]))


def draw_runs(rng):
    """Runs between random cuts; a third of them is left out."""
    cuts = np.sort(rng.integers(0, min(ROWS, LENGTH) + 1, RUNS + 1))
    runs = [(int(rng.integers(0, LENGTH - (b - a) + 1)), int(a), int(b - a)) for a, b in itertools.pairwise(cuts)]
    return [(source, target, size if rng.random() < 0.67 else 0) for source, target, size in runs]


@pytest.mark.parametrize(
    ("dim", "dtype"),
    [(64, jnp.bfloat16), (128, jnp.bfloat16), (192, jnp.bfloat16), (192, jnp.float32), (256, jnp.float32)],
)
def test_widths(interpreter, dim, dtype):
    check_rows(draw(dim=dim, dtype=dtype), arrays(ROW_RUNS["odd offsets"]))


@pytest.mark.parametrize(
    ("length", "rows", "runs"),
    [
        (61, 67, ([(0, 1, 13), (38, 33, 23)], [(50, 5, 11), (0, 60, 5), (60, 66, 1)])),
        (5, 9, ([(1, 2, 4)], [(4, 0, 1)])),
    ],
)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_rows_behind_the_last_eight(interpreter, length, rows, runs, dtype):
    check_rows(draw(length, dtype=dtype), arrays(runs), rows)


def test_groups_of_heads(interpreter, monkeypatch):
    monkeypatch.setattr(moves, "_BUFFER", 2**14)  # two heads; half of them are three
    check_rows(draw(heads=6), arrays(ROW_RUNS["odd offsets"]))


def test_two_cores(interpreter):
    """Each has some of the scenes and heads."""
    with interpreted(dataclasses.replace(interpreter, num_cores_or_threads=2)):
        check_rows(draw(), arrays(ROW_RUNS["one"]), 160)


def test_vmap(interpreter):
    x = jnp.stack([draw(), -draw()])
    runs = [np.stack(r) for r in zip(*(arrays(ROW_RUNS[case]) for case in ("odd offsets", "empty")))]
    got = jax.jit(jax.vmap(rows_program()))(x, *runs)
    want = np.stack([moved(np.asarray(x[i]), [r[i] for r in runs], ROWS, 0, 2) for i in range(2)])
    np.testing.assert_array_equal(bits(got), bits(want))


@pytest.mark.parametrize("case", COLUMN_RUNS)
def test_columns(interpreter, case):
    check_columns(LINES, WIDTH, COLUMNS, COLUMN_RUNS[case])


@pytest.mark.parametrize("lines", [1, 60, 256])
def test_lines(interpreter, lines):
    check_columns(lines, WIDTH, COLUMNS, COLUMN_RUNS["any offsets"])


@pytest.mark.parametrize(
    ("width", "columns", "runs"),
    [
        (270, 333, ([(0, 1, 130), (200, 257, 70)], [(269, 5, 1), (255, 300, 15)])),
        (100, 40, ([(1, 2, 4)], [(99, 0, 1)])),
    ],
)
def test_columns_behind_the_last_128(interpreter, width, columns, runs):
    check_columns(LINES, width, columns, runs)


def test_columns_of_floats(interpreter):
    check_columns(LINES, WIDTH, COLUMNS, COLUMN_RUNS["any offsets"], jnp.float32)


def check_columns(lines, width, columns, scenes, dtype=jnp.int32):
    x = jax.random.randint(jax.random.key(1), (BATCH, lines, width), -(2**30), 2**30, jnp.int32)
    x, runs = x if dtype == jnp.int32 else jax.lax.bitcast_convert_type(x, dtype), arrays(scenes)
    got = columns_program(columns)(x, *runs)
    np.testing.assert_array_equal(bits(got), bits(moved(np.asarray(x), runs, columns, -1, 2)))
