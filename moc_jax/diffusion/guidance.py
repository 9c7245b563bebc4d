"""Classifier-free guidance (arXiv 2207.12598), in one model call of twice the batch."""

import dataclasses

import jax
import jax.numpy as jnp

from moc_jax.diffusion.process import VelocityFn
from moc_jax.scene import SceneLengths, noisiest
from moc_jax.shapes import Array, Bool, Float, Shaped, typed


@typed
def guided(
    conditional: Float[Array, "*any"], unconditional: Float[Array, "*any"], scale: float | Float[Array, "..."]
) -> Float[Array, "*any"]:
    """v = u + g (c - u): g = 1 is the conditional velocity c, g = 0 the unconditional u, g > 1 steers away from u."""
    return unconditional + scale * (conditional - unconditional)


def doubled(x: Shaped[Array, "B ..."], batch: int) -> Shaped[Array, "_ ..."]:
    """What both branches are given alike, for as many scenes as the model is called with."""
    return jnp.concatenate([x] * (batch // len(x)))


def both[T](of_captions: T, of_negative: T) -> T:
    """Trees of arrays [B, ...] as the batch of one call, [2 B, ...]."""
    return jax.tree.map(lambda *x: jnp.concatenate(x), of_captions, of_negative)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scales:
    """How far to steer, by noise level."""

    scale: float
    """g; at 1 the negative captions are never evaluated."""
    low: float = 0.0
    """g where the noisiest shot of a scene that is denoised stands below `boundary`; 0: as `scale`."""
    boundary: float = 0.0

    @property
    def off(self) -> bool:
        """Whether nothing is steered at any level."""
        return self.scale == 1 and self.low in (0, 1)

    @typed
    def at(
        self, t: Float[Array, "B S"], lengths: SceneLengths, active: Bool[Array, "B S"] | None = None
    ) -> float | Float[Array, "B 1 1 1 1"]:
        """g for each scene; of its shots the `active` ones count, or all."""
        if not (self.low and self.boundary):
            return self.scale
        g = jnp.where(noisiest(t, lengths, active) >= self.boundary, self.scale, self.low)
        return g[:, None, None, None, None]


@typed
def guided_velocity(
    velocity_fn,
    text: Float[Array, "B L E"],
    lengths: SceneLengths,
    negative_text: Float[Array, "B L E"],
    negative_lengths: SceneLengths,
    scales: Scales,
    active: Bool[Array, "B S"] | None = None,
) -> VelocityFn:
    """Makes a velocity function of z and t from a text-conditioned one.

    Args:
        velocity_fn: (video, text, t, lengths) -> velocity.
        text, lengths: the captions, and the lengths of shots and captions.
        negative_text, negative_lengths: what to steer away from: empty captions as in training, or a negative prompt.
        scales: g.
        active: see `Scales.at`.
    """
    if scales.off:
        return lambda z, t: velocity_fn(z, text, t, lengths)

    both_text, both_lengths = both((text, lengths), (negative_text, negative_lengths))

    def velocity(z, t):
        z, t_of_both = both((z, t), (z, t))
        conditional, unconditional = jnp.split(velocity_fn(z, both_text, t_of_both, both_lengths), 2)
        return guided(conditional, unconditional, scales.at(t, lengths, active))

    return velocity
