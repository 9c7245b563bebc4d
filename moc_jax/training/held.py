"""Bytes that one device holds at the worst moment of a step, by what holds them.

    state       weights, optimizer and average, exactly; bfloat16 copies and gradients by parameter that is trained;
                frozen weights, which are held in the type that they are read in
    kept        what the loop over layers keeps for the backward pass (`model.remat`), exactly
    a block     while one block is differentiated: the larger of what its attention holds (q, k, v, outputs, their
                gradients, and the pairs that a group of heads passes through) and what its MLP holds
    scene       latents, noise and targets, whose 16 channels fill 128 lanes on TPUs
    exchange    what a mesh gathers: a layer's weights, and tokens of other devices

What is not exact is fitted to XLA's buffer assignment of training steps of the MMDiT
(`benchmarks/results/plan_memory-*.json`; `python -m benchmarks.plan_memory` compiles and compares), and for all others
to steps that were measured on an H200. A run's `model.remat auto` goes by it, and `moc-plan`.
"""

import dataclasses
import math
from collections.abc import Mapping

import jax.numpy as jnp

from moc_jax.attention import deal
from moc_jax.attention.accounting import Exchange
from moc_jax.attention.layout import head_groups
from moc_jax.attention.pallas_tpu import device as tpu
from moc_jax.attention.pallas_tpu.attend import buffer_limit
from moc_jax.chips import Chip
from moc_jax.config import MoCConfig, ModelConfig, Remat
from moc_jax.models import kept_bytes, parameter_count
from moc_jax.scene import SceneShape
from moc_jax.training.state import TrainState, device_bytes

_TILE, _SPAN, _ROWS, _LANES = 1024, 7168, 8, 128  # of the kernels for TPUs: slots, queries, rows of a tile, lanes
# On GPUs. While a block is differentiated: numbers per token and unit of width, and bytes whatever the size. Fitted to
# steps on an H200 from 10 thousand tokens to 180 thousand, which needed between 95 and 100 % of what this comes to.
_BLOCK, _FIXED = 50, 2**28
_GATHERED = 5  # keys and values: what is received, in order, and its gradients: in order, by groups, and received
_KEYS = 4  # on TPUs, of what XLA held at once: received, in order, and as many gradients
_SAMPLED = {"torus": 16, "gpu": 11}  # numbers per token and unit of width in a forward pass alone


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fit:
    """Of a kind of TPU. Numbers of bfloat16 per token, but where it says else."""

    weights: float
    """Bytes per parameter that a device holds: copies in bfloat16, gradients, what the optimizer has in hand."""
    attention: float
    """Per unit of width, in attention."""
    padding: float
    """Per lane that heads narrower than 128 leave empty, in attention."""
    pairs: float
    """Bytes for each number of a group's pairs."""
    mlp: float
    """Per unit of width, in the MLP."""
    hidden: float
    """Per unit of the MLP's hidden width."""
    mlp_padding: float
    latents: float
    """Arrays of latents, 4 positions and 128 lanes of float32 for each token."""
    gathered: float
    """Bytes per parameter of one layer, where devices have parts of it."""
    latents_of_meshes: float
    """Instead of `latents`, in a program for several devices."""


