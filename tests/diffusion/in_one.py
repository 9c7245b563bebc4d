"""The whole loop of `Denoising` as one function, whose program is compiled once for all turns and calls."""

import jax
import jax.numpy as jnp

from moc_jax.config import SampleConfig
from moc_jax.diffusion.conditioning import Denoising, Known
from moc_jax.diffusion.process import VelocityFn
from moc_jax.scene import SceneLengths
from moc_jax.shapes import Array, Float, typed


@typed
def sample_scene(
    velocity_fn: VelocityFn,
    noise: Float[Array, "B F Y X Z"],
    history_noise: Float[Array, "B F Y X Z"],
    known: Known,
    lengths: SceneLengths,
    cfg: SampleConfig,
) -> Float[Array, "B F Y X Z"]:
    """Clean latents of the scenes: what is known exactly as it was given, zeros on padding frames.

    Arguments: see `Denoising`.
    """
    denoising = Denoising(noise=noise, history_noise=history_noise, known=known, lengths=lengths, cfg=cfg)
    solver = denoising.solver
    constants = tuple(map(jnp.asarray, denoising.constants))

    def denoise(now, z_0):
        carried, _ = jax.lax.scan(
            lambda carried, at: (denoising.call(velocity_fn, now, z_0, carried, at), None),
            solver.start(noise),
            constants,
        )
        return denoising.end(now, z_0, carried)

    return jax.lax.fori_loop(0, denoising.turn.max() + 1, denoise, denoising.begin())
