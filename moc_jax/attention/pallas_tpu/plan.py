"""A scene's chunks -> the order of its queries and the tiles of the kernels. Integer work on tables of chunks.

Queries are laid out segment after segment (layout.py), each from a whole tile on (`Order`), so that no tile crosses a
segment and all of a tile's rows read the same runs of keys. Captions come first, and segments in the order of their
chunks, wherever the queries lie and however many of them a chunk has. Keys and values stay where they are: runs are
rows of memory. Rows of the order that hold no token have zeros for queries and nothing to read.

For the gradients of keys, segments are cut into tiles of keys, which walk runs of the ordered queries.

Lines of tiles: of queries over keys, tile g is block g of the queries, and its line the runs of keys. Of keys over
queries, the tile's first row (a multiple of 8), begin and end of those of its rows that are keys, the runs of queries.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moc_jax.attention.layout import (
    Cut,
    Queries,
    Tiles,
    all_read_text,
    by_shot,
    cut,
    has_anchors,
    round_up,
    run_lines,
    segments,
    text_tiles,
)
from moc_jax.attention.pallas_tpu.device import ROWS
from moc_jax.attention.pallas_tpu.placement import Placement
from moc_jax.attention.pallas_tpu.tuning import Blocks
from moc_jax.attention.runs import Runs, anchor_runs, reader_runs
from moc_jax.config import MoCConfig
from moc_jax.scene import TEXT, VIDEO, ChunkTable
from moc_jax.shapes import Array, Bool, Int

_SHARE = 24  # blocks of queries that a tile of text keys walks in one go: about as many as a shot has


class Moves(NamedTuple):
    """Runs of rows that lie elsewhere: row source + i is row target + i. Runs of no size say nothing."""

    source: Int[Array, "B _"]
    target: Int[Array, "B _"]
    size: Int[Array, "B _"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Order:
    """Where queries lie: captions first, each from a multiple of a text tile on, then video."""

    moves: Moves  # of tokens to rows
    back: Moves  # of rows to tokens
    chunk_of_row: Int[Array, "B R"]  # the first chunk of the row's segment; -1: none
    text_rows: int = dataclasses.field(metadata={"static": True})  # rows before the video's; whole tiles of video

    @property
    def rows(self) -> int:
        """R, those without a token too."""
        return self.chunk_of_row.shape[1]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OrderedTiles:
    """What the anchors' kernels walk."""

    order: Order
    text: Tiles  # queries of captions over keys
    video: Tiles  # queries of video over keys
    anchored: Bool[Array, "B R"]  # rows that have anchors
    keys: Tiles  # keys over queries
    key_moves: Moves  # from the rows of `keys` to the tokens
    anchors: bool = dataclasses.field(metadata={"static": True})  # False: nothing has any, whatever the lengths
    text_shares: int = dataclasses.field(metadata={"static": True})  # times that text's tiles of `keys` are repeated
    text_tiles: int = dataclasses.field(metadata={"static": True})  # how many of `keys` text has each time


def ordered_tiles(queries: Queries, table: ChunkTable, cfg: MoCConfig, blocks: Blocks) -> OrderedTiles:
    """The tiles of scenes under a config."""
    order, chunk_row = _order(queries, table, cfg, blocks)
    runs, readers = anchor_runs(table, cfg), reader_runs(table, cfg, chunk_row, queries.length)
    some = jnp.any(runs.begin < runs.end, axis=1)
    text, video = order.chunk_of_row[:, : order.text_rows], order.chunk_of_row[:, order.text_rows :]
    keys, key_moves, shares, tiles = _key_tiles(table, cfg, readers, order.rows, blocks)
    return OrderedTiles(
        order=order,
        text=_query_tiles(text, runs, blocks.text.queries),
        video=_query_tiles(video, runs, blocks.anchors.queries),
        anchored=(order.chunk_of_row >= 0) & jnp.take_along_axis(some, jnp.maximum(order.chunk_of_row, 0), axis=1),
        keys=keys,
        key_moves=key_moves,
        anchors=has_anchors(table, cfg),
        text_shares=shares,
        text_tiles=tiles,
    )


def key_rows(tokens: int, text_tokens: int, blocks: Blocks) -> int:
    """Rows of the arrays of keys: whole tiles of memory, and no fewer than a block or the tiles of text have."""
    return max(round_up(tokens, ROWS), blocks.most_keys, round_up(text_tokens, blocks.gradient_keys))


def pick_tiles(placement: Placement, table: ChunkTable) -> Tiles:
    """Sorted queries [B, H, slots] over the chunk that each tile picks."""
    used, of = placement.tile_chunk >= 0, jnp.maximum(placement.tile_chunk, 0)
    begin, end = (jnp.take_along_axis(x[:, None], of, axis=2) for x in (table.start, table.start + table.length))
    return Tiles(jnp.stack([jnp.where(used, begin, 0), jnp.where(used, end, 0)], axis=-1))


def reader_tiles(placement: Placement, cut: Cut) -> Tiles:
    """Chunks, cut into tiles of keys, over the sorted queries that pick them."""
    index = jnp.broadcast_to(cut.owner[:, None], (*placement.chunk_begin.shape[:2], cut.owner.shape[1]))
    begin, end = (jnp.take_along_axis(x, index, axis=2) for x in (placement.chunk_begin, placement.chunk_end))
    used = cut.used[:, None]
    lines = [jnp.broadcast_to(x[:, None], begin.shape) for x in (cut.row, cut.begin, cut.end)]
    return Tiles(jnp.stack([*lines, jnp.where(used, begin, 0), jnp.where(used, end, 0)], axis=-1))


