"""Storyboards -> videos, with the weights and the codec of a checkpoint.

    moc-sample --checkpoint out/run --storyboard scene.yaml --out scene.mp4

A storyboard is a YAML file with a caption and shots (moc_jax/sampling/storyboard.py shows one). Several storyboards
are sampled as one batch; --out and the pictures are then folders, with one file per storyboard. The same seed gives
the same bytes. Settings that are not given here are those of the checkpoint.
"""

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

from moc_jax.checkpoint_names import find_steps
from moc_jax.cli import parse
from moc_jax.commands.saved import saved_values
from moc_jax.config import AttentionConfig, Config, ConfigError, MeshConfig
from moc_jax.config.base import File, Folder, OptionalPath, Settings
from moc_jax.phases import Phases, garbage_left
from moc_jax.sampling.storyboard import Storyboard, load_storyboard
from moc_jax.sampling.targets import target_files
from moc_jax.showing import printable
from moc_jax.signals import Signals

SAMPLE = "solver", "steps", "guidance", "shift", "order", "history_noise"  # settings of the checkpoint's `sample`


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments(Settings):
    """What the command line says."""

    checkpoint: Folder
    """A run's folder, its checkpoints folder, or one checkpoint's."""
    storyboard: tuple[File, ...] = ()
    """YAML files."""
    training_scene: int | None = None
    """Instead of a storyboard: the training scene of this number, beside its original and the codec's rendering."""
    out: File
    """The MP4 to write; with several storyboards, a folder."""
    step: int | None = None
    """Which checkpoint; none given: the newest."""
    dense: bool = False
    """Every token sees every other: Mixture of Contexts off, same weights."""
    top_k: int | None = None
    """Chunks that each query picks."""
    chunk: int | None = None
    """The most frames (or tokens, as in training) per chunk."""
    solver: Literal["euler", "heun", "unipc", "dpm++"] | None = None
    """Order 1, 2, 2 and 2; heun evaluates the model twice per step."""
    steps: int | None = None
    """Steps from noise to video."""
    guidance: float | None = None
    """How far to steer from the negative prompt to the captions; 1 is off."""
    shift: float | None = None
    """Larger spends more steps at high noise."""
    order: Literal["joint", "shots"] | None = None
    """All shots together, or one after another."""
    history_noise: float | None = None
    """Noise level at which given and earlier shots are shown to the model."""
    negative_prompt: str | None = None
    """What to steer away from; overrides a storyboard's own."""
    seed: int | None = None
    """Overrides a storyboard's own seed; a shot's own seed overrides both."""
    contact_sheet: File | None = None
    """Also write a PNG with a few frames of each shot."""
    routing_picture: File | None = None
    """Also write a PNG of which shots each shot reads from, per layer."""
    routing_atlas: File | None = None
    """Also write an HTML page in which a click on a patch shows what its heads read, per layer and noise level."""
    overwrite: bool = False
    """Replace files that exist."""
    attention: AttentionConfig = AttentionConfig()
    compilation_cache: OptionalPath = "auto"
    """Where compiled programs are kept, as in training."""


def main(argv: Sequence[str], signals: Signals | None = None) -> None:
    """Samples and writes the files; `signals` are asked in between whether to end."""
    phases = Phases()
    args: Arguments = parse(Arguments, argv, description=__doc__, default=saved_values(Arguments, argv, SAMPLE))
    configure(Config(), 1, args)  # only checks: nothing is read if a setting is impossible
    if bool(args.storyboard) == (args.training_scene is not None):
        raise ConfigError("give --storyboard or --training-scene: one of them, not both")
    boards = [overridden(load_storyboard(path), args) for path in args.storyboard]
    for board in boards:  # a long one takes a while before the first step is shown
        print(f"{printable(board.name)}: {len(board.shots):,} shots", flush=True)
    names = [path.stem for path in args.storyboard] or [f"scene-{args.training_scene}"]
    videos = target_files(args.out, names, ".mp4", overwrite=args.overwrite)
    png = {"suffix": ".png", "overwrite": args.overwrite}
    sheets = target_files(args.contact_sheet, names, **png, setting="--contact-sheet")
    routings = target_files(args.routing_picture, names, **png, setting="--routing-picture")
    html = {"suffix": ".html", "overwrite": args.overwrite}
    atlases = target_files(args.routing_atlas, names, **html, setting="--routing-atlas")
    find_steps(args.checkpoint, args.step)
    phases.done("settings")
    with contextlib.nullcontext() if signals is None else signals.deferred(line=""), garbage_left():  # see `cli.run`
        # Only now: what is wrong so far is reported before jax is loaded.
        from moc_jax.processes import wake_devices

        if signals is not None:
            wake_devices(MeshConfig(), signals.leave)  # while the rest is imported
        from moc_jax.commands.videos import Files, make_videos
    phases.done("imports")
    make_videos(args, boards, Files(videos=videos, sheets=sheets, routings=routings, atlases=atlases), signals, phases)


def configure(config: Config, step: int, args: Arguments) -> Config:
    """The checkpoint's settings, as they were at its step, with those of the command line in their place."""
    moc = dataclasses.replace(config.moc_at(step - 1), **_given(args, "top_k"))
    if args.dense:
        moc = dataclasses.replace(moc, mode="dense")
    if args.chunk is not None:
        moc = dataclasses.replace(moc, chunk=dataclasses.replace(moc.chunk, size=args.chunk))
    sample = dataclasses.replace(config.sample, **_given(args, *SAMPLE))
    # How attention is computed is for this machine to say, not for the one that trained.
    return dataclasses.replace(config, moc=moc, sample=sample, attention=args.attention)


def overridden(board: Storyboard, args: Arguments) -> Storyboard:
    """The storyboard, with what the command line says in place of its own."""
    return dataclasses.replace(board, **_given(args, "seed", "negative_prompt"))


def _given(args: Arguments, *names: str) -> dict[str, Any]:
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}
