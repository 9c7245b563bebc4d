"""The order in which thread blocks take tiles: each once, and those that take long or short evenly spread."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moc_jax.attention.pallas_gpu import tiles
from moc_jax.attention.pallas_gpu.device import KernelTiling
from moc_jax.attention.pallas_gpu.tiles import Job


def items(batch, heads, count, *, blocks=132, heads_first=False, deal=None):
    """(block, scene, head, tile) of each item, as thread blocks take them."""
    job = Job(
        tiling=KernelTiling(),
        thread_blocks=blocks,
        batch=batch,
        heads=heads,
        dim=128,
        tiles=count,
        runs=1,
        unit=8,
        per_head=True,
        rows=1024,
        sorted_rows=True,
        heads_first=heads_first,
        in_turn=heads_first,
        dealt=deal is not None,
        interpret=None,
    )
    count = tiles._looks(job) if deal is None else int(tiles._dealt_looks(deal, job))
    looks, block = jnp.meshgrid(jnp.arange(count), jnp.arange(blocks), indexing="ij")
    (scene, head, tile), there = jax.jit(jax.vmap(lambda i, block: tiles._item(i, block, job, deal)))(
        looks.reshape(-1), block.reshape(-1)
    )
    return np.stack([block.reshape(-1), scene, head, tile], axis=1)[np.asarray(there)]


@pytest.mark.parametrize("heads_first", [False, True])
@pytest.mark.parametrize("blocks", [2, 132])
@pytest.mark.parametrize(("batch", "heads", "count"), [(1, 12, 789), (2, 3, 7), (1, 1, 132), (3, 64, 133), (1, 7, 1)])
def test_each_tile_is_taken_once(batch, heads, count, blocks, heads_first):
    block, *found = items(batch, heads, count, blocks=blocks, heads_first=heads_first).T
    want = np.stack(np.unravel_index(np.arange(batch * heads * count), (batch, heads, count)), axis=1)
    order = np.lexsort(found[::-1])
    np.testing.assert_array_equal(np.stack(found, axis=1)[order], want)
    if heads_first:  # all before a tile of its head are taken by then: in rounds of all blocks, none is in a later one
        nth = np.zeros(len(block), int)
        for b in range(blocks):
            nth[block == b] = np.arange(np.sum(block == b))
        assert (np.diff((nth * blocks + block)[order].reshape(batch, heads, count)) > 0).all()


def test_tiles_that_take_turns_hardly_wait():
    """Four groups of 20 tiles that read 41 blocks each, the last of which is the next group's first, on 12 blocks."""
    groups, tiles_each, count, blocks = 4, 20, 41, 12
    order = np.asarray(tiles.nth_block(jnp.arange(count), count))
    assert sorted(order) == list(range(count))
    free, told = np.zeros(blocks), np.zeros(groups * count)
    for i in range(groups * tiles_each):
        time = free[i % blocks]
        for block in order + i // tiles_each * (count - 1):
            time = told[block] = max(time, told[block]) + 1
        free[i % blocks] = time
    ideal = groups * tiles_each * count / blocks
    assert free.max() < 1.2 * ideal


@pytest.mark.parametrize(("heads", "count"), [(12, 789), (12, 792), (24, 789), (4, 7_204)])
@pytest.mark.parametrize(("first", "last", "steps"), [(714, 789, 4), (0, 9, 1_400)])
def test_tiles_of_other_lengths_are_spread_over_all_blocks(heads, count, first, last, steps):
    """The same tiles of all heads take longer (text) or shorter (a short last chunk) than the usual 12 steps."""
    block, _, _, tile = items(1, heads, count).T
    odd = (first <= tile) & (tile < last)
    each = np.bincount(block[odd], minlength=132)
    assert each.max() - each.min() <= 2
    work = np.bincount(block, np.where(odd, steps, 12), minlength=132)
    assert work.max() - work.mean() <= 2 * max(steps, 12)


@pytest.mark.parametrize("blocks", [66, 132])
@pytest.mark.parametrize("long", [slice(0), slice(0, 1), slice(2, 4)])
def test_whoever_has_a_long_tile_gets_fewer_of_the_others(long, blocks):
    """Text queries that read everything, before, between or without others: 60 steps beside 5, and unused tiles."""
    heads, loads = 12, np.full(76, 5)
    loads[60:] = 0
    loads[long] = 60
    deal = tiles.deal(jnp.asarray(loads)[None], 12, heads, blocks)
    found = items(1, heads, 76, blocks=blocks, heads_first=True, deal=deal)
    want = np.stack(np.unravel_index(np.arange(heads * 76), (1, heads, 76)), axis=1)
    np.testing.assert_array_equal(found[np.lexsort(found[:, :0:-1].T)][:, 1:], want)
    work = np.bincount(found[:, 0], loads[found[:, 3]], minlength=blocks)
    assert work.max() <= max(loads.max(), work.mean() + 10)


@pytest.mark.parametrize("loads", [[5, 60, 5, 60], [60] * 6, [60] * 12 + [5] * 60], ids=["apart", "all", "many"])
def test_long_tiles_that_nobody_can_be_spared_for(loads):
    np.testing.assert_array_equal(tiles.deal(jnp.asarray(loads)[None], 12, 12, 132), 0)
