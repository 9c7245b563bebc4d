"""Sizes of blocks: which rows a kernel takes at a time, by chip and by what there is to attend to."""

import dataclasses

import jax.numpy as jnp

from moc_jax.attention.pallas_tpu import device, flash, flash_backward
from moc_jax.attention.pallas_tpu.device import LANES, ROWS
from moc_jax.config import MoCConfig
from moc_jax.scene import ChunkTable


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blocks:
    """All sizes of one attention."""

    anchors: flash.Tiling  # video queries over their anchors
    text: flash.Tiling  # captions over theirs
    picks: flash.Tiling  # sorted queries over a chunk
    gradient_keys: int  # rows of a tile of anchors' keys
    anchor_gradients: flash_backward.Tiling
    pick_gradient_keys: int  # rows of a tile of a chunk's keys
    pick_gradients: flash_backward.Tiling

    def __post_init__(self):
        sizes = (self.queries, self.gradient_queries, self.text_queries)
        if any(self.align % size for size in sizes):
            raise ValueError(f"{self}: of the blocks of ordered queries, {sizes}, each must divide the largest")
        if self.picks.queries % self.pick_gradients.block:
            raise ValueError(f"{self}: blocks of sorted queries must divide their tiles")

    @property
    def queries(self) -> int:
        return self.anchors.queries

    @property
    def gradient_queries(self) -> int:
        return self.anchor_gradients.block

    @property
    def text_queries(self) -> int:
        return self.text.queries

    @property
    def align(self) -> int:
        """Rows at whose multiples a segment's queries start."""
        return max(self.queries, self.gradient_queries, self.text_queries)

    @property
    def most_keys(self) -> int:
        """Rows of the largest block of keys."""
        sizes = (self.anchors.keys, self.text.keys, self.picks.keys, self.gradient_keys, self.pick_gradient_keys)
        return max(sizes)


def blocks(cfg: MoCConfig, table: ChunkTable, dim: int, dtype) -> Blocks:
    """The sizes for a config on the chip that the program is for."""
    del dim, dtype
    large, chunk = 1024, -(-(table.max_chunk + ROWS - 1) // LANES) * LANES
    picks = flash.Tiling(queries=large, keys=min(chunk, 2048), compute_queries=256, compute_keys=128)
    anchors = flash.Tiling(queries=large, keys=large, compute_queries=256, compute_keys=256, ahead=2)
    return Blocks(
        anchors=anchors,
        text=flash.Tiling(queries=LANES, keys=large, compute_queries=LANES, compute_keys=512),
        picks=picks,
        gradient_keys=large,
        anchor_gradients=flash_backward.Tiling(block=large, at_once=256),
        pick_gradient_keys=min(chunk, 2048),
        pick_gradients=flash_backward.Tiling(block=large, at_once=128),
    )


_ = device, jnp
