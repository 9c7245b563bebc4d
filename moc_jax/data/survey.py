"""The first reading of all videos: where their shots lie, which can be used, and the clips to fit a codec on."""

import dataclasses
from collections.abc import Generator, Iterator

import numpy as np

from moc_jax.codecs import crop_frames, pixels_to_unit
from moc_jax.config import DataConfig
from moc_jax.data.folders import some
from moc_jax.data.shots import CutDetector, GivenCuts, begin_shots
from moc_jax.data.sources import Source, Sources
from moc_jax.data.video import VideoError, decode
from moc_jax.progress import Progress
from moc_jax.shapes import Float32, UInt8


@dataclasses.dataclass(frozen=True)
class Cut:
    """One shot as detected: its frames at the new rate, and how many of them can be encoded (0: left out)."""

    frames: int
    used: int


class Survey:
    """Reads all sources once: finds the shots, and hands the training clips to the codec's fit on the way."""

    def __init__(self, cfg: DataConfig, sources: Sources, *, stride: int, patch: int):
        """`stride`, `patch`: frames per latent frame, and latent frames per token."""
        self._cfg, self._sources = cfg, sources
        self._stride, self._patch = stride, patch
        self._least = max(cfg.min_shot_frames, stride * (patch - 1) + 1)
        self.cuts: dict[str, list[Cut]] = {}
        self.skipped: dict[str, str] = {}
        self.notes: list[str] = []
        self._frames = 0  # read so far

    def clips(self) -> Generator[Float32[np.ndarray, "F Y X 3"]]:
        """The training clips in [-1, 1]; when it ends, `cuts`, `skipped` and `notes` are complete."""
        with Progress("finding shots", total=len(self._sources), unit="file") as progress:
            for number, source in enumerate(self._sources):
                for cut, beginning in self._read(source):
                    progress.reach(number, frames=f"{self._frames:,}")
                    if cut.used and source.split == "train":
                        yield pixels_to_unit(beginning[: cut.used])
                progress.reach(number + 1, frames=f"{self._frames:,}")
        bare = [s.name for s in self._sources if s.name in self.cuts and s.captions.file is None]
        if bare:  # perhaps on purpose, perhaps for a caption file of another name
            self.notes.append(
                f"{len(bare)} of {len(self.cuts)} files have no caption file but the defaults: {some(bare)}"
            )

    def _read(self, source: Source) -> Iterator[tuple[Cut, UInt8[np.ndarray, "F Y X 3"]]]:
        """Each shot of a file, and how it begins."""
        cuts: list[Cut] = []
        try:
            for count, beginning in self._shots(source):
                self._frames += count
                cuts.append(Cut(count, self._usable(count)))
                yield cuts[-1], beginning
        except VideoError as error:
            self.skipped[source.name] = error.reason
            return
        if not any(cut.used for cut in cuts):
            longest = max(cut.frames for cut in cuts)
            self.skipped[source.name] = (
                f"too short: its longest shot has {longest} frames at {self._cfg.fps:g} fps, "
                f"but {self._least} are needed"
            )
            return
        self.cuts[source.name] = cuts
        self._compare(source, len(cuts))

    def _shots(self, source: Source) -> Iterator[tuple[int, UInt8[np.ndarray, "F Y X 3"]]]:
        cfg, cuts = self._cfg, source.captions.cuts
        is_cut = CutDetector(cfg.shot_threshold) if cuts is None else GivenCuts(cuts)
        frames = decode(source.path, cfg.height, cfg.width, lambda text: self.notes.append(f"{source.name}: {text}"))
        return begin_shots(frames, (cfg.height, cfg.width), cfg.fps, is_cut, cfg.max_shot_frames or None)

    def _usable(self, frames: int) -> int:
        if frames < self._least:
            return 0
        most = min(frames, self._cfg.max_shot_frames or frames)
        return crop_frames(most, self._stride, self._patch)

    def _compare(self, source: Source, shots: int) -> None:
        captions = source.captions
        expected = len(captions.shots) if captions.cuts is None else len(captions.cuts) + 1
        if captions.cuts is not None and expected != shots:
            self.notes.append(f"{captions.file}: its cuts make {expected} shots, but the video ends after {shots}")
        elif captions.shots and len(captions.shots) != shots:
            rest = "the rest go unused" if len(captions.shots) > shots else "the others have the default caption"
            self.notes.append(
                f"{captions.file}: captions for {len(captions.shots)} shots, but {shots} were found; {rest}"
            )
