"""What `moc-sample --extend` does once its arguments are known to be possible."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax

from moc_jax.attention.api import given_tilings
from moc_jax.commands.extending import ask, found_or_begun
from moc_jax.commands.public import Opened
from moc_jax.commands.sample_arguments import Extending
from moc_jax.commands.videos import of_run
from moc_jax.compilation import kept_programs
from moc_jax.data.video import join_videos, read_video
from moc_jax.phases import Phases
from moc_jax.processes import join
from moc_jax.sampling.generate import Sampler
from moc_jax.sampling.generation import Generation
from moc_jax.sampling.pictures import save_picture, shots_sheet
from moc_jax.sampling.provenance import provenance_of
from moc_jax.sampling.scenes import check_given, check_shot_by_shot
from moc_jax.sampling.shot_by_shot import sample_shots
from moc_jax.sampling.storyboard import Storyboard
from moc_jax.sharding import make_mesh
from moc_jax.signals import Stop
from moc_jax.training.lock import Lock


def make_shots(
    args: Extending,
    found: Generation | None,
    boards: Sequence[Storyboard],
    sheets: Sequence[Path],
    stop: Stop | None,
    phases: Phases,
    opened: Opened | None,
) -> None:
    """Samples what isn't done, joins all shots, and draws the sheet if one is asked for."""
    given_tilings(args.attention)
    join(args.mesh)
    phases.done("devices")
    with kept_programs(args.compilation_cache), held(Path(args.extend), found) as still_held:
        opened = opened or of_run(args)
        generation = found_or_begun(args, found, opened.config, weights=opened.digest, step=opened.step)
        # How attention is computed, and where files lie, is for this call to say, not for the one that began it.
        here = {"attention": args.attention, "codec": opened.config.codec, "text": opened.config.text}
        config = dataclasses.replace(generation.config, **here)
        phases.done("checkpoint")
        sampler = Sampler(config, opened.codec, opened.encoder, stop, progress=True, phases=phases)
        if found is None:
            check_given(boards[0], sampler.canvas.condition_channels)
        for board in boards:
            check_shot_by_shot(board, sampler.canvas, config.sample, sampler.encoder)
        still_held()
        ask(generation, args, boards)
        with jax.set_mesh(make_mesh(args.mesh)):
            params = opened.load(sampler)
            for _ in sample_shots(generation, sampler, params, lambda line: print(line, flush=True), still_held):
                pass
        still_held()
        if jax.process_index() == 0:
            _finish(generation, sheets, replace=args.overwrite)


@contextlib.contextmanager
def held(folder: Path, found: Generation | None) -> Iterator[Callable[[], None]]:
    """By these processes alone, as they found it; what it yields raises LockError once that is no longer so."""
    if jax.process_index() != 0:
        yield lambda: None
        return
    folder.mkdir(parents=True, exist_ok=True)
    lock = Lock(folder, setting="--extend")
    try:
        lock.acquire(lambda line: print(line, flush=True))
        if found is not None:
            found.check_current()
        yield functools.partial(lock.check, now=True)
    finally:
        lock.release()
        with contextlib.suppress(OSError):  # unless there is something in it
            folder.rmdir()


def _finish(generation: Generation, sheets: Sequence[Path], *, replace: bool) -> None:
    config, whole = generation.config, generation.folder / "video.mp4"
    shown = [number for number, shot in enumerate(generation.shots) if not shot.is_reference]
    files = [generation.file(number, "mp4") for number in shown]
    board = Storyboard(caption=generation.boards[0].caption, shots=tuple(generation.shots))
    made = {"weights": generation.weights, "step": generation.step}
    join_videos(files, whole, provenance_of(board, config.sample, config.moc, **made))
    print(f"{whole}: {len(files):,} shots")
    for path in sheets:
        data = config.data
        middles = []
        for file in files:
            frames = read_video(file, data.height, data.width, data.fps)
            middles.append(frames[len(frames) // 2])
        captions = [generation.shots[number].caption for number in shown]
        save_picture(shots_sheet(middles, captions, [number + 1 for number in shown]), path, replace=replace)
