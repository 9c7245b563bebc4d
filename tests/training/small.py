"""A model and batches small enough to train on two cores, with everything in them that can go wrong."""

import dataclasses
import functools

import jax
import numpy as np
from jax.sharding import Mesh

from moc_jax.config import (
    ChunkConfig,
    Config,
    DataConfig,
    HashConfig,
    MeshConfig,
    MMDiTConfig,
    MoCConfig,
    OptimizerConfig,
    PcaConfig,
    TrainConfig,
)
from moc_jax.scene import Scene, SceneLengths
from moc_jax.sharding import make_mesh
from moc_jax.training.state import Blueprint, TrainState, make_blueprint

CONFIG = Config(
    model=MMDiTConfig(dim=16, depth=2, heads=2, latent_channels=4, text_dim=8, dtype="float32", remat="none"),
    codec=PcaConfig(channels=4),
    text=HashConfig(dim=8),
    moc=MoCConfig(chunk=ChunkConfig(unit="frames", size=1), top_k=2, drop_off_max=1.0, drop_in_rate=1.0),
    optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=0, clip_norm=0.0),
    train=TrainConfig(steps=100),
)

# The same, to be run on videos.
DATA = dataclasses.replace(
    CONFIG,
    data=DataConfig(height=32, width=48, fps=12.0, caption_dropout=0.3, image_conditioning=0.3, max_buckets=1),
    train=TrainConfig(steps=6, batch_size=2, checkpoint_every=3, log_every=2),
)


def changed(config: Config, **parts) -> Config:
    """`changed(CONFIG, train={"steps": 3})`."""
    new = {name: dataclasses.replace(getattr(config, name), **fields) for name, fields in parts.items()}
    return dataclasses.replace(config, **new)


def blueprint_of(config: Config, mesh: Mesh) -> Blueprint:
    """As a run makes it."""
    return make_blueprint(config.model, config.optimizer, config.train, mesh)


def mesh_of(count: int, **sizes: int):
    return make_mesh(MeshConfig(**sizes), jax.devices()[:count])


def make_scene(seed: int = 0, batch: int = 8, frames: int = 7) -> Scene:
    """Scenes of unequal lengths in one bucket: padding in shots, frames and text; the last one is all padding."""
    random = np.random.default_rng(seed)
    shot_frames = random.integers(0, 3, (batch, 3)).astype(np.int32)
    shot_frames[:, 0] += 1
    shot_frames[-1] = 0
    text_lengths = random.integers(1, 3, (batch, 4)).astype(np.int32) * np.pad(
        shot_frames > 0, ((0, 0), (1, 0)), "edge"
    )
    used = np.arange(frames)[None] < shot_frames.sum(axis=1)[:, None]
    words = np.arange(9)[None] < text_lengths.sum(axis=1)[:, None]
    video = random.normal(size=(batch, frames, 4, 4, 4)) * used[:, :, None, None, None]
    text = random.normal(size=(batch, 9, 8)) * words[:, :, None]
    lengths = SceneLengths(shot_frames, text_lengths)
    return Scene(video.astype(np.float32), text.astype(np.float32), lengths)


@functools.cache
def _noise(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def random_state(config: Config, blueprint: Blueprint) -> TrainState:
    """A state whose weights are all in play (fresh ones hold many zeros)."""
    params = jax.tree.map(lambda x: 0.1 * _noise(x.shape, x.ndim), blueprint.abstract.params)
    optimizer = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), blueprint.abstract.optimizer)
    ema = jax.tree.map(np.copy, params) if config.train.ema_decay else None
    return jax.device_put(TrainState(np.zeros((), np.int32), params, optimizer, ema), blueprint.shardings)
