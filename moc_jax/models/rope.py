"""Interleaved 3-D rotary position embedding (LCT, section 3.2; the split of Wan 2.1).

A head of size D holds D/2 pairs (x_0, x_D/2), (x_1, x_D/2+1), ...: its halves, which lie together in memory. The first
pairs turn with t, the next with h, the rest with w. Pair i of an axis with d components turns by
position * theta ** (-2 i / d).

Wan and LCT pair neighbours, (x_0, x_1), (x_2, x_3), ...; `halves` is the order of components in which such weights of
queries and keys, and of their norms, compute the same here.
"""

import jax
import jax.numpy as jnp
import numpy as np

from moc_jax.shapes import Array, Float32, Int, typed

Turns = tuple[Float32[Array, "B N D"], Float32[Array, "B N D"]]
"""What each component of a head is multiplied by, and its pair's other one: cosines, and sines with their signs."""


def axis_sizes(head_dim: int) -> tuple[int, int, int]:
    """Components of a head for t, h and w: a third each, all even, what is left over to t (44, 42, 42 for 128)."""
    side = 2 * (head_dim // 6)
    return head_dim - 2 * side, side, side


@typed
def rope_angles(positions: Int[Array, "B N 3"], head_dim: int, theta: float) -> Float32[Array, "B N half"]:
    """The angle of each of a head's pairs, which are half its size, in radians."""
    parts = []
    for axis, size in enumerate(axis_sizes(head_dim)):
        frequency = theta ** -(np.arange(0, size, 2) / size)  # float64 until here
        parts.append(positions[:, :, axis, None] * jnp.asarray(frequency, jnp.float32)[None, None])
    return jnp.concatenate(parts, axis=-1)


def turns_of(angles: Float32[Array, "B N half"]) -> Turns:
    """As every layer uses them: for whole heads, so that no layer puts halves together for each number it turns."""
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1)


def rotate(x: Float32[Array, "B N H D"], turns: Turns) -> Float32[Array, "B N H D"]:
    """Turns every pair of every head."""
    cos, sin = (each[:, :, None] for each in turns)
    return x * cos + jax.lax.platform_dependent(x, tpu=_permuted, default=_flipped) * sin


# A head's halves exchanged, in the way that each compiler fuses with what is before and behind.


def _flipped(x):
    return jnp.flip(x.reshape(*x.shape[:3], 2, -1), axis=3).reshape(x.shape)


def _permuted(x):
    """By the matrix unit: a head fills the lanes of a TPU's register, and half of it does not."""
    order = jnp.roll(jnp.eye(x.shape[3]), x.shape[3] // 2, axis=0)
    return jnp.einsum("bnhd,de->bnhe", x, order, precision=jax.lax.Precision.HIGH)


def halves(head_dim: int) -> np.ndarray:
    """Components of pairs of neighbours, (0, 1), (2, 3), ..., in this module's order: 0, 2, ..., 1, 3, ..."""
    return np.arange(head_dim).reshape(-1, 2).T.ravel()
