"""Where queries lie in memory: what all backends walk, derived once.

Queries need not be keys. A shard of the tokens, the shot that is being sampled, or all of them: what attention needs to
know of a query token is the chunk that it belongs to.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moc_jax.config import MoCConfig
from moc_jax.scene import TEXT, VIDEO, ChunkTable
from moc_jax.shapes import Array, Bool, Float, Float32, Int

LOG2E = math.log2(math.e)  # kernels take exponentials to base 2
ALIGN = 8  # rows at whose multiples copies from memory start

_Runs = tuple[Int[Array, "B A C"], Int[Array, "B A C"]]  # runs.Runs


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Queries:
    """The Q query tokens of each scene, by the chunks of a table that they belong to.

    The query tokens of one chunk are one run of rows, and those of a shot's video chunks follow each other in chunk
    order. A chunk may have fewer of them than it has keys, or none.
    """

    chunk_of: Int[Array, "B Q"]  # -1: padding
    start: Int[Array, "B C"]  # each chunk's first row
    length: Int[Array, "B C"]  # and how many rows it has
    text_tokens: int = dataclasses.field(metadata={"static": True})  # no more query tokens are text
    first_video: int = dataclasses.field(metadata={"static": True})  # no row before this one is video
    row: Int[Array, " Q"] | None = None  # what is drawn depends on it: of the same token, the same; None: 0, 1, 2, ...

    @property
    def valid(self) -> Bool[Array, "B Q"]:
        """False for padding."""
        return self.chunk_of >= 0


def queries_of(table: ChunkTable, query_chunk: Int[Array, "B Q"] | None = None) -> Queries:
    """The queries whose tokens belong to the chunks `query_chunk`, -1 for padding; None: the table's own tokens."""
    if query_chunk is None:
        return Queries(table.chunk_of, table.start, table.length, table.text_tokens, table.text_tokens)
    start, length = jax.vmap(_runs, in_axes=(0, None))(query_chunk, table.kind.shape[1])
    return Queries(query_chunk, start, length, min(table.text_tokens, query_chunk.shape[1]), 0)


def _runs(chunk_of: Int[Array, " Q"], chunks: int) -> tuple[Int[Array, " C"], Int[Array, " C"]]:
    """Start and length of each chunk's run of rows.

    Runs are counted along the rows and then looked up, which reads the rows a few times: nothing is rows x chunks.
    """
    rows = chunk_of.shape[0]
    if rows == 0:
        return jnp.zeros(chunks, jnp.int32), jnp.zeros(chunks, jnp.int32)
    most = 2 * chunks + 1  # with padding before, between and behind
    changes = jnp.concatenate([jnp.zeros(1, bool), chunk_of[1:] != chunk_of[:-1]])
    run_of = jnp.cumsum(changes)
    begin = jnp.searchsorted(run_of, jnp.arange(most + 1)).astype(jnp.int32)
    start, length = begin[:-1], begin[1:] - begin[:-1]
    chunk = chunk_of.at[start].get(mode="fill", fill_value=-1)
    chunk = jnp.where((length > 0) & (chunk >= 0), chunk, chunks)  # a place beyond the end is dropped
    nothing = jnp.zeros(chunks, jnp.int32)
    return nothing.at[chunk].set(start, mode="drop"), nothing.at[chunk].set(length, mode="drop")


# ------------------------------------------------------------------------------------------------ what a setting says


def by_shot(cfg: MoCConfig) -> bool:
    """Whether the video queries of a shot share their anchors."""
    return cfg.mode == "dense" or cfg.self_anchor in ("shot", "none")


def has_anchors(table: ChunkTable, cfg: MoCConfig) -> bool:
    """False if no query has any, whatever the lengths."""
    return cfg.mode == "dense" or cfg.self_anchor != "none" or table.text_tokens > 0 or cfg.top_k == 0


def all_read_text(table: ChunkTable, cfg: MoCConfig) -> bool:
    """Whether there is text, and all queries always read all of it."""
    return table.text_tokens > 0 and cfg.visibility == "scene" and (cfg.mode == "dense" or cfg.text_anchor == "all")


def candidates_are_split(cfg: MoCConfig) -> bool:
    """Whether a query's candidates continue behind its anchors: with causal routing they don't."""
    return not cfg.causal_routing and cfg.self_anchor != "none"


# ------------------------------------------------------------------------------------------------ segments and tiles


class Segments(NamedTuple):
    """Chunks that share their anchors, as one run of rows: a shot's video with the own shot as anchor, else a chunk.

    A tile that lies within a segment reads the same runs with all of its rows.
    """

    lead: Int[Array, "B C"]  # the first chunk of each chunk's segment
    begin: Int[Array, "B C"]  # of first chunks: the segment's rows [begin, end); none for others and empty segments
    end: Int[Array, "B C"]

    def of(self, rows: Queries | ChunkTable) -> Int[Array, "B _"]:
        """The segment of each row, as its first chunk; -1 for padding."""
        return jnp.where(rows.valid, jnp.take_along_axis(self.lead, jnp.maximum(rows.chunk_of, 0), axis=1), -1)


