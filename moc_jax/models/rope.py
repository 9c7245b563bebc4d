"""Interleaved 3-D rotary position embedding (LCT, section 3.2; the split of Wan 2.1).

A head of size D holds D/2 pairs (x_0, x_1), (x_2, x_3), ...; the first pairs turn with t, the next with h, the rest
with w. Pair i of an axis with d components turns by  position * theta ** (-2 i / d).
"""

import jax.numpy as jnp
import numpy as np

from moc_jax.shapes import Array, Float, Float32, Int, typed


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


@typed
def rotate(x: Float[Array, "B N H D"], angles: Float32[Array, "B N half"]) -> Float[Array, "B N H D"]:
    """Turns every pair of every head; in float32, returned in x's type."""
    even, odd = x[..., 0::2].astype(jnp.float32), x[..., 1::2].astype(jnp.float32)
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)
