"""What a run is about to do and what that costs, printed before the first step."""

import dataclasses
import math
import pathlib
import shutil

import flax
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

import moc_jax
from moc_jax.attention.accounting import Exchange, account, chosen_exchange, group_pairs
from moc_jax.attention.api import routed_attention
from moc_jax.attention.backends import Backend
from moc_jax.attention.deal import Deal
from moc_jax.attention.sharded import deal_of
from moc_jax.attention.tilings import given_tiling
from moc_jax.chips import chip_of
from moc_jax.config import BucketConfig, Config, MoCConfig
from moc_jax.data.buckets import Buckets
from moc_jax.data.manifest import Manifest, SceneEntry
from moc_jax.data.table import Table
from moc_jax.models import matrix_flops, parameter_count, scene_shape, step_flops
from moc_jax.scene import SceneLengths, chunk_table
from moc_jax.sharding import AXES, replicated_weights
from moc_jax.showing import printable
from moc_jax.training.optimizer import remainder
from moc_jax.training.state import Blueprint, device_bytes

_SCENES = 16  # per bucket, to take the means over


@dataclasses.dataclass(frozen=True)
class SceneCost:
    """Means over a bucket's scenes."""

    tokens: float  # text and video
    flops: float  # of the model, forward and backward; recomputation is not counted
    attention_share: float  # of `flops`
    backend: Backend  # attention's
    sparsity: float  # 1 - attended pairs / all pairs, if each query picks the longest chunks it may
    deal: Deal  # how the scene lies on its devices
    exchanged: Exchange  # what they exchange for a layer, if a device has one scene
    gathered: int  # bytes of keys in it, if these are gathered
    imbalance: float  # the most that a group of tokens attends to, of the mean of its scene's groups


def scene_costs(cfg: Config, moc: MoCConfig, buckets: Buckets) -> list[SceneCost | None]:
    """What a scene of each bucket costs; None for a bucket without scenes."""
    attention = routed_attention(cfg.attention)
    q = jax.ShapeDtypeStruct((1, 1, cfg.model.heads, cfg.model.head_dim), cfg.model.dtype)

    def cost(shape: BucketConfig, scenes: Table[SceneEntry]) -> SceneCost | None:
        if not scenes:
            return None
        scenes = scenes[:: math.ceil(len(scenes) / _SCENES)]
        shot_frames = np.zeros((len(scenes), shape.shots), np.int32)
        text_lengths = np.zeros((len(scenes), shape.shots + 1), np.int32)
        for row, (frames, texts) in enumerate(zip(scenes.inner_of("shots", "frames"), buckets.text_lengths(scenes))):
            shot_frames[row, : len(frames)] = frames
            text_lengths[row, : len(texts)] = texts
        video = len(scenes), shape.frames, *cfg.latent_size, cfg.codec.channels
        text = len(scenes), shape.text_tokens, cfg.text.dim
        tokens_shape, lengths = scene_shape(
            cfg.model, video, text, SceneLengths(jnp.asarray(shot_frames), jnp.asarray(text_lengths))
        )
        table = jax.jit(chunk_table, static_argnums=(1, 2))(lengths, tokens_shape, moc.chunk)
        counted = account(table, moc, cfg.model.head_dim)
        video_tokens = int(lengths.shot_frames.sum()) * tokens_shape.rows * tokens_shape.columns
        dense = len(set(moc.dense_layers)) if moc.mode == "moc" else 0
        attended = cfg.model.heads * ((cfg.model.depth - dense) * counted.flops + dense * counted.flops_dense)
        matrices = matrix_flops(cfg.model, int(text_lengths.sum()), video_tokens)
        deal = deal_of(tokens_shape, cfg.model.heads, attention)
        heads, size = cfg.model.heads // deal.sharing, jnp.dtype(cfg.model.dtype).itemsize
        copies = cfg.diffusion.copies
        moved, gathered = (
            chosen_exchange(deal, table, moc, kind, heads, cfg.model.head_dim, scenes=copies, element_bytes=size)
            for kind in (cfg.training_exchange, "gather")
        )
        pairs = group_pairs(table, moc, deal, moved.kind)
        return SceneCost(
            tokens=counted.tokens / len(scenes),
            flops=copies * step_flops(cfg.model, matrices, attended) / len(scenes),
            attention_share=attended / (matrices + attended),
            backend=attention.backend_for(q, q, q, table, moc),
            sparsity=counted.sparsity * (1 - dense / cfg.model.depth),
            deal=deal,
            exchanged=moved,
            gathered=gathered.keys,
            imbalance=float((pairs.max(axis=1) / np.maximum(pairs.mean(axis=1), 1)).max()),
        )

    return [cost(shape, scenes) for shape, scenes in zip(buckets.shapes, buckets.scenes)]


