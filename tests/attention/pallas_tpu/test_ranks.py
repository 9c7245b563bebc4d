"""Ranks of picks against counting them one after the other: interpreted."""

import jax.numpy as jnp
import numpy as np
import pytest

from moc_jax.attention.pallas_tpu import ranks as kernel

SMALL = kernel.ScanTiling(block=256, chunks=16)


def counted(routes, begin):
    rank, end = np.full(routes.shape, -1), np.array(begin)
    for x, n in np.ndindex(routes.shape[0], routes.shape[2]):
        for i, chunk in enumerate(routes[x, :, n]):
            if chunk >= 0:
                rank[x, i, n] = end[x, chunk]
                end[x, chunk] += 1
    return rank, end


def picks(tokens, chunks, slots, *, first=0, seed=0):
    """Routes [4, slots, tokens] of chunks from `first` on, none twice; a third of the slots are empty."""
    rng = np.random.default_rng(seed)
    order = rng.permuted(np.tile(np.arange(first, chunks)[:, None], (4, 1, tokens)), axis=1)[:, :slots]
    return np.where(rng.random(order.shape) < 1 / 3, -1, order).astype(np.int32)


def check(routes, chunks, **options):
    begin = np.random.default_rng(5).integers(-(2**22), 2**20, (len(routes), chunks), np.int32)
    begin[0] = 0
    rank, end = kernel.ranks(jnp.asarray(routes), jnp.asarray(begin), **options)
    want_rank, want_end = counted(routes, begin)
    np.testing.assert_array_equal(rank, want_rank)
    np.testing.assert_array_equal(end, want_end)


def test_ranks_are_those_of_counting(interpreter):
    """Two blocks of 256 tokens, the second not full, and three tiles of 16 chunks, the last not full."""
    check(picks(400, 41, 3), 41, tiling=SMALL)


def test_blocks_without_picks_keep_the_counts(interpreter):
    """Picks of the first chunks, then none, then of the last chunks, then one chunk by all."""
    routes = picks(1024, 30, 2)
    routes[:, :, :256] = picks(256, 8, 2)
    routes[:, :, 256:512] = -1
    routes[:, :, 512:768] = picks(256, 30, 2, first=20)
    routes[:, :, 768:] = np.array([-1, 29])[:, None]
    check(routes, 30, tiling=SMALL)


def test_more_slots_than_chunks_and_few_tokens(interpreter):
    routes = np.pad(picks(5, 3, 3), ((0, 0), (0, 2), (0, 0)), constant_values=-1)
    check(routes, 3)


def test_nothing_to_rank():
    rank, end = kernel.ranks(jnp.zeros((2, 0, 10), jnp.int32), jnp.ones((2, 4), jnp.int32))
    assert rank.shape == (2, 0, 10)
    np.testing.assert_array_equal(end, np.ones((2, 4)))


@pytest.mark.parametrize(
    ("tokens", "slots", "block"), [(64, 5, 128), (1_100, 5, 1024), (180_504, 7, 3072), (180_504, 24, 1024)]
)
def test_blocks_suit_the_sizes(tokens, slots, block):
    assert kernel.tiling_of(tokens, slots) == kernel.ScanTiling(block=block)


@pytest.mark.parametrize("sizes", [{"block": 100}, {"block": 512, "chunks": 24}])
def test_blocks_are_whole_registers(sizes):
    with pytest.raises(ValueError, match="must be a multiple of"):
        kernel.ScanTiling(**sizes)
