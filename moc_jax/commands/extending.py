"""`moc-sample --extend FOLDER`: a video made shot by shot: begun, resumed, extended, or some of its shots again.

    moc-sample --checkpoint out/run --storyboard scene.yaml --extend film/
    moc-sample --extend film/ --storyboard more.yaml
    moc-sample --extend film/ --redo 3 --redo-readers

The same command, run again after it was stopped or killed, resumes where it was, with the same bits.
"""

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from moc_jax import flags
from moc_jax.checkpoint_names import find_steps
from moc_jax.cli import parse
from moc_jax.commands.sample import configure, given, opens_public, overridden
from moc_jax.commands.sample_arguments import DATA, MOC, SAMPLE, Extending
from moc_jax.config import Config, ConfigError
from moc_jax.files import prove_folder
from moc_jax.phases import Phases, garbage_left
from moc_jax.sampling.generation import Generation, begin, check_new, check_same, is_generation, numbers, resume
from moc_jax.sampling.refusal import check_by_command
from moc_jax.sampling.storyboard import Shot, Storyboard, load_storyboard
from moc_jax.sampling.targets import check_apart, target_files
from moc_jax.signals import Signals

_ELSEWHERE = "training_scene", "routing_picture", "routing_atlas", "order"


def extend(argv: Sequence[str], signals: Signals | None, phases: Phases) -> None:
    """Reads the command line and does what it says; `signals` are asked in between whether to end."""
    args: Extending = parse(Extending, argv, description=__doc__)
    configure(Config(), 1, dataclasses.replace(args, dense_layers=(), height=None, width=None))
    folder, found, said = Path(args.extend), None, args.checkpoint
    for name in [*given(args, *_ELSEWHERE), *(["out"] if args.out != Path() else [])]:
        raise ConfigError(f"--{name.replace('_', '-')} has no use with --extend: all that is made lies in {folder}")
    if args.redo and args.storyboard:
        raise ConfigError("give --redo or --storyboard: one of them, not both")
    for name in given(args, "seed", "negative_prompt") if not args.storyboard else ():
        raise ConfigError(f"--{name.replace('_', '-')} is for the shots of a --storyboard, which is not given")
    if args.redo_readers and not args.redo:
        raise ConfigError("--redo-readers: of which shots? Give --redo")
    if is_generation(folder):
        found = resume(folder)
        said = said or f"{found.checkpoint}, which {folder}/generation.json names and --checkpoint overrides"
        args = dataclasses.replace(args, checkpoint=args.checkpoint or found.checkpoint)
        for number in args.redo:
            if not 1 <= number <= len(found.shots):
                raise ConfigError(f"--redo {number}: there are shots 1 to {len(found.shots)}")
    elif not (args.checkpoint and args.storyboard):
        raise ConfigError(f"{folder} holds no generation yet; give --checkpoint and --storyboard to begin one")
    else:
        check_new(folder)
    public = opens_public(args)
    if found and not public:
        args = dataclasses.replace(args, step=args.step or found.step)
    boards = _boards(args, found)
    check_by_command(boards, args.caption_filter)
    prove_folder(folder.parent, setting="--extend")
    png = {"suffix": ".png", "overwrite": args.overwrite}
    sheets = target_files(args.contact_sheet, [folder.name], **png, setting="--contact-sheet")
    check_apart({"--contact-sheet": sheets}, [*boards, *(found.boards if found else [])], args.storyboard)
    if not public:
        find_steps(args.checkpoint, args.step, name=said)
    phases.done("settings")
    with contextlib.nullcontext() if signals is None else signals.deferred(line=""), garbage_left():
        flags.set_flags()
        from moc_jax.processes import wake_devices

        opened = None
        if public:
            from moc_jax.commands.public import open_public

            opened = open_public(args, boards)
        if signals is not None:
            wake_devices(args.mesh, signals.leave)
        from moc_jax.commands.shots import make_shots
    phases.done("imports")
    make_shots(args, found, boards, sheets, signals, phases, opened)


def found_or_begun(args: Extending, found: Generation | None, config: Config, **made) -> Generation:
    """The generation that is continued, as before anything is asked for.

    Args:
        found: what there was.
        config: of the checkpoint, with the command line's settings, to begin one.
        made: of what: `weights` and `step`.

    Raises:
        GenerationError: other weights or settings than began it.
    """
    if found is None:
        # Of what is shown to a take all is finished, so keys and values can be kept.
        config = dataclasses.replace(config, sample=dataclasses.replace(config.sample, order="shots"))
        return begin(Path(args.extend), config, checkpoint=args.checkpoint, **made)
    now = {"sample": given(args, *SAMPLE), "moc": given(args, *MOC), "data": given(args, *DATA)}
    now["moc"] |= {"mode": "dense" if args.dense else "moc"} if args.dense or args.routed else {}
    now["moc"] |= {"chunk": dataclasses.replace(found.config.moc.chunk, size=args.chunk)} if args.chunk else {}
    was = {(part, name): getattr(getattr(found.config, part), name) for part in now for name in now[part]}
    changed = {f"{p}.{n}": (old, now[p][n]) for (p, n), old in was.items() if old != now[p][n]}
    check_same(found, made["weights"], changed)
    return found


def ask(generation: Generation, args: Extending, boards: Sequence[Storyboard]) -> None:
    """For what the command line does; from here on that is on disk.

    Raises:
        StoryboardError, GenerationError: see `Generation.extend`.
    """
    if boards:
        generation.extend(*boards)
    if args.redo:
        redo, takes = [number - 1 for number in args.redo], generation.take(args.redo[0] - 1)
        readers = generation.again(redo, readers=args.redo_readers)
        if generation.take(redo[0]) == takes:
            print(f"{generation.folder} was asked for this last, and not all is done: it resumes", flush=True)
        told = f"read by {numbers(readers)}" if readers else "read by no later one"
        print(f"{numbers(redo)}: {told}{', done again, too' if readers and args.redo_readers else ''}", flush=True)


def _boards(args: Extending, found: Generation | None) -> list[Storyboard]:
    """What isn't asked for yet."""
    boards = _loaded(args, found.shots[-1] if found else None)
    count = sum(len(board.shots) for board in boards)
    if found is None or not 0 < count <= len(found.shots):
        return boards
    again = _loaded(args, found.shots[-count - 1] if count < len(found.shots) else found.shots[0])
    if not found.ends_with(again):
        return boards
    print(f"{found.folder} ends with these shots already; another seed would give others", flush=True)
    return []


def _loaded(args: Extending, before: Shot | None) -> list[Storyboard]:
    boards = list[Storyboard]()
    for path in args.storyboard:
        boards.append(overridden(load_storyboard(path, before), args))
        before = boards[-1].shots[-1]
    return boards
