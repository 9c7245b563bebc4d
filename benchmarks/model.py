"""How long do one denoising step and one training step of a whole model take, with MoC and with dense attention?

    python -m benchmarks.model                                  # 30 layers, 1536 wide, 8 shots of 22 500 tokens
    python -m benchmarks.model --model.depth 20 --steps training   # fewer layers where memory is short: time is linear
    python -m benchmarks.model --case base --scenes 8           # a named model and scene, and what differs from it
    python -m benchmarks.model --case wan21-1.3b                # Wan's transformer at 480p, in its published size
    python -m benchmarks.model --case small --steps training --attend moc --profile   # and where the time goes
    python -m benchmarks.model --case wan21-1.3b --model.lora.rank 32 --steps training --attend moc   # adapters alone

Both columns are the same model, weights, scene and step functions; only the attention inside differs, and dense
attention is cuDNN's. Denoising is one Euler step without guidance; training is loss, gradients, clipping and AdamW,
with context drop-off and drop-in on, as `moc-train` does it. What the backward pass computes again is `model.remat`'s.
With `model.lora` only adapters are trained; in both steps they are computed beside the weights, not merged with them.

Useful FLOPs are those of the matrices and of the pairs that uniformly random picks attend to, times three for training,
of frozen matrices times two: nothing that is recomputed, no adapters, no padding and no elementwise work.

Memory of the training step, for P parameters, N tokens of width M and `depth` layers: 16 P bytes of weights, gradients
and two moments (of frozen weights 2 P); 2 N M depth bytes of layer inputs; and what one layer holds while it is
differentiated. The compiler's own figure is checked against the device before anything is run.
"""

import argparse
import dataclasses
import gc
import pathlib
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from benchmarks import results
from benchmarks.measure import (
    Effort,
    Memory,
    Program,
    Timing,
    begun,
    dense_attention,
    dense_implementation,
    time_launches,
)
from benchmarks.tables import model_tables, split_table
from benchmarks.trace import Split, traced
from moc_jax import models
from moc_jax.attention.accounting import account
from moc_jax.attention.api import SceneAttention, routed_attention
from moc_jax.attention.backends import resolve
from moc_jax.chips import chip_of
from moc_jax.config import (
    AttentionConfig,
    ChunkConfig,
    Config,
    HashConfig,
    MeshConfig,
    MMDiTConfig,
    MoCConfig,
    ModelConfig,
    OptimizerConfig,
    PcaConfig,
    TrainConfig,
)
from moc_jax.config.presets import PRESETS
from moc_jax.diffusion.samplers import sigmas, solve
from moc_jax.models import matrix_flops, parameter_count, step_flops, trained_count
from moc_jax.scene import Scene, SceneLengths, chunk_table
from moc_jax.sharding import make_mesh
from moc_jax.training.held import state_bytes, training_bytes
from moc_jax.training.remat import choose, device_memory, policies
from moc_jax.training.state import TrainState, make_blueprint
from moc_jax.training.step import make_train_step

# Wan 2.1 1.3B's sizes (30 layers, 12 heads of 128, MLPs of 8960, umT5's embeddings: arXiv 2503.20314, table 2), with
# weights of their own for text and for video: 3.1 B parameters.
TWO_STREAMS = MMDiTConfig(dim=1536, depth=30, heads=12, mlp_ratio=8960 / 1536, text_dim=4096)
_STEPS, _SHIFT = 50, 5.0  # the grid that the denoising step is the first of

