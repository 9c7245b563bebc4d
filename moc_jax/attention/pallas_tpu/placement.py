"""Where the (query, chunk) pairs of picks lie: sorted by chunk, without a sort.

Each head's pairs lie in *slots*, chunk after chunk, each chunk's from a whole tile on, so that a tile of slots reads
one chunk. Queries come in *spans*; a chunk's pairs of one span are a *run* of slots, rounded up to 8 rows. Prefix
counts (ranks.py) say which slot of its run a pair takes; sums over spans and chunks say where runs begin. Integer
work on [spans, chunks], and on the pairs' chunks.

A span has two buffers, so that transfers are behind the work. Where that would leave most runs short of pairs, as
with many chunks and little vector memory, it has one and is larger: fewer slots are worth a wait per span.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from moc_jax.attention.layout import round_up
from moc_jax.attention.pallas_tpu.device import LANES, ROWS, Chip
from moc_jax.attention.pallas_tpu.ranks import ranks
from moc_jax.shapes import Array, Int, typed

STEP = 1024  # rows of a grid step
RUN = 3  # columns of a run: rows, place in the span, slot
PARTS = 8  # in which a single buffer's pairs leave
_MOST_SPAN = 8192
_LONG_RUN = 2 * ROWS  # pairs: runs whose padding is a fifth or less


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Placement:
    """Where each pair lies."""

    places: Int[Array, "B H S 1 E"]  # of the pairs of each step of rows, slot i's after slot i - 1's, in their span
    runs: Int[Array, "B H W 1 R"]  # of each span and chunk: rows, place, slot
    tails: Int[Array, "B H 1 1 T"]  # of each chunk: slots behind its last run, first and count, to the end of a tile
    tile_chunk: Int[Array, "B H G"]  # the chunk of each tile; -1: unused
    chunk_begin: Int[Array, "B H C"]  # slots of each chunk's pairs
    chunk_end: Int[Array, "B H C"]
    picks: int = dataclasses.field(metadata={"static": True})  # K
    step: int = dataclasses.field(metadata={"static": True})
    tile: int = dataclasses.field(metadata={"static": True})
    room: int = dataclasses.field(metadata={"static": True})  # rows of a span's buffer; the last 8 are nobody's
    buffers: int = dataclasses.field(metadata={"static": True})  # 1 or 2
    rows: int = dataclasses.field(metadata={"static": True})  # R, of queries

    @property
    def slots(self) -> int:
        return self.tile_chunk.shape[2] * self.tile

    @property
    def steps(self) -> int:
        """Of a span; the last span's may reach beyond the queries."""
        return self.places.shape[2] // self.runs.shape[2]

    def block(self, span, step):
        """The block of queries of a step; beyond the last, the last again."""
        return jnp.minimum(span * self.steps + step, self.rows // self.step - 1)


@typed
def place(
    routes: Int[Array, "B H R K"],
    lengths: Int[Array, "B C"],
    tile: int,
    most_pairs: int,
    *,
    span: int,
    buffers: int = 2,
    step: int = STEP,
) -> Placement:
    """Places for the pairs of queries and the chunks that they pick; -1 and chunks of no length pick nothing.

    No head has more than `most_pairs` pairs. `step` divides R and `span`, both in rows.
    """
    batch, heads, rows, picks = routes.shape
    chunks = lengths.shape[1]
    routes = jnp.pad(routes, ((0, 0), (0, 0), (0, -rows % span), (0, 0)), constant_values=-1)
    spans = routes.shape[2] // span
    by_span = routes.reshape(batch, heads * spans, span, picks)
    rank, counts = ranks(by_span, chunks)
    room = _room(span, picks, chunks)
    some = (lengths > 0)[:, None, None]
    run_rows = jnp.where(some, round_up(counts, ROWS).reshape(batch, heads, spans, chunks), 0)
    run_place = jnp.cumsum(run_rows, axis=3) - run_rows
    in_chunk = jnp.cumsum(run_rows, axis=2) - run_rows
    total = jnp.sum(run_rows, axis=2)  # [B, H, C]
    tiles = -(-total // tile)
    until = jnp.cumsum(tiles, axis=2)
    begin = (until - tiles) * tile
    run_slot = begin[:, :, None] + in_chunk

    first = jnp.where(some, run_place, -1).reshape(batch * heads * spans, chunks)
    places = _lookup(by_span, rank, first, room - ROWS)  # [B * H * spans, K, span]
    places = jnp.swapaxes(places.reshape(batch, heads * spans, picks, span // step, step), 2, 3)

    capacity = -(-(most_pairs + spans * chunks * (ROWS - 1)) // tile) + chunks
    index = jnp.arange(capacity)
    tile_chunk = jnp.sum(until[:, :, None] <= index[None, None, :, None], axis=3)
    # A block of scalar memory is the last two axes. Without the barrier XLA would lay them out again for each group of
    # heads.
    tables = lax.optimization_barrier(
        (
            places.reshape(batch, heads, -1, 1, picks * step).astype(jnp.int32),
            jnp.stack([run_rows, run_place, run_slot], axis=-1).reshape(batch, heads, spans, 1, -1).astype(jnp.int32),
            jnp.stack([begin + total, tiles * tile - total], axis=-1).reshape(batch, heads, 1, 1, -1).astype(jnp.int32),
        )
    )
    return Placement(
        *tables,
        tile_chunk=jnp.where(tile_chunk < chunks, tile_chunk, -1).astype(jnp.int32),
        chunk_begin=begin,
        chunk_end=begin + total,
        picks=picks,
        step=step,
        tile=tile,
        room=room,
        buffers=buffers,
        rows=rows,
    )


def _lookup(routes: Int[Array, "B H W K"], rank, first: Int[Array, "X C"], nobody: int) -> Int[Array, "X K W"]:
    """first[chunk] + rank for each pair that picks a chunk with first >= 0, else `nobody`; spans are B * H = X."""
    batch, spans, rows, picks = routes.shape
    lanes = min(LANES, rows)

    def tokens_last(x):
        return jnp.swapaxes(x.astype(jnp.int32), 2, 3).reshape(batch * spans, picks, rows // lanes, lanes)

    block = next(n for n in (32, 16, 8, rows // lanes) if rows // lanes % n == 0)
    spec = pl.BlockSpec((pl.squeezed, picks, block, lanes), lambda x, i: (x, 0, i, 0))
    chunks = first.shape[1]
    table = pl.BlockSpec((pl.squeezed, 1, chunks), lambda x, i: (x, 0, 0), memory_space=pltpu.SMEM)
    found = pl.pallas_call(
        functools.partial(_look_up_kernel, nobody=nobody),
        name="moc_look_up",
        out_shape=jax.ShapeDtypeStruct((batch * spans, picks, rows // lanes, lanes), jnp.int32),
        grid=(batch * spans, rows // lanes // block),
        in_specs=[table, spec, spec],
        out_specs=spec,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=2 * routes.size * chunks, transcendentals=0, bytes_accessed=3 * 4 * routes.size
        ),
    )(first.astype(jnp.int32)[:, None], tokens_last(routes), tokens_last(rank))
    return found.reshape(batch * spans, picks, rows)


def _look_up_kernel(first_smem_ref, routes_vmem_ref, rank_vmem_ref, out_vmem_ref, *, nobody: int):
    """Goes through the chunks, for some thousand pairs at a time: 2 instructions for 1024 pairs and a chunk."""
    picks, rows, _ = routes_vmem_ref.shape
    at_once = math.gcd(ROWS, rows)

    def some(i, _):
        here = pl.ds(pl.multiple_of(i * at_once, at_once), at_once)
        routes = [routes_vmem_ref[pick, here] for pick in range(picks)]

        def one_chunk(chunk, found):
            value = first_smem_ref[0, chunk]
            return tuple(jnp.where(route == chunk, value, x) for route, x in zip(routes, found, strict=True))

        found = tuple(jnp.full(route.shape, -1, jnp.int32) for route in routes)
        found = lax.fori_loop(0, first_smem_ref.shape[1], one_chunk, found, unroll=8)
        for pick, x in enumerate(found):
            out_vmem_ref[pick, here] = jnp.where(x < 0, nobody, x + rank_vmem_ref[pick, here])
        return 0

    lax.fori_loop(0, rows // at_once, some, 0)


def step_rows(rows: int, span: int) -> int:
    """Rows of a step: as many as divide all rows and a span's."""
    return math.gcd(rows, span, STEP)


def span_size(rows: int, picks: int, width: int, chunks: int, chip: Chip) -> tuple[int, int]:
    """(rows, buffers) of a span of queries whose pairs' rows have `width` 32-bit columns: what fits the chip.

    Raises:
        NotImplementedError: not even the smallest span fits, as every chunk needs up to 7 rows of padding.
    """
    row = round_up(width, LANES) * 4
    limit = chip.vmem_limit - 4 * STEP * row  # beside what else a step has

    def fitting(bytes_per_row: int) -> int:
        fit = max(0, limit // bytes_per_row - _room(0, picks, chunks)) // max(1, picks)
        steps = fit // STEP * STEP or 1 << fit.bit_length() >> 1
        return min(_MOST_SPAN, steps, round_up(rows, STEP)) if steps >= LANES else 0

    one, two = fitting(row + row // PARTS), fitting(2 * row)
    if not one:
        needed = _room(LANES, picks, chunks) * (row + row // PARTS)
        raise NotImplementedError(
            f"{chunks} chunks and top_k {picks} need {needed / 2**20:.1f} MiB of vector memory, of which TPU "
            f'{chip.name} has {limit / 2**20:.1f} to spare: take larger chunks, fewer picks, or backend="xla"'
        )
    return (two, 2) if two == one or two * picks >= _LONG_RUN * chunks else (one, 1)


def _room(span: int, picks: int, chunks: int) -> int:
    """Rows of a span's buffer: its pairs, padding, and rows for nobody's."""
    return round_up(span * picks, LANES) + round_up(chunks * (ROWS - 1), LANES) + LANES
