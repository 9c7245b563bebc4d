"""Models that predict the flow's velocity from noisy latents and captions, a folder per family.

`ModelConfig` says which: `MODELS` has the class that each of its kinds builds. All other modules import from here.
"""

import math

import jax
from flax import nnx

from moc_jax.config import MMDiTConfig, MoCConfig, ModelConfig, Remat
from moc_jax.config.base import Settings
from moc_jax.models.family import Routed, VideoModel
from moc_jax.models.mmdit import MMDiT
from moc_jax.models.patches import scene_shape

__all__ = [
    "MODELS",
    "Routed",
    "VideoModel",
    "abstract",
    "build",
    "kept_bytes",
    "matrix_flops",
    "parameter_count",
    "scene_shape",
]

MODELS: dict[type[Settings], type[VideoModel]] = {MMDiTConfig: MMDiT}


def build(cfg: ModelConfig, *, rngs: nnx.Rngs) -> VideoModel:
    """The model that `cfg` names, with fresh weights."""
    return MODELS[type(cfg)](cfg, rngs=rngs)


def abstract(cfg: ModelConfig) -> tuple[nnx.GraphDef[VideoModel], nnx.State]:
    """The model without its numbers: its graph, and the shape, type and logical axes of every weight."""
    return nnx.split(nnx.eval_shape(lambda: build(cfg, rngs=nnx.Rngs(0))), nnx.Param)


def parameter_count(cfg: ModelConfig) -> int:
    """Numbers that training changes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract(cfg)[1]))


def matrix_flops(cfg: ModelConfig, text_tokens: int, video_tokens: int) -> int:
    """FLOPs of one forward pass outside attention; nothing that is recomputed."""
    return MODELS[type(cfg)].matrix_flops(cfg, text_tokens, video_tokens)


def kept_bytes(cfg: ModelConfig, remat: Remat, moc: MoCConfig) -> int:
    """Bytes per token that all blocks together keep for the backward pass; `remat` is neither `none` nor `auto`."""
    return MODELS[type(cfg)].kept_bytes(cfg, remat, moc)
