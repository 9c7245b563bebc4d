"""Sizes of blocks for every chip and every published setting: they exist, and what the kernels hold fits vector memory.

What a kernel holds is read off what it asks Pallas for: every block twice, since the next one is copied while one is
computed on, and every buffer of its own. The compiler's temporaries come on top (test_compiles.py).
"""

import itertools
import math
from unittest import mock

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from benchmarks.settings import SETTINGS, multi_shot
from moc_jax.attention.layout import Tiles
from moc_jax.attention.pallas_tpu import device, flash, flash_backward, tuning
from moc_jax.attention.pallas_tpu.device import LANES, ROWS, Chip

CHIPS = tuple(map(Chip, dict.fromkeys(device.CHIPS.values())))


def _bytes(shape, dtype) -> int:
    """Of an array in registers of 8 rows of 128 lanes of 32 bits."""
    *more, rows, columns = (1, 1, *shape)
    packed = ROWS * 4 // jnp.dtype(dtype).itemsize
    whole = -(-rows // packed) * packed * -(-columns // LANES) * LANES
    return math.prod(more) * whole * jnp.dtype(dtype).itemsize


def _held(function, *arguments) -> int:
    """Bytes of vector memory of the kernel that a function calls."""
    found = []

    def pallas_call(kernel, *, grid_spec, out_shape, **_):
        def call(*operands):
            specs = [*grid_spec.in_specs, *grid_spec.out_specs]
            arrays = [*operands[grid_spec.num_scalar_prefetch :], *out_shape]
            blocks = [(s, x.dtype) for s, x in zip(specs, arrays, strict=True) if s.memory_space is not pl.ANY]
            sizes = [[d for d in map(_rows, spec.block_shape) if d] for spec, _ in blocks]
            own = [x for x in grid_spec.scratch_shapes if x.memory_space == pltpu.VMEM]
            found.append(2 * sum(_bytes(size, dtype) for size, (_, dtype) in zip(sizes, blocks)))
            found.append(sum(_bytes(x.shape, x.dtype) for x in own))
            return [jnp.zeros(x.shape, x.dtype) for x in out_shape]

        return call

    with mock.patch.object(pl, "pallas_call", pallas_call):
        jax.eval_shape(function, *arguments)
    assert len(found) == 2
    return sum(found)


def _rows(dimension) -> int | None:
    """Of a block, however its place is given; None if it is left out."""
    return None if dimension is pl.squeezed else getattr(dimension, "block_size", dimension)


def _shapes(queries: int, keys: int, dim: int, dtype):
    """Arguments of the kernels: one scene, head and tile, of as many rows as blocks have."""
    q, k = (jax.ShapeDtypeStruct((1, 1, rows, dim), dtype) for rows in (queries, keys))
    line = jax.ShapeDtypeStruct((1, 1, queries), jnp.float32)
    return q, k, line


def _forward(tiling: flash.ForwardTiling, dim: int, dtype, chip: Chip) -> int:
    q, k, _ = _shapes(tiling.queries, 2 * tiling.keys, dim, dtype)
    tiles = Tiles(jax.ShapeDtypeStruct((1, 1, 1, 4), jnp.int32))
    return _held(lambda q, k, v, *rest: flash.forward(q, k, v, *rest, tiling=tiling, chip=chip), q, k, k, tiles)


def _backward(rows: int, tiling: flash_backward.GradientTiling, dim: int, dtype, chip: Chip) -> int:
    q, k, line = _shapes(2 * tiling.block, 2 * rows, dim, dtype)
    tiles = Tiles(jax.ShapeDtypeStruct((1, 1, 1, 5), jnp.int32))

    def run(*arguments):
        return flash_backward.gradients(*arguments, rows=rows, tiling=tiling, chip=chip, accumulate=True)

    return _held(run, q, k, k, q, line, line, tiles)


@pytest.mark.parametrize("name", [*SETTINGS, "minutes"])
@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.name)
def test_blocks_fit_vector_memory(chip, name):
    setting = SETTINGS.get(name) or multi_shot(64)
    table = jax.eval_shape(setting.table)
    for dim, dtype in itertools.product((64, 128, 256), (jnp.bfloat16, jnp.float32)):
        blocks, limit = tuning.blocks(setting.moc, table, dim, dtype, chip), chip.vmem_limit
        for tiling in (blocks.anchors, blocks.text, blocks.picks):
            assert tiling.queries % LANES == tiling.keys % LANES == 0
            assert _forward(tiling, dim, dtype, chip) <= limit
        for rows, tiling in (
            (blocks.gradient_keys, blocks.anchor_gradients),
            (blocks.pick_gradient_keys, blocks.pick_gradients),
        ):
            assert rows % LANES == tiling.block % LANES == 0
            assert _backward(rows, tiling, dim, dtype, chip) <= limit


def test_what_is_held_is_counted_in_full():
    """By hand, for a kernel whose blocks differ in all sizes."""
    tiling = flash.ForwardTiling(queries=256, keys=512, compute_queries=256, compute_keys=512, ahead=0)
    inputs = 2 * 128 * (256 + 2 * 512)  # q, k, v
    outputs = 2 * 128 * 256 + 4 * 8 * 256  # and log-sum-exp, on eight rows
    state = 4 * 256 * 128 * 5  # the reference; maxima and sums, and products, of two kinds each
    assert _forward(tiling, 128, jnp.bfloat16, Chip("v5e")) == 2 * (inputs + outputs) + state
