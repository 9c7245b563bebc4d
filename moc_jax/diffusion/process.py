"""The process: how video is noised, what the model learns, and at which noise levels (equations 1 to 5).

A scene holds several shots and each has a noise level of its own (LCT, arXiv 2503.10589, section 3.3). Equal levels are
joint denoising; a low level on some shots is conditioning on them. One model trained so does both.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from moc_jax.config import DiffusionConfig
from moc_jax.scene import NO_SHOT, Scene, SceneLengths, clean_frames, frame_shot
from moc_jax.shapes import Array, Bool, Float, Int, Key, typed

VelocityFn = Callable[[Array, Array], Array]
"""(z [B, F, Y, X, Z], t [B, S]) -> velocity [B, F, Y, X, Z]; what it gives for padding frames is ignored."""


Level = float | np.ndarray | Float[Array, "*any"]


@typed
def shift(t: Level, amount: float) -> Level:
    """Flow shift: moves noise levels towards 1, as larger videos need (SD3, arXiv 2403.03206, equation 23).

    t' = s t / (1 + (s - 1) t)    (1)
    """
    return amount * t / (1 + (amount - 1) * t)


@typed
def sample_timesteps(key: Key[Array, ""], lengths: SceneLengths, cfg: DiffusionConfig) -> Float[Array, "B S"]:
    """Draws the noise level of each shot for training: logit-normal, then shifted.

    t = shift(sigmoid(t_mean + t_std n)), n ~ N(0, 1)    (2)

    Each shot draws its own n, but one that continues another, which shares it; with chance `cfg.joint_probability` all
    shots of a scene share one.
    """
    normal_key, joint_key = jax.random.split(key)
    n = jax.random.normal(normal_key, lengths.shot_frames.shape)
    joint = jax.random.bernoulli(joint_key, cfg.joint_probability, (n.shape[0], 1))
    n = jnp.where(joint, n[:, :1], n)
    if lengths.continues is not None:
        n = jnp.take_along_axis(n, takes(lengths.continues), axis=1)
    return shift(jax.nn.sigmoid(cfg.t_mean + cfg.t_std * n), cfg.t_shift)


@typed
def takes(continues: Bool[Array, "B S"]) -> Int[Array, "B S"]:
    """The first shot of the take that each shot belongs to: itself, unless it continues the one before."""
    shot = jnp.arange(continues.shape[1])[None]
    return jax.lax.cummax(jnp.where(continues, 0, shot), axis=1)


@typed
def shot_mask(lengths: SceneLengths, frames: int) -> Bool[Array, "B S F"]:
    """Which of `frames` frames belong to which shot; padding frames belong to none."""
    shots = lengths.shot_frames.shape[1]
    return frame_shot(lengths.shot_frames, frames)[:, None, :] == jnp.arange(shots)[None, :, None]


@typed
def of_frames(per_shot: Float[Array, "B S"], lengths: SceneLengths, frames: int) -> Float[Array, "B F"]:
    """Spreads a value per shot over the shot's frames; padding frames get 0."""
    shot = frame_shot(lengths.shot_frames, frames)
    picked = jnp.take_along_axis(per_shot, jnp.maximum(shot, 0), axis=1)
    return jnp.where(shot == NO_SHOT, 0, picked)


@typed
def add_noise(
    z_0: Float[Array, "B F Y X Z"], noise: Float[Array, "B F Y X Z"], t: Float[Array, "B S"], lengths: SceneLengths
) -> Float[Array, "B F Y X Z"]:
    """Rectified flow (arXiv 2209.03003), each frame at the noise level of its shot; padding, and first frames that are
    given clean, stay as they are.

    z_t = (1 - t) z_0 + t noise    (3)
    """
    t = jnp.where(clean_frames(lengths, z_0.shape[1]), 0, of_frames(t, lengths, z_0.shape[1]))
    t = t[:, :, None, None, None]
    return (1 - t) * z_0 + t * noise


@typed
def velocity_target(z_0: Float[Array, "B F Y X Z"], noise: Float[Array, "B F Y X Z"]) -> Float[Array, "B F Y X Z"]:
    """What the model learns: v = dz_t / dt = noise - z_0    (4)"""
    return noise - z_0


@typed
def flow_loss(
    velocity_fn: VelocityFn,
    scene: Scene,
    key: Key[Array, ""],
    cfg: DiffusionConfig,
    *,
    t: Float[Array, "B S"] | None = None,
) -> tuple[Float[Array, ""], Float[Array, "B S"]]:
    """Flow matching loss: the mean over the batch's shots of each shot's mean squared error.

    L_s = mean over the latents of shot s of |velocity_fn(z_t, t) - v|^2,   L = mean_s L_s    (5)

    A short shot so weighs as much as a long one, and padding and given first frames weigh nothing.

    Args:
        velocity_fn: the model.
        scene: clean latents and their lengths.
        key: draws the noise levels and the noise.
        cfg: the law of the noise levels.
        t: fixed noise levels instead of drawn ones (validation).

    Returns:
        The loss, and L_s of every shot, 0 where there is none.
    """
    t_key, noise_key = jax.random.split(key)
    if t is None:
        t = sample_timesteps(t_key, scene.lengths, cfg)
    noise = jax.random.normal(noise_key, scene.video.shape, scene.video.dtype)
    velocity = velocity_fn(add_noise(scene.video, noise, t, scene.lengths), t)
    # Padding is cut off before the square, so that whatever a model gives for it, NaN included, reaches no gradient.
    given = clean_frames(scene.lengths, scene.video.shape[1])[:, None]
    mine = shot_mask(scene.lengths, scene.video.shape[1]) & ~given  # [B, S, F]
    inside = mine.any(axis=1)[:, :, None, None, None]
    residual = jnp.where(inside, velocity - velocity_target(scene.video, noise), 0)
    of_frame = jnp.square(residual).mean(axis=(2, 3, 4))  # [B, F]
    frames = mine.sum(axis=-1)
    per_shot = jnp.where(mine, of_frame[:, None, :], 0).sum(axis=-1) / jnp.maximum(frames, 1)
    return per_shot.sum() / jnp.maximum((frames > 0).sum(), 1), per_shot