Costs = dict[MoCConfig, list[SceneCost | None]]  # by stage of the chunk-size schedule, then by bucket


def stage_costs(cfg: Config, buckets: Buckets) -> Costs:
    """`scene_costs` for every attention config of the run."""
    steps = sorted({0, *(stage.step for stage in cfg.train.chunk_schedule)})
    return {moc: scene_costs(cfg, moc, buckets) for moc in (cfg.moc_at(step) for step in steps)}


def summary(
    cfg: Config, manifest: Manifest, buckets: list[Buckets], costs: Costs, mesh: Mesh, blueprint: Blueprint
) -> str:
    """Versions, devices, mesh, parameters, memory, scenes per bucket, and attention and FLOPs of every stage."""
    versions = f"moc_jax {moc_jax.__version__}, jax {jax.__version__}, flax {flax.__version__}"
    device = mesh.devices.flat[0]
    lines = [
        f"{versions}; {mesh.size} x {device.device_kind} in {jax.process_count()} process(es); "
        f"mesh {' x '.join(f'{axis} {mesh.shape[axis]}' for axis in AXES)}",
        *([] if chip_of(device.device_kind) else [f"  MFU is left out: no peak is known of {device.device_kind}"]),
        *_memory(blueprint, mesh),
        *_disk(cfg.workdir, cfg.train.keep_last, blueprint),
        manifest.summary(),
        *(split.summary() for split in buckets),
    ]
    for moc, of_buckets in costs.items():
        how = _reads(moc)
        for shape, cost in zip(buckets[0].shapes, of_buckets):
            if cost is not None:
                tiles = "" if given_tiling(cost.backend) is None else ", measured tiles"
                lines.append(
                    f"attention by {cost.backend.name} ({how}; bucket of {shape.frames} frames{tiles}) skips "
                    f"{cost.sparsity:.1%} of all pairs; "
                    f"{cost.tokens:,.0f} tokens and {si(cost.flops)}FLOP per scene, "
                    f"{si(cost.flops * cfg.train.batch_size)}FLOP per step, {cost.attention_share:.0%} in attention"
                )
                lines += _exchanges(cost)
    left = remainder(cfg.optimizer, cfg.train.steps)
    return "\n".join([*lines, *([left] if left else [])])


def model_card(cfg: Config, manifest: Manifest, step: int, digest: str) -> str:
    """What a checkpoint is, in words for people who find it, with what model hubs read at its head.

    Args:
        step: after which it is saved.
        digest: of its weights; videos sampled with them state it, too.
    """
    model, moc, data, counts = cfg.model, cfg.moc_at(step - 1), cfg.data, manifest.counts
    attention = "dense" if moc.mode == "dense" else f"chunks of {moc.chunk.size} {moc.chunk.unit}, {moc.top_k} picks"
    adapters = f", with adapters of rank {model.lora.rank}" if model.lora.rank else ""
    rows = {
        "weights": f"SHA-256 `{digest}`",
        "model": f"{model.name}, {parameter_count(model):,} parameters{adapters}, {model.depth} blocks of {model.dim}",
        "attention": f"Mixture of Contexts, {attention}; {moc.visibility} visibility",
        "trained": f"{step:,} of {cfg.train.steps:,} steps, batch size {cfg.train.batch_size}"
        + (f", from {pathlib.Path(cfg.train.init_from).name}" if cfg.train.init_from else ""),
        "data": f"scenes: {len(manifest.split('train')):,}; files: {counts['files']:,}; latent frames: "
        f"{counts['latent_frames']:,}; {data.height} x {data.width} pixels, {data.fps:g} frames per second",
        "captions": f"text encoder {cfg.text.name}",
        "codec": f"{cfg.codec.name}, {cfg.codec.channels} channels",
    }
    table = "\n".join(f"| {name} | {printable(value)} |" for name, value in rows.items())
    return f"""---
library_name: moc_jax
pipeline_tag: text-to-video
tags: [mixture-of-contexts, video-diffusion, jax, flax]
---

# A video model after {step:,} steps

| | |
|---|---|
{table}

## Use

With moc_jax {moc_jax.__version__}, `moc-sample --checkpoint <this folder> --storyboard scene.yaml --out scene.mp4`.

## Before you share it

- Licence: not stated. It depends on the videos, the captions and the weights that this was trained from.
- It shows what it was trained on, people and marks included; what it does on other captions has not been examined.
  `moc-sample --caption-filter` has a program of yours refuse captions.
- Its videos say in XMP that they are AI-generated and by which weights; `python -m moc_jax.provenance` shows it.
"""


