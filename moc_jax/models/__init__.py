"""Models that predict the flow's velocity from noisy latents and captions, a folder per family.

`ModelConfig` says which: `MODELS` has the class that each of its kinds builds. All other modules import from here.
"""

import functools
import math

import jax
from flax import nnx

from moc_jax.config import MMDiTConfig, MoCConfig, ModelConfig, Remat, WanConfig
from moc_jax.config.base import Settings
from moc_jax.models.after import After, Routed, kept_size, why_not
from moc_jax.models.family import VideoModel
from moc_jax.models.lora import adapted, frozen, joined, merged, trained, with_dropout
from moc_jax.models.mmdit import MMDiT
from moc_jax.models.patches import scene_shape
from moc_jax.models.wan import WanDiT
from moc_jax.models.wan.adapters import adapter_part, original_name, public_adapters, written_names
from moc_jax.models.wan.names import Names
from moc_jax.models.wan.names import Tensor as PublicTensor
from moc_jax.models.wan.published import (
    SIZES,
    check_index,
    public_index,
    public_settings,
    public_tensors,
    recognised,
    with_experts,
)
from moc_jax.sharding import Params, key_path, logical_axes

__all__ = [
    "MODELS",
    "SIZES",
    "After",
    "Names",
    "PublicTensor",
    "Routed",
    "VideoModel",
    "abstract",
    "adapter_part",
    "build",
    "check_index",
    "frozen",
    "joined",
    "kept_bytes",
    "kept_size",
    "matrix_flops",
    "merged",
    "original_name",
    "parameter_count",
    "public_adapters",
    "public_index",
    "public_settings",
    "public_tensors",
    "recognised",
    "scene_shape",
    "step_flops",
    "trained",
    "trained_count",
    "why_not",
    "with_dropout",
    "with_experts",
    "written_names",
]

MODELS: dict[type[Settings], type[VideoModel]] = {MMDiTConfig: MMDiT, WanConfig: WanDiT}


def build(cfg: ModelConfig, *, rngs: nnx.Rngs) -> VideoModel:
    """The model that `cfg` names, with fresh weights and adapters; ConfigError: `model.lora.targets` names nothing."""
    return adapted(MODELS[type(cfg)](cfg, rngs=rngs), cfg.lora, rngs=rngs)


def abstract(cfg: ModelConfig) -> tuple[nnx.GraphDef[VideoModel], nnx.State]:
    """The model without its numbers: its graph, and the shape, type and logical axes of every weight."""
    return nnx.split(nnx.eval_shape(lambda: build(cfg, rngs=nnx.Rngs(0))), nnx.Param)


@functools.cache
def parameter_count(cfg: ModelConfig) -> int:
    """Numbers that a model is made of, adapters aside."""
    weights = nnx.to_pure_dict(abstract(cfg)[1])
    return _count(frozen(weights) or weights)


def trained_count(cfg: ModelConfig) -> int:
    """Numbers that training changes: those of adapters, if there are any."""
    return _count(trained(nnx.to_pure_dict(abstract(cfg)[1])))


def moving_count(cfg: ModelConfig) -> int:
    """Those of `parameter_count` that devices gather to use them: all but modulation's (`linear.Staying`)."""
    shapes = abstract(cfg)[1]
    weights, logical = nnx.to_pure_dict(shapes), logical_axes(shapes)
    held = jax.tree.leaves_with_path(frozen(weights) or weights)
    return sum(math.prod(leaf.shape) for path, leaf in held if "embed_in" not in logical[key_path(path)])


def _count(tree: Params) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def matrix_flops(cfg: ModelConfig, text_tokens: int, video_tokens: int) -> int:
    """FLOPs of one forward pass outside attention; nothing that is recomputed."""
    return MODELS[type(cfg)].matrix_flops(cfg, text_tokens, video_tokens)


def step_flops(cfg: ModelConfig, matrices: float, attention: float) -> float:
    """FLOPs of a training step, from those of a forward pass: three times as many, but of frozen matrices twice.

    What adapters add is not counted, nor what is recomputed.
    """
    return (2 if cfg.lora.rank else 3) * matrices + 3 * attention


def kept_bytes(cfg: ModelConfig, remat: Remat, moc: MoCConfig, shots: int) -> int:
    """Bytes per token that all blocks together keep for the backward pass of scenes of so many shots; `remat` is
    neither `none` nor `auto`."""
    return MODELS[type(cfg)].kept_bytes(cfg, remat, moc, shots)
