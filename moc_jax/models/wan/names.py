"""Which tensor of a public file is which weight: names, shapes, and the order of numbers.

Diffusers renamed what the Wan team had named, and its norm2 is the team's norm3; ComfyUI has the team's names behind a
prefix. Each tensor stands once in the table below, with both names, so nothing is renamed twice.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Literal

import numpy as np

from moc_jax.config import WanConfig
from moc_jax.sharding import Path

Names = Literal["diffusers", "original", "comfyui"]
COMFYUI = "model.diffusion_model."

# Diffusers' name, the Wan team's, where it lies among our weights. Of names without an end, weight and bias.
_AROUND = (
    ("patch_embedding", "patch_embedding", "video_in"),
    ("condition_embedder.time_embedder.linear_1", "time_embedding.0", "time/hidden"),
    ("condition_embedder.time_embedder.linear_2", "time_embedding.2", "time/out"),
    ("condition_embedder.time_proj", "time_projection.1", "time_projection"),
    ("condition_embedder.text_embedder.linear_1", "text_embedding.0", "text_hidden"),
    ("condition_embedder.text_embedder.linear_2", "text_embedding.2", "text_out"),
    ("proj_out", "head.head", "head"),
    ("scale_shift_table", "head.modulation", "head_modulation"),
)
_IN_BLOCKS = (
    *(
        (f"{theirs}.{linear}", f"{original}.{short}", f"{ours}/{name}")
        for theirs, original, ours in (("attn1", "self_attn", "attention"), ("attn2", "cross_attn", "cross"))
        for linear, short, name in (
            ("to_q", "q", "q"),
            ("to_k", "k", "k"),
            ("to_v", "v", "v"),
            ("to_out.0", "o", "out"),
            ("norm_q", "norm_q", "q_norm/scale"),
            ("norm_k", "norm_k", "k_norm/scale"),
        )
    ),
    ("norm2", "norm3", "cross_norm"),
    ("ffn.net.0.proj", "ffn.0", "mlp/up"),
    ("ffn.net.2", "ffn.2", "mlp/down"),
    ("scale_shift_table", "modulation", "modulation"),
)
_TABLES = "modulation", "head_modulation"


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of a file, and where its numbers lie among our weights.

    Its axes are split into `split` and put in `order`; then they are the weight's, some of them together.
    """

    names: tuple[str, str]  # diffusers', and the Wan team's
    shape: tuple[int, ...]
    path: Path  # of the weight
    layer: int | None  # its place along the weight's first axis; None: it is the whole weight
    split: tuple[int, ...]
    order: tuple[int, ...]
    part: tuple[int, ...]  # shape of the weight, or of its layer

    def name(self, names: Names) -> str:
        """What a file calls it."""
        diffusers, original = self.names
        return {"diffusers": diffusers, "original": original, "comfyui": COMFYUI + original}[names]

    def of_file(self, tensor: np.ndarray) -> np.ndarray:
        """The weight's numbers, or its layer's."""
        return tensor.reshape(self.split).transpose(self.order).reshape(self.part)

    def to_file(self, part: np.ndarray) -> np.ndarray:
        """What `of_file` was given."""
        back = part.reshape([self.split[i] for i in self.order]).transpose(np.argsort(self.order))
        return np.ascontiguousarray(back).reshape(self.shape)


def tensors(cfg: WanConfig) -> Iterator[Tensor]:
    """Those of one network; paths begin below it."""
    for names, ours, layer in _entries(cfg.depth):
        yield from _of_module(cfg, names, ours, layer)


def _entries(depth: int) -> Iterator[tuple[tuple[str, str], str, int | None]]:
    """Names in files, name here and layer of every module."""
    for diffusers, original, ours in _AROUND:
        yield (diffusers, original), ours, None
    for layer in range(depth):
        for diffusers, original, ours in _IN_BLOCKS:
            yield (f"blocks.{layer}.{diffusers}", f"blocks.{layer}.{original}"), f"blocks/{ours}", layer


def linear_maps(depth: int) -> Iterator[tuple[tuple[str, str], str, int | None]]:
    """Diffusers' name and the Wan team's of every linear map, its path here, and its layer."""
    for names, ours, layer in _entries(depth):
        if ours.split("/")[-1] not in (*_TABLES, "scale", "cross_norm"):
            yield names, ours, layer


