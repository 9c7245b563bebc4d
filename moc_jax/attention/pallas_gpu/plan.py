"""A scene's chunks -> the tiles of the kernels. Integer work on tables of chunks; nothing here touches q, k or v.

A tile is 128 rows of queries (or of keys, for their gradients) in memory order and never crosses a segment
(layout.py), so all of its rows read the same runs and only a run's edges need masks. A segment's first tile starts at
the multiple of 8 at or before its first row, and the array's last tile ends with the array.

What a row computes follows from its runs alone: where its tile starts decides no sum. Runs of keys are cut into blocks
from the run's own first row on, and tiles of keys add to dq in their order, so a query's output and dq are the same
bits whatever other queries there are. What keys sum over queries (dk, dv) follows the order of the queries, and so how
they are sliced.

Tiles of keys with the same readers are a *group*. The groups before a tile's own that read a block of 64 queries, and
its place in its group, are how many tiles add to the block's dq before it.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moc_jax.attention.layout import (
    ALIGN,
    Cut,
    Queries,
    Tiles,
    all_read_text,
    cut,
    has_anchors,
    round_up,
    run_lines,
    running_sum,
    segments,
    text_tiles,
)
from moc_jax.attention.pallas_gpu.device import Hopper
from moc_jax.attention.pallas_gpu.ranks import MOST_CHUNKS, ranks
from moc_jax.attention.pallas_gpu.tiles import ROWS, TILE, deal
from moc_jax.attention.runs import anchor_runs, reader_runs
from moc_jax.attention.schedule import group_by_chunk, tile_capacity
from moc_jax.config import MoCConfig
from moc_jax.scene import TEXT, VIDEO, ChunkTable
from moc_jax.shapes import Array, Bool, Int

_MOST_SHARES = 16  # of text's keys: each costs memory for its share of the gradients


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AnchorTiles:
    """What the anchors' kernels walk, and where tokens lie in the rows that they write."""

    queries: Tiles  # over keys
    query_row: Int[Array, "B Q"]
    anchored: Bool[Array, "B Q"]  # queries that have anchors
    keys: Tiles  # over queries
    key_row: Int[Array, "B N"]
    earlier: Int[Array, "B G M"]  # tiles of the groups before each that read each block of dq
    d_q_row: Int[Array, "B Q"]
    text_tokens: int = dataclasses.field(metadata={"static": True})
    text_shares: int = dataclasses.field(metadata={"static": True})  # times that the tiles of text's keys are repeated

    @property
    def text_tiles(self) -> int:
        """How many of `keys` are text's each time."""
        return -(-self.text_tokens // TILE)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PickTiles:
    """What the picks' kernels walk: each head its own."""

    query_of_slot: Int[Array, "B H S"]  # 0: an empty slot
    slot_of_pair: Int[Array, "B K Q H"]  # -1: the pair picks nothing
    queries: Tiles  # sorted queries over the chunk that each tile picks
    keys: Tiles  # chunks over the sorted queries that pick them
    key_row: Int[Array, "B N"]


def anchor_tiles(
    queries: Queries, table: ChunkTable, cfg: MoCConfig, heads: int, backend: Hopper
) -> AnchorTiles | None:
    """The anchors' tiles; None if nothing has any, whatever the lengths.

    Rows of queries and tokens are multiples of 8, at least a tile's, and the tokens at least the text's tiles'.
    """
    if not has_anchors(table, cfg):
        return None
    rows, tokens = queries.chunk_of.shape[1], table.chunk_of.shape[1]
    runs, readers = anchor_runs(table, cfg), reader_runs(table, cfg, queries.start, queries.length)
    some = jnp.any(runs.begin < runs.end, axis=1)  # [B, C]
    own = segments(queries, table, cfg)
    of, tiles = own.of(queries), _cut(own.begin, own.end, rows)
    # The kernels over keys want at least one; a query without anchors needs no tile.
    used = tiles.used & jnp.take_along_axis(some, tiles.owner, axis=1)
    query_tiles = _lines(tiles.row, used, run_lines(runs, tiles.owner, used))
    steps = [-(-(runs.end[:, i] - runs.begin[:, i]) // backend.tiles.forward.block) for i in range(runs.end.shape[1])]
    steps = jnp.where(used, jnp.take_along_axis(functools.reduce(jnp.add, steps), tiles.owner, axis=1), 0)
    dealt = deal(steps, tokens // (4 * backend.tiles.forward.block), heads, backend.thread_blocks)
    query_row = _row_of_token(own.begin, own.end, tiles, of)
    anchored = (of >= 0) & jnp.take_along_axis(some, jnp.maximum(of, 0), axis=1)

    own, text_end = segments(table, table, cfg), jnp.zeros((table.kind.shape[0], 1), jnp.int32)
    of, copies, lines, groups, sizes = own.of(table), 0, [], [], []
    if all_read_text(table, cfg):  # first, so that no thread block is left with a tile of text at the end
        copies = min(-(-rows // backend.tiles.text_readers), _MOST_SHARES)
        first, text_end, shares = text_tiles(readers, table, TILE, copies, rows, ROWS)
        count = first.shape[1] // copies
        share, place = jnp.divmod(jnp.arange(first.shape[1])[None], count)
        lines = [_lines(first, first < text_end, shares, share, place, 0, text_end)]
        groups, sizes = [shares[:, ::count]], [jnp.broadcast_to(-(-text_end // TILE), (len(text_end), copies))]
        own = own._replace(end=jnp.where(table.kind == TEXT, own.begin, own.end))
    tiles = _cut(own.begin, own.end, tokens)
    runs, of_group = run_lines(readers, tiles.owner, tiles.used), (tiles.owner + copies, _places(tiles))
    lines.append(_lines(tiles.row, tiles.used, runs, *of_group, tiles.begin, tiles.end))
    every = jnp.broadcast_to(jnp.arange(own.begin.shape[1])[None], own.begin.shape)
    groups.append(run_lines(readers, every, own.begin < own.end))
    sizes.append(jnp.diff(tiles.before, axis=1, append=jnp.sum(tiles.used, axis=1, keepdims=True)))
    blocks = round_up(rows, ROWS) // ROWS + 1
    earlier = _earlier(jnp.concatenate(groups, axis=1), jnp.concatenate(sizes, axis=1), blocks)
    video = jnp.take_along_axis(table.kind, jnp.maximum(queries.chunk_of, 0), axis=1) == VIDEO
    token, before = jnp.arange(tokens)[None], sum(x.shape[1] for x in lines[:-1]) * TILE
    return AnchorTiles(
        queries=Tiles(query_tiles[:, None], dealt),
        query_row=query_row,
        anchored=anchored,
        keys=Tiles(jnp.concatenate(lines, axis=1)[:, None]),
        key_row=jnp.where(token < text_end, token, _row_of_token(own.begin, own.end, tiles, of) + before),
        earlier=earlier,
        d_q_row=jnp.arange(rows)[None] + jnp.where(video, ROWS, 0),
        text_tokens=table.text_tokens,
        text_shares=copies,
    )


def _earlier(runs: Int[Array, "B G 4"], sizes: Int[Array, "B G"], blocks: int) -> Int[Array, "B G M"]:
    """How many tiles of the groups before each read each block of dq, where the second runs' blocks lie one further."""
    begin, end = (runs[..., i::2, None] for i in range(2))
    block = (jnp.arange(blocks)[None] - jnp.arange(2)[:, None])[None, None]
    read = (begin < end) & (begin < (block + 1) * ROWS) & (block * ROWS < end)
    tiles = jnp.where(jnp.any(read, axis=2), sizes[..., None], 0)
    return jnp.cumsum(tiles, axis=1, dtype=jnp.int32) - tiles


def _places(tiles: Cut) -> Int[Array, "B G"]:
    """Each tile's place among its owner's."""
    return jnp.arange(tiles.owner.shape[1])[None] - jnp.take_along_axis(tiles.before, tiles.owner, axis=1)


def pick_tiles(routes: Int[Array, "B H Q K"], table: ChunkTable, backend: Hopper) -> PickTiles | None:
    """The picks' pairs, sorted by chunk; None if there are no slots."""
    if routes.shape[-1] == 0:
        return None
    # An empty chunk is as good as none: its tile would have no keys.
    length = jnp.take_along_axis(table.length[:, None, None], jnp.maximum(routes, 0), axis=3)
    sort = _counted if table.kind.shape[1] <= MOST_CHUNKS else _sorted
    pairs = sort(jnp.where(length > 0, routes, -1), table.kind.shape[1], backend)

    begin, end = table.start, table.start + table.length
    slot = jnp.arange(pairs.tile_chunk.shape[2], dtype=jnp.int32)[None, None] * TILE
    runs = jnp.stack([jnp.take_along_axis(x[:, None], pairs.tile_chunk, axis=2) for x in (begin, end)], axis=-1)
    queries = _lines(slot, slot < jnp.take_along_axis(pairs.end, pairs.tile_chunk, axis=2), runs)

    tiles = _cut(begin, end, table.chunk_of.shape[1])
    owner = jnp.broadcast_to(tiles.owner[:, None], (*routes.shape[:2], tiles.owner.shape[1]))
    readers = (jnp.take_along_axis(x, owner, axis=2) for x in (pairs.begin, pairs.end))
    row, used, place, first, last = (
        x[:, None] for x in (tiles.row, tiles.used, _places(tiles), tiles.begin, tiles.end)
    )
    keys = _lines(row, used, jnp.stack([*readers], axis=-1), 0, place, first, last)
    row = _row_of_token(begin, end, tiles, table.chunk_of)
    return PickTiles(pairs.query_of_slot, pairs.slot_of_pair, Tiles(queries), Tiles(keys), row)


class _Pairs(NamedTuple):
    """The pairs in their slots: those of a chunk by their queries, those of a query in order."""

    query_of_slot: Int[Array, "B H S"]
    slot_of_pair: Int[Array, "B K Q H"]
    tile_chunk: Int[Array, "B H G"]  # 0: an unused tile
    begin: Int[Array, "B H C"]  # first slot of each chunk's queries
    end: Int[Array, "B H C"]


@jax.named_scope("moc_sort")
def _counted(routes: Int[Array, "B H Q K"], chunks: int, backend: Hopper) -> _Pairs:
    """By a counting sort."""
    batch, heads, queries, picks = routes.shape
    routes = routes.swapaxes(2, 3)
    rank, counts, rows = ranks(routes, chunks, backend)
    count = jnp.sum(counts, axis=2)  # [B, H, C]
    ends = running_sum(-(-count // TILE))
    begin = ends * TILE - round_up(count, TILE)
    tiles = tile_capacity(queries * picks, chunks, TILE)
    tile_chunk = jnp.sum(ends[:, :, None] <= jnp.arange(tiles)[None, None, :, None], axis=-1, dtype=jnp.int32)
    tile_chunk = jnp.where(tile_chunk < chunks, tile_chunk, 0)

    earlier = running_sum(counts.swapaxes(2, 3)).swapaxes(2, 3) - counts
    base = (begin[:, :, None] + earlier).reshape(-1)
    head = jnp.arange(batch * heads, dtype=jnp.int32).reshape(batch, heads, 1, 1)
    query = jnp.arange(queries, dtype=jnp.int32)[None, None, None]
    place = (head * counts.shape[2] + query // rows) * chunks + jnp.maximum(routes, 0)
    slot = jnp.where(routes < 0, -1, base.at[place].get(mode="promise_in_bounds") + rank[..., :queries])
    slots = tiles * TILE
    nowhere = batch * heads * slots + jnp.arange(routes.size).reshape(routes.shape)  # each its own
    target = jnp.where(slot < 0, nowhere, head * slots + slot)
    query_of_slot = jnp.zeros(batch * heads * slots, jnp.int32)
    query_of_slot = query_of_slot.at[target].set(jnp.broadcast_to(query, slot.shape), mode="drop", unique_indices=True)
    slot_of_pair = _transposed(slot, (0, 2, 3, 1))
    return _Pairs(query_of_slot.reshape(batch, heads, slots), slot_of_pair, tile_chunk, begin, begin + count)


def _sorted(routes: Int[Array, "B H Q K"], chunks: int, _: Hopper) -> _Pairs:
    """By a radix sort, of all scenes at once."""
    batch, heads, queries, picks = routes.shape
    made = group_by_chunk(routes.reshape(batch * heads, queries, picks), chunks, TILE)
    made = jax.tree.map(lambda x: x.reshape(batch, heads, *x.shape[1:]), made)
    query = (jnp.maximum(made.pair_of_slot, 0) // picks).reshape(batch, heads, -1)
    slot = _transposed(made.slot_of_pair, (0, 3, 2, 1))
    return _Pairs(query, slot, made.tile_chunk, made.chunk_begin, made.chunk_end)


def _transposed(x: Array, axes: tuple[int, ...]) -> Array:
    """x.transpose(axes) as a gather: XLA would write a transposition once for each of its readers."""
    index = jnp.zeros((1,) * x.ndim, jnp.int32)
    for i, n in zip(jnp.ogrid[*map(slice, x.shape)], x.shape, strict=True):
        index = index * n + i
    index = index.transpose(axes)
    return x.reshape(-1).at[index.reshape(-1)].get(mode="promise_in_bounds").reshape(index.shape)


def _cut(begin, end, rows: int) -> Cut:
    return cut(begin, end, TILE, rows=rows, owners=begin.shape[1], last_row=rows - TILE)


def _lines(row: Int[Array, "*G"], used: Bool[Array, "*G"], runs: Int[Array, "*G _"], *more) -> Int[Array, "*G _"]:
    ends = jnp.where(used, row, -1), *more
    start, *more = (jnp.broadcast_to(x, runs.shape[:-1])[..., None] for x in ends)
    return jnp.concatenate([start, runs, *more], axis=-1).astype(jnp.int32)


def _row_of_token(begin, end, tiles: Cut, of: Int[Array, "B N"]) -> Int[Array, "B N"]:
    """Where the row of each token of run `of` lies among the rows of all tiles; 0 if in none."""
    tokens, there = of.shape[1], jnp.maximum(of, 0)
    token = jnp.arange(tokens)[None]
    first, before, end = (jnp.take_along_axis(x, there, axis=1) for x in (begin - begin % ALIGN, tiles.before, end))
    tile = (token - first) // TILE
    row = (before + tile) * TILE + token - jnp.minimum(first + tile * TILE, tokens - TILE)
    return jnp.where((of >= 0) & (token < end), row, 0).astype(jnp.int32)
