"""Which rows of q each tile takes and which runs of keys it reads, and how a kernel walks them."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from moc_jax.shapes import Array, Int

ALIGN = 8  # rows at whose multiples a copy may start
ROWS = 64  # of one warpgroup: the smallest height of a Hopper matrix product
COMPUTE = 2  # warpgroups that compute
TILE = ROWS * COMPUTE  # rows of a tile


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tiles:
    """The work of one kernel: G tiles per scene and head.

    `table[..., 0]` is a tile's first row (a multiple of 8; -1: an unused tile), then begin and end of each run; a run
    with begin >= end is empty. Where queries walk keys, a used tile has at least one key. The second axis is 1 where
    all heads share their tiles.
    """

    table: Int[Array, "B H G W"]

    @property
    def count(self) -> int:
        return self.table.shape[2]

    @property
    def static(self) -> "Layout":
        return Layout(self.count, (self.table.shape[3] - 1) // 2, self.table.shape[1] > 1)


class Layout(NamedTuple):
    """What a kernel knows of its `Tiles` when it is compiled."""

    count: int
    runs: int
    per_head: bool


def each_tile(table_ref, *, tiles: Layout, blocks: int, batch: int, heads: int, body):
    """Calls body(item, first row, its line of the table, tiles before it, steps before it) -> steps after it, for each
    used tile of this thread block, in an order that all its warpgroups share. An item is (scene, head, tile):
    neighbours share keys, which then come from the cache."""
    first = lax.axis_index("block")
    mine = lax.div(batch * heads * tiles.count - first + blocks - 1, blocks)

    def one(i, before):
        used, steps = before
        index = first + i * blocks
        row = lax.div(index, tiles.count)
        item = lax.div(row, heads), lax.rem(row, heads), lax.rem(index, tiles.count)
        line = table_ref.at[item[0], item[1] if tiles.per_head else 0, item[2]]
        start = line[0]
        return lax.cond(
            start >= 0,
            lambda: (used + 1, body(item, pl.multiple_of(start, ALIGN), line, used, steps)),
            lambda: (used, steps),
        )

    lax.fori_loop(0, mine, one, (jnp.int32(0), jnp.int32(0)))


class Way:
    """A tile's way through its runs, block after block.

    A block's rows are [row, row + block); those of the run are [row + low, row + high). Blocks start at multiples of
    8 and stay inside the array of `rows`: the last one may start earlier than its turn, and what it repeats is masked.
    """

    def __init__(self, line, runs: int, block: int, rows: int):
        legs, count = [], jnp.int32(0)
        for r in range(runs):
            begin, end = line[1 + 2 * r], line[2 + 2 * r]
            first = begin - lax.rem(begin, ALIGN)
            legs.append((count, first, begin, end))
            count += jnp.where(begin < end, lax.div(end - first + block - 1, block), 0)
        self.count = count  # blocks
        self._legs, self._block, self._rows = legs, block, rows

    def at(self, s):
        """(row, low, high) of block s."""
        before, first, begin, end = self._legs[0]
        for leg in self._legs[1:]:
            there = s >= leg[0]
            before, first, begin, end = (
                jnp.where(there, new, old) for new, old in zip(leg, (before, first, begin, end), strict=True)
            )
        return _block(first, begin, end, s - before, self._block, self._rows)


def walk(line, runs: int, block: int, rows: int, step, carry, steps):
    """Folds step(carry, steps so far, row, low, high) over a tile's runs as `Way` has them; (carry, steps so far).

    One run after the other, which takes fewer registers than choosing among them at each step.
    """

    def one_run(r, state):
        begin, end = line[1 + 2 * r], line[2 + 2 * r]
        first = begin - lax.rem(begin, ALIGN)
        count = jnp.where(begin < end, lax.div(end - first + block - 1, block), 0)
        carry, steps = state

        def one_block(s, carry):
            return step(carry, steps + s, *_block(first, begin, end, s, block, rows))

        return lax.fori_loop(0, count, one_block, carry), steps + count

    if runs == 1:
        return one_run(0, (carry, steps))
    return lax.fori_loop(0, runs, one_run, (carry, steps))


def _block(first, begin, end, s, block: int, rows: int):
    turn = first + s * block
    row = pl.multiple_of(jnp.minimum(turn, rows - block), ALIGN)
    return row, jnp.maximum(begin, turn) - row, end - row
