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
from moc_jax.attention.accounting import account
from moc_jax.attention.api import routed_attention
from moc_jax.attention.backends import Backend
from moc_jax.attention.tilings import given_tiling
from moc_jax.config import BucketConfig, Config, MoCConfig
from moc_jax.data.buckets import Buckets
from moc_jax.data.manifest import Manifest, SceneEntry
from moc_jax.models import matrix_flops, scene_shape
from moc_jax.scene import SceneLengths, chunk_table
from moc_jax.sharding import AXES, replicated_weights
from moc_jax.training.optimizer import remainder
from moc_jax.training.state import Blueprint, device_bytes

_SCENES = 16  # per bucket, to take the means over


@dataclasses.dataclass(frozen=True)
class SceneCost:
    """Means over a bucket's scenes."""

    tokens: float  # text and video
    flops: float  # of the model, forward and backward: three times the forward pass; recomputation is not counted
    attention_share: float  # of `flops`
    backend: Backend  # attention's
    sparsity: float  # 1 - attended pairs / all pairs, if each query picks the longest chunks it may


def scene_costs(cfg: Config, moc: MoCConfig, buckets: Buckets) -> list[SceneCost | None]:
    """What a scene of each bucket costs; None for a bucket without scenes."""
    attention = routed_attention(cfg.attention)
    q = jax.ShapeDtypeStruct((1, 1, cfg.model.heads, cfg.model.head_dim), cfg.model.dtype)

    def cost(shape: BucketConfig, scenes: tuple[SceneEntry, ...]) -> SceneCost | None:
        scenes = scenes[:: math.ceil(len(scenes) / _SCENES)] if scenes else ()
        if not scenes:
            return None
        shot_frames = np.zeros((len(scenes), shape.shots), np.int32)
        text_lengths = np.zeros((len(scenes), shape.shots + 1), np.int32)
        for row, scene in enumerate(scenes):
            shot_frames[row, : len(scene.shots)] = [shot.frames for shot in scene.shots]
            text_lengths[row, : len(scene.captions)] = [buckets.tokens[caption] for caption in scene.captions]
        video = len(scenes), shape.frames, *cfg.latent_size, cfg.codec.channels
        text = len(scenes), shape.text_tokens, cfg.text.dim
        tokens_shape, lengths = scene_shape(
            cfg.model, video, text, SceneLengths(jnp.asarray(shot_frames), jnp.asarray(text_lengths))
        )
        table = jax.jit(chunk_table, static_argnums=(1, 2))(lengths, tokens_shape, moc.chunk)
        counted = account(table, moc, cfg.model.head_dim)
        text_tokens = int(text_lengths.sum())
        attended = cfg.model.depth * cfg.model.heads * counted.flops
        matrices = matrix_flops(cfg.model, text_tokens, counted.tokens - text_tokens)
        return SceneCost(
            tokens=counted.tokens / len(scenes),
            flops=3 * (matrices + attended) / len(scenes),
            attention_share=attended / (matrices + attended),
            backend=attention.backend_for(q, q, q, table, moc),
            sparsity=counted.sparsity,
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
        *_memory(blueprint, mesh),
        *_disk(cfg.workdir, cfg.train.keep_last, blueprint),
        manifest.summary(),
        *(split.summary() for split in buckets),
    ]
    for moc, of_buckets in costs.items():
        how = "dense" if moc.mode == "dense" else f"chunks of {moc.chunk.size} {moc.chunk.unit}, top {moc.top_k}"
        for shape, cost in zip(buckets[0].shapes, of_buckets):
            if cost is not None:
                tiles = "" if given_tiling(cost.backend) is None else ", measured tiles"
                lines.append(
                    f"attention by {cost.backend.name} ({how}; bucket of {shape.frames} frames{tiles}) skips "
                    f"{cost.sparsity:.1%} of all pairs; "
                    f"{cost.tokens:,.0f} tokens and {si(cost.flops)}FLOP per scene, "
                    f"{si(cost.flops * cfg.train.batch_size)}FLOP per step, {cost.attention_share:.0%} in attention"
                )
    left = remainder(cfg.optimizer, cfg.train.steps)
    return "\n".join([*lines, *([left] if left else [])])


def _memory(blueprint: Blueprint, mesh: Mesh) -> list[str]:
    """Bytes of the state that one device holds; what activations need is printed when a step is compiled."""
    state = blueprint.abstract
    parameters = sum(math.prod(x.shape) for x in jax.tree.leaves(state.params))
    weights = device_bytes(state.params)
    lines = [
        f"model: {parameters:,} parameters; each device holds {si(device_bytes(state))}B of state (weights "
        f"{si(weights)}B, optimizer {si(device_bytes(state.optimizer))}B, average {si(device_bytes(state.ema))}B) "
        f"and {si(weights)}B of gradients"
    ]
    if mesh.size > 1 and mesh.shape["fsdp"] == 1:
        lines.append("  every device holds the whole state; mesh.fsdp > 1 splits it")
    whole = replicated_weights(state.params, blueprint.logical, mesh)
    if whole:
        lines.append(f"  not split over fsdp, since no dimension divides by {mesh.shape['fsdp']}: {', '.join(whole)}")
    return lines


def _disk(workdir: str, keep: int, blueprint: Blueprint) -> list[str]:
    """What a checkpoint takes, and whether those that are kept and the one being written fit on it."""
    size = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(blueprint.abstract))
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
