"""The second reading of a video: its usable shots -> scenes of latents in shards, one shot at a time."""

import collections
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from moc_jax.codecs import Codec, crop_frames, pixels_from_unit, pixels_to_unit
from moc_jax.config import DataConfig
from moc_jax.data.manifest import SceneEntry, ShotEntry
from moc_jax.data.quality import psnr
from moc_jax.data.shards import ShardWriter
from moc_jax.data.sources import Source, Split
from moc_jax.data.survey import Cut
from moc_jax.data.video import VideoError, decode, resample
from moc_jax.shapes import Float32, UInt8

# The codec is measured on the beginning of the first shots, then of one in so many: decoding all would take as long as
# encoding.
_MEASURED, _ALL, _ONE_IN = 17, 32, 8
_EXACT = 99.0  # dB, what an exact reconstruction counts for in the mean


class SceneEncoder:
    """Encodes file after file."""

    def __init__(self, cfg: DataConfig, codec: Codec, writer: ShardWriter, *, patch: int):
        """`patch`: latent frames per token."""
        self._cfg, self._codec, self._writer, self._patch = cfg, codec, writer, patch
        self.frames = 0
        """Encoded so far."""
        self._psnr: dict[Split, list[float]] = {}  # of the shots that were measured
        self._shots = collections.Counter[Split]()

    @property
    def quality(self) -> dict[str, float]:
        """By split: the mean PSNR of what the codec makes of the first frames of shots."""
        return {split: float(np.mean(values)) for split, values in self._psnr.items()}

    def scenes(self, source: Source, cuts: Sequence[Cut]) -> Iterator[SceneEntry]:
        """Writes the scenes of one file: its usable shots in order, split as evenly as can be.

        Raises:
            VideoError: the file is not what it was when the cuts were found.
            ValueError: latents that are not finite.
        """
        usable = [index for index, cut in enumerate(cuts) if cut.used]
        starts = list(itertools.accumulate((cut.frames for cut in cuts), initial=0))
        groups = np.array_split(usable, -(-len(usable) // self._cfg.shots_per_scene))
        shots = read_shots(source.path, self._cfg, [(starts[index], cuts[index].used) for index in usable])
        for number, group in enumerate(groups):
            latents, stills, entries = [], [], []
            for index in group.tolist():
                shot = next(shots)
                video = pixels_to_unit(shot)
                latents.append(self._codec.encode(video))
                stills.append(self._stills(video))
                entries.append(
                    ShotEntry(caption=source.captions.shot(index), frames=len(latents[-1]), start=starts[index])
                )
                self.frames += len(shot)
                self._measure(source.split, shot, latents[-1])
            shard, record = self._writer.write(np.concatenate(latents), np.stack(stills))
            yield SceneEntry(
                name=f"{source.name}#{number}",
                source=source.name,
                split=source.split,
                caption=source.captions.caption,
                shots=tuple(entries),
                shard=shard,
                record=record,
            )

    def _stills(self, video: Float32[np.ndarray, "F Y X 3"]) -> Float32[np.ndarray, "n p Y X Z"]:
        """Frames spread over the shot, its first and last included, each encoded as the shortest still clip."""
        frames = self._codec.stride[0] * (self._patch - 1) + 1
        picks = np.linspace(0, len(video) - 1, self._cfg.keyframes).round().astype(int)
        return np.stack([self._codec.encode(np.repeat(video[k : k + 1], frames, axis=0)) for k in picks])

    def _measure(
        self, split: Split, shot: UInt8[np.ndarray, "F Y X 3"], latents: Float32[np.ndarray, "f Y X Z"]
    ) -> None:
        self._shots[split] += 1
        if self._shots[split] > _ALL and self._shots[split] % _ONE_IN:
            return
        frames = crop_frames(min(len(shot), _MEASURED), self._codec.stride[0])
        decoded = self._codec.decode(latents[: self._codec.latent_frames(frames)])
        self._psnr.setdefault(split, []).append(min(psnr(shot[:frames], pixels_from_unit(decoded)), _EXACT))


def read_shots(
    path: Path, cfg: DataConfig, places: Sequence[tuple[int, int]]
) -> Iterator[UInt8[np.ndarray, "F Y X 3"]]:
    """Shots of a file by (first frame, frames), counted at `cfg.fps`, in rising order.

    Raises:
        VideoError: it cannot be decoded, or ends before.
    """
    reported_by_the_survey = decode(path, cfg.height, cfg.width, note=lambda text: None)
    shown = resample(reported_by_the_survey, cfg.fps)
    frames = (frame for _, frame, times in shown for _ in range(times))
    at = 0
    for start, count in places:
        collections.deque(itertools.islice(frames, start - at), maxlen=0)
        shot = list(itertools.islice(frames, count))
        if len(shot) < count:
            raise VideoError(path, "it became shorter while it was read")
        at = start + count
        yield np.stack(shot)