StepName = Literal["denoising", "training"]
Column = Literal["moc", "dense"]
_FLOPS: dict[StepName, str] = {"denoising": "forward_flops", "training": "training_flops"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Which model and scene, and how they are measured."""

    model: ModelConfig = TWO_STREAMS
    moc: MoCConfig = MoCConfig(chunk=ChunkConfig(size=1280), top_k=5)
    attention: AttentionConfig = AttentionConfig()
    scenes: int = 1
    """Scenes of the batch, all alike."""
    shots: int = 8
    frames: int = 25
    """Latent frames per shot."""
    rows: int = 60
    """Rows of a latent frame; with patches of 2 x 2, 30 rows of tokens."""
    columns: int = 60
    caption: int = 56
    """Tokens of each caption, the global one included."""
    steps: tuple[StepName, ...] = ("denoising", "training")
    attend: tuple[Column, ...] = ("moc", "dense")
    """Which attentions the model is measured with."""
    profile: bool = False
    """Also trace one launch of each, and split the device's time by what its kernels do."""
    repeats: int = 3
    """Samples per figure; a step that takes longer than 8 s is timed once."""
    out: pathlib.Path = results.FOLDER


def _own_videos(preset: str, rows: int, columns: int) -> Arguments:
    """Five shots of 8 latent frames with short captions, chunks of two frames and 4 picks, as configs/own_videos.py."""
    return Arguments(
        model=PRESETS[preset],
        moc=MoCConfig(chunk=ChunkConfig(unit="frames", size=2), top_k=4),
        shots=5,
        frames=8,
        rows=rows,
        columns=columns,
        caption=8,
    )


def _wan(preset: str, frames: int, rows: int, columns: int, chunk: int) -> Arguments:
    """One shot, of whose chunks each query reads its own and 3 more."""
    chunks = ChunkConfig(unit="frames", size=chunk)
    moc = MoCConfig(chunk=chunks, top_k=3, self_anchor="chunk", causal_routing=False)
    return Arguments(model=PRESETS[preset], moc=moc, shots=1, frames=frames, rows=rows, columns=columns, caption=128)


CASES = {
    "multi_shot": Arguments(),
    "base": dataclasses.replace(_own_videos("base", 24, 40), scenes=2),  # 192x320 pixels, 9 648 tokens a scene
    "small": dataclasses.replace(_own_videos("small", 12, 20), scenes=4),  # 96x160 pixels, 2 448 tokens a scene
    "wan21-1.3b": _wan("wan21-1.3b", 21, 60, 104, 1),  # 5 s of 480x832 pixels, 32 760 tokens
    "wan22-5b": _wan("wan22-5b", 31, 44, 80, 2),  # 5 s of 704x1280 pixels, 27 280 tokens
}


class DoesNotFit(RuntimeError):
    """A program needs more memory than the device has."""


def main(args: Arguments, case: Arguments, command: str) -> None:
    """Measures, stores and prints the steps; `case` is what `args` began as."""
    args = with_policy(args)
    entry = measure(args)
    entry["variant"] = _variant(args, case)
    path = args.out
    for step, found in entry["steps"].items():  # an entry each, so that one can be measured again alone
        name = f"{step}, {_name(args, case, entry)}, {entry['backend']}"
        name += f", remat {args.model.remat}" if step == "training" else ""
        path = results.store(args.out, "model", name, command, {**entry, "steps": {step: found}})
    print("\n".join(model_tables([entry])))
    if args.profile:
        print("\n" + "\n".join(split_table([entry])))
    print(f"\nresults are in {path}")


def _name(args: Arguments, case: Arguments, entry: dict[str, Any]) -> str:
    model, usual = args.model, args.model.name == "mmdit"
    kind = "" if usual else f"{model.name}, "
    width = "" if usual and model.dim == TWO_STREAMS.dim else f" of {model.dim}"
    tokens = "" if usual and _sizes(args) == _sizes(case) else f", {entry['tokens']} tokens"
    scenes = f", {args.scenes} scenes" if args.scenes > 1 else ""
    return f"{kind}{model.depth} layers{width}{tokens}{scenes}{entry['variant']}"


def _sizes(args: Arguments) -> tuple[int, ...]:
    return args.shots, args.frames, args.rows, args.columns, args.caption


def _variant(args: Arguments, case: Arguments) -> str:
    """What tells figures apart from the case's own where tables have no column for it."""
    rank, picks, chunk = args.model.lora.rank, args.moc.top_k, args.moc.chunk
    found = [f"LoRA of rank {rank}"] if rank else []
    found += [f"top {picks}"] if picks != case.moc.top_k else []
    found += [f"chunks of {chunk.size} {chunk.unit}"] if chunk != case.moc.chunk else []
    found += [f"{args.model.heads} heads"] if args.model.heads != case.model.heads else []
    return "".join(f", {words}" for words in found)


def measure(args: Arguments) -> dict[str, Any]:
    """One entry: each step with MoC and with dense attention."""
    config = Config(
        model=args.model,
        moc=args.moc,
        attention=args.attention,
        text=HashConfig(dim=args.model.text_dim),
        codec=PcaConfig(channels=args.model.latent_channels),
        train=TrainConfig(ema_decay=0.0),
    )
    scene = make_scene(args)
    effort = Effort(samples=args.repeats)
    entry: dict[str, Any] = {**_describe(args, scene), "steps": {}}
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    with jax.set_mesh(mesh):
        state = begun(make_blueprint(config.model, config.optimizer, config.train, mesh))
        entry["state_bytes"] = state_bytes(state)
        for step in args.steps:
            timings: dict[str, Any] = {}
            for name in args.attend:
                attention = routed_attention(args.attention) if name == "moc" else dense
                if step == "denoising":
                    found = denoising(config, attention, state, scene, effort, args.profile)
                else:
                    found, state = training(config, attention, mesh, state, scene, effort, args.profile)
                timings[name] = {**dataclasses.asdict(found.timing), "memory": dataclasses.asdict(found.memory)}
                if found.split is not None:
                    timings[name]["split"] = dataclasses.asdict(found.split)
                timings[name] |= _rate(entry[_FLOPS[step]][name], found.timing)
                print(f"{step}, {name}: {found.timing.median_ms:.1f} ms", flush=True)
                gc.collect()
            if len(timings) == 2:
                timings["ratio"] = timings["dense"]["median_ms"] / timings["moc"]["median_ms"]
            timings["bound"] = entry[_FLOPS[step]]["dense"] / entry[_FLOPS[step]]["moc"]
            entry["steps"][step] = timings
    return entry


def _rate(flops: float, timing: Timing) -> dict[str, float]:
    """Useful TFLOP/s, and which share of the data sheet's that is where there is one."""
    rate = flops / timing.median_ms * 1e3
    chip = chip_of(jax.devices()[0].device_kind)
    return {"tflops": rate / 1e12, **({} if chip is None else {"share_of_peak": rate / chip.flops})}


def dense(q, k, v, table, cfg, *, key=None):
    """A model's attention over the whole scene, cuDNN's.

    The scene has no padding, so that it differs from ours in what is attended to and in nothing else.
    """
    return dense_attention(q, k, v), jnp.zeros((q.shape[0], q.shape[2], q.shape[1], 0), jnp.int32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """One step with one attention."""

    timing: Timing
    memory: Memory
    split: Split | None


def denoising(
    config: Config, attention: SceneAttention, state: TrainState, scene: Scene, effort: Effort, profile: bool
) -> Measured:
    """One Euler step from pure noise, without guidance."""
    graph = models.abstract(config.model)[0]
    levels = sigmas(_STEPS, _SHIFT, "diffusers-euler")[:2]

    @jax.jit
    def step(params, z, text, lengths):
        def velocity(z, sigma):
            t = jnp.full(lengths.shot_frames.shape, sigma)
            return nnx.merge(graph, params)(z, text, t, lengths, config.moc, attention=attention)

        return solve(velocity, z, levels, "euler")

    inputs = state.sampling_params, scene.video, scene.text, scene.lengths
    program = fitting(step.lower(*inputs), config.model)
    return _measured(lambda: program(*inputs), program, effort, profile)


def training(
    config: Config,
    attention: SceneAttention,
    mesh: jax.sharding.Mesh,
    state: TrainState,
    scene: Scene,
    effort: Effort,
    profile: bool,
) -> tuple[Measured, TrainState]:
    """One update; every launch continues from the state of the one before, which it overwrites."""
    blueprint = make_blueprint(config.model, config.optimizer, config.train, mesh)
    step = make_train_step(config.train, config.optimizer, config.diffusion, blueprint, mesh, attention)
    program = fitting(step.lower(state, scene, config.moc), config.model)

    def launch():
        nonlocal state
        state, metrics = program(state, scene)
        return metrics

    return _measured(launch, program, effort, profile), state


def _measured(launch: Callable[[], Any], program: Program, effort: Effort, profile: bool) -> Measured:
    timing = time_launches(launch, effort)
    return Measured(timing=timing, memory=program.memory, split=traced(launch) if profile else None)


def make_scene(args: Arguments) -> Scene:
    """Noise for latents and embeddings, equal shots, and nothing padded."""
    random = np.random.default_rng(0)
    size = args.shots * args.frames, args.rows, args.columns, args.model.latent_channels
    captions = args.shots + 1
    return Scene(
        jnp.asarray(random.standard_normal((args.scenes, *size), np.float32)),
        jnp.asarray(random.standard_normal((args.scenes, captions * args.caption, args.model.text_dim), np.float32)),
        SceneLengths(jnp.full((args.scenes, args.shots), args.frames), jnp.full((args.scenes, captions), args.caption)),
    )


def with_policy(args: Arguments) -> Arguments:
    """With what `moc-train` would take for `model.remat auto`."""
    model, scene = args.model, make_scene(args)
    if model.remat != "auto":
        return args
    shape, _ = models.scene_shape(model, scene.video.shape, scene.text.shape, scene.lengths)
    mesh = make_mesh(MeshConfig(data=1), device := jax.devices()[:1])
    state = state_bytes(make_blueprint(model, OptimizerConfig(), TrainConfig(ema_decay=0.0), mesh).abstract)
    of = scene.video.shape[0], state, dict(mesh.shape), chip_of(device[0].device_kind)
    needs = {policy: training_bytes(model, policy, args.moc, shape, *of).total for policy in policies(model)}
    policy, why = choose(needs, device_memory())
    print(f"model.remat {policy}: {why}")
    return dataclasses.replace(args, model=dataclasses.replace(model, remat=policy))


def fitting(lowered: jax.stages.Lowered, model: ModelConfig) -> Program:
    """The step compiled; DoesNotFit if it needs more than the device has."""
    program = Program(lowered)
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    if limit is not None and program.memory.peak > limit:
        raise DoesNotFit(
            f"the step of {model.depth} layers needs {program.memory.peak / 2**30:.1f} GiB and the device has "
            f"{limit / 2**30:.1f} GiB; try --model.depth {max(1, int(model.depth * limit / program.memory.peak))}"
        )
    return program


def _describe(args: Arguments, scene: Scene) -> dict[str, Any]:
    model = args.model
    shape, lengths = models.scene_shape(model, scene.video.shape, scene.text.shape, scene.lengths)
    cost = account(chunk_table(lengths, shape, args.moc.chunk), args.moc, model.head_dim)
    matrices = args.scenes * matrix_flops(model, scene.text.shape[1], shape.video_tokens)
    heads = model.depth * model.heads
    attended = 4 * cost.expected_pairs * model.head_dim + cost.flops_pool + cost.flops_route
    attention = {"moc": heads * attended, "dense": heads * cost.flops_dense}
    q = jax.ShapeDtypeStruct((1, 1, model.heads, model.head_dim), model.dtype)
    return {
        "backend": resolve(args.attention.backend, args.moc, q).name,
        "dense_by": dense_implementation(),
        "model": dataclasses.asdict(model),
        "parameters": parameter_count(model),
        "trained": trained_count(model),
        "tokens": cost.tokens,
        "chunk": dataclasses.asdict(args.moc.chunk),
        "top_k": args.moc.top_k,
        "forward_flops": {name: matrices + flops for name, flops in attention.items()},
        "training_flops": {name: step_flops(model, matrices, flops) for name, flops in attention.items()},
    }


def run(argv: Sequence[str]) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--case", choices=CASES, default="multi_shot")
    chosen, rest = parser.parse_known_args(argv)
    one_kind = (tyro.conf.AvoidSubcommands,)  # of model: the case's
    args = tyro.cli(Arguments, args=rest, default=CASES[chosen.case], description=__doc__, config=one_kind)
    main(args, CASES[chosen.case], shlex.join(["python", "-m", "benchmarks.model", *argv]))


if __name__ == "__main__":
    run(sys.argv[1:])
