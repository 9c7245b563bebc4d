"""One video -> latents in a shard, one part of a shot at a time."""

import collections
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from moc_jax.codecs import Codec, crop_frames, pixels_from_unit, pixels_to_unit
from moc_jax.config import DataConfig
from moc_jax.data.cache import Part
from moc_jax.data.film import Film
from moc_jax.data.filters import look_at
from moc_jax.data.parts import part_lengths
from moc_jax.data.quality import psnr
from moc_jax.data.shards import ShardWriter
from moc_jax.data.shots import CutDetector, GivenCuts, find_shots
from moc_jax.data.sources import Source
from moc_jax.data.video import VideoError, decode, resample
from moc_jax.shapes import Float32, UInt8

# The codec is measured on the beginning of a video's first part and of one in so many: decoding all would take as long
# as encoding.
_MEASURED, _ONE_IN = 17, 8
_EXACT = 99.0  # dB, what an exact reconstruction counts for in the mean

Frames = UInt8[np.ndarray, "F Y X 3"]


def shots_of(source: Source, cfg: DataConfig, film: Film, notes: list[str], *, still: int = 1) -> Iterator[Frames]:
    """The shots of a video, decoded once; their frames lie in `film`, which may forget a shot before the next. A
    picture is a shot of `still` frames.

    Raises:
        VideoError: it cannot be decoded.
    """
    cuts, frames = source.captions.cuts, decode(source.path, cfg.height, cfg.width, notes.append)
    if source.still:
        frames = ((0.0, still / cfg.fps, frame) for _, _, frame in itertools.islice(frames, 1))
    is_cut = CutDetector(cfg.shot_threshold) if cuts is None else GivenCuts(cuts, source.captions.cut_unit)
    return find_shots(frames, cfg.fps, is_cut, film)


def parts_of(shot: Frames, cfg: DataConfig, codec_stride: int, patch: int) -> Iterator[Frames]:
    """What of a shot is used."""
    begin = 0
    for frames in part_lengths(len(shot), cfg, stride=codec_stride, patch=patch):
        yield shot[begin : begin + frames]
        begin += frames


class Encoder:
    """Encodes the shots of one video as they come."""

    def __init__(self, cfg: DataConfig, codec: Codec, writer: ShardWriter, *, patch: int, starts: bool = False):
        """`patch`: latent frames per token; `starts`: encode first frames with nothing behind them, too."""
        self._cfg, self._codec, self._writer, self._patch, self._starts = cfg, codec, writer, patch, starts
        self.shots: list[int] = []
        """Frames of each, used or not."""
        self.parts: list[Part] = []
        self.psnr: list[float] = []
        """Of what the codec makes of the first frames of some parts."""

    def add(self, shot: Frames) -> None:
        """The next shot.

        Raises:
            ValueError: latents that are not finite.
            OSError: the disk is full.
        """
        start = sum(self.shots)
        parts = parts_of(shot, self._cfg, self._codec.stride[0], self._patch)
        for _, alike in itertools.groupby(parts, len):
            for batch in itertools.batched(alike, self._codec.batch_size):
                videos = np.stack([pixels_to_unit(np.asarray(frames)) for frames in batch])
                encoded = self._codec.encode_batch(videos)
                starts = [None] * len(batch)
                if self._starts:
                    alone = np.concatenate([videos[:, :1], 0 * videos[:, 1:]], axis=1)
                    starts = self._codec.encode_batch(alone)
                for frames, video, latents, begun in zip(batch, videos, encoded, starts):
                    self._writer.write(latents, self._stills(video), begun)
                    self._measure(frames, latents)
                    part = Part(
                        shot=len(self.shots),
                        start=start,
                        frames=len(frames),
                        latent_frames=len(latents),
                        look=look_at(frames),
                    )
                    self.parts.append(part)
                    start += len(frames)
        self.shots.append(len(shot))

    def _stills(self, video: Float32[np.ndarray, "F Y X 3"]) -> Float32[np.ndarray, "n p Y X Z"]:
        """Frames spread over the part, its first and last included, each encoded as the shortest still clip."""
        frames = self._codec.stride[0] * (self._patch - 1) + 1
        picks = np.linspace(0, len(video) - 1, self._cfg.keyframes).round().astype(int)
        clips = np.repeat(video[picks][:, None], frames, axis=1)
        size = self._codec.batch_size
        batches = [self._codec.encode_batch(clips[k : k + size]) for k in range(0, len(clips), size)]
        return np.concatenate(batches)

    def _measure(self, part: Frames, latents: Float32[np.ndarray, "f Y X Z"]) -> None:
        if len(self.parts) % _ONE_IN:
            return
        frames = crop_frames(min(len(part), _MEASURED), self._codec.stride[0])
        decoded = self._codec.decode(latents[: self._codec.latent_frames(frames)])
        self.psnr.append(min(psnr(part[:frames], pixels_from_unit(decoded)), _EXACT))


def read_shots(
    path: Path, cfg: DataConfig, places: Sequence[tuple[int, int]]
) -> Iterator[UInt8[np.ndarray, "F Y X 3"]]:
    """Shots of a file by (first frame, frames), counted at `cfg.fps`, in rising order.

    Raises:
        VideoError: it cannot be decoded, or ends before.
    """
    reported_when_it_was_encoded = decode(path, cfg.height, cfg.width, note=lambda text: None)
    shown = resample(reported_when_it_was_encoded, cfg.fps)
    frames = (frame for _, frame, times in shown for _ in range(times))
    at = 0
    for start, count in places:
        collections.deque(itertools.islice(frames, start - at), maxlen=0)
        shot = list(itertools.islice(frames, count))
        if len(shot) < count:
            raise VideoError(path, "it became shorter while it was read")
        at = start + count
        yield np.stack(shot)
