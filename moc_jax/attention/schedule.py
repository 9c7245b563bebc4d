"""Picked chunks -> what a kernel walks: (query, chunk) pairs sorted by chunk and cut into tiles.

Sorted, every tile of queries reads one chunk of keys, which is read from memory once per tile instead of once per
query. Each chunk's group is rounded up to whole tiles; the capacity is static, the fill is data:

    tiles <= ceil(pairs / tile) + chunks                       one more, half-filled, per chunk at most
"""

import dataclasses

import jax
import jax.numpy as jnp

from moc_jax.shapes import Array, Int, typed


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Schedule:
    """The sorted walk of one scene. A *slot* is a place for one pair in the tiles; G = tiles, T = tile."""

    tile_chunk: Int[Array, "H G"]  # the chunk that the tile's queries read
    pair_of_slot: Int[Array, "H G T"]  # pair n * K + i of query n; -1: an empty slot
    slot_of_pair: Int[Array, "H N K"]  # where each pair went; -1: the pair picks nothing


def tile_capacity(pairs: int, chunks: int, tile: int) -> int:
    """Tiles that hold any grouping of `pairs` pairs into `chunks` groups."""
    return -(-pairs // tile) + chunks


@typed
def group_by_chunk(routes: Int[Array, "H N K"], chunks: int, tile: int) -> Schedule:
    """A stable counting sort of each head's pairs by chunk: within a chunk, queries stay in order."""
    heads, queries, slots = routes.shape
    pairs = queries * slots
    tiles = tile_capacity(pairs, chunks, tile)

    def one(chunk):  # [pairs], -1: nothing
        chunk = jnp.where(chunk < 0, chunks, chunk)
        order = jnp.argsort(chunk, stable=True)
        ends = jnp.searchsorted(chunk[order], jnp.arange(chunks), side="right").astype(jnp.int32)
        begins = jnp.concatenate([jnp.zeros(1, jnp.int32), ends[:-1]])
        tile_ends = jnp.cumsum(-(-(ends - begins) // tile))
        tile_begins = tile_ends - -(-(ends - begins) // tile)

        of = jnp.searchsorted(tile_ends, jnp.arange(tiles), side="right")
        of = jnp.where(of < chunks, of, 0)
        inside = (jnp.arange(tiles) - tile_begins[of])[:, None] * tile + jnp.arange(tile)[None]
        used = (jnp.arange(tiles) < tile_ends[-1])[:, None] & (inside < (ends - begins)[of][:, None])
        rank = jnp.where(used, begins[of][:, None] + inside, 0)
        pair_of_slot = jnp.where(used, order[rank], -1)

        target = jnp.where(used, pair_of_slot, pairs).reshape(-1)  # unused slots fall off the end
        slot_of_pair = jnp.full(pairs, -1, jnp.int32)
        slot_of_pair = slot_of_pair.at[target].set(jnp.arange(tiles * tile, dtype=jnp.int32), mode="drop")
        return of.astype(jnp.int32), pair_of_slot.astype(jnp.int32), slot_of_pair

    tile_chunk, pair_of_slot, slot_of_pair = jax.vmap(one)(routes.reshape(heads, pairs))
    return Schedule(tile_chunk, pair_of_slot, slot_of_pair.reshape(routes.shape))
