"""Teacher forcing: every shot is learned while it reads the shots before it as sampling shot by shot shows them.

A scene comes twice, as history at a noise level t_c and with its shots at levels of their own; the model has an
attention in which the latter read the former (attention/taught.py), so one pass serves all shots.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from moc_jax.attention.taught import in_pairs
from moc_jax.config import DiffusionConfig
from moc_jax.diffusion.process import VelocityFn, add_noise
from moc_jax.scene import Scene, SceneLengths
from moc_jax.shapes import Array, Key

Model = Callable[[Array, Array, Array, SceneLengths], Array]
"""(video, text, t, lengths) of a batch of twice as many scenes, each one's history before it -> velocity."""


def teacher_forced(model: Model, scene: Scene, key: Key[Array, ""], cfg: DiffusionConfig) -> VelocityFn:
    """The velocity of shots whose history is `scene` with noise that `key` draws, of one level for each scene."""
    level_key, noise_key = jax.random.split(key)
    low, high = cfg.history_noise
    level = jax.random.uniform(level_key, (scene.video.shape[0], 1), minval=low, maxval=high)
    history_t = jnp.broadcast_to(level, scene.lengths.shot_frames.shape)
    noise = jax.random.normal(noise_key, scene.video.shape, scene.video.dtype)
    history = add_noise(scene.video, noise, history_t, scene.lengths)
    text, lengths = jax.tree.map(lambda x: in_pairs(x, x), (scene.text, scene.lengths))

    def velocity(z, t):
        return model(in_pairs(history, z), text, in_pairs(history_t, t), lengths)[1::2]

    return velocity
