"""Tiles walk runs of rows in blocks, a step for each: which block a step takes, from a table in scalar memory."""

import dataclasses

import jax
import jax.numpy as jnp

from moc_jax.shapes import Array, Int, Int32

_RUN = 4  # numbers of a run: steps up to its end, the first row of a step 0, begin and end


@dataclasses.dataclass(frozen=True)
class Steps:
    """What a kernel knows of the steps of its tiles when it is compiled."""

    heads: int  # that have tiles of their own; 1: all share them
    tiles: int  # of a head
    runs: int  # of a tile
    block: int  # rows of a step

    def of(self, runs: Int[Array, "B H G W"], unit: int, first_head) -> tuple[Int32[Array, " _"], Int32[Array, ""]]:
        """The table, flat, of runs as begin and end, and the most steps of any tile, at least 1.

        A run's first block starts at the last multiple of `unit` that isn't behind its begin. The table begins with the
        first of the heads whose tiles these are.
        """
        begin, end = runs[..., 0::2].astype(jnp.int32), runs[..., 1::2].astype(jnp.int32)
        first = begin // unit * unit
        count = jnp.where(begin < end, -(-(end - first) // self.block), 0)
        until = jnp.cumsum(count, axis=-1, dtype=jnp.int32)
        table = jnp.stack([until, first - (until - count) * self.block, begin, end], axis=-1)
        first_head = jnp.full(1, first_head, jnp.int32)
        return jnp.concatenate([first_head, table.reshape(-1)]), jnp.maximum(jnp.max(until), 1)

    def tile(self, scene, head, tile):
        """A tile's number among those of all scenes and heads."""
        return (scene * self.heads + (head if self.heads > 1 else 0)) * self.tiles + tile

    def count(self, table_smem_ref: jax.Ref, tile):
        """Steps of the tile of a number."""
        return table_smem_ref[1 + (tile * self.runs + self.runs - 1) * _RUN]

    def rows(self, table_smem_ref: jax.Ref, tile, step):
        """(first row of the block, begin, end of the run) of a step; of those beyond the last, the last's."""
        step = jnp.minimum(step, jnp.maximum(self.count(table_smem_ref, tile) - 1, 0))
        at = 1 + tile * self.runs * _RUN
        for _ in range(self.runs - 1):
            at = jnp.where(step < table_smem_ref[at], at, at + _RUN)
        return table_smem_ref[at + 1] + step * self.block, table_smem_ref[at + 2], table_smem_ref[at + 3]
