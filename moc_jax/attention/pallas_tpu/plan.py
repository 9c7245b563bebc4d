"""A scene's chunks -> the order of its queries and the tiles of the kernels. Integer work on tables of chunks.

Tokens that share their anchors form a *segment*: each caption, and each shot where the own shot is an anchor, else each
chunk. Queries are laid out segment after segment, each from a whole tile on (`Order`), so that no tile crosses a
segment and all of a tile's rows read the same runs of keys. Captions come first, and segments in the order of their
chunks, wherever the queries lie and however many of them a chunk has. Keys and values stay where they are: runs are
rows of memory. Rows of the order that hold no token have zeros for queries and nothing to read.

For the gradients of keys, segments are cut into tiles of keys, which walk runs of the ordered queries.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moc_jax.attention.layout import Queries
from moc_jax.attention.pallas_tpu.device import ROWS
from moc_jax.attention.pallas_tpu.placement import Placement
from moc_jax.attention.pallas_tpu.tiles import Tiles
from moc_jax.attention.pallas_tpu.tuning import Blocks
from moc_jax.attention.runs import Runs, anchor_runs, reader_runs
from moc_jax.config import MoCConfig
from moc_jax.scene import TEXT, VIDEO, ChunkTable
from moc_jax.shapes import Array, Bool, Int

_PART = 24  # blocks of queries that a tile of text keys walks in one go: about as many as a shot has


class Moves(NamedTuple):
    """Runs of rows that lie elsewhere: row source + i is row target + i. Runs of no size say nothing."""

    source: Int[Array, "B S"]
    target: Int[Array, "B S"]
    size: Int[Array, "B S"]

    def by_target(self) -> "Moves":
        """With targets that ascend."""
        order = jnp.argsort(jnp.where(self.size > 0, self.target, jnp.iinfo(jnp.int32).max), axis=1)
        return Moves(*(jnp.take_along_axis(x, order, axis=1) for x in self))


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
        return self.chunk_of_row.shape[1]


class Cut(NamedTuple):
    """Runs of memory cut into tiles of keys."""

    owner: Int[Array, "B G"]  # whose each tile is; unused tiles: 0
    row: Int[Array, "B G"]  # first row of memory, a multiple of 8
    begin: Int[Array, "B G"]  # keys of the tile: rows [begin, end) of memory; none if unused
    end: Int[Array, "B G"]

    def moves(self, rows: int) -> Moves:
        """From the rows of all tiles to the tokens, which ascend."""
        first = rows * jnp.arange(self.row.shape[1])[None]
        return Moves(first + self.begin - self.row, self.begin, self.end - self.begin).by_target()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """What the anchors' kernels walk."""

    order: Order
    text: Tiles  # queries of captions over keys
    video: Tiles  # queries of video over keys
    anchored: Bool[Array, "B R"]  # rows that have anchors
    keys: Tiles  # keys over queries
    key_moves: Moves  # from the rows of `keys` to the tokens
    anchors: bool = dataclasses.field(metadata={"static": True})  # False: nothing has any, whatever the lengths
    text_parts: int = dataclasses.field(metadata={"static": True})  # times that the first tile of text is repeated
    text_tiles: int = dataclasses.field(metadata={"static": True})  # how many of `keys` text has each time


def plan(queries: Queries, table: ChunkTable, cfg: MoCConfig, blocks: Blocks) -> Plan:
    """The tiles of scenes under a config."""
    lead = _leads(table, by_shot(cfg))
    order, chunk_row = _order(queries, table, lead, by_shot(cfg), blocks)
    runs = anchor_runs(table, cfg)
    some = jnp.any(runs.begin < runs.end, axis=1)
    any_anchors = cfg.mode == "dense" or cfg.self_anchor != "none" or table.text_tokens > 0 or cfg.top_k == 0
    text, video = slice(0, order.text_rows), slice(order.text_rows, None)
    readers = reader_runs(table, cfg, chunk_row, queries.length)
    keys, key_moves, parts, tiles = _key_tiles(table, cfg, *_extent(lead, table), readers, order.rows, blocks)
    return Plan(
        order=order,
        text=_query_tiles(order.chunk_of_row[:, text], runs, blocks.text_queries),
        video=_query_tiles(order.chunk_of_row[:, video], runs, blocks.queries),
        anchored=(order.chunk_of_row >= 0) & jnp.take_along_axis(some, jnp.maximum(order.chunk_of_row, 0), axis=1),
        keys=keys,
        key_moves=key_moves,
        anchors=any_anchors,
        text_parts=parts,
        text_tiles=tiles,
    )


