"""Which runs of rows each tile reads, and how a kernel's grid walks them.

A kernel's grid is (scene, head, tile, step), in that order on one core. A tile's rows stay while its steps walk the
*blocks* of its runs, one run after the other. Blocks are numbered from row 0, so a run's first and last block may
hold rows that are not the run's: those are masked. The number of steps is the most that any tile has, and is data:
tiles with fewer repeat their last block, which copies nothing, and skip the work.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from moc_jax.shapes import Array, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tiles:
    """The work of one kernel: G tiles per scene and head. The second axis is 1 where all heads share their tiles.

    Queries over keys: tile g is block g of the queries, and a line of the table is begin and end of each run of keys.
    Keys over queries: a line starts with the tile's first row (a multiple of 8) and begin and end of those of its
    rows that are keys; begin and end of each run of queries follow.

    A run with begin >= end is empty; a tile whose runs all are is unused.
    """

    table: Int[Array, "B H G W"]

    @property
    def count(self) -> int:
        """Tiles per scene and head, used or not."""
        return self.table.shape[2]


def flat(tiles: Tiles) -> Int[Array, "_"]:
    """The table as kernels get it, prefetched: scalar memory would pad more dimensions."""
    return tiles.table.astype(jnp.int32).reshape(-1)


def blocks_of(begin, end, block: int):
    """(first block, number of blocks) of a run."""
    first = lax.div(begin, jnp.int32(block))
    return first, jnp.where(begin < end, lax.div(end + block - 1, jnp.int32(block)) - first, 0)


def steps(tiles: Tiles, block: int, first_run: int) -> Int[Array, ""]:
    """The most blocks that any tile walks, at least 1; runs start at column `first_run` of the table."""
    runs = tiles.table[..., first_run:].astype(jnp.int32)
    _, count = blocks_of(runs[..., 0::2], runs[..., 1::2], block)
    return jnp.maximum(jnp.max(jnp.sum(count, axis=-1)), 1)
