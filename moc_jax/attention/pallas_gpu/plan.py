"""A scene's chunks -> the tiles of the kernels. Integer work on tables of chunks; nothing here touches q, k or v.

Tokens that share their anchors form a *segment*: with the own shot as anchor, a shot; else a chunk. A tile never
crosses a segment, so all of its rows read the same runs and only a run's edges need masks. A segment's first tile
starts at the multiple of 8 at or before its first token, and the array's last tile ends with the array.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moc_jax.attention.pallas_gpu.tiles import ALIGN, TILE, Tiles
from moc_jax.attention.runs import Runs, anchor_runs, reader_runs
from moc_jax.attention.schedule import Schedule
from moc_jax.config import MoCConfig
from moc_jax.scene import TEXT, VIDEO, ChunkTable
from moc_jax.shapes import Array, Bool, Int

_PART = 2048  # readers of a tile of text in one go: text is read by everyone, and tiles should take equally long
_MOST_PARTS = 16  # each costs memory for its share of the gradients


class Cut(NamedTuple):
    """Segments cut into tiles."""

    segment: Int[Array, "B G"]  # of each tile; unused tiles: 0
    start: Int[Array, "B G"]  # first row of each tile; -1: unused
    row_of_token: Int[Array, "B N"]  # where a token's row lies among the rows of all tiles; 0 if in none


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """What the anchors' kernels walk, and where tokens lie in the rows that they write."""

    queries: Tiles  # over keys
    query_row: Int[Array, "B N"]
    anchored: Bool[Array, "B N"]  # queries that have anchors
    keys: Tiles  # over queries
    key_row: Int[Array, "B N"]
    chunks: Cut  # all chunks cut into tiles, for picks
    anchors: bool = dataclasses.field(metadata={"static": True})  # False: nothing has any, whatever the lengths
    text_tokens: int = dataclasses.field(metadata={"static": True})
    text_parts: int = dataclasses.field(metadata={"static": True})  # times that the tiles of text keys are repeated
    text_tiles: int = dataclasses.field(metadata={"static": True})  # how many of `keys` they are each time


