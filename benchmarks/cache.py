"""How long does a denoising step of a scene's last shot take with the keys and values of all earlier shots kept?

    python -m benchmarks.cache                                        # 30 layers, 8 and 16 shots of 22 500 tokens
    python -m benchmarks.cache --model.depth 8 --shots 32 64          # more shots than the memory of one GPU has for 30
    python -m benchmarks.cache --no-recompute --small                 # kept in 8 bits, and not beside the whole scene

Beside it: a step of the whole scene, as it is without `sample.cache`; of the shot alone, which nothing precedes; and
how long what the shot picks would take at the rate at which the kernels read the shot itself,

    bound = shot alone + layers x picked pairs x 4 D heads / rate        rate = FLOPs / time of one layer's own shot

What is kept is random, the same in each layer, so that queries agree on nothing: each chunk is picked by some.
"""

import dataclasses
import functools
import gc
import pathlib
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from benchmarks import results
from benchmarks.measure import Effort, Program, Timing, begun, time_launches
from benchmarks.model import TWO_STREAMS, DoesNotFit, fitting
from benchmarks.model import Arguments as SceneArguments
from benchmarks.model import make_scene as scene_of
from benchmarks.trace import traced
from moc_jax import models
from moc_jax.attention.accounting import account
from moc_jax.attention.api import routed_attention
from moc_jax.attention.backends import resolve
from moc_jax.attention.kept import Kept, Rows
from moc_jax.config import (
    AttentionConfig,
    ChunkConfig,
    MeshConfig,
    MoCConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)
from moc_jax.sampling.in_turn import Past, Turn, rounds_of
from moc_jax.sampling.room import size_of
from moc_jax.scene import Scene, SceneLengths, chunk_table
from moc_jax.sharding import make_mesh
from moc_jax.training.state import make_blueprint


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Which model and scenes."""

    model: ModelConfig = dataclasses.replace(TWO_STREAMS, remat="full")
    moc: MoCConfig = MoCConfig(chunk=ChunkConfig(size=1280), top_k=5, visibility="past")
    attention: AttentionConfig = AttentionConfig()
    shots: tuple[int, ...] = (8, 16)
    frames: int = 25
    """Latent frames per shot."""
    rows: int = 60
    """Rows of a latent frame; with patches of 2 x 2, 30 rows of tokens."""
    columns: int = 60
    caption: int = 56
    """Tokens of each caption, the global one included."""
    small: bool = False
    """Keep 8 bits of each number."""
    recompute: bool = True
    """Measure the whole scene, too."""
    repeats: int = 3
    """Samples per figure; a step that takes longer than 8 s is timed once."""
    profile: bool = False
    """Also trace a step, and the shot alone, and split the device's time by what its kernels do."""
    out: pathlib.Path = results.FOLDER


def main(args: Arguments, command: str) -> None:
    """Measures, stores and prints."""
    mesh, effort = make_mesh(MeshConfig(data=1), jax.devices()[:1]), Effort(samples=args.repeats)
    with jax.set_mesh(mesh):
        made = make_blueprint(args.model, OptimizerConfig(), TrainConfig(ema_decay=0.0), mesh)
        params = begun(made).params
        gc.collect()
        alone = measure_alone(args, params, effort)
        for shots in args.shots:
            entry = {**alone, **measure(args, shots, params, effort, alone)}
            bits = ", 8 bits" if args.small else ""
            name = f"{shots} shots, {args.model.depth} layers of {args.model.dim}{bits}, {entry['backend']}"
            path = results.store(args.out, "cache", name, command, entry)
            print(f"{name}: {shown(entry)}", flush=True)
    print(f"\nresults are in {path}")


def shown(entry: dict[str, Any]) -> str:
    """An entry in a line."""
    whole = entry.get("whole")
    beside = f", of the whole scene {whole['median_ms']:.4g} ms" if whole else ""
    ms = {name: f"{entry[name]['median_ms']:.4g}" for name in ("step", "alone", "remember")}
    return (
        f"a step takes {ms['step']} ms{beside}; {entry['ratio']:.3f} of {entry['bound_ms']:.4g} ms, the shot alone "
        f"({ms['alone']}) and its picks ({entry['picks_ms']:.4g}); to keep a shot {ms['remember']} ms; "
        f"{entry['kept_bytes'] / 2**30:.4g} GiB are kept"
    )


