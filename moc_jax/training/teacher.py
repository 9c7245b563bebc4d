"""Teacher forcing: every shot is learned while it reads the shots before it as sampling shot by shot shows them.

A scene comes twice, as history at a noise level t_c and with its shots at levels of their own; the model has an
attention in which the latter read the former (attention/taught.py), so one pass serves all shots. The history is the
data's, or, at times, what the model makes of it: sampling has no other.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from moc_jax.attention.taught import in_pairs
from moc_jax.config import DiffusionConfig
from moc_jax.diffusion.process import VelocityFn, add_noise
from moc_jax.scene import NO_SHOT, Scene, SceneLengths, frame_shot
from moc_jax.shapes import Array, Float, Key

Model = Callable[[Array, Array, Array, SceneLengths], Array]
"""(video, text, t, lengths) of a batch of twice as many scenes, each one's history before it -> velocity."""


def teacher_forced(
    model: Model, scene: Scene, key: Key[Array, ""], cfg: DiffusionConfig, sampling: Model | None = None
) -> VelocityFn:
    """The velocity of shots whose history is `scene` with noise that `key` draws, of one level for each scene.

    Args:
        model: what learns.
        sampling: the same as it samples, with nothing dropped; it makes the histories that are the model's own.
    """
    level_key, noise_key = jax.random.split(key)
    low, high = cfg.history_noise
    level = jax.random.uniform(level_key, (scene.video.shape[0], 1), minval=low, maxval=high)
    history_t = jnp.broadcast_to(level, scene.lengths.shot_frames.shape)
    noise = jax.random.normal(noise_key, scene.video.shape, scene.video.dtype)
    text, lengths = jax.tree.map(lambda x: in_pairs(x, x), (scene.text, scene.lengths))

    def after(model: Model, video: Float[Array, "B F Y X Z"]) -> VelocityFn:
        """The velocity of shots whose history is `video`."""
        history = add_noise(video, noise, history_t, scene.lengths)

        def velocity(z, t):
            return model(in_pairs(history, z), text, in_pairs(history_t, t), lengths)[1::2]

        return velocity

    if not cfg.own_history:
        return after(model, scene.video)
    sampling = model if sampling is None else sampling
    return after(model, own_history(after(sampling, scene.video), scene, jax.random.fold_in(key, 1), cfg))


def own_history(
    velocity: VelocityFn, scene: Scene, key: Key[Array, ""], cfg: DiffusionConfig
) -> Float[Array, "B F Y X Z"]:
    """The scenes, some of them as the model makes them of themselves with noise; no gradients flow through it.

    All shots at once, each after the shots before it as they are in the data, so mistakes do not add up from shot to
    shot.
    """
    own_key, level_key, noise_key = jax.random.split(key, 3)
    video, (low, high) = scene.video, cfg.own_history_from
    begin = jax.random.uniform(level_key, (video.shape[0], 1), minval=low, maxval=high)

    def at(level):
        return jnp.broadcast_to(level, scene.lengths.shot_frames.shape)

    def euler(step, z):
        level = begin * (1 - step / cfg.own_history_steps)
        return z - (begin / cfg.own_history_steps)[..., None, None, None] * velocity(z, at(level))

    z = add_noise(video, jax.random.normal(noise_key, video.shape, video.dtype), at(begin), scene.lengths)
    z = jax.lax.fori_loop(0, cfg.own_history_steps, euler, z)
    own = jax.random.bernoulli(own_key, cfg.own_history, (video.shape[0],))[:, None]
    own &= frame_shot(scene.lengths.shot_frames, video.shape[1]) != NO_SHOT
    return jax.lax.stop_gradient(jnp.where(own[..., None, None, None], z, video))
