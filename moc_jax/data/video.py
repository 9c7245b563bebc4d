"""Video files <-> arrays of frames, through PyAV (FFmpeg)."""

import contextlib
import itertools
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video import VideoStream
from av.video.codeccontext import VideoCodecContext

from moc_jax.data.frames import deinterlaced, fit, remarks
from moc_jax.data.streams import best_stream, can_be_torn, decoder_of, display_matrix, end_of, packets, usual_step
from moc_jax.data.tars import address, open_bytes
from moc_jax.data.timestamps import Stamp, show_times
from moc_jax.errors import Failure
from moc_jax.files import whole_file
from moc_jax.provenance import Provenance, append_provenance
from moc_jax.shapes import UInt8, typed

_log = logging.getLogger(__name__)
# cpu-independent: without it x264's rounding, and so the file, differs from one run to the next.
_X264 = {"crf": "16", "preset": "medium", "x264-params": "cpu-independent=1"}
# What swscale turns RGB into, by the numbers of ISO 23001-8, and limited range; untagged, players guess by size.
_BT601 = (6, 6, 6, 1)
_AHEAD = 2  # frames that x264 with these settings is decoded ahead of what is shown
_SAME_TIME = 1e-6  # seconds; time stamps are rounded to the container's clock


class VideoError(Failure):
    """A video file that cannot be used: `path` says which, `reason` why."""

    def __init__(self, path: str | os.PathLike, reason: str):
        super().__init__(path, reason)
        self.path, self.reason = os.fspath(path), reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def decode(
    path: str | os.PathLike, height: int, width: int, note: Callable[[str], None] | None = None
) -> Iterator[tuple[float, float, np.ndarray]]:
    """Every frame of the file, one at a time, scaled to cover height x width and cropped to it around the centre.

    Args:
        path: of a file in any format that FFmpeg reads.
        height: rows of the result.
        width: columns of the result.
        note: called with each thing that the user should know about the file, once; by default it is logged.

    Yields:
        (start, end, frame): when it is shown, in seconds from the first frame on, and uint8 [Y X 3].

    Raises:
        VideoError: the file cannot be opened, holds no video stream or no frame, or is damaged.
    """
    reported = set[str]()

    def note_once(text: str) -> None:
        if text not in reported:
            reported.add(text)
            note(text) if note is not None else _log.warning("%s: %s", os.fspath(path), text)

    try:
        with av.open(address(path)) as container:
            stream = best_stream(container, note_once)
            if stream is None:
                known = "that can be decoded" if container.streams.video else ""
                raise VideoError(path, f"it has no video stream {known}".rstrip())
            found = packets(container, stream, note_once)
            frames = _frames(path, found, decoder_of(stream), can_be_torn(container), note_once)
            fitted = _fitted(frames, stream, height, width, note_once)
            shown = None
            for shown in show_times(fitted, usual_step(stream), end_of(container, stream), note_once):
                yield shown
            if shown is None:
                raise VideoError(path, "it has no frames")
    except (av.FFmpegError, OSError) as error:
        if _is_empty(path):
            raise VideoError(path, "it is empty (0 bytes); copy or download it again") from error
        raise VideoError(path, f"it cannot be decoded ({error.strerror or error})") from error


def _is_empty(path: str | os.PathLike) -> bool:
    with contextlib.suppress(OSError), open_bytes(path if isinstance(path, Path) else Path(path)) as file:
        return not file.read(1)
    return False


def _frames(
    path: str | os.PathLike,
    packets: Iterable[av.Packet],
    decoder: VideoCodecContext,
    torn: bool,
    note: Callable[[str], None],
) -> Iterator[av.VideoFrame]:
    count = 0
    early: list[int] = []  # when the packets that come ahead of the first frame are to be shown
    failed: Exception | None = None
    for packet in packets:
        if failed is not None and packet.size:  # not the end of a recording, but damage within
            raise failed
        if packet.is_corrupt and not torn:  # the file ends in its middle
            raise VideoError(path, f"it is cut off or damaged after frame {count}")
        if not count and packet.pts is not None and not packet.is_discard:
            early.append(packet.pts)
        try:
            frames = decoder.decode(packet)
        except av.FFmpegError as error:
            if not torn:
                raise
            failed, frames = error, []
        for frame in frames:
            if frame.is_corrupt:
                failed = VideoError(path, f"frame {count} is damaged")
                if not torn:
                    raise failed
                continue
            if not count and frame.pts is not None and (lost := sum(pts < frame.pts for pts in early)):
                note(f"frames ahead of the first one that can be decoded are left out ({lost})")
            yield frame
            count += 1
    if failed is not None:
        note("it ends in the middle of a frame, which is left out")


