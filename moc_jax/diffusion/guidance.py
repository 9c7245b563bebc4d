"""Classifier-free guidance (arXiv 2207.12598), in one model call of twice the batch."""

import jax
import jax.numpy as jnp

from moc_jax.diffusion.process import VelocityFn
from moc_jax.scene import SceneLengths
from moc_jax.shapes import Array, Float, typed


@typed
def guided(
    conditional: Float[Array, "*any"], unconditional: Float[Array, "*any"], scale: float | Float[Array, ""]
) -> Float[Array, "*any"]:
    """v = u + g (c - u): g = 1 is the conditional velocity c, g = 0 the unconditional u, g > 1 steers away from u."""
    return unconditional + scale * (conditional - unconditional)


@typed
def guided_velocity(
    velocity_fn,
    text: Float[Array, "B L E"],
    lengths: SceneLengths,
    negative_text: Float[Array, "B L E"],
    negative_lengths: SceneLengths,
    scale: float,
) -> VelocityFn:
    """Makes a velocity function of z and t from a text-conditioned one.

    Args:
        velocity_fn: (video, text, t, lengths) -> velocity.
        text, lengths: the captions, and the lengths of shots and captions.
        negative_text, negative_lengths: what to steer away from: empty captions as in training, or a negative prompt.
        scale: g; at 1 the negative captions are never evaluated.
    """
    if scale == 1:
        return lambda z, t: velocity_fn(z, text, t, lengths)

    def double(a, b):
        return jnp.concatenate([a, b])

    both_text = double(text, negative_text)
    both_lengths = jax.tree.map(double, lengths, negative_lengths)

    def velocity(z, t):
        conditional, unconditional = jnp.split(velocity_fn(double(z, z), both_text, double(t, t), both_lengths), 2)
        return guided(conditional, unconditional, scale)

    return velocity