def cut_chunks(table: ChunkTable, blocks: Blocks) -> Cut:
    """Every video chunk cut into tiles of keys."""
    video = table.kind == VIDEO
    begin, end = (jnp.where(video, x, 0) for x in (table.start, table.start + table.length))
    return _cut(table, begin, end, blocks.pick_gradient_keys, table.kind.shape[1], blocks)


def key_moves(cut: Cut, rows: int) -> Moves:
    """From the rows of all tiles, `rows` each, to the tokens."""
    first = rows * jnp.arange(cut.row.shape[1])[None]
    return Moves(first + cut.begin - cut.row, cut.begin, cut.end - cut.begin)


def _cut(table: ChunkTable, begin, end, rows: int, owners: int, blocks: Blocks) -> Cut:
    tokens = table.chunk_of.shape[1]
    last_row = key_rows(tokens, table.text_tokens, blocks) - rows
    return cut(begin, end, rows, rows=tokens, owners=min(owners, tokens), last_row=last_row)


def _most(table: ChunkTable, cfg: MoCConfig, text: int, video: int) -> tuple[int, int]:
    """The most captions and video segments that so many tokens of text and of video have."""
    chunks = table.kind.shape[1]
    shots = chunks if table.max_shots is None else table.max_shots
    return min(chunks, shots + 1, text), min(shots if by_shot(cfg) else chunks, chunks, video)


def _order(queries: Queries, table: ChunkTable, cfg: MoCConfig, blocks: Blocks) -> tuple[Order, Int[Array, "B C"]]:
    """The order, and the row of each chunk's first query."""
    text, video = queries.text_tokens, queries.chunk_of.shape[1] - queries.first_video
    captions, shots = _most(table, cfg, text, video)
    step = blocks.text.queries
    text_rows = round_up(text + captions * (step - 1), blocks.align)
    rows = text_rows + round_up(video + shots * (blocks.align - 1), blocks.align)
    lead, begin, end = segments(queries, table, cfg)
    size, first = end - begin, jnp.zeros_like(begin)
    for kind, align, offset in ((TEXT, step, 0), (VIDEO, blocks.align, text_rows)):
        room = jnp.where(table.kind == kind, round_up(size, align), 0)
        first = jnp.where(table.kind == kind, offset + jnp.cumsum(room, axis=1) - room, first)
    chunk_row = queries.start + jnp.take_along_axis(first - begin, lead, axis=1)

    # Segments start at whole tiles, so finding the segment of each tile is enough.
    tile = jnp.arange(0, rows, step)[None, None]
    here = (first[..., None] <= tile) & (tile < (first + round_up(size, step))[..., None])  # [B, C, tiles]
    segment = jnp.argmax(here, axis=1)
    there = jnp.repeat(jnp.any(here, axis=1), step, axis=1)
    first_of, size_of = (jnp.repeat(jnp.take_along_axis(x, segment, axis=1), step, axis=1) for x in (first, size))
    there &= jnp.arange(rows)[None] - first_of < size_of
    of_row = jnp.where(there, jnp.repeat(segment, step, axis=1), -1).astype(jnp.int32)
    return Order(Moves(begin, first, size), Moves(first, begin, size), of_row, text_rows), chunk_row


def _query_tiles(chunk_of_row: Int[Array, "B R"], runs: Runs, size: int) -> Tiles:
    """Tiles of `size` rows over the runs of the segment that each tile's first row is of."""
    lead = chunk_of_row[:, ::size]
    return Tiles(run_lines(runs, jnp.maximum(lead, 0), lead >= 0)[:, None])


def _key_tiles(table: ChunkTable, cfg: MoCConfig, readers: Runs, query_rows: int, blocks: Blocks):
    """(tiles, moves of their rows to tokens, times that text's tiles are repeated, number of them)."""
    rows, tokens = blocks.gradient_keys, table.chunk_of.shape[1]
    own = segments(table, table, cfg)
    captions, shots = _most(table, cfg, table.text_tokens, tokens - table.text_tokens)

    def of_segments(end, owners):
        tiles = _cut(table, own.begin, end, rows, owners, blocks)
        return tiles, _lines(tiles.row, tiles.begin, tiles.end, run_lines(readers, tiles.owner, tiles.used))

    if not all_read_text(table, cfg):
        tiles, lines = of_segments(own.end, captions + shots)
        return Tiles(lines[:, None]), key_moves(tiles, rows), 0, 0
    count, block = -(-table.text_tokens // rows), blocks.anchor_gradients.block
    repeats = -(-query_rows // (_SHARE * block))
    first, text_end, shares = text_tiles(readers, table, rows, repeats, query_rows, block)
    first = jnp.broadcast_to(first, shares.shape[:2])
    of_text = _lines(first, first, jnp.minimum(text_end, first + rows), shares)
    tiles, of_video = of_segments(jnp.where(table.kind == TEXT, own.begin, own.end), shots)
    text, video = first[:, :count], key_moves(tiles, rows)
    text_moves = Moves(text, text, jnp.clip(text_end - text, 0, rows))
    video = video._replace(source=video.source + repeats * count * rows)
    moves = Moves(*(jnp.concatenate(pair, axis=1) for pair in zip(text_moves, video, strict=True)))
    return Tiles(jnp.concatenate([of_text, of_video], axis=1)[:, None]), moves, repeats, count


def _lines(row, begin, end, runs: Int[Array, "B G W"]) -> Int[Array, "B G _"]:
    return jnp.concatenate([jnp.stack([row, begin, end], axis=-1), runs], axis=-1).astype(jnp.int32)