def plan(table: ChunkTable, cfg: MoCConfig) -> Plan:
    """The tiles of scenes whose tokens are a multiple of 8, at least a tile's, and at least the text's tiles'."""
    rows = table.chunk_of.shape[1]
    by_shot = cfg.mode == "dense" or cfg.self_anchor in ("shot", "none")
    lead, begin, end = _segments(table, by_shot)
    of = jnp.where(table.valid, jnp.take_along_axis(lead, jnp.maximum(table.chunk_of, 0), axis=1), -1)
    chunks = _cut(table.start, table.start + table.length, table.chunk_of, rows)

    cut = _cut(begin, end, of, rows)
    runs = anchor_runs(table, cfg)
    some = jnp.any(runs.begin < runs.end, axis=1)  # [B, C]
    anchored = jnp.take_along_axis(some, jnp.maximum(of, 0), axis=1) & (of >= 0)
    # The kernels over keys want at least one; a query without anchors needs no tile.
    start = jnp.where(jnp.take_along_axis(some, cut.segment, axis=1), cut.start, -1)
    queries = Tiles(_table(start, *_of_segments(runs, cut))[:, None])
    any_anchors = cfg.mode == "dense" or cfg.self_anchor != "none" or table.text_tokens > 0 or cfg.top_k == 0
    whole = functools.partial(
        Plan,
        queries,
        cut.row_of_token,
        anchored,
        chunks=chunks,
        anchors=any_anchors,
        text_tokens=table.text_tokens,
    )

    # Keys of text that all read have more readers than any others by far: their tiles come in parts, each with its
    # share of the readers, and first, so that no thread block is left with one at the end.
    readers = reader_runs(table, cfg)
    all_alike = cfg.visibility == "scene" and (cfg.mode == "dense" or cfg.text_anchor == "all")
    if not all_alike or table.text_tokens == 0:
        keys = Tiles(_table(cut.start, *_of_segments(readers, cut))[:, None])
        return whole(keys=keys, key_row=cut.row_of_token, text_parts=0, text_tiles=0)
    parts, count = min(-(-rows // _PART), _MOST_PARTS), -(-table.text_tokens // TILE)
    is_text = table.kind == TEXT
    text_end = jnp.max(jnp.where(is_text, table.start + table.length, 0), axis=1)
    text = _text_table(readers, is_text, text_end, parts, count, rows)
    cut = _cut(begin, jnp.where(is_text, begin, end), of, rows)
    table_ = _table(cut.start, *_of_segments(readers, cut))
    token = jnp.arange(rows)[None]
    return whole(
        keys=Tiles(jnp.concatenate([text, table_], axis=1)[:, None]),
        key_row=jnp.where(token < text_end[:, None], token, cut.row_of_token + parts * count * TILE),
        text_parts=parts,
        text_tiles=count,
    )


def pick_tiles(schedule: Schedule, table: ChunkTable) -> Tiles:
    """Sorted queries [B, H, slots] over the chunk that each tile picks."""
    begin, end = (
        jnp.take_along_axis(x[:, None], schedule.tile_chunk, axis=2) for x in (table.start, table.start + table.length)
    )
    first = jnp.arange(begin.shape[2], dtype=jnp.int32) * TILE
    start = jnp.where(schedule.pair_of_slot[..., 0] >= 0, first[None, None], -1)
    return Tiles(jnp.stack([start, begin, end], axis=-1).astype(jnp.int32))


def reader_tiles(schedule: Schedule, chunks: Cut) -> Tiles:
    """Chunks over the sorted queries that pick them."""
    index = jnp.broadcast_to(chunks.segment[:, None], (*schedule.chunk_begin.shape[:2], chunks.segment.shape[1]))
    begin, end = (jnp.take_along_axis(x, index, axis=2) for x in (schedule.chunk_begin, schedule.chunk_end))
    start = jnp.broadcast_to(chunks.start[:, None], begin.shape)
    return Tiles(jnp.stack([start, begin, end], axis=-1).astype(jnp.int32))


def _segments(table: ChunkTable, by_shot: bool):
    """The first chunk of each chunk's segment, and for first chunks where their segment begins and ends."""
    batch, chunks = table.kind.shape
    index = jnp.broadcast_to(jnp.arange(chunks)[None], (batch, chunks))
    lead = index
    if by_shot:
        video = table.kind == VIDEO
        follows = video[:, 1:] & video[:, :-1] & (table.shot[:, 1:] == table.shot[:, :-1])
        lead = lax.cummax(jnp.where(jnp.pad(follows, ((0, 0), (1, 0))), 0, index), axis=1)
    member = (lead[:, None, :] == index[:, :, None]) & (table.length > 0)[:, None, :]
    far = table.chunk_of.shape[1]
    begin = jnp.min(jnp.where(member, table.start[:, None], far), axis=-1)
    end = jnp.max(jnp.where(member, (table.start + table.length)[:, None], 0), axis=-1)
    return lead, jnp.minimum(begin, end), end


def _cut(begin, end, segment_of_token, rows: int) -> Cut:
    """Tiles for segments [begin, end), in their order. The capacity is static: all tokens, and two edges each."""
    segments, tokens = begin.shape[1], segment_of_token.shape[1]
    first = begin - begin % ALIGN
    counts = jnp.where(begin < end, -(-(end - first) // TILE), 0)
    ends = jnp.cumsum(counts, axis=1)
    before = ends - counts
    capacity = (tokens + segments * (TILE + ALIGN - 2)) // TILE
    tile = jnp.arange(capacity)
    segment = jnp.sum(ends[:, None, :] <= tile[None, :, None], axis=-1, dtype=jnp.int32)
    used = segment < segments
    segment = jnp.where(used, segment, 0)
    first_here, before_here = (jnp.take_along_axis(x, segment, axis=1) for x in (first, before))
    start = jnp.minimum(first_here + TILE * (tile[None] - before_here), rows - TILE)

    of = jnp.maximum(segment_of_token, 0)
    token = jnp.arange(tokens)[None]
    first_of, before_of = (jnp.take_along_axis(x, of, axis=1) for x in (first, before))
    inside = (token - first_of) // TILE
    its_start = jnp.minimum(first_of + inside * TILE, rows - TILE)
    row = (before_of + inside) * TILE + token - its_start
    there = (segment_of_token >= 0) & (token < jnp.take_along_axis(end, of, axis=1))
    return Cut(segment, jnp.where(used, start, -1).astype(jnp.int32), jnp.where(there, row, 0).astype(jnp.int32))


def _of_segments(runs: Runs, cut: Cut):
    """Begin and end of each tile's runs [B, R, G]."""
    index = jnp.broadcast_to(cut.segment[:, None], (*runs.begin.shape[:2], cut.segment.shape[1]))
    return tuple(jnp.take_along_axis(x, index, axis=2) for x in runs)


def _text_table(readers: Runs, is_text, text_end, parts: int, count: int, rows: int) -> Int[Array, "B G W"]:
    """The tiles of all text as keys, `parts` times: part 0 has the text's readers, each its share of the video's."""
    # All captions have the same readers, so the union over them is each one's own.
    begin = jnp.min(jnp.where(is_text[:, None], readers.begin, rows), axis=2)  # [B, 2]
    end = jnp.max(jnp.where(is_text[:, None], readers.end, 0), axis=2)
    part = jnp.arange(parts)[None]
    share = -(-rows // parts // ALIGN) * ALIGN
    video = jnp.maximum(begin[:, 1:], part * share), jnp.minimum(end[:, 1:], (part + 1) * share)
    text = jnp.broadcast_to(begin[:, :1], video[0].shape), jnp.where(part == 0, end[:, :1], 0)
    begin, end = (jnp.repeat(jnp.stack(pair, axis=1), count, axis=2) for pair in zip(text, video, strict=True))
    first = jnp.tile(jnp.arange(count) * TILE, parts)[None]
    return _table(jnp.where(first < text_end[:, None], first, -1), begin, end)


def _table(start, begin, end) -> Int[Array, "B G W"]:
    runs = jnp.stack([begin, end], axis=-1)  # [B, R, G, 2]
    runs = jnp.moveaxis(runs, 1, 2).reshape(*start.shape, -1)
    return jnp.concatenate([start[..., None], runs], axis=-1).astype(jnp.int32)