def key_rows(tokens: int, text_tokens: int, blocks: Blocks) -> int:
    """Rows of the arrays of keys: whole tiles of memory, and no fewer than a block or the tiles of text have."""
    return max(_up(tokens, ROWS), blocks.most_keys, _up(text_tokens, blocks.gradient_keys))


def by_shot(cfg: MoCConfig) -> bool:
    """Whether the video queries of a shot share their anchors."""
    return cfg.mode == "dense" or cfg.self_anchor in ("shot", "none")


def pick_tiles(placement: Placement, table: ChunkTable) -> Tiles:
    """Sorted queries [B, H, slots] over the chunk that each tile picks."""
    used, of = placement.tile_chunk >= 0, jnp.maximum(placement.tile_chunk, 0)
    begin, end = (jnp.take_along_axis(x[:, None], of, axis=2) for x in (table.start, table.start + table.length))
    return Tiles(jnp.stack([jnp.where(used, begin, 0), jnp.where(used, end, 0)], axis=-1))


def reader_tiles(placement: Placement, cut: Cut) -> Tiles:
    """Chunks, cut into tiles of keys, over the sorted queries that pick them."""
    index = jnp.broadcast_to(cut.owner[:, None], (*placement.chunk_begin.shape[:2], cut.owner.shape[1]))
    begin, end = (jnp.take_along_axis(x, index, axis=2) for x in (placement.chunk_begin, placement.chunk_end))
    used = (cut.begin < cut.end)[:, None]
    lines = [jnp.broadcast_to(x[:, None], begin.shape) for x in (cut.row, cut.begin, cut.end)]
    return Tiles(jnp.stack([*lines, jnp.where(used, begin, 0), jnp.where(used, end, 0)], axis=-1))


def cut_chunks(table: ChunkTable, blocks: Blocks) -> Cut:
    """Every video chunk cut into tiles of keys."""
    rows, tokens = blocks.pick_gradient_keys, table.chunk_of.shape[1]
    video = table.kind == VIDEO
    begin, end = (jnp.where(video, x, 0) for x in (table.start, table.start + table.length))
    last = key_rows(tokens, table.text_tokens, blocks) - rows
    return _cut(begin, end, tokens, rows, min(table.kind.shape[1], tokens), last)


def _leads(table: ChunkTable, by_shot: bool) -> Int[Array, "B C"]:
    """The first chunk of each chunk's segment."""
    index = jnp.broadcast_to(jnp.arange(table.kind.shape[1])[None], table.kind.shape)
    if not by_shot:
        return index
    video = table.kind == VIDEO
    follows = video[:, 1:] & video[:, :-1] & (table.shot[:, 1:] == table.shot[:, :-1])
    return lax.cummax(jnp.where(jnp.pad(follows, ((0, 0), (1, 0))), 0, index), axis=1)


def _extent(lead: Int[Array, "B C"], tokens: ChunkTable | Queries) -> tuple[Int[Array, "B C"], Int[Array, "B C"]]:
    """For first chunks of segments, where the segment's keys, or its queries, begin and end."""
    there = (lead[:, None, :] == jnp.arange(lead.shape[1])[None, :, None]) & (tokens.length > 0)[:, None, :]
    begin = jnp.min(jnp.where(there, tokens.start[:, None], jnp.iinfo(jnp.int32).max), axis=-1)
    end = jnp.max(jnp.where(there, (tokens.start + tokens.length)[:, None], 0), axis=-1)
    return jnp.minimum(begin, end), end


def _most(table: ChunkTable, by_shot: bool, text: int, video: int) -> tuple[int, int]:
    """The most captions and video segments that so many tokens of text and of video have."""
    chunks = table.kind.shape[1]
    shots = chunks if table.max_shots is None else table.max_shots
    return min(chunks, shots + 1, text), min(shots if by_shot else chunks, chunks, video)


