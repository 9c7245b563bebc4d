"""What `moc-sample` does once its arguments are known to be possible: samples, and writes the files."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax

from moc_jax.attention.api import given_tilings
from moc_jax.checkpoint import load_for_sampling
from moc_jax.codecs import load_codec
from moc_jax.commands.sample import Arguments, configure, overridden
from moc_jax.compilation import kept_programs
from moc_jax.config import ConfigError, MeshConfig
from moc_jax.data import write_video
from moc_jax.phases import Phases
from moc_jax.processes import join
from moc_jax.sampling.atlas import LEVELS, atlas, save_atlas
from moc_jax.sampling.compare import mean_psnr, training_scene
from moc_jax.sampling.generate import Sampler
from moc_jax.sampling.pictures import contact_sheet, routing_picture, save_picture
from moc_jax.sampling.storyboard import Storyboard
from moc_jax.sharding import make_mesh
from moc_jax.showing import printable
from moc_jax.signals import Stop


@dataclasses.dataclass(frozen=True, kw_only=True)
class Files:
    """One of each kind per storyboard; none of a kind that is not asked for."""

    videos: Sequence[Path]
    sheets: Sequence[Path]
    routings: Sequence[Path]
    atlases: Sequence[Path]


def make_videos(args: Arguments, boards: Sequence[Storyboard], files: Files, stop: Stop | None, phases: Phases) -> None:
    """Samples all storyboards, or the training scene that is asked for, and writes the files."""
    given_tilings(args.attention)  # a file of tilings that can't be read is reported before any work
    join(MeshConfig())
    phases.done("devices")
    with kept_programs(args.compilation_cache):
        _make(args, boards, files, stop, phases)


def _make(args: Arguments, boards: Sequence[Storyboard], files: Files, stop: Stop | None, phases: Phases) -> None:
    checkpoint = load_for_sampling(args.checkpoint, args.step)
    config = configure(checkpoint.config, checkpoint.step, args)
    for asked, setting in ((files.routings, "--routing-picture"), (files.atlases, "--routing-atlas")):
        if asked and config.moc.mode == "dense":
            raise ConfigError(f"{setting}: dense attention routes nothing; drop it or --dense")
    codec, scene = load_codec(config.codec, checkpoint.codec_state), None
    if args.training_scene is not None:
        scene = training_scene(config, codec, args.training_scene)
        boards = [overridden(scene.board, args)]
    phases.done("checkpoint")
    sampler, fps = Sampler(config, codec, None, stop, progress=True, phases=phases), config.data.fps
    with jax.set_mesh(make_mesh(MeshConfig())):
        samples = sampler(params := sampler.placed(checkpoint.params), boards)
        shares = [sampler.routing(params, sample) for sample, _ in zip(samples, files.routings)]
        picks = [sampler.picks(params, sample, LEVELS) for sample, _ in zip(samples, files.atlases)]
    for sample, path in zip(samples, files.videos):
        write_video(path, sample.video, fps)
        print(f"{printable(str(path))}: {len(sample.shots)} shots, {len(sample.video)} frames at {fps:g} fps")
    for sample, path in zip(samples, files.sheets):
        rows = [*(scene.rows() if scene else []), ("sample", sample.shots)]
        captions = [shot.caption for shot in sample.storyboard.shots]
        notes = [f"PSNR {score:.1f} dB" for score in mean_psnr(sample.shots, scene.codec)[1]] if scene else []
        save_picture(contact_sheet(rows, captions, title=sample.storyboard.caption, notes=notes, fps=fps), path)
    for share, path in zip(shares, files.routings):
        save_picture(routing_picture(share), path)
    for sample, of_sample, path in zip(samples, picks, files.atlases):
        save_atlas(atlas(sample, of_sample), path)
    if scene:
        print(scene.comparison(samples[0].shots))