def adapter_tensors(
    cfg: WanConfig, names: tuple[str, str], ours: str, layer: int | None, rank: int
) -> tuple[Tensor, Tensor]:
    """A and B of a linear map's adapter, as public files have them: [rank, inputs] and [outputs, rank]."""
    path = tuple(ours.split("/"))
    inputs, outputs = _sizes(cfg, path)
    a, b = ((f"{names[0]}.lora_{x}.weight", f"{names[1]}.lora_{y}.weight") for x, y in (("A", "down"), ("B", "up")))
    if path[-1] == "video_in":
        of_a = _patches(cfg, a, (*path, "lora", "a"), layer, inputs, (rank,), False)
        shape = *outputs, rank
        return of_a, _tensor(b, (*shape, 1, 1, 1), (*path, "lora", "b"), layer, shape, (1, 0), shape[::-1])
    of_a = _matrix(cfg, a, (*path, "lora", "a"), layer, inputs, (rank,), False)
    return of_a, _matrix(cfg, b, (*path, "lora", "b"), layer, (rank,), outputs, _turned(ours))


def _turned(ours: str) -> bool:
    path = ours.split("/")
    return ours.startswith("blocks/attention/") and path[2] in ("q", "k", "q_norm", "k_norm")


def _of_module(cfg: WanConfig, names: tuple[str, str], ours: str, layer: int | None) -> Iterator[Tensor]:
    path = tuple(ours.split("/"))
    turned = _turned(ours)
    if path[-1] in _TABLES:
        rows = 6 if layer is not None else 2
        yield _tensor(names, (1, rows, cfg.dim), path, layer, (rows, cfg.dim), (0, 1), (rows, cfg.dim))
    elif path[-1] == "scale":
        yield _vector(_ended(names, "weight"), path, layer, (cfg.heads, cfg.head_dim), turned)
    elif path[-1] == "cross_norm":
        yield _vector(_ended(names, "weight"), (*path, "scale"), layer, (cfg.dim,), turned)
        yield _vector(_ended(names, "bias"), (*path, "bias"), layer, (cfg.dim,), turned)
    else:
        inputs, outputs = _sizes(cfg, path)
        weight = _patches if path[-1] == "video_in" else _matrix
        yield weight(cfg, _ended(names, "weight"), (*path, "kernel"), layer, inputs, outputs, turned)
        yield _vector(_ended(names, "bias"), (*path, "bias"), layer, outputs, turned)


def _ended(names: tuple[str, str], end: str) -> tuple[str, str]:
    return f"{names[0]}.{end}", f"{names[1]}.{end}"


def _sizes(cfg: WanConfig, path: Path) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Axes of a linear map's inputs and outputs."""
    heads, dim = (cfg.heads, cfg.head_dim), (cfg.dim,)
    return {
        "video_in": (((cfg.latent_channels + cfg.condition_channels) * cfg.patch_size,), dim),
        "hidden": ((256,), dim),
        "time_projection": (dim, (6, cfg.dim)),
        "text_hidden": ((cfg.text_dim,), dim),
        "text_out": (dim, dim),
        "head": (dim, (cfg.latent_channels * cfg.patch_size,)),
        "up": (dim, (cfg.mlp_dim,)),
        "down": ((cfg.mlp_dim,), dim),
        "q": (dim, heads),
        "k": (dim, heads),
        "v": (dim, heads),
        "out": (dim if path[0] == "time" else heads, dim),
    }[path[-1]]


def _tensor(names, shape, path, layer, split, order, part) -> Tensor:
    return Tensor(names, tuple(shape), path, layer, tuple(split), tuple(order), tuple(part))


def _pairs(sizes: tuple[int, ...], turned: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Axes of outputs, split and in order: in heads that turn, neighbours are pairs in the file, halves here (rope)."""
    if not turned:
        return sizes, tuple(range(len(sizes)))
    return (sizes[0], sizes[1] // 2, 2), (0, 2, 1)


def _vector(names, path, layer, sizes, turned) -> Tensor:
    split, order = _pairs(sizes, turned)
    return _tensor(names, (math.prod(sizes),), path, layer, split, order, sizes)


def _matrix(cfg, names, path, layer, inputs, outputs, turned) -> Tensor:
    """[outputs, inputs] in the file."""
    split, order = _pairs(outputs, turned)
    of_inputs = range(len(split), len(split) + len(inputs))
    shape = math.prod(outputs), math.prod(inputs)
    return _tensor(names, shape, path, layer, split + inputs, (*of_inputs, *order), inputs + outputs)


def _patches(cfg, names, path, layer, inputs, outputs, turned) -> Tensor:
    """A convolution [outputs, channels, t, y, x] in the file; here a patch's channels lie together."""
    shape = *outputs, inputs[0] // cfg.patch_size, *cfg.patch
    return _tensor(names, shape, path, layer, shape, (2, 3, 4, 1, 0), inputs + outputs)
