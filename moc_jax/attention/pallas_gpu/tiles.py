"""Which rows of q each tile takes and which runs of keys it reads, and how a kernel walks them."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from moc_jax.shapes import Array, Int

ALIGN = 8  # rows at whose multiples a copy may start


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tiles:
    """The work of one kernel: G tiles per scene and head.

    `table[..., 0]` is a tile's first row (a multiple of 8; -1: unused), then begin and end of each run; a run with
    begin >= end is empty. The second axis is 1 where all heads share their tiles.
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


class Walk(NamedTuple):
    """A tile's way through its runs, as scalars of a kernel."""

    used: Array  # whether there is a tile at all
    start: Array  # its first row
    count: Array  # blocks to read
    legs: list  # per run: (steps before it, first row read, begin, end)
    block: int
    rows: int

    def at(self, s):
        """(first row of block s, begin and end of what counts there). Blocks stay inside the array: the last one
        may start earlier than its turn, and what it repeats does not count."""
        before, first, begin, end = self.legs[0]
        for leg in self.legs[1:]:
            there = s >= leg[0]
            before, first, begin, end = (
                jnp.where(there, new, old) for new, old in zip(leg, (before, first, begin, end), strict=True)
            )
        row = first + (s - before) * self.block
        inside = pl.multiple_of(jnp.minimum(row, self.rows - self.block), ALIGN)
        return inside, jnp.maximum(begin, row), end


def walk(table_ref, item, tiles: Layout, block: int, rows: int) -> Walk:
    """Reads a tile's line of the table; `rows` is the length of the array whose runs are walked."""
    batch, head, tile = item
    line = table_ref.at[batch, head if tiles.per_head else 0, tile]
    start = line[0]
    legs, count = [], jnp.int32(0)
    for r in range(tiles.runs):
        begin, end = line[1 + 2 * r], line[2 + 2 * r]
        first = begin - lax.rem(begin, ALIGN)
        legs.append((count, first, begin, end))
        count += jnp.where(begin < end, lax.div(end - first + block - 1, block), 0)
    used = start >= 0
    return Walk(used, pl.multiple_of(jnp.maximum(start, 0), ALIGN), jnp.where(used, count, 0), legs, block, rows)


def item_of(index, heads: int, tiles: int):
    """(scene, head, tile): neighbouring indices share keys, which then come from the cache."""
    row = lax.div(index, tiles)
    return lax.div(row, heads), lax.rem(row, heads), lax.rem(index, tiles)