def _scene(args: Arguments, shots: int) -> Scene:
    sizes = {name: getattr(args, name) for name in ("model", "moc", "frames", "rows", "columns", "caption")}
    return scene_of(SceneArguments(shots=shots, **sizes))


def _lengths(scene: Scene) -> SceneLengths:
    return jax.tree.map(np.asarray, scene.lengths)


def _timed(
    function: Callable[..., Any], args: Arguments, effort: Effort, *inputs: Any
) -> tuple[Timing, Program, dict[str, Any]]:
    """How long it takes, its program, and where the time goes, if that is asked for."""
    program = fitting(jax.jit(function).lower(*inputs), args.model)
    timing = time_launches(lambda: program(*inputs), effort)
    split = {"split": dataclasses.asdict(traced(lambda: program(*inputs)))} if args.profile else {}
    return timing, program, split


def _velocity(args: Arguments) -> Callable[..., Any]:
    """(params, Scene) -> velocity at t = 1/2."""
    graph, attention = models.abstract(args.model)[0], routed_attention(args.attention)

    def velocity(params, scene):
        t = jnp.full(scene.lengths.shot_frames.shape, 0.5)
        network = nnx.merge(graph, params)
        return network(scene.video, scene.text, t, scene.lengths, args.moc, attention=attention)

    return velocity


def measure_alone(args: Arguments, params: Any, effort: Effort) -> dict[str, Any]:
    """The shot by itself, and at which rate one layer of it is read."""
    scene, cfg = _scene(args, 1), args.model
    timing, _, split = _timed(_velocity(args), args, effort, params, scene)
    shape, lengths = models.scene_shape(cfg, scene.video.shape, scene.text.shape, scene.lengths)
    table, attention = chunk_table(lengths, shape, args.moc.chunk), routed_attention(args.attention)
    random = np.random.default_rng(0)
    sizes = (1, shape.tokens, cfg.heads, cfg.head_dim)
    q, k, v = (jnp.asarray(random.standard_normal(sizes, np.float32), cfg.dtype) for _ in range(3))
    layer, *_ = _timed(lambda q, k, v: attention(q, k, v, table, args.moc)[0], args, effort, q, k, v)
    pairs = account(table, args.moc, cfg.head_dim).expected_pairs
    return {
        "backend": resolve(args.attention.backend, args.moc, q).name,
        "model": dataclasses.asdict(cfg),
        "parameters": models.parameter_count(cfg),
        "top_k": args.moc.top_k,
        "chunk": dataclasses.asdict(args.moc.chunk),
        "small": args.small,
        "alone": dataclasses.asdict(timing) | split,
        "layer": dataclasses.asdict(layer),
        "flops_per_second": 4 * cfg.head_dim * cfg.heads * pairs / layer.median_ms * 1e3,
    }