FITS = {
    "v5p": Fit(
        weights=1.39,
        attention=29.03,
        padding=31.83,
        pairs=10.43,
        mlp=25.03,
        hidden=2.82,
        mlp_padding=29.39,
        latents=3.53,
        gathered=0,
        latents_of_meshes=0,
    ),
    "v6e": Fit(
        weights=0,
        attention=14,
        padding=15.49,
        pairs=12.69,
        mlp=27.27,
        hidden=0.48,
        mlp_padding=26.71,
        latents=10.38,
        gathered=0.54,
        latents_of_meshes=20.42,
    ),
    "v5e": Fit(
        weights=6.09,
        attention=21.56,
        padding=26.66,
        pairs=10.53,
        mlp=22.86,
        hidden=0.68,
        mlp_padding=29.39,
        latents=4.39,
        gathered=1.68,
        latents_of_meshes=9.75,
    ),
    "tpu7x": Fit(
        weights=14.26,
        attention=26.32,
        padding=31.83,
        pairs=10.09,
        mlp=25.54,
        hidden=2.69,
        mlp_padding=29.39,
        latents=10.15,
        gathered=1.05,
        latents_of_meshes=11.29,
    ),
}
"""By chip; others are taken to be as v5p."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Held:
    """Of one device."""

    parts: Mapping[str, float]

    @property
    def total(self) -> float:
        """All of it."""
        return sum(self.parts.values())


def training_bytes(
    model: ModelConfig,
    policy: Remat,
    moc: MoCConfig,
    shape: SceneShape,
    scenes: int,
    state: Mapping[str, int],
    sizes: Mapping[str, int],
    chip: Chip | None,
    moved: Exchange | None = None,
) -> Held:
    """In a training step.

    Args:
        shape: of a scene.
        scenes: that a group of devices which shares them has.
        state: bytes of `weights`, `optimizer`, `average` and `frozen` that a device holds.
        sizes: of the mesh.
        chip: a device; None: a kind that is not listed, counted as GPUs are.
        moved: by attention, between the devices of a scene; None: nothing.
    """
    share = sizes["context"] * sizes["tensor"]
    tokens = math.ceil(scenes * shape.tokens / share)
    kept = tokens * kept_bytes(model, policy, moc, shape.shots)
    parameters = state["weights"] / 4
    parts = {**state, "kept by layers": kept}
    if chip is None or not chip.torus:
        block = tokens * _BLOCK * model.dim * jnp.dtype(model.dtype).itemsize
        parts |= {"gradients": state["weights"], "a block": block, "fixed": _FIXED}
        return Held(parts={**parts, "exchange": _GATHERED * moved.at_once} if moved and moved.at_once else parts)
    fit, alone = FITS.get(chip.name, FITS["v5p"]), math.prod(sizes.values()) == 1
    groups = _groups_of_heads(model, sizes)
    heads, queries = model.heads // sizes["tensor"] // groups, math.ceil(shape.tokens * groups / sizes["context"])
    padding = model.heads * max(0, _LANES - model.head_dim)
    pairs = fit.pairs * _pairs(moc, shape, queries, scenes, heads, model.head_dim, chip)
    attention = 2 * tokens * (fit.attention * model.dim + fit.padding * padding) + pairs
    mlp = 2 * tokens * (fit.mlp * model.dim + fit.hidden * model.mlp_dim + fit.mlp_padding * padding)
    parts |= {
        "copies and gradients": fit.weights * parameters,
        "a block": max(attention, mlp),
        "scene": (fit.latents if alone else fit.latents_of_meshes) * tokens * 4 * _LANES * 4,
    }
    if sizes["fsdp"] * sizes["context"] > 1:
        parts["gathered weights"] = fit.gathered * parameter_count(model) / model.depth / sizes["tensor"]
    dispatched = moved.at_once if moved and moved.kind == "dispatch" else None
    return Held(parts=parts | _exchanged(model, tokens, sizes, dispatched))


def state_bytes(state: TrainState) -> dict[str, int]:
    """That one device holds of the training state, arrays or ShapeDtypeStructs with shardings, by its parts."""
    found = {"weights": state.params, "optimizer": state.optimizer, "average": state.ema, "frozen": state.frozen}
    return {name: device_bytes(tree) for name, tree in found.items()}


def sampling_bytes(
    model: ModelConfig, tokens: int, weights: int, sizes: Mapping[str, int], chip: Chip, dispatched: int | None = None
) -> Held:
    """In a denoising step without guidance: float32 weights, a copy in the compute type, and one block."""
    itemsize = jnp.dtype(model.dtype).itemsize
    tokens = math.ceil(tokens / (sizes["context"] * sizes["tensor"]))
    block = _SAMPLED["torus" if chip.torus else "gpu"] * model.dim * itemsize * tokens
    copies = weights * itemsize / 4 if itemsize < 4 else 0
    parts = {"weights": weights, "copies": copies, "a block": block}
    return Held(parts=parts | _exchanged(model, tokens, sizes, dispatched))


def _groups_of_heads(model: ModelConfig, sizes: Mapping[str, int]) -> int:
    return deal.head_groups(model.heads // sizes["tensor"], sizes["context"])


def _exchanged(model: ModelConfig, tokens: int, sizes: Mapping[str, int], dispatched: int | None) -> dict[str, float]:
    """q, k, v and the output on their way to other devices, sent and received; and keys of all groups of tokens."""
    if sizes["context"] == 1:
        return {}
    width, itemsize = model.heads * max(model.head_dim, _LANES), jnp.dtype(model.dtype).itemsize
    groups = _groups_of_heads(model, sizes)
    keys = 2 * width / groups * tokens * sizes["context"] * (groups < sizes["context"])
    of_keys = _KEYS * itemsize * keys if dispatched is None else dispatched
    return {"exchange": itemsize * 2 * 4 * width * tokens + of_keys}


def _pairs(
    moc: MoCConfig, shape: SceneShape, queries: int, scenes: int, heads: int, head_dim: int, chip: Chip
) -> float:
    """Numbers of a group's pairs, of so many queries of each scene, each head's padded to whole tiles: as the kernels
    lay them out."""
    if moc.mode == "dense" or not moc.top_k:
        return 0.0
    per_frame = shape.rows * shape.columns
    shot = shape.frames // max(1, shape.shots) * (1 if moc.chunk.unit == "frames" else per_frame)
    chunks = math.ceil(shot / moc.chunk.size) * shape.shots
    picks, spans = moc.most_picks(shape.shots), math.ceil(queries / _SPAN)
    slots = (math.ceil((queries * picks + spans * chunks * (_ROWS - 1)) / _TILE) + chunks) * _TILE * scenes
    width = max(head_dim, _LANES)
    groups = head_groups(heads, slots * width * 4, buffer_limit(tpu.Chip(chip.name)))
    return heads // groups * slots * width