def _order(queries: Queries, table: ChunkTable, lead, by_shot: bool, blocks: Blocks):
    """The order, and the row of each chunk's first query."""
    text, video = queries.text_tokens, queries.chunk_of.shape[1] - queries.first_video
    captions, segments = _most(table, by_shot, text, video)
    text_rows = _up(text + captions * (blocks.text_queries - 1), blocks.align)
    rows = text_rows + _up(video + segments * (blocks.align - 1), blocks.align)
    begin, end = _extent(lead, queries)
    size, first = end - begin, jnp.zeros_like(begin)
    for kind, align, offset in ((TEXT, blocks.text_queries, 0), (VIDEO, blocks.align, text_rows)):
        room = jnp.where(table.kind == kind, _up(size, align), 0)
        first = jnp.where(table.kind == kind, offset + jnp.cumsum(room, axis=1) - room, first)
    chunk_row = queries.start + jnp.take_along_axis(first - begin, lead, axis=1)

    # Segments start at whole tiles, so finding the segment of each tile is enough.
    step = blocks.text_queries
    tile = jnp.arange(0, rows, step)[None, None]
    here = (first[..., None] <= tile) & (tile < (first + _up(size, step))[..., None])  # [B, C, tiles]
    segment = jnp.argmax(here, axis=1)
    there = jnp.repeat(jnp.any(here, axis=1), step, axis=1)
    first_of, size_of = (jnp.repeat(jnp.take_along_axis(x, segment, axis=1), step, axis=1) for x in (first, size))
    there &= jnp.arange(rows)[None] - first_of < size_of
    parts = [(begin, first, jnp.where(table.kind == kind, size, 0)) for kind in (TEXT, VIDEO)]
    moves = Moves(*(jnp.concatenate(x, axis=1) for x in zip(*parts, strict=True)))
    of_row = jnp.where(there, jnp.repeat(segment, step, axis=1), -1).astype(jnp.int32)
    return Order(moves, Moves(moves.target, moves.source, moves.size).by_target(), of_row, text_rows), chunk_row


def _query_tiles(chunk_of_row: Int[Array, "B R"], runs: Runs, size: int) -> Tiles:
    """Tiles of `size` rows over the runs of the segment that each tile's first row is of."""
    lead = chunk_of_row[:, ::size]
    index = jnp.broadcast_to(jnp.maximum(lead, 0)[:, None], (*runs.begin.shape[:2], lead.shape[1]))
    begin, end = (jnp.where(lead[:, None] >= 0, jnp.take_along_axis(x, index, axis=2), 0) for x in runs)
    lines = jnp.stack([begin, end], axis=-1)  # [B, R, G, 2]
    return Tiles(jnp.moveaxis(lines, 1, 2).reshape(*lead.shape, 2 * lines.shape[1])[:, None])