def measure(args: Arguments, shots: int, params: Any, effort: Effort, alone: dict[str, Any]) -> dict[str, Any]:
    """A step of the last of so many shots, keeping it, and a step of all of them."""
    scene, cfg = _scene(args, shots), args.model
    graph, attention = models.abstract(cfg)[0], routed_attention(args.attention)
    lengths = _lengths(scene)
    rounds = rounds_of(np.arange(shots)[None], lengths, [lengths.text_lengths])
    turn = rounds[-1].turn
    assert isinstance(turn, Turn)
    whole = None
    if args.recompute:
        try:
            timing, program, _ = _timed(_velocity(args), args, effort, params, scene)
            whole = {**dataclasses.asdict(timing), "memory": dataclasses.asdict(program.memory)}
        except DoesNotFit as error:
            print(f"the whole scene of {shots} shots: {error}", flush=True)
    size = size_of(cfg, args.moc, attention, turn, scene, twice=False, small=args.small)
    kept = jax.jit(functools.partial(_random, cfg.depth), donate_argnums=0)(size.empty())

    t = jnp.full(scene.lengths.shot_frames.shape, 0.5)

    def step(params, scene, kept):
        network, parts = nnx.merge(graph, params), (scene.video, scene.text, t, scene.lengths)
        return Past(turn, kept).velocity(network, *parts, args.moc, attention)

    def remember(params, scene, kept):
        network, parts = nnx.merge(graph, params), (scene.video, scene.text, t, scene.lengths)
        return Past(turn, kept).remember(network, *parts, args.moc, attention)

    timing, program, split = _timed(step, args, effort, params, scene, kept)
    keeping = fitting(jax.jit(remember, donate_argnums=2).lower(params, scene, kept), cfg)

    def keep():
        nonlocal kept
        kept = keeping(params, scene, kept)
        return kept

    kept_timing = time_launches(keep, effort)
    picks_ms = _picks_ms(args, scene, turn, alone["flops_per_second"])
    bound = alone["alone"]["median_ms"] + picks_ms
    return {
        "shots": shots,
        "tokens": int(scene.lengths.shot_frames.sum()) * (args.rows // 2) * (args.columns // 2),
        "kept_bytes": size.device_bytes,
        "step": {**dataclasses.asdict(timing), "memory": dataclasses.asdict(program.memory), **split},
        "remember": {**dataclasses.asdict(kept_timing), "memory": dataclasses.asdict(keeping.memory)},
        "whole": whole,
        "picks_ms": picks_ms,
        "bound_ms": bound,
        "ratio": timing.median_ms / bound,
    }


def _random(depth: int, kept: Kept) -> Kept:
    """The same with random numbers; of rows, as many as a layer has are drawn, for there may be no room for more."""

    def rows(key: jax.Array, x: jax.Array) -> jax.Array:
        size = x.shape[2] // depth
        layer = jax.random.normal(key, (*x.shape[:2], size, *x.shape[3:]), jnp.bfloat16).astype(x.dtype)
        return jax.lax.fori_loop(
            0, depth, lambda i, x: jax.lax.dynamic_update_slice_in_dim(x, layer, i * size, axis=2), x
        )

    def of(key: jax.Array, x: Rows) -> Rows:
        return Rows(rows(key, x.values), None if x.scale is None else jnp.ones_like(x.scale))

    draws = jax.random.split(jax.random.key(0), 5)
    rest = zip(draws[2:], (kept.text_k, kept.text_v, kept.phi))
    found = (jax.random.normal(draw, x.shape, x.dtype) for draw, x in rest)
    return Kept(of(draws[0], kept.k), of(draws[1], kept.v), *found)


def _picks_ms(args: Arguments, scene: Scene, turn: Turn, rate: float) -> float:
    """What the last shot picks, and all captions that it reads beside its own, at this rate."""
    cfg = args.model
    shape, lengths = models.scene_shape(cfg, scene.video.shape, scene.text.shape, scene.lengths)
    table = chunk_table(lengths, shape, args.moc.chunk)
    last = jnp.where(table.token_shot == turn.first[:, None], table.chunk_of, -1)[:, table.text_tokens :]
    of_last = last[:, -int(shape.video_tokens // lengths.shot_frames.shape[1]) :]
    picking = account(table, args.moc, cfg.head_dim, query_chunk=of_last).expected_pairs
    anchors = account(table, dataclasses.replace(args.moc, top_k=0), cfg.head_dim, query_chunk=of_last).expected_pairs
    return cfg.depth * cfg.heads * 4 * cfg.head_dim * (picking - anchors) / rate * 1e3


def run(argv: Sequence[str]) -> None:
    """The command line."""
    one_kind = (tyro.conf.AvoidSubcommands,)
    args = tyro.cli(Arguments, args=argv, description=__doc__, config=one_kind)
    main(args, shlex.join(["python", "-m", "benchmarks.cache", *argv]))


if __name__ == "__main__":
    run(sys.argv[1:])
