"""Trains a model on video files; the same command goes on where it was stopped.

    python train.py --config configs/demo.py [--any.nested.field value]

Several hosts: the same command on each, with --mesh.distributed True (and --mesh.coordinator, --mesh.num-processes and
--mesh.process-id where the cluster does not tell them by itself). Folders must be on storage that all hosts share.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from moc_jax.cli import clean_exit, load_config
from moc_jax.config import Config


def main(argv: Sequence[str]) -> None:
    """Exits with 0 when the run is complete or was stopped by SIGTERM, 2 for a wrong setting, 1 for what went wrong."""
    with clean_exit():
        config = load_config(argv)

    import jax  # only now: a wrong setting is told before any device is touched

    from moc_jax.checkpoint import CheckpointError
    from moc_jax.codecs import CodecMismatch
    from moc_jax.data import CaptionError, DataError, VideoError
    from moc_jax.sampling.generate import SamplingError
    from moc_jax.sharding import make_mesh
    from moc_jax.training.loop import TrainingError, train

    failures = (CaptionError, CheckpointError, CodecMismatch, DataError, SamplingError, TrainingError, VideoError)
    with clean_exit(*failures):
        if config.mesh.distributed:
            cluster = config.mesh
            if cluster.coordinator:
                jax.distributed.initialize(cluster.coordinator, cluster.num_processes, cluster.process_id)
            else:
                jax.distributed.initialize()
        mesh = make_mesh(config.mesh)
        manifest = prepared(config)
        train(config, manifest, mesh, preview=make_preview(config, manifest) if config.train.preview_every else None)


def prepared(config: Config):
    """The encoded data: made by the main process, if need be, while the others wait."""
    import jax
    from jax.experimental import multihost_utils

    from moc_jax.data import prepare

    if jax.process_count() == 1:
        return prepare(config)
    manifest = prepare(config) if jax.process_index() == 0 else None
    multihost_utils.sync_global_devices("data is prepared")
    return manifest or prepare(config)  # which finds what the main process made


def make_preview(config: Config, manifest):
    """(weights, step) -> previews/<step>.mp4 and a contact sheet in the workdir."""
    import jax

    from moc_jax.data import codec_of, write_video
    from moc_jax.sampling.generate import Sampler
    from moc_jax.sampling.pictures import contact_sheet, save_picture
    from moc_jax.sampling.scenes import scene_storyboard
    from moc_jax.sampling.storyboard import load_storyboard

    given = config.train.preview_storyboard
    board = load_storyboard(given) if given else scene_storyboard(manifest.split("train")[0], config)
    sampler = Sampler(config, codec_of(manifest))

    def preview(params, step: int) -> None:
        (sample,) = sampler(params, [board])
        if jax.process_index() == 0:
            folder = Path(config.workdir) / "previews"
            folder.mkdir(parents=True, exist_ok=True)
            write_video(folder / f"{step:08}.mp4", sample.video, config.data.fps)
            sheet = contact_sheet(
                [(f"step {step}", sample.shots)], [shot.caption for shot in board.shots], title=board.caption
            )
            save_picture(sheet, folder / f"{step:08}.png")

    return preview


if __name__ == "__main__":
    main(sys.argv[1:])
