"""Which of a scene's devices speak with which, and what they say."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moc_jax.attention.deal import Deal
from moc_jax.shapes import Array, Int, Key

CONTEXT = "context"


class Links(NamedTuple):
    """Device r U + u is of token group r and head group u."""

    token_groups: Sequence[Sequence[int]]  # devices that share their tokens
    head_groups: Sequence[Sequence[int]]  # devices that share their heads

    @classmethod
    def of(cls, deal: Deal) -> "Links":
        """Those of a deal."""
        groups, heads = range(deal.groups), range(deal.head_groups)
        rows = tuple(tuple(r * deal.head_groups + u for u in heads) for r in groups)
        return cls(rows, tuple(zip(*rows, strict=True)))

    @property
    def group(self) -> Array:
        """This device's r."""
        return lax.axis_index(CONTEXT) // len(self.head_groups)

    def own_heads(self, x: Key[Array, "B H"], count: int) -> Key[Array, "B _"]:
        """What this device needs of what all heads have."""
        first = lax.axis_index(CONTEXT) % len(self.head_groups) * count
        return lax.dynamic_slice_in_dim(x, first, count, axis=1)

    def exchanged(self, x: Array, *, split: int, joined: int) -> Array:
        """An axis cut into U, of which each device of the token group gets one, joined along another axis."""
        return lax.all_to_all(x, CONTEXT, split, joined, axis_index_groups=self.token_groups, tiled=True)

    def of_all_heads(self, x: Array) -> Array:
        """Joined along axis 1."""
        return lax.all_gather(x, CONTEXT, axis_index_groups=self.token_groups, axis=1, tiled=True)

    def gathered(self, x: Array) -> Array:
        """[R, ...] of the devices that have the same heads."""
        return _gathered(x, self.head_groups)

    # -------------------------------------------------------------------------------------------- for dispatch.py

    def joined(self, x: Array, axis: int) -> Array:
        """Those of the R devices that have the same heads, one behind the other."""
        return lax.all_gather(x, CONTEXT, axis_index_groups=self.head_groups, axis=axis, tiled=True)

    def across(self, x: Array, axis: int) -> Array:
        """An axis of R equal parts, one for each device with the same heads -> those that they have for this one."""
        return lax.all_to_all(x, CONTEXT, axis, axis, axis_index_groups=self.head_groups, tiled=True)

    def shifted(self, x: Array, by: int) -> Array:
        """What the group `by` before this one has."""
        moves = [(device, group[(r + by) % len(group)]) for group in self.head_groups for r, device in enumerate(group)]
        return lax.ppermute(x, CONTEXT, moves)

    def shifted_by(self, x: Array, by: Int[Array, ""], *, sign: int) -> Array:
        """What the group sign x `by` before this one has; `by` is 1 to R / 2, and the same everywhere."""
        most = len(self.token_groups) // 2
        branches = [functools.partial(self.shifted, by=sign * distance) for distance in range(1, most + 1)]
        return lax.switch(by - 1, branches, x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gathered(x: Array, groups: Sequence[Sequence[int]]) -> Array:
    return lax.all_gather(x, CONTEXT, axis_index_groups=groups)


def _sum_of_gathered(groups, _, d_x):
    """As many bytes as a reduce-scatter; but the order is known, and all is rounded once."""
    parts = lax.all_to_all(d_x, CONTEXT, 0, 0, axis_index_groups=groups)
    total = parts[0].astype(jnp.float32)
    for part in parts[1:]:
        total = total + part.astype(jnp.float32)
    return (total.astype(d_x.dtype),)


_gathered.defvjp(lambda x, groups: (_gathered(x, groups), None), _sum_of_gathered)
