"""Do memory and the time of a shot stay the same, however long the video is?

    python -m benchmarks.generation                                      # 256 shots of 22 500 tokens, each shown 3
    python -m benchmarks.generation --model.depth 8 --retrieve-shots 7   # more layers, and more is shown
    python -m benchmarks.generation --shots 64 --steps 4

A generation is sampled as `moc-sample --extend` does it, in a folder that is removed afterwards, with random weights
and a caption of its own for each shot. The last 16 shots are compared with the first 16 that choose what they are
shown: their medians, and the memory after each. All these shots take the same work on the device,

    the mean query; keeping M earlier shots; the steps; a pass over all M + 1, for where picks lie; the mean keys

and on the host some that grows: the mean keys of all earlier shots are compared with the query. The time of a shot is
from the end of the one before to its own. Meanwhile the one before is decoded and written in a thread, as ever, by a
codec that has little to do: a latent is 2 x 4 pixels. `video_seconds` is what that takes by itself.
"""

import dataclasses
import gc
import math
import os
import pathlib
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Collection, Sequence
from typing import Any

import jax
import numpy as np
import tyro
from flax import nnx

from benchmarks import results
from benchmarks.model import TWO_STREAMS
from moc_jax import models
from moc_jax.attention.backends import resolve
from moc_jax.codecs import fit_codec
from moc_jax.config import (
    AttentionConfig,
    ChunkConfig,
    Config,
    DataConfig,
    HashConfig,
    MeshConfig,
    MoCConfig,
    ModelConfig,
    PcaConfig,
    SampleConfig,
)
from moc_jax.data import write_video
from moc_jax.sampling.generate import Sampler
from moc_jax.sampling.generation import Generation, begin
from moc_jax.sampling.shot_by_shot import sample_shots
from moc_jax.sampling.storyboard import parse_storyboard
from moc_jax.sharding import Params, make_mesh

_STRETCH, _EVERY = 16, 32  # shots whose median is taken, and between two looks at memory
_FPS = 24.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Which model and generation."""

    model: ModelConfig = dataclasses.replace(TWO_STREAMS, depth=4, remat="full")
    moc: MoCConfig = MoCConfig(chunk=ChunkConfig(size=1280), top_k=5, visibility="past")
    attention: AttentionConfig = AttentionConfig()
    shots: int = 256
    retrieve_shots: int = 3
    """Earlier shots that each is shown."""
    steps: int = 1
    """Denoising steps of a shot."""
    frames: int = 25
    """Latent frames per shot."""
    rows: int = 60
    """Rows of a latent frame; with patches of 2 x 2, 30 rows of tokens."""
    columns: int = 60
    caption: int = 56
    """Tokens of each caption, the global one included."""
    out: pathlib.Path = results.FOLDER

    @property
    def stretch(self) -> int:
        """Shots whose median is taken, first and last."""
        return min(_STRETCH, (self.shots - self.retrieve_shots - 1) // 2)


def main(args: Arguments, command: str) -> None:
    """Measures, stores and prints."""
    entry = measure(args)
    steps = f"{args.steps} step{'s' if args.steps > 1 else ''}"
    sizes = f"{args.shots} shots of {entry['tokens']} tokens, {args.retrieve_shots} shown, {steps}"
    moc, usual = args.moc, type(args)().moc
    more = "" if moc == usual else f", top {moc.top_k} of {moc.chunk.size} {moc.chunk.unit}"
    name = f"{sizes}, {args.model.depth} layers of {args.model.dim}{more}, {entry['backend']}"
    path = results.store(args.out, "generation", name, command, entry)
    print(f"{name}: {shown(entry)}\n\nresults are in {path}")


def shown(entry: dict[str, Any]) -> str:
    """An entry in a line."""
    found = []
    for stretch in (entry["first"], entry["last"]):
        of, to = stretch["shots"]
        gib = ", ".join(f"{what} {size / 2**30:.4g} GiB" for what, size in stretch["memory"].items())
        found.append(f"shots {of} to {to} take {stretch['median_ms']:.4g} ms each; {gib}")
    ratios = ", ".join(f"{what} {ratio:.4f}" for what, ratio in entry["ratios"].items())
    return f"{'. '.join(found)}. Last to first: {ratios}"


def measure(args: Arguments) -> dict[str, Any]:
    """One entry."""
    config, watch = config_of(args), Watch({_first(args), *range(_EVERY, args.shots, _EVERY), args.shots})
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    with tempfile.TemporaryDirectory() as folder, jax.set_mesh(mesh):
        generation = begun(pathlib.Path(folder) / "film", config, args)
        noise = np.random.default_rng(0).uniform(-1, 1, (2, 64, 64, 3)).astype(np.float32)
        sampler = Sampler(config, fit_codec(config.codec, [noise]))
        params = sampler.placed(fresh(args.model))
        watch.begin()
        for _ in sample_shots(generation, sampler, params, watch.note):
            pass
        video_seconds = alone(generation, sampler)
    query = jax.ShapeDtypeStruct((1, 1, args.model.heads, args.model.head_dim), args.model.dtype)
    frames, rows, columns = (n // p for n, p in zip((args.frames, args.rows, args.columns), args.model.patch))
    return {
        "backend": resolve(args.attention.backend, args.moc, query).name,
        "model": dataclasses.asdict(args.model),
        "parameters": models.parameter_count(args.model),
        "top_k": args.moc.top_k,
        "chunk": dataclasses.asdict(args.moc.chunk),
        "shots": args.shots,
        "retrieve_shots": args.retrieve_shots,
        "steps": args.steps,
        "tokens": frames * rows * columns,
        **compared(args, watch.seconds, watch.memory),
        "video_seconds": video_seconds,
        "seconds": watch.seconds,
        "memory": {str(shot): found for shot, found in watch.memory.items()},
    }


def config_of(args: Arguments) -> Config:
    """A run's."""
    stride = (1, 2, 2 * math.ceil(args.model.latent_channels / 12))  # as few pixels as have so many numbers
    return Config(
        model=args.model,
        moc=args.moc,
        attention=args.attention,
        codec=PcaConfig(stride=stride, channels=args.model.latent_channels),
        text=HashConfig(dim=args.model.text_dim, max_tokens=args.caption),
        data=DataConfig(height=stride[1] * args.rows, width=stride[2] * args.columns, fps=_FPS),
        sample=SampleConfig(
            solver="euler", steps=args.steps, order="shots", cache="on", retrieve_shots=args.retrieve_shots
        ),
    )


