"""Video files <-> arrays of frames, through PyAV (FFmpeg)."""

import itertools
import math
import os
from collections.abc import Iterable, Iterator
from fractions import Fraction

import av
import numpy as np
from av.container import InputContainer
from av.video import VideoStream

from moc_jax.files import whole_file
from moc_jax.shapes import UInt8, typed

_LONGEST_GAP = 10.0  # seconds without a new frame: beyond it the time stamps are damaged, not slow
# cpu-independent: without it x264's rounding, and so the file, differs from one run to the next.
_X264 = {"crf": "16", "preset": "medium", "x264-params": "cpu-independent=1"}
# What swscale turns RGB into, by the numbers of ISO 23001-8, and limited range; untagged, players guess by size.
_BT601 = (6, 6, 6, 1)
_SAME_TIME = 1e-6  # seconds; time stamps are rounded to the container's clock


class VideoError(Exception):
    """A video file that cannot be used: `path` says which, `reason` why."""

    def __init__(self, path: str | os.PathLike, reason: str):
        super().__init__(path, reason)
        self.path, self.reason = os.fspath(path), reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def decode(path: str | os.PathLike, height: int, width: int) -> Iterator[tuple[float, float, np.ndarray]]:
    """Every frame of the file, one at a time, scaled to cover height x width and cropped to it around the centre.

    Yields:
        (start, end, frame): when it is shown, in seconds from the first frame on, and uint8 [Y X 3].

    Raises:
        VideoError: the file cannot be opened, holds no video stream or no frame, or is damaged.
    """
    try:
        with av.open(os.fspath(path)) as container:
            if not container.streams.video:
                raise VideoError(path, "it has no video stream")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            # By default FFmpeg paints over damage, and with several threads it forgets some of it.
            stream.codec_context.options = {"err_detect": "explode"}
            usual = 1 / float(stream.average_rate or stream.guessed_rate or 25)
            aspect = float(stream.sample_aspect_ratio or 1)
            origin, shown, lasts = None, None, usual
            for number, frame in enumerate(_frames(path, container, stream)):
                stamp = number * usual if frame.time is None else frame.time
                origin = stamp if origin is None else origin
                start = stamp - origin
                if shown is not None:
                    start = max(start, shown[0])
                    if start - shown[0] > _LONGEST_GAP:
                        raise VideoError(path, f"its time stamps jump from {shown[0]:.2f} s to {start:.2f} s")
                    yield shown[0], start, shown[1]
                shown = start, _fit(frame, aspect, height, width)
                lasts = max(usual, float((frame.duration or 0) * (frame.time_base or 0)))
            if shown is None:
                raise VideoError(path, "it has no frames")
            yield shown[0], shown[0] + lasts, shown[1]
    except (av.FFmpegError, OSError) as error:
        raise VideoError(path, f"it cannot be decoded ({error.strerror or error})") from error


def _frames(path: str | os.PathLike, container: InputContainer, stream: VideoStream) -> Iterator[av.VideoFrame]:
    count = 0
    for packet in container.demux(stream):
        if packet.is_corrupt:  # the file ends in its middle
            raise VideoError(path, f"it is cut off or damaged after frame {count}")
        for frame in packet.decode():
            if frame.is_corrupt:
                raise VideoError(path, f"frame {count} is damaged")
            yield frame
            count += 1


def _fit(frame: av.VideoFrame, aspect: float, height: int, width: int) -> UInt8[np.ndarray, "Y X 3"]:
    """Scales so that the frame covers the size, keeping its shape, then crops around the centre.

    Args:
        frame: as decoded.
        aspect: width of its pixels over their height.
        height: rows of the result.
        width: columns of the result.
    """
    turned = frame.rotation % 180 == 90  # phones store portrait video lying on its side
    goal_rows, goal_columns = (width, height) if turned else (height, width)
    scale = max(goal_rows / frame.height, goal_columns / (frame.width * aspect))
    rows = max(round(frame.height * scale), goal_rows)
    columns = max(round(frame.width * aspect * scale), goal_columns)
    method = "AREA" if scale < 1 else "BICUBIC"
    image = frame.reformat(columns, rows, format="rgb24", interpolation=method).to_ndarray()
    top, left = (rows - goal_rows) // 2, (columns - goal_columns) // 2
    image = image[top : top + goal_rows, left : left + goal_columns]
    return np.ascontiguousarray(np.rot90(image, frame.rotation // 90))


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
def write_video(path: str | os.PathLike, frames: UInt8[np.ndarray, "F Y X 3"], fps: float | int) -> None:
    """Writes an H.264 MP4 that any player shows. It appears under its name only when it is complete.

    Raises:
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
        with whole_file(path) as partial, av.open(os.fspath(partial), "w", format="mp4", options=options) as container:
            rate = Fraction(fps).limit_denominator(1001)
            stream = container.add_stream("libx264", rate=rate, options=_X264)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            context = stream.codec_context
            context.colorspace, context.color_primaries, context.color_trc, context.color_range = _BT601
            for array in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
            container.mux(stream.encode(None))
    except (av.FFmpegError, OSError) as error:
        raise VideoError(path, f"it cannot be written ({error.strerror or error})") from error
