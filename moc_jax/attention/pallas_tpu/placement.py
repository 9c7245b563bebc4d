"""Where the (query, chunk) pairs of picks lie: sorted by chunk, without a sort.

Each head's pairs lie in *slots*, chunk after chunk, each chunk's from a whole tile on, so that a tile of slots reads
one chunk. Queries come in *spans*; a chunk's pairs of one span are a *run* of slots, rounded up to 8 rows. Prefix
counts (ranks.py) say which slot of its run a pair takes; sums over spans and chunks say where runs begin. Integer
work on [spans, chunks].

A span has two buffers, so that transfers are behind the work. Where that would leave most runs short of pairs, as
with many chunks and little vector memory, it has one and is larger: fewer slots are worth a wait per span.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax

from moc_jax.attention.layout import round_up
from moc_jax.attention.pallas_tpu.device import LANES, ROWS, Chip
from moc_jax.attention.pallas_tpu.ranks import ranks
from moc_jax.shapes import Array, Int, typed

STEP = 1024  # rows of a grid step
RUN = 3  # columns of a run: rows, place in the span, slot
PARTS = 8  # in which a single buffer's pairs leave
_MOST_SPAN = 8192
_LONG_RUN = 2 * ROWS  # pairs: runs whose padding is a fifth or less
_NOWHERE = -(2**22)  # further from 0 than any place is


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spans:
    """What kernels know of a placement when they are compiled."""

    count: int
    chunks: int
    picks: int  # K
    rows: int  # R, of queries
    steps: int  # of a span; the last span's may reach beyond the queries
    step: int  # rows of one
    room: int  # rows of a span's buffer; the last 8 are nobody's
    buffers: int  # 1 or 2

    @property
    def blocks(self) -> int:
        """Steps with queries."""
        return self.rows // self.step

    def block(self, span, step):
        """The block of queries of a step; beyond the last, the last again."""
        return jnp.minimum(span * self.steps + step, self.blocks - 1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Placement:
    """Where each pair lies."""

    places: Int[Array, "B H steps 1 _"]  # of the pairs of each step of rows, slot i's after slot i - 1's, in their span
    runs: Int[Array, "B H spans 1 _"]  # of each span and chunk: rows, place, slot
    tails: Int[Array, "B H 1 1 _"]  # of each chunk: slots behind its last run, first and count, to the end of a tile
    tile_chunk: Int[Array, "B H G"]  # the chunk of each tile; -1: unused
    chunk_begin: Int[Array, "B H C"]  # slots of each chunk's pairs
    chunk_end: Int[Array, "B H C"]
    tile: int = dataclasses.field(metadata={"static": True})  # slots of a tile
    spans: Spans = dataclasses.field(metadata={"static": True})

    @property
    def slots(self) -> int:
        """Slots of a head, used or not."""
        return self.tile_chunk.shape[2] * self.tile


@typed
def place(
    routes: Int[Array, "B H K R"],
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
    batch, heads, picks, rows = routes.shape
    chunks = lengths.shape[1]
    routes = jnp.pad(routes, ((0, 0), (0, 0), (0, 0), (0, -rows % span)), constant_values=-1)
    spans = routes.shape[3] // span
    by_span = jnp.swapaxes(routes.reshape(batch, heads, picks, spans, span), 2, 3).reshape(-1, picks, span)
    room = _room(span, picks, chunks)
    some = (lengths > 0)[:, None, None]
    _, counts = ranks(by_span, jnp.zeros((len(by_span), chunks), jnp.int32))
    run_rows = jnp.where(some, round_up(counts, ROWS).reshape(batch, heads, spans, chunks), 0)
    run_place = jnp.cumsum(run_rows, axis=3) - run_rows
    in_chunk = jnp.cumsum(run_rows, axis=2) - run_rows
    total = jnp.sum(run_rows, axis=2)  # [B, H, C]
    tiles = -(-total // tile)
    until = jnp.cumsum(tiles, axis=2)
    begin = (until - tiles) * tile
    run_slot = begin[:, :, None] + in_chunk

    # Counted again from where runs begin, ranks are places. It takes about as long as looking up what to add.
    places, _ = ranks(by_span, jnp.where(some, run_place, _NOWHERE).reshape(-1, chunks))
    places = jnp.where(places < 0, room - ROWS, places).reshape(batch, heads, spans, picks, span // step, step)
    places = jnp.swapaxes(places, 3, 4)

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
        tile=tile,
        spans=Spans(
            count=spans,
            chunks=chunks,
            picks=picks,
            rows=rows,
            steps=span // step,
            step=step,
            room=room,
            buffers=buffers,
        ),
    )


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