def begun(folder: pathlib.Path, config: Config, args: Arguments) -> Generation:
    """What is asked for; nothing of it is sampled yet."""

    def caption(name: str) -> str:
        return " ".join([name, *["scene"] * (args.caption - 2)])  # the first token stands for the beginning

    shots = [{"caption": caption(str(shot)), "seconds": args.frames / _FPS} for shot in range(args.shots)]
    generation = begin(folder, config, checkpoint="none", weights="random", step=0)
    generation.extend(parse_storyboard({"caption": caption("video"), "shots": shots}))
    return generation


def fresh(cfg: ModelConfig) -> Params:
    """Random weights."""
    return jax.jit(lambda: nnx.to_pure_dict(nnx.state(models.build(cfg, rngs=nnx.Rngs(0)), nnx.Param)))()


def alone(generation: Generation, sampler: Sampler) -> float:
    """Seconds to decode and write the last shot's video while nothing else is done."""
    done = generation.done(len(generation.shots) - 1)
    assert done is not None
    since = time.monotonic()
    write_video(generation.folder / "alone.mp4", sampler.decoded(done.latents), _FPS)
    return time.monotonic() - since


class Watch:
    """Notes how long each shot takes, and after some of them, counted from 1, the memory."""

    def __init__(self, looks: Collection[int]):
        self.seconds: list[float] = []
        self.memory: dict[int, dict[str, int]] = {}
        self._looks, self._since = looks, time.monotonic()

    def begin(self) -> None:
        """The first shot begins now."""
        self._since = time.monotonic()

    def note(self, line: str) -> None:
        """A shot is done, and `line` is about it; the next one's time begins when this returns."""
        self.seconds.append(time.monotonic() - self._since)
        if len(self.seconds) in self._looks:
            self.memory[len(self.seconds)] = memory()
            print(line, flush=True)
        self.begin()


def memory() -> dict[str, int]:
    """Bytes in use on the device and the most that were, where it tells, and those of this process on the host."""
    gc.collect()
    stats = jax.devices()[0].memory_stats() or {}
    names = {"in_use": "bytes_in_use", "peak": "peak_bytes_in_use"}
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    device = {name: stats[theirs] for name, theirs in names.items() if theirs in stats}
    return {**device, "host": pages * os.sysconf("SC_PAGE_SIZE")}


def _first(args: Arguments) -> int:
    """The last shot of the first stretch, which begins where there are more earlier shots than one is shown."""
    return args.retrieve_shots + 1 + args.stretch


def compared(args: Arguments, seconds: Sequence[float], looks: dict[int, dict[str, int]]) -> dict[str, Any]:
    """The first stretch, the last, and the ratios of the last to the first."""
    both: list[dict[str, Any]] = []
    for end in (_first(args), args.shots):
        median = statistics.median(seconds[end - args.stretch : end])
        both.append({"shots": [end - args.stretch + 1, end], "median_ms": 1e3 * median, "memory": looks[end]})
    first, last = both
    ratios = {what: last["memory"][what] / size for what, size in first["memory"].items()}
    return {"first": first, "last": last, "ratios": {"time": last["median_ms"] / first["median_ms"], **ratios}}


def run(argv: Sequence[str]) -> None:
    """The command line."""
    one_kind = (tyro.conf.AvoidSubcommands,)  # of model
    args = tyro.cli(Arguments, args=list(argv), description=__doc__, config=one_kind)
    if args.stretch < 1:
        sys.exit(f"error: --shots is {args.shots}; to compare, --retrieve-shots and 3 more are needed")
    main(args, shlex.join(["python", "-m", "benchmarks.generation", *argv]))


if __name__ == "__main__":
    run(sys.argv[1:])