def _key_tiles(table: ChunkTable, cfg: MoCConfig, begin, end, readers: Runs, query_rows: int, blocks: Blocks):
    """(tiles, moves of their rows to tokens, times that text's tiles are repeated, number of them)."""
    tokens, rows = table.chunk_of.shape[1], blocks.gradient_keys
    captions, segments = _most(table, by_shot(cfg), table.text_tokens, tokens - table.text_tokens)
    last_row = key_rows(table.chunk_of.shape[1], table.text_tokens, blocks) - blocks.gradient_keys
    all_alike = cfg.visibility == "scene" and (cfg.mode == "dense" or cfg.text_anchor == "all")
    if not all_alike or table.text_tokens == 0:
        cut = _cut(begin, end, tokens, rows, captions + segments, last_row)
        return Tiles(_lines(cut, readers)[:, None]), cut.moves(rows), 0, 0

    # Keys of text that all read have more readers than any others by far: their tiles come in parts, each with its
    # share of the readers, so that all tiles take about as many steps.
    is_text = table.kind == TEXT
    text_end = jnp.max(jnp.where(is_text, table.start + table.length, 0), axis=1)
    count = -(-table.text_tokens // rows)
    parts = -(-query_rows // (_PART * blocks.gradient_queries))
    text = _text_lines(readers, is_text, text_end, parts, count, query_rows, blocks)
    cut = _cut(begin, jnp.where(is_text, begin, end), tokens, rows, segments, last_row)
    of_text, of_video = rows * jnp.arange(count)[None], cut.moves(rows)
    of_text = Moves(of_text, of_text, jnp.clip(text_end[:, None] - of_text, 0, rows))
    of_video = of_video._replace(source=of_video.source + parts * count * rows)
    moves = [jnp.concatenate([jnp.broadcast_to(x, of_text.size.shape), y], axis=1) for x, y in zip(of_text, of_video)]
    return Tiles(jnp.concatenate([text, _lines(cut, readers)], axis=1)[:, None]), Moves(*moves), parts, count


def _text_lines(readers: Runs, is_text, text_end, parts: int, count: int, rows: int, blocks: Blocks):
    """The tiles of all text, `parts` times: part 0 has the text's readers, each its share of the video's."""
    # All captions have the same readers, so the union over them is each one's own.
    here = is_text[:, None] & (readers.begin < readers.end)
    end = jnp.max(jnp.where(here, readers.end, 0), axis=2)  # [B, 2]
    begin = jnp.minimum(jnp.min(jnp.where(here, readers.begin, rows), axis=2), end)  # no readers: an empty run at 0
    share = _up(-(-rows // parts), blocks.gradient_queries)
    part = jnp.arange(parts)[None]
    video = jnp.maximum(begin[:, 1:], part * share), jnp.minimum(end[:, 1:], (part + 1) * share)
    text = jnp.broadcast_to(begin[:, :1], video[0].shape), jnp.where(part == 0, end[:, :1], 0)
    row = jnp.tile(jnp.arange(count) * blocks.gradient_keys, parts)[None]
    until = jnp.minimum(text_end[:, None], row + blocks.gradient_keys)
    runs = [jnp.repeat(x, count, axis=1) for x in (*text, *video)]
    begin_end = [jnp.broadcast_to(x, until.shape) for x in (row, row, until)]
    return jnp.stack([*begin_end, *runs], axis=-1)


def _lines(cut: Cut, readers: Runs):
    """Lines of tiles of keys [B, G, 3 + 2 R]."""
    index = jnp.broadcast_to(cut.owner[:, None], (*readers.begin.shape[:2], cut.owner.shape[1]))
    used = (cut.begin < cut.end)[:, None]
    runs = jnp.stack([jnp.where(used, jnp.take_along_axis(x, index, axis=2), 0) for x in readers], axis=-1)
    runs = jnp.moveaxis(runs, 1, 2).reshape(*cut.owner.shape, -1)
    return jnp.concatenate([jnp.stack([cut.row, cut.begin, cut.end], axis=-1), runs], axis=-1)


def _cut(begin, end, tokens: int, rows: int, most: int, last_row: int) -> Cut:
    """Tiles of `rows` rows for the runs [begin, end) of each owner, at most `most` of which are not empty.

    No tile starts after `last_row`: one that would starts there, and its keys are its last rows.
    """
    first = begin // ROWS * ROWS
    counts = jnp.where(begin < end, -(-(end - first) // rows), 0)
    ends = jnp.cumsum(counts, axis=1)
    capacity = (tokens + most * (rows + ROWS - 2)) // rows
    tile = jnp.arange(capacity)
    owner = jnp.sum(ends[:, None, :] <= tile[None, :, None], axis=-1)
    used = owner < begin.shape[1]
    owner = jnp.where(used, owner, 0)
    first_here, before_here, begin_here, end_here = (
        jnp.take_along_axis(x, owner, axis=1) for x in (first, ends - counts, begin, end)
    )
    row = first_here + rows * (tile[None] - before_here)
    return Cut(
        owner,
        jnp.where(used, jnp.minimum(row, last_row), 0),
        jnp.where(used, jnp.maximum(begin_here, row), 0),
        jnp.where(used, jnp.minimum(end_here, row + rows), 0),
    )


def _up(x, unit: int):
    return -(-x // unit) * unit
