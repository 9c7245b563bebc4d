"""What `moc-sample` does once its arguments are known to be possible: samples, and writes the files."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from moc_jax.attention.api import given_tilings
from moc_jax.checkpoint import load_for_sampling
from moc_jax.codecs import load_codec
from moc_jax.commands.public import Opened
from moc_jax.commands.sample import configure, overridden
from moc_jax.commands.sample_arguments import Arguments
from moc_jax.compilation import kept_programs
from moc_jax.data import write_video
from moc_jax.files import TakenError
from moc_jax.phases import Phases
from moc_jax.processes import join
from moc_jax.provenance import Provenance
from moc_jax.sampling.atlas import LEVELS, atlas, save_atlas
from moc_jax.sampling.compare import TrainingScene, mean_psnr, training_scene
from moc_jax.sampling.generate import Sample, Sampler
from moc_jax.sampling.picks import Picks
from moc_jax.sampling.pictures import contact_sheet, routing_picture, save_picture
from moc_jax.sampling.provenance import provenance_of
from moc_jax.sampling.refusal import check_by_command
from moc_jax.sampling.storyboard import Storyboard
from moc_jax.sharding import make_mesh
from moc_jax.showing import printable
from moc_jax.signals import Stop


@dataclasses.dataclass(frozen=True, kw_only=True)
class Files:
    """One of each kind per storyboard; none of a kind that is not asked for."""

    videos: Sequence[Sequence[Path]]
    """One per storyboard, or one for each of its shots."""
    sheets: Sequence[Path]
    routings: Sequence[Path]
    atlases: Sequence[Path]


def make_videos(
    args: Arguments,
    boards: Sequence[Storyboard],
    files: Files,
    stop: Stop | None,
    phases: Phases,
    opened: Opened | None = None,
) -> None:
    """Samples all storyboards, or the training scene that is asked for, and writes the files; `opened`: with these
    public weights, not with a run's."""
    given_tilings(args.attention)  # a file of tilings that can't be read is reported before any work
    join(args.mesh)
    phases.done("devices")
    with kept_programs(args.compilation_cache):
        _make(args, boards, files, stop, phases, opened)


def _make(
    args: Arguments,
    boards: Sequence[Storyboard],
    files: Files,
    stop: Stop | None,
    phases: Phases,
    opened: Opened | None,
) -> None:
    opened = opened or of_run(args)
    config, codec, scene = opened.config, opened.codec, None
    if args.training_scene is not None:
        scene = training_scene(config, codec, args.training_scene, data=opened.data)
        boards = [overridden(scene.board, args)]
        check_by_command(boards, args.caption_filter)
    weights = {"weights": opened.digest, "step": opened.step}
    made = [provenance_of(board, config.sample, config.moc, **weights) for board in boards]
    phases.done("checkpoint")
    sampler, fps = Sampler(config, codec, opened.encoder, stop, progress=True, phases=phases), config.data.fps
    with jax.set_mesh(make_mesh(args.mesh)):
        samples = sampler(params := opened.load(sampler), boards)
        shares = [sampler.routing(params, sample) for sample, _ in zip(samples, files.routings)]
        picks = [sampler.picks(params, sample, LEVELS) for sample, _ in zip(samples, files.atlases)]
    if jax.process_index() == 0:
        _write(samples, made, files, scene, shares, picks, fps=fps, replace=args.overwrite)


def _write(
    samples: Sequence[Sample],
    made: Sequence[Provenance],
    files: Files,
    scene: TrainingScene | None,
    shares: Sequence[np.ndarray],
    picks: Sequence[Picks],
    *,
    fps: float,
    replace: bool,
) -> None:
    """All files, also where the names of some are taken by now; raises TakenError in the end, which says which."""
    taken = list[TakenError]()

    def written(write: Callable[..., None], *what: object) -> bool:
        try:
            write(*what, replace=replace)
        except TakenError as error:
            taken.append(error)
            return False
        return True

    for sample, of_sample, paths in zip(samples, made, files.videos):
        videos = sample.shots if sample.storyboard.shots[0].file else [sample.video]
        done = [written(write_video, path, video, fps, of_sample) for path, video in zip(paths, videos, strict=True)]
        where, shots = (paths[0] if len(paths) == 1 else paths[0].parent), len(sample.shots)
        if all(done):
            print(f"{printable(str(where))}: {shots} shots, {len(sample.video)} frames at {fps:g} fps")
    for sample, path in zip(samples, files.sheets):
        rows = [*(scene.rows() if scene else []), ("sample", sample.shots)]
        captions = [shot.caption for shot in sample.storyboard.shots]
        notes = [f"PSNR {score:.1f} dB" for score in mean_psnr(sample.shots, scene.codec)[1]] if scene else []
        title, continues = sample.storyboard.caption, _continues(sample)
        sheet = contact_sheet(rows, captions, title=title, notes=notes, fps=fps, continues=continues)
        written(save_picture, sheet, path)
    for sample, share, path in zip(samples, shares, files.routings):
        written(save_picture, routing_picture(share, continues=_continues(sample)), path)
    for sample, of_sample, path in zip(samples, picks, files.atlases):
        written(save_atlas, atlas(sample, of_sample), path)
    if scene:
        print(scene.comparison(samples[0].shots))
    if taken:
        raise TakenError("; ".join(map(str, taken)))


def of_run(args: Arguments) -> Opened:
    """A run's checkpoint, and what goes with it."""
    saved = load_for_sampling(args.checkpoint, args.step, adapters=args.adapters, base=args.base)
    if saved.licence:
        print(f"licence of the weights that its adapters are beside: {saved.licence}", flush=True)
    config = configure(saved.config, saved.step, args)
    codec = load_codec(config.codec, saved.codec_state)
    load = functools.partial(Sampler.placed, params=saved.params)
    return Opened(config=config, codec=codec, load=load, digest=saved.digest, step=saved.step, data=saved.data)


def _continues(sample: Sample) -> list[bool]:
    return [shot.continues for shot in sample.storyboard.shots]
