"""Mean keys of chunks in one kernel: each chunk is a run of rows, so a block of memory that is read once.

A chunk's block starts at a multiple of 8 rows and may hold rows of other chunks; those are left out by selection, so
that a NaN stays in its own chunk. Chunks longer than a block take several.

(a) Near. The mean of the chunk's first few keys: differences from it are small, and they give back what rounding took
    from it, so that chunks of equal keys tie exactly (`routing.descriptors`).
(b) Sums of differences, float32: eight of them, of every eighth row each, one row after the other.
(c) The eight are added in halves. Where the chunk starts within its block decides which of the eight is the first;
    halves of a circle add up to the same bits from wherever it begins, so that no bit depends on the chunk's place.

Bytes: k once, and up to 15 rows more per chunk.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from moc_jax.attention.layout import round_up
from moc_jax.attention.pallas_tpu.batching import more_scenes
from moc_jax.attention.pallas_tpu.device import LANES, ROWS, Chip, heads_of_block
from moc_jax.attention.routing import FEW
from moc_jax.scene import VIDEO, ChunkTable
from moc_jax.shapes import Array, Float, Float32, typed

_MOST_ROWS = 2048  # of a block
_GROUP = 64  # rows added up at a time
_REGISTERS = 8  # that hold the sums of heads at once


@typed
def descriptors(k: Float[Array, "B N H D"], table: ChunkTable, *, chip: Chip) -> Float32[Array, "B H C D"]:
    """Equation (1) for video chunks, the only ones that can be picked; 0 for all others and for empty ones."""
    return more_scenes(functools.partial(_means, chip=chip))(k, table)


def _means(k, table: ChunkTable, chip: Chip):
    batch, tokens, heads, dim = k.shape
    chunks, rows = table.kind.shape[1], min(round_up(table.max_chunk + ROWS - 1, _GROUP), _MOST_ROWS)
    k = jnp.swapaxes(k, 1, 2)
    more = max(-tokens % ROWS, rows - tokens)
    k = jnp.pad(k, ((0, 0), (0, 0), (0, more), (0, 0))) if more else k
    last = k.shape[2] - rows
    group = heads_of_block(heads, rows * max(dim, LANES) * k.dtype.itemsize, chip.vmem_limit // 8)
    length = jnp.where(table.kind == VIDEO, table.length, 0)
    lines = jnp.stack([jnp.where(length > 0, table.start, 0), length], axis=-1).astype(jnp.int32)
    steps = -(-(table.max_chunk + ROWS - 1) // rows)

    def first_row(lines_smem_ref, b, c, s):
        return lax.div(lines_smem_ref[2 * (b * chunks + c)], jnp.int32(ROWS)) * ROWS + s * rows

    def keys_at(b, g, c, s, lines_smem_ref):
        return b, g * group, pl.multiple_of(jnp.minimum(first_row(lines_smem_ref, b, c, s), last), ROWS), 0

    means = pl.pallas_call(
        functools.partial(_kernel, chunks=chunks, rows=rows, last=last, first_row=first_row),
        name="moc_pool",
        out_shape=jax.ShapeDtypeStruct((batch, chunks, heads, 1, dim), jnp.float32),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, heads // group, chunks, steps),
            in_specs=[pl.BlockSpec((pl.squeezed, pl.Element(group), pl.Element(rows), pl.Element(dim)), keys_at)],
            out_specs=pl.BlockSpec((pl.squeezed, pl.squeezed, group, 1, dim), lambda b, g, c, s, _: (b, c, g, 0, 0)),
            scratch_shapes=[pltpu.VMEM((group, n, dim), jnp.float32) for n in (1, ROWS)],
        ),
        compiler_params=chip.params("ppaa"),
        cost_estimate=pl.CostEstimate(flops=k.size, transcendentals=0, bytes_accessed=k.size * k.dtype.itemsize),
    )(lines.reshape(-1), k)
    return jnp.swapaxes(means[:, :, :, 0], 1, 2)


def heads_at_once(heads: int, dim: int) -> int:
    """Heads of a group whose sums fit their registers."""
    most = max(1, _REGISTERS // pl.cdiv(dim, LANES))
    return max(n for n in range(1, heads + 1) if heads % n == 0 and n <= most)


def _kernel(
    lines_smem_ref,
    keys_vmem_ref,
    means_vmem_ref,
    near_vmem_ref,
    sums_vmem_ref,
    *,
    chunks: int,
    rows: int,
    last: int,
    first_row,
):
    heads, _, dim = keys_vmem_ref.shape
    assert keys_vmem_ref.shape[1] == rows
    assert means_vmem_ref.shape == near_vmem_ref.shape == (heads, 1, dim)
    assert sums_vmem_ref.shape == (heads, ROWS, dim)
    b, c, s = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    begin, length = (lines_smem_ref[2 * (b * chunks + c) + i] for i in range(2))
    first = first_row(lines_smem_ref, b, c, s)
    row = jnp.minimum(first, last)
    low, high = jnp.maximum(begin, first) - row, jnp.minimum(begin + length - row, rows)

    def keys(here, start, count, end, less=0.0):
        """`count` rows of heads less `less`, 0 for those outside of [low, end)."""
        x = keys_vmem_ref[here, pl.ds(start, count)].astype(jnp.float32)
        index = start + lax.broadcasted_iota(jnp.int32, x.shape, 1)
        return jnp.where((index >= low) & (index < end), x - less, 0.0)

    def start_heads(here):
        few = jnp.minimum(length, FEW)
        start = pl.multiple_of(jnp.minimum(lax.div(low, jnp.int32(2 * ROWS)) * 2 * ROWS, rows - 4 * ROWS), 2 * ROWS)
        total = _add_every_eighth(
            jnp.zeros((here.size, ROWS, dim), jnp.float32), keys(here, start, 4 * ROWS, low + few)
        )
        near_vmem_ref[here] = _halves(total) / jnp.maximum(few, 1).astype(jnp.float32)
        sums_vmem_ref[here] = jnp.zeros_like(total)

    at_once = heads_at_once(heads, dim)

    def some_heads(i, _):
        here = pl.ds(i * at_once, at_once)
        pl.when(s == 0)(functools.partial(start_heads, here))
        near = near_vmem_ref[here]

        def some_rows(i, total):
            return _add_every_eighth(total, keys(here, pl.multiple_of(i * _GROUP, _GROUP), _GROUP, high, near))

        blocks = lax.div(low, jnp.int32(_GROUP)), lax.div(high + _GROUP - 1, jnp.int32(_GROUP))
        total = lax.fori_loop(*blocks, some_rows, sums_vmem_ref[here])
        sums_vmem_ref[here] = total

        @pl.when(s == pl.num_programs(3) - 1)
        def _():
            means_vmem_ref[here] = near + _halves(total) / jnp.maximum(length, 1).astype(jnp.float32)

        return 0

    lax.fori_loop(0, heads // at_once, some_heads, 0)


def _add_every_eighth(total, x):
    """(b) total [heads, 8, D] and the rows of x [heads, rows, D], one after the other."""
    return functools.reduce(jnp.add, [x[:, i : i + ROWS] for i in range(0, x.shape[1], ROWS)], total)


def _halves(x):
    """(c) x [heads, 8, D] -> [heads, 1, D]."""
    while x.shape[1] > 1:
        half = x.shape[1] // 2
        x = x[:, :half] + x[:, half:]
    return x
