"""Groups of heads: buffers of pairs are large, so kernels of pairs take some heads after the others."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moc_jax.shapes import Array, Int


class Heads(NamedTuple):
    """A group of heads; `first` is data, so that one program serves all groups."""

    first: Array | int
    count: int

    @property
    def operand(self) -> Int[Array, "1"]:
        """As an operand of kernels."""
        return jnp.full(1, self.first, jnp.int32)

    def of(self, x):
        """The group's part of a tree of arrays [B, H, ...]."""
        return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, self.first, self.count, axis=1), x)


def head_groups(heads: int, bytes_per_head: int, most: int) -> int:
    """The fewest equal groups of heads whose bytes are at most `most`; one head each if none are."""
    return next((g for g in range(1, heads) if heads % g == 0 and heads // g * bytes_per_head <= most), heads)