def segments(rows: Queries | ChunkTable, table: ChunkTable, cfg: MoCConfig) -> Segments:
    """The segments of queries, or of keys (`rows` is the table itself)."""
    batch, chunks = table.kind.shape
    index = jnp.broadcast_to(jnp.arange(chunks)[None], (batch, chunks))
    lead = index
    if by_shot(cfg):
        video = table.kind == VIDEO
        follows = video[:, 1:] & video[:, :-1] & (table.shot[:, 1:] == table.shot[:, :-1])
        lead = lax.cummax(jnp.where(jnp.pad(follows, ((0, 0), (1, 0))), 0, index), axis=1)
    member = (lead[:, None, :] == index[:, :, None]) & (rows.length > 0)[:, None, :]
    begin = jnp.min(jnp.where(member, rows.start[:, None], rows.chunk_of.shape[1]), axis=-1)
    end = jnp.max(jnp.where(member, (rows.start + rows.length)[:, None], 0), axis=-1)
    return Segments(lead, jnp.minimum(begin, end), end)


class Cut(NamedTuple):
    """Runs of rows, cut into tiles."""

    owner: Int[Array, "B G"]  # whose run each tile is of; unused tiles: 0
    row: Int[Array, "B G"]  # the tile's first row, a multiple of `ALIGN`
    begin: Int[Array, "B G"]  # its owner's rows, [begin, end); none if unused
    end: Int[Array, "B G"]
    before: Int[Array, "B C"]  # tiles before each owner's first

    @property
    def used(self) -> Bool[Array, "B G"]:
        """Whether a tile is somebody's."""
        return self.begin < self.end


