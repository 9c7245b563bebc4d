"""Trains a model on video files; the same command goes on where it was stopped.

    python train.py --config configs/demo.py [--any.nested.field value]

Several hosts: the same command on each, with --mesh.distributed True (and --mesh.coordinator, --mesh.num-processes and
--mesh.process-id where the cluster does not tell them by itself). Folders must be on storage that all hosts share.
"""

import dataclasses
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from moc_jax.cli import clean_exit, load_config
from moc_jax.config import Config


def main(argv: Sequence[str]) -> None:
    """Exits with 0 when the run is done or was stopped by a signal, 2 for a wrong setting, 1 for what went wrong."""
    with clean_exit():
        config = load_config(argv)

    # Only now: a wrong setting is told before any device is touched.
    from moc_jax.checkpoint import CheckpointError
    from moc_jax.codecs import CodecMismatch
    from moc_jax.data import CaptionError, DataError, VideoError, prepare, resolved
    from moc_jax.processes import ProcessError, join, losses_reported, main_process_first
    from moc_jax.sampling.generate import SamplingError
    from moc_jax.sharding import make_mesh
    from moc_jax.training.loop import TrainingError, train
    from moc_jax.training.start import initial_codec

    data = CaptionError, DataError, VideoError
    told = *data, CheckpointError, CodecMismatch, ProcessError, SamplingError, TrainingError
    with clean_exit(*told), losses_reported(config.mesh.heartbeat):
        join(config.mesh)
        mesh = make_mesh(config.mesh)
        codec = initial_codec(config)
        manifest = main_process_first("prepare the data", lambda: prepare(config, codec))
        config = resolved(config, manifest)
        train(config, manifest, mesh, preview=make_preview(config, manifest) if config.train.preview_every else None)


def make_preview(config: Config, manifest):
    """(weights, step) -> previews/<step>.mp4 and a contact sheet in the workdir."""
    import jax
    from etils import epath

    from moc_jax.data import codec_of, write_video
    from moc_jax.sampling.generate import Sampler
    from moc_jax.sampling.pictures import contact_sheet, save_picture
    from moc_jax.sampling.scenes import scene_storyboard
    from moc_jax.sampling.storyboard import load_storyboard

    given = config.train.preview_storyboard
    board = load_storyboard(given) if given else scene_storyboard(manifest.split("train")[0], config)
    samplers = {}  # one per chunk size of the schedule

    def preview(params, step: int) -> None:
        moc = config.moc_at(step - 1)
        if moc not in samplers:
            samplers[moc] = Sampler(dataclasses.replace(config, moc=moc), codec_of(manifest))
        (sample,) = samplers[moc](params, [board])
        if jax.process_index() == 0:
            video, picture = f"{step:08}.mp4", f"{step:08}.png"
            sheet = contact_sheet(
                [(f"step {step}", sample.shots)], [shot.caption for shot in board.shots], title=board.caption
            )
            folder = epath.Path(config.workdir) / "previews"
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory() as made:  # a video can't be written straight into a bucket
                write_video(Path(made) / video, sample.video, config.data.fps)
                save_picture(sheet, Path(made) / picture)
                for name in (video, picture):
                    part = epath.Path(made, name).copy(folder / f".{name}.part", overwrite=True)
                    part.replace(folder / name)

    return preview


if __name__ == "__main__":
    main(sys.argv[1:])