def _fitted(
    frames: Iterable[av.VideoFrame], stream: VideoStream, height: int, width: int, note: Callable[[str], None]
) -> Iterator[tuple[Stamp, np.ndarray]]:
    aspect, matrix = float(stream.sample_aspect_ratio or 1), display_matrix(stream)
    for frame in deinterlaced(frames):
        for remark in remarks(frame, matrix):
            note(remark)
        yield _stamp(frame), fit(frame, aspect, matrix, height, width)


def _stamp(frame: av.VideoFrame) -> Stamp:
    clock = frame.time_base or Fraction(0)
    presented, decoded, lasts = (
        None if ticks is None or not clock else float(ticks * clock) for ticks in (frame.pts, frame.dts, frame.duration)
    )
    return Stamp(presented=presented, decoded=decoded, lasts=lasts)


def resample(frames: Iterable[tuple[float, float, np.ndarray]], fps: float) -> Iterator[tuple[float, np.ndarray, int]]:
    """The frames of `decode` at another rate: frame k shows what the file shows at k / fps seconds.

    Yields:
        (start, frame, times): every frame of the file, and how often it is shown at the new rate, 0 included.
    """
    shown = 0
    for start, end, frame in frames:
        until = max(shown, math.ceil((end - _SAME_TIME) * fps))
        yield start, frame, until - shown
        shown = until


@typed
def read_video(
    path: str | os.PathLike, height: int, width: int, fps: float | int, most: int | None = None
) -> UInt8[np.ndarray, "F Y X 3"]:
    """The file as frames of one size at one rate; `most` reads no more than that many.

    Raises:
        VideoError: see `decode`.
    """
    shown = resample(decode(path, height, width), fps)
    return np.stack(list(itertools.islice((frame for _, frame, times in shown for _ in range(times)), most)))


@typed
def write_video(
    path: str | os.PathLike,
    frames: UInt8[np.ndarray, "F Y X 3"],
    fps: float | int,
    made: Provenance | None = None,
    *,
    replace: bool = True,
) -> None:
    """Writes an H.264 MP4 that any player shows. It appears under its name only when it is complete.

    `made` is what it will say about how it was made; None: nothing, for what was not.

    Raises:
        TakenError: there is another file, and it is not to be replaced; see `whole_file`.
        VideoError: no frames, a size that H.264 cannot hold, or a file that cannot be written, for instance because
            the disk is full.
    """
    count, height, width, _ = frames.shape
    if not count:
        raise VideoError(path, "it would have no frames")
    if height % 2 or width % 2:
        raise VideoError(path, f"frames of {height}x{width} cannot be written; H.264 needs even rows and columns")
    options = {"movflags": "faststart"}
    try:
        with whole_file(path, replace=replace) as partial:
            with av.open(os.fspath(partial), "w", format="mp4", options=options) as container:
                rate = Fraction(fps).limit_denominator(1001)
                stream = container.add_stream("libx264", rate=rate, options=_X264)
                stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
                context = stream.codec_context
                context.colorspace, context.color_primaries, context.color_trc, context.color_range = _BT601
                for array in frames:
                    container.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
                container.mux(stream.encode(None))
            if made is not None:
                append_provenance(partial, made)
    except (av.FFmpegError, OSError) as error:
        raise VideoError(path, f"it cannot be written ({error.strerror or error})") from error


def join_videos(parts: Sequence[Path], path: Path, made: Provenance | None = None) -> None:
    """Joins videos that `write_video` wrote, of one size and rate, without encoding them again.

    Raises:
        VideoError: none is given, one can't be read, or the file can't be written.
    """
    if not parts:
        raise VideoError(path, "there is nothing to join")
    try:
        with whole_file(path) as partial:
            with av.open(os.fspath(partial), "w", format="mp4", options={"movflags": "faststart"}) as container:
                joined, count = None, 0
                for part in parts:
                    with av.open(os.fspath(part)) as video:
                        stream, before = video.streams.video[0], count
                        joined = joined or container.add_stream_from_template(stream)
                        for packet in video.demux(stream):
                            if packet.pts is None or packet.duration is None:
                                continue  # the end
                            # In the order of decoding frames are as long apart as they are shown, ahead of their time.
                            # A file's own duration is rounded, to milliseconds where the first frames are in order.
                            packet.dts = (count - _AHEAD) * packet.duration
                            packet.pts += before * packet.duration
                            packet.stream, count = joined, count + 1
                            container.mux(packet)
            if made is not None:
                append_provenance(partial, made)
    except (av.FFmpegError, OSError) as error:
        raise VideoError(path, f"it cannot be joined ({error.strerror or error})") from error
