"""Pairs sorted by chunk: every pair in exactly one slot of a tile of its chunk, in order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moc_jax.attention.schedule import group_by_chunk, tile_capacity


def by_hand(routes, chunks, tile):
    """(tile_chunk, pair_of_slot, slot_of_pair) of one head's routes [N, K], pair after pair."""
    pairs = routes.reshape(-1)
    tile_chunk, slots = [], []
    for chunk in range(chunks):
        members = np.flatnonzero(pairs == chunk)
        tiles = -(-len(members) // tile)
        tile_chunk += [chunk] * tiles
        slots += [*members, *[-1] * (tiles * tile - len(members))]
    rest = tile_capacity(len(pairs), chunks, tile) - len(tile_chunk)
    tile_chunk += [0] * rest
    slots += [-1] * (rest * tile)
    slot_of_pair = np.full(len(pairs), -1)
    for slot, pair in enumerate(slots):
        if pair >= 0:
            slot_of_pair[pair] = slot
    return np.array(tile_chunk), np.array(slots).reshape(-1, tile), slot_of_pair.reshape(routes.shape)


@pytest.mark.parametrize(
    ("heads", "queries", "slots", "chunks", "tile"),
    [
        (3, 100, 5, 7, 8),
        (2, 64, 3, 24, 16),
        (1, 50, 1, 3, 4),
        (2, 33, 4, 1, 5),
        (40, 20, 2, 1_700, 8),  # more groups than 16 bits can tell apart
    ],
)
@pytest.mark.parametrize("kind", ["random", "one chunk", "nothing"])
def test_every_pair_has_its_slot(heads, queries, slots, chunks, tile, kind):
    rng = np.random.default_rng(chunks)
    routes = rng.integers(-1, chunks, (heads, queries, slots))
    if kind == "one chunk":
        routes = np.where(routes < 0, -1, chunks - 1)
    elif kind == "nothing":
        routes[:] = -1
    got = jax.jit(group_by_chunk, static_argnums=(1, 2))(jnp.asarray(routes, jnp.int32), chunks, tile)
    for h in range(heads):
        for value, want in zip((got.tile_chunk, got.pair_of_slot, got.slot_of_pair), by_hand(routes[h], chunks, tile)):
            np.testing.assert_array_equal(value[h], want)
