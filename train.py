"""Trains a model on video files; the same command resumes where it was stopped.

    python train.py --config configs/demo.py [--any.nested.field value]

Several hosts: the same command on each, with --mesh.distributed True (and --mesh.coordinator, --mesh.num-processes and
--mesh.process-id where the cluster does not give them by itself). Folders must be on storage that all hosts share.
"""

import sys

if __name__ == "__main__":  # first of all, so that what goes wrong in the imports below is reported as well
    if sys.version_info < (3, 12):  # noqa: UP036 - outside the environment it may be any
        sys.exit("error: this needs Python 3.12 or newer: run `make setup` once, then .venv/bin/python train.py")
    sys.path.insert(0, __file__.rpartition("/")[0])  # where python -P and -I don't look by themselves
    from moc_jax.cli import run

    run("train")

import contextlib
import dataclasses
from collections.abc import Sequence

from moc_jax.cli import clean_exit, load_config
from moc_jax.config import Config
from moc_jax.signals import Signals


def main(argv: Sequence[str], signals: Signals | None = None) -> None:
    """Exits with 0 when the run is done or was stopped by a signal, 2 for a wrong setting, 1 for what went wrong.

    A signal before there is anything to save exits with 130 (SIGINT) or 143 (SIGTERM).
    """
    with clean_exit():
        config = load_config(argv)

    with contextlib.nullcontext(signals) if signals else Signals(whole_process=True) as signals, clean_exit():
        with signals.deferred(line=""):  # an extension that is interrupted while it loads is broken
            # Only now: a wrong setting is reported before any device is touched.
            from moc_jax.checkpoint import CheckpointError
            from moc_jax.codecs import CodecMismatch
            from moc_jax.compilation import kept_programs
            from moc_jax.data import CaptionError, DataError, VideoError, prepare, resolved
            from moc_jax.processes import ProcessError, join, losses_reported, main_process_first
            from moc_jax.sampling.generate import SamplingError
            from moc_jax.sharding import make_mesh
            from moc_jax.training.lock import LockError
            from moc_jax.training.loop import TrainingError, train
            from moc_jax.training.start import initial_codec
            from moc_jax.training.stop import RunStop
            from moc_jax.training.workdir import claimed
        signals.check()
        data = CaptionError, DataError, VideoError
        with clean_exit(*data, CheckpointError, CodecMismatch, LockError, ProcessError, SamplingError, TrainingError):
            join(config.mesh)
            with (
                claimed(config.workdir) as lock,
                losses_reported(config.mesh.heartbeat),
                kept_programs(config.compilation_cache),
            ):
                mesh, stop = make_mesh(config.mesh), RunStop(signals)
                codec = initial_codec(config)
                manifest = main_process_first("prepare the data", lambda: prepare(config, codec))
                config = resolved(config, manifest)
                preview = make_preview(config, manifest, stop) if config.train.preview_every else None
                train(config, manifest, mesh, preview=preview, stop=stop, lock=lock)


def make_preview(config: Config, manifest, stop=None) -> "Preview":
    """What makes a run's previews; `stop` is asked as it samples."""
    from moc_jax.data import codec_of
    from moc_jax.sampling.scenes import scene_storyboard
    from moc_jax.sampling.storyboard import load_storyboard

    given = config.train.preview_storyboard
    board = load_storyboard(given) if given else scene_storyboard(manifest.split("train")[0], config)
    return Preview(config, board, codec_of(manifest), stop)


class Preview:
    """(weights, step) -> previews/<step>.mp4 and a contact sheet in the workdir."""

    def __init__(self, config: Config, board, codec, stop):
        self._config, self._board, self._codec, self._stop = config, board, codec, stop
        self._samplers = {}  # one per chunk size of the schedule

    def __call__(self, params, step: int) -> None:
        import jax

        from moc_jax.data import write_video
        from moc_jax.sampling.generate import Sampler
        from moc_jax.sampling.pictures import contact_sheet, save_picture

        config, board = self._config, self._board
        moc = config.moc_at(step - 1)
        if moc not in self._samplers:
            self._samplers[moc] = Sampler(dataclasses.replace(config, moc=moc), self._codec, None, self._stop)
        (sample,) = self._samplers[moc](params, [board])
        if jax.process_index() == 0:
            video, picture = self._files(step)
            captions = [shot.caption for shot in board.shots]
            write_video(video, sample.video, config.data.fps)
            save_picture(contact_sheet([(f"step {step}", sample.shots)], captions, title=board.caption), picture)

    def missing(self, step: int) -> bool:
        """Whether the previews of `step` are not there, or not all of them."""
        return not all(file.exists() for file in self._files(step))

    def _files(self, step: int):
        from etils import epath

        return [epath.Path(self._config.workdir) / "previews" / f"{step:08}.{kind}" for kind in ("mp4", "png")]
