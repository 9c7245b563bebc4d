"""A tiny world to sample in: model with random weights, codec fitted on noise, storyboards."""

import dataclasses
import functools

import jax
import numpy as np
from flax import nnx

from moc_jax import models
from moc_jax.codecs import fit_codec
from moc_jax.config import (
    AttentionConfig,
    BucketConfig,
    ChunkConfig,
    Config,
    DataConfig,
    HashConfig,
    MMDiTConfig,
    MoCConfig,
    PcaConfig,
    SampleConfig,
)
from moc_jax.sampling.generate import Sampler
from moc_jax.sampling.scenes import Canvas
from moc_jax.sampling.storyboard import parse_storyboard

CONFIG = Config(
    moc=MoCConfig(chunk=ChunkConfig(unit="frames", size=1), top_k=1),
    attention=AttentionConfig(backend="reference"),
    model=MMDiTConfig(dim=32, depth=2, heads=2, latent_channels=4, text_dim=8, dtype="float32", remat="none"),
    codec=PcaConfig(channels=4),
    text=HashConfig(dim=8, max_tokens=12),
    data=DataConfig(height=16, width=32, fps=12.0),
    sample=SampleConfig(steps=3, guidance=2.0, seed=5),
)

BUCKET = BucketConfig(shots=4, frames=8, text_tokens=40)


@functools.cache
def make_codec(cfg=CONFIG.codec):
    random = np.random.default_rng(0)
    coarse = random.uniform(-1, 1, size=(3, 9, 4, 8, 3)).astype(np.float32)
    return fit_codec(cfg, [np.kron(clip, np.ones((1, 4, 4, 1), np.float32)) for clip in coarse])


def canvas_of(config):
    return Canvas(config.data, make_codec(), config.model.patch, config.moc)


@functools.cache
def make_params(cfg=CONFIG.model):
    random = np.random.default_rng(1)
    shapes = nnx.to_pure_dict(models.abstract(cfg)[1])
    return jax.tree.map(lambda x: (0.2 * random.normal(size=x.shape)).astype(np.float32), shapes)


def make_board(shots, caption="a street", **fields):
    """`shots`: (caption, seconds) or a mapping of fields, each."""
    fields["shots"] = [shot if isinstance(shot, dict) else dict(zip(("caption", "seconds"), shot)) for shot in shots]
    return parse_storyboard({"caption": caption, **fields})


def with_sample(**settings):
    return dataclasses.replace(CONFIG, sample=dataclasses.replace(CONFIG.sample, **settings))


def with_moc(**settings):
    return dataclasses.replace(CONFIG, moc=dataclasses.replace(CONFIG.moc, **settings))


@functools.cache
def make_sampler(config):
    return Sampler(config, make_codec())


def run(*boards, config=CONFIG, params=None):
    """Samples in the one bucket of these tests, so that each configuration compiles once."""
    return make_sampler(config)(make_params() if params is None else params, boards, bucket=BUCKET)
