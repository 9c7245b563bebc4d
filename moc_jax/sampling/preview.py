"""Previews: what a run samples now and then while it trains, to be looked at."""

import dataclasses
import functools
from collections.abc import Callable

import jax
from etils import epath

from moc_jax.codecs import Codec
from moc_jax.config import Config, ConfigError, MoCConfig
from moc_jax.data import Manifest, codec_of, write_video
from moc_jax.digest import tree_digests, weights_digest
from moc_jax.errors import PreviewError, out_of_memory
from moc_jax.processes import attempt
from moc_jax.provenance import Provenance
from moc_jax.sampling.compare import prepared_scene
from moc_jax.sampling.generate import Sample, Sampler, SamplingError
from moc_jax.sampling.pictures import Row, contact_sheet, save_picture, shown_frames
from moc_jax.sampling.provenance import provenance_of
from moc_jax.sampling.scenes import Canvas, canvas_of, check_given, of_each, pixels_of, scene_storyboard
from moc_jax.sampling.storyboard import (
    Shot,
    Storyboard,
    StoryboardError,
    check_pins,
    load_storyboard,
    storyboard_digest,
)
from moc_jax.sharding import Params
from moc_jax.signals import Stop


def make_preview(config: Config, manifest: Manifest, stop: Stop | None = None) -> "Preview":
    """What makes a run's previews; `stop` is checked while it samples.

    A storyboard and its files are read now, and not again. Without one it is the first training scene that is sampled,
    and shown below the original and below what the codec makes of it, which no sample surpasses.
    """
    given, codec = config.train.preview_storyboard, codec_of(manifest, config.codec)
    if given:
        check_pins(board := load_storyboard(given))
        check_given(board, config.condition_channels)
        board = _read(board, canvas_of(config.data, codec, config.model, config.moc))
        return Preview(config, board, codec, stop)
    entry = manifest.split("train")[0]
    board = scene_storyboard(entry, stride=codec.stride[0], fps=config.data.fps)
    if config.condition_channels:
        raise ConfigError("previews of a model that reads first frames need some: give a train.preview_storyboard")

    def rows() -> list[Row]:
        scene = prepared_scene(config.data, manifest, codec, entry)
        return [(name, [shown_frames(shot) for shot in shots]) for name, shots in scene.rows()]

    return Preview(config, board, codec, stop, rows)


def _read(board: Storyboard, canvas: Canvas) -> Storyboard:
    """The storyboard with what its files hold; raises StoryboardError where one can't be read or is too short."""

    def read(shot: Shot) -> Shot:
        return dataclasses.replace(shot, pixels=pixels_of(shot, canvas)) if shot.image or shot.video else shot

    return dataclasses.replace(board, shots=tuple(of_each(board, read)))


class Preview:
    """(weights, step) -> previews/<step>.mp4 and a contact sheet in the workdir."""

    def __init__(
        self, config: Config, board: Storyboard, codec: Codec, stop: Stop | None, rows: Callable[[], list[Row]] = list
    ):
        """`rows`: what to show above the sample; the main process asks at its first preview."""
        self._config, self._board, self._codec, self._stop = config, board, codec, stop
        self._digest = storyboard_digest(board)
        self._rows = functools.cache(rows)
        self._samplers: dict[MoCConfig, Sampler] = {}  # one per chunk size of the schedule

    def __call__(self, params: Params, step: int) -> None:
        """All processes call it together, and one that fails alone leaves no other waiting.

        Raises:
            PreviewError: it can't be made, on all of them; or not written, which process 0 alone does.
        """
        config, board = self._config, self._board
        moc = config.moc_at(step - 1)
        sampler, problem = attempt(lambda: self._sampler(moc))  # it may read files, of the text encoder
        if sampler is None:
            raise PreviewError(problem)
        weights = weights_digest(tree_digests(params))
        made = provenance_of(board, config.sample, moc, weights=weights, step=step, digest=self._digest)
        try:
            (sample,) = sampler(params, [board])
        except (StoryboardError, SamplingError) as error:
            if out_of_memory(error) is not None:  # perhaps on one process alone
                raise
            raise PreviewError(str(error)) from error
        if jax.process_index() == 0:
            try:
                self._write(sample, made, step)
            except Exception as error:
                raise PreviewError(str(error) or type(error).__name__) from error

    def _sampler(self, moc: MoCConfig) -> Sampler:
        if moc not in self._samplers:
            config = dataclasses.replace(self._config, moc=moc)
            self._samplers[moc] = Sampler(config, self._codec, None, self._stop)
        return self._samplers[moc]

    def _write(self, sample: Sample, made: Provenance, step: int) -> None:
        video, picture = self._files(step)
        board = self._board
        write_video(video, sample.video, self._config.data.fps, made)
        rows = [*self._rows(), (f"step {step}", sample.shots)]
        captions, continues = zip(*((shot.caption, shot.continues) for shot in board.shots))
        save_picture(contact_sheet(rows, captions, title=board.caption, continues=continues), picture)

    def missing(self, step: int) -> bool:
        """Whether the previews of `step` are not there, or not all of them."""
        return not all(file.exists() for file in self._files(step))

    def _files(self, step: int) -> list[epath.Path]:
        return [epath.Path(self._config.workdir) / "previews" / f"{step:08}.{kind}" for kind in ("mp4", "png")]