def _exchanges(cost: SceneCost) -> list[str]:
    """How a scene lies on several devices, and what that costs."""
    deal, moved = cost.deal, cost.exchanged
    if deal.devices == 1:
        return []
    keys = f"{si(moved.keys)}B of keys, and as much of gradients"
    if moved.kind == "dispatch":
        keys = (
            f"{si(moved.between)}B by dispatch to keys and {si(moved.between_backward)}B of gradients, in "
            f"{moved.rounds[0]} rounds of anchors and {moved.rounds[1]} of picks (by gather: {si(cost.gathered)}B each)"
        )
    return [
        f"  a scene lies on {deal.devices} devices, {deal.head_groups} groups of heads x {deal.groups} of tokens; for "
        f"a layer each receives {si(moved.heads)}B of heads, {keys}; "
        f"the most pairs that a group attends to are {cost.imbalance:.3f} of the mean"
    ]


def _reads(moc: MoCConfig) -> str:
    if moc.mode == "dense":
        return "dense"
    by = "" if moc.descriptors == 1 else f" by {moc.descriptors} descriptors"
    sinks = "" if not moc.sink_chunks else f" and the first {moc.sink_chunks} of earlier shots"
    layers = f", {len(set(moc.dense_layers))} layers dense" if moc.dense_layers else ""
    return f"chunks of {moc.chunk.size} {moc.chunk.unit}, top {moc.top_k}{by}{sinks}{layers}"


def _memory(blueprint: Blueprint, mesh: Mesh) -> list[str]:
    """Bytes of the state that one device holds; what activations need is printed when a step is compiled."""
    state = blueprint.abstract
    parameters, frozen = (
        sum(math.prod(x.shape) for x in jax.tree.leaves(part)) for part in (state.params, state.frozen)
    )
    weights, beside = device_bytes(state.params), f" of adapters, beside {frozen:,} frozen ones" if frozen else ""
    lines = [
        f"model: {parameters:,} parameters{beside}; each device holds {si(device_bytes(state))}B of state (weights "
        f"{si(weights + device_bytes(state.frozen))}B, optimizer {si(device_bytes(state.optimizer))}B, average "
        f"{si(device_bytes(state.ema))}B) and {si(weights)}B of gradients"
    ]
    if mesh.size > 1 and mesh.shape["fsdp"] == 1:
        lines.append("  every device holds the whole state; mesh.fsdp > 1 splits it")
    whole = replicated_weights(state.model_params(state.params), blueprint.logical, mesh)
    if whole:
        lines.append(f"  whole on every device, as no dimension divides by mesh.fsdp and context: {', '.join(whole)}")
    return lines


def _disk(workdir: str, keep: int, blueprint: Blueprint) -> list[str]:
    """What a checkpoint takes, and whether those that are kept and the one being written fit on it."""
    size = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(blueprint.abstract.items()))
    line = f"disk: a checkpoint takes about {si(size)}B"
    if "://" in workdir:
        return [line]
    folder = pathlib.Path(workdir).absolute()
    free = shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists())).free
    needed = (keep + 1) * size
    short = f"; NOT ENOUGH for the {keep} that are kept and one more ({si(needed)}B)"
    return [f"{line}, and {si(free)}B are free at {workdir}{short if free < needed else ''}"]


def si(x: float) -> str:
    """Three digits and a decimal prefix, ready for a unit: `1.23 G`."""
    for exponent, prefix in ((15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if x >= 10**exponent:
            return f"{x / 10**exponent:.3g} {prefix}"
    return f"{x:.3g} "
