"""Storyboards -> videos, with the weights and the codec of a checkpoint.

    moc-sample --checkpoint out/run --storyboard scene.yaml --out scene.mp4
    moc-sample --checkpoint Wan2.1-T2V-1.3B --storyboard scene.yaml --out scene.mp4
    moc-sample --checkpoint out/run --storyboard scene.yaml --extend film/

A storyboard is a YAML file with a caption and shots (moc_jax/sampling/storyboard.py shows one). Several storyboards
are sampled as one batch; --out and the pictures are then folders, with one file per storyboard. The same seed gives
the same bytes. Settings that are not given here are those of the checkpoint.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

from moc_jax import flags
from moc_jax.checkpoint_names import find_steps
from moc_jax.cli import parse
from moc_jax.commands.sample_arguments import DATA, MOC, SAMPLE, Arguments
from moc_jax.commands.saved import saved_values
from moc_jax.config import Config, ConfigError
from moc_jax.phases import Phases, garbage_left
from moc_jax.sampling.refusal import check_by_command
from moc_jax.sampling.storyboard import Storyboard, check_pins, load_storyboard
from moc_jax.sampling.targets import check_apart, target_files, video_files
from moc_jax.showing import printable
from moc_jax.signals import Signals
from moc_jax.tensor_files.places import are_public


def main(argv: Sequence[str], signals: Signals | None = None) -> None:
    """Samples and writes the files; `signals` are asked in between whether to end."""
    phases = Phases()
    if any(word.split("=")[0] == "--extend" for word in argv) and not {"-h", "--help"} & {*argv}:
        from moc_jax.commands.extending import extend

        return extend(argv, signals, phases)
    args: Arguments = parse(Arguments, argv, description=__doc__, default=saved_values(Arguments, argv, SAMPLE, DATA))
    # Only checks, of what needs no checkpoint: nothing is read if a setting is impossible.
    configure(Config(), 1, dataclasses.replace(args, dense_layers=(), height=None, width=None))
    if bool(args.storyboard) == (args.training_scene is not None):
        raise ConfigError("give --storyboard or --training-scene: one of them, not both")
    public = opens_public(args)
    boards = [overridden(load_storyboard(path), args) for path in args.storyboard]
    for board in boards:  # a long one takes a while before the first step is shown
        print(f"{printable(board.name)}: {len(board.shots):,} shots", flush=True)
        check_pins(board)
    check_by_command(boards, args.caption_filter)
    names = [path.stem for path in args.storyboard] or [f"scene-{args.training_scene}"]
    videos = video_files(args.out, names, boards, overwrite=args.overwrite)
    png = {"suffix": ".png", "overwrite": args.overwrite}
    sheets = target_files(args.contact_sheet, names, **png, setting="--contact-sheet")
    routings = target_files(args.routing_picture, names, **png, setting="--routing-picture")
    atlases = target_files(args.routing_atlas, names, ".html", overwrite=args.overwrite, setting="--routing-atlas")
    made = {"--out": [*itertools.chain(*videos)], "--contact-sheet": sheets, "--routing-picture": routings}
    check_apart({**made, "--routing-atlas": atlases}, boards, args.storyboard)
    if not public:
        find_steps(args.checkpoint, args.step)
    phases.done("settings")
    with contextlib.nullcontext() if signals is None else signals.deferred(line=""), garbage_left():  # see `cli.run`
        flags.set_flags()
        # Only now: what is wrong so far is reported before jax is loaded, and with public weights before it starts.
        from moc_jax.processes import wake_devices

        opened = None
        if public:
            from moc_jax.commands.public import open_public

            opened = open_public(args, boards)
        if signals is not None:
            wake_devices(args.mesh, signals.leave)  # while the rest is imported
        from moc_jax.commands.videos import Files, make_videos
    phases.done("imports")
    files = Files(videos=videos, sheets=sheets, routings=routings, atlases=atlases)
    make_videos(args, boards, files, signals, phases, opened)


def opens_public(args: Arguments) -> bool:
    """Whether the checkpoint is public weights.

    Raises:
        ConfigError: an option is for what it isn't.
    """
    public, defaults = are_public(args.checkpoint), {x.name: x.default for x in dataclasses.fields(args)}
    what = "public weights, which have none" if public else "a run; this is for public weights: export it, or drop this"
    for name in ("training_scene", "step", "base", "adapters") if public else ("lora", "lora_scale"):
        if (value := getattr(args, name)) != defaults[name]:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: {args.checkpoint} holds {what}")
    if args.lora_scale != 1 and not args.lora:
        raise ConfigError(f"--lora-scale {args.lora_scale:g} scales the adapters of --lora, which is not given")
    return public


def configure(config: Config, step: int, args: Arguments) -> Config:
    """The checkpoint's settings, as they were at its step, with those of the command line in their place."""
    moc = dataclasses.replace(config.moc_at(step - 1), **given(args, *MOC))
    if args.dense and args.routed:
        raise ConfigError("give --dense or --routed: one of them, not both")
    moc = dataclasses.replace(moc, mode="dense" if args.dense else "moc" if args.routed else moc.mode)
    if args.chunk is not None:
        moc = dataclasses.replace(moc, chunk=dataclasses.replace(moc.chunk, size=args.chunk))
    for asked, setting in ((args.routing_picture, "--routing-picture"), (args.routing_atlas, "--routing-atlas")):
        if asked and moc.mode == "dense":
            raise ConfigError(f"{setting}: dense attention routes nothing; drop it{' or --dense' * args.dense}")
    sample = dataclasses.replace(config.sample, **given(args, *SAMPLE))
    data = dataclasses.replace(config.data, **given(args, *DATA))
    # How attention is computed, and where files lie, is for this machine to say, not for the one that trained.
    config = config.with_weights(
        codec=args.codec or args.weights, text=args.text_encoder or args.weights, tokenizer=args.tokenizer
    )
    return dataclasses.replace(config, moc=moc, sample=sample, data=data, attention=args.attention)


def overridden(board: Storyboard, args: Arguments) -> Storyboard:
    """The storyboard, with what the command line says in place of its own."""
    return dataclasses.replace(board, **given(args, "seed", "negative_prompt"))


def given(args: Arguments, *names: str) -> dict[str, Any]:
    """Those of the arguments that the command line says."""
    return {name: getattr(args, name) for name in names if getattr(args, name) not in (None, ())}