def cut(begin: Int[Array, "B C"], end: Int[Array, "B C"], tile: int, *, rows: int, owners: int, last_row: int) -> Cut:
    """Tiles of `tile` rows for the runs [begin, end) of `rows` rows, in their order; at most `owners` are not empty.

    The number of tiles is static: all rows, and two edges for each owner. No tile starts after `last_row`: one that
    would starts there, and holds its owner's rows at its end.
    """
    first = begin - begin % ALIGN
    counts = jnp.where(begin < end, -(-(end - first) // tile), 0)
    ends = running_sum(counts)
    before = ends - counts
    index = jnp.arange((rows + owners * (tile + ALIGN - 2)) // tile)
    owner = jnp.sum(ends[:, None, :] <= index[None, :, None], axis=-1, dtype=jnp.int32)
    used = owner < begin.shape[1]
    owner = jnp.where(used, owner, 0)
    first, ahead, low, high = (jnp.take_along_axis(x, owner, axis=1) for x in (first, before, begin, end))
    row = first + tile * (index[None] - ahead)
    low, high = jnp.maximum(low, row), jnp.minimum(high, row + tile)
    row, low, high = (jnp.where(used, x, 0).astype(jnp.int32) for x in (jnp.minimum(row, last_row), low, high))
    return Cut(owner, row, low, high, before)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tiles:
    """The work of one kernel: G tiles per scene and head, a line of W integers for each.

    A line names the tile's rows, as the kernel says, and then begin and end of each run that they read; a run with
    begin >= end is empty. The second axis is 1 where all heads share their tiles.

    `deal`: how they are dealt to thread blocks, if some take much longer than others (pallas_gpu/tiles.py).
    """

    table: Int[Array, "B H G W"]
    deal: Int[Array, "3"] | None = None

    @property
    def count(self) -> int:
        """Tiles per scene and head, used or not."""
        return self.table.shape[2]


def run_lines(runs: _Runs, owner: Int[Array, "B G"], used: Bool[Array, "B G"]) -> Int[Array, "B G W"]:
    """The ends of lines: begin and end of each run of a tile's owner, empty for unused tiles."""
    index = jnp.broadcast_to(owner[:, None], (*runs[0].shape[:2], owner.shape[1]))
    begin, end = (jnp.where(used[:, None], jnp.take_along_axis(x, index, axis=2), 0) for x in runs)
    lines = jnp.moveaxis(jnp.stack([begin, end], axis=-1), 1, 2)
    return lines.reshape(*owner.shape, 2 * runs[0].shape[1]).astype(jnp.int32)


# ------------------------------------------------------------------------------------------------ readers of text
# Keys of text that all queries read have more readers than any others by far. Their tiles are repeated, each time with
# another share of the readers, so that all tiles take about equally long; the shares' gradients are added up.


def text_tiles(
    readers: _Runs, table: ChunkTable, tile: int, shares: int, rows: int, unit: int
) -> tuple[Int[Array, "1 G"], Int[Array, "B 1"], Int[Array, "B G 4"]]:
    """First keys of the tiles of all shares, where text ends, and the ends of the tiles' lines.

    Share 0 has the readers among text, each its own of the video's.

    Args:
        readers: Of all chunks, as two runs of `rows` rows: of text and of video.
        unit: What shares are multiples of.
    """
    tiles = -(-table.text_tokens // tile)
    first = jnp.tile(jnp.arange(tiles) * tile, shares)[None]
    text_end = jnp.max(jnp.where(table.kind == TEXT, table.start + table.length, 0), axis=1, keepdims=True)
    # All captions have the same readers, so the union over them is each one's own.
    begin, end = readers
    here = (table.kind == TEXT)[:, None] & (begin < end)
    end = jnp.max(jnp.where(here, end, 0), axis=2)  # [B, 2]
    begin = jnp.minimum(jnp.min(jnp.where(here, begin, rows), axis=2), end)
    size = round_up(-(-rows // shares), unit)
    share = jnp.arange(shares)[None]
    video = jnp.maximum(begin[:, 1:], share * size), jnp.minimum(end[:, 1:], (share + 1) * size)
    text = jnp.broadcast_to(begin[:, :1], video[0].shape), jnp.where(share == 0, end[:, :1], 0)
    lines = jnp.stack([*text, *video], axis=-1).astype(jnp.int32)
    return first, text_end, jnp.repeat(lines, tiles, axis=1)


def sum_other_shares(x: Float[Array, "B H R D"], shares: int, rows: int) -> Float32[Array, "B H _ D"]:
    """The sum of all shares' rows but the first's; each has so many `rows`, and x begins with them."""
    apart = x[:, :, : shares * rows].astype(jnp.float32).reshape(*x.shape[:2], shares, rows, x.shape[3])
    return jnp.sum(apart[:, :, 1:], axis=2)


# ------------------------------------------------------------------------------------------------ groups of heads


class Heads(NamedTuple):
    """Some heads: buffers of pairs are large, so kernels of pairs take some heads after the others.

    `first` is data, so that one program serves all groups.
    """

    first: Array | int
    count: int

    @property
    def operand(self) -> Int[Array, "1"]:
        """As an operand of kernels."""
        return jnp.full(1, self.first, jnp.int32)

    def of(self, x):
        """The group's part of a tree of arrays [B, H, ...]."""
        return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, self.first, self.count, axis=1), x)

    def put(self, whole: Array, part: Array, axis: int) -> Array:
        """`whole` with the group's part in its place."""
        return part if part.shape == whole.shape else lax.dynamic_update_slice_in_dim(whole, part, self.first, axis)


def head_groups(heads: int, bytes_per_head: int, most: int) -> int:
    """The fewest equal groups of heads whose bytes are at most `most`; one head each if none are."""
    return next((g for g in range(1, heads) if heads % g == 0 and heads // g * bytes_per_head <= most), heads)


def by_group[T](function: Callable[[Heads, T], T], start: T, heads: int, groups: int) -> T:
    """function(group of heads, arrays of all heads) -> these with the group's part filled in; for all groups."""
    count = heads // groups
    if groups == 1:
        return function(Heads(0, heads), start)
    return lax.fori_loop(0, groups, lambda i, whole: function(Heads(i * count, count), whole), start)


# ------------------------------------------------------------------------------------------------ routers


def candidate_rows(runs: Sequence[Int[Array, "B C"]], queries: Queries, rows: int) -> Int[Array, "B 3 _"]:
    """`routing.candidate_runs` of each query, for at least as many `rows`; none for padding."""
    chunks = runs[0].shape[1]
    of = jnp.pad(queries.chunk_of, ((0, 0), (0, rows - queries.chunk_of.shape[1])), constant_values=-1)
    of = jnp.where(of < 0, chunks, of)
    runs = [jnp.pad(run, ((0, 0), (0, 1))) for run in runs]
    return jnp.stack([jnp.take_along_axis(run, of, axis=1) for run in runs], axis=1).astype(jnp.int32)


def split_in_parts(x: Float32[Array, "*shape"], dtype, parts: int = 3) -> list[Array]:
    """x as a sum of numbers of a 16-bit type, largest first: three hold the 24 bits of a float32."""
    found, kind = [], jnp.finfo(dtype)
    for _ in range(parts):
        # Not a plain cast there and back, which XLA may take for excess precision and drop.
        part = lax.reduce_precision(x, exponent_bits=kind.nexp, mantissa_bits=kind.nmant)
        found.append(part.astype(dtype))
        x = jnp.where(jnp.isfinite(part), x - part, 0.0)
    return found


def running_sum(x: Int[Array, "*rows C"]) -> Int[Array, "*rows C"]:
    """The cumulative sum of short rows, each element's by itself: a GPU launches it once, and a scan several times."""
    return jnp.sum(jnp.where(jnp.tri(x.shape[-1], dtype=bool), x[..., None, :], 0), axis=-1, dtype=x.dtype)


def round_up(x, unit: int):
    """The smallest multiple of `unit` that is at least x."""
    return -(-x // unit) * unit
