"""Picked chunks -> what a kernel walks: (query, chunk) pairs sorted by chunk and cut into tiles.

Sorted, every tile of queries reads one chunk of keys, which is read from memory once per tile instead of once per
query. Each chunk's group is rounded up to whole tiles; the capacity is static, the fill is data:

    tiles <= ceil(pairs / tile) + chunks                       one more, half-filled, per chunk at most
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from moc_jax.attention.layout import running_sum
from moc_jax.shapes import Array, Int, typed

_COMPARE = 2**25  # comparisons that take less time than launching a search


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Schedule:
    """The sorted walk of one scene."""

    tile_chunk: Int[Array, "H G"]  # the chunk that the tile's queries read
    pair_of_slot: Int[Array, "H G T"]  # pair n * K + i of query n; -1: an empty slot
    slot_of_pair: Int[Array, "H Q K"]  # where each pair went; -1: the pair picks nothing
    chunk_begin: Int[Array, "H C"]  # first slot of each chunk's queries
    chunk_end: Int[Array, "H C"]  # one past their last


def tile_capacity(pairs: int, chunks: int, tile: int) -> int:
    """Tiles that hold any grouping of `pairs` pairs into `chunks` groups."""
    return -(-pairs // tile) + chunks


_IN_BOUNDS = dict(mode="promise_in_bounds", wrap_negative_indices=False)  # spares a pass over the indices


def _take(x: Array, index: Array) -> Array:
    return x.at[index].get(**_IN_BOUNDS)


@jax.named_scope("moc_sort")
@typed
def group_by_chunk(routes: Int[Array, "H Q K"], chunks: int, tile: int) -> Schedule:
    """A stable sort of each head's pairs by chunk: within a chunk, queries stay in order.

    One flat sort serves all heads, by keys as narrow as they come: a radix sort's time goes with the bits of the key.
    """
    heads, queries, slots = routes.shape
    pairs = queries * slots
    tiles = tile_capacity(pairs, chunks, tile)
    groups = chunks + 1  # of one head; the last holds the pairs that pick nothing
    head = jnp.arange(heads, dtype=jnp.int32)[:, None]
    group = head * groups + jnp.where(routes < 0, chunks, routes).reshape(heads, pairs)
    narrow = jnp.uint16 if heads * groups <= 1 << 16 else jnp.uint32
    group, order = lax.sort(
        (group.astype(narrow).reshape(-1), jnp.arange(heads * pairs, dtype=jnp.int32)), num_keys=1, is_stable=True
    )
    first = (head * groups + jnp.arange(groups)[None]).astype(narrow)
    # A head keeps its share of the array. Comparing all is one step, searching takes a step for each halving.
    if heads * groups * pairs <= _COMPARE:
        before = group.reshape(heads, 1, pairs) < first[:, :, None]
        edges = head * pairs + jnp.sum(before, axis=2, dtype=jnp.int32)
    else:
        edges = jnp.searchsorted(group, first.reshape(-1), method="scan_unrolled").astype(jnp.int32)
        edges = edges.reshape(heads, groups)
    begins, counts = edges[:, :-1], jnp.diff(edges)
    tile_counts = -(-counts // tile)
    tile_ends = running_sum(tile_counts)
    tile_begins = tile_ends - tile_counts

    index = jnp.arange(tiles, dtype=jnp.int32)
    tile_chunk = jnp.sum(tile_ends[:, None, :] <= index[None, :, None], axis=-1, dtype=jnp.int32)
    tile_chunk = jnp.where(tile_chunk < chunks, tile_chunk, 0)
    begin, count, first = (_take(x.reshape(-1), head * chunks + tile_chunk) for x in (begins, counts, tile_begins))
    inside = (index[None] - first)[:, :, None] * tile + jnp.arange(tile, dtype=jnp.int32)[None, None]
    used = (index[None] < tile_ends[:, -1:])[:, :, None] & (inside < count[:, :, None])
    pair = _take(order, jnp.where(used, begin[:, :, None] + inside, 0)) - head[:, :, None] * pairs
    pair_of_slot = jnp.where(used, pair, -1)

    # The n-th pair of a group is in the n-th slot of the group's tiles.
    nothing = jnp.iinfo(jnp.int32).min
    shift = jnp.pad(tile_begins * tile - begins, ((0, 0), (0, 1)), constant_values=nothing).reshape(-1)
    slot = jnp.maximum(jnp.arange(heads * pairs, dtype=jnp.int32) + _take(shift, group.astype(jnp.int32)), -1)
    slot_of_pair = jnp.zeros(heads * pairs, jnp.int32)
    slot_of_pair = slot_of_pair.at[order].set(slot, unique_indices=True, **_IN_BOUNDS)
    chunk_begin = tile_begins * tile
    return Schedule(tile_chunk, pair_of_slot, slot_of_pair.reshape(routes.shape), chunk_begin, chunk_begin + counts)
