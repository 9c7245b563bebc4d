"""Where one shot of a video ends and the next begins."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from moc_jax.data.video import resample
from moc_jax.shapes import UInt8

_LEAST_SECONDS = 0.5  # two cuts closer than this are a flash, not a shot
_DETECTOR_COLUMNS = 256  # PySceneDetect, too, looks at frames of about this width


class CutDetector:
    """PySceneDetect's ContentDetector, frame by frame: a cut is where hue, saturation and brightness jump."""

    def __init__(self, threshold: float):
        from scenedetect import ContentDetector, FrameTimecode  # with OpenCV, which prepared data doesn't need

        # Its own filter of short shots counts frames; ours counts seconds, which hold at any frame rate.
        self._detector = ContentDetector(threshold=threshold, min_scene_len=0)
        self._timecode = FrameTimecode
        self._number = 0
        self._last_cut = 0.0

    def __call__(self, seconds: float, frame: UInt8[np.ndarray, "Y X 3"]) -> bool:
        """Whether this frame, shown at `seconds`, is the first of a new shot."""
        step = max(1, frame.shape[1] // _DETECTOR_COLUMNS)
        bgr = np.ascontiguousarray(frame[::step, ::step, ::-1])
        jump = bool(self._detector.process_frame(self._timecode(self._number, 25.0), bgr))
        self._number += 1
        if not jump or seconds - self._last_cut < _LEAST_SECONDS:
            return False
        self._last_cut = seconds
        return True


class GivenCuts:
    """Cuts that the caption file names, in seconds."""

    def __init__(self, cuts: Sequence[float]):
        self._left = list(cuts)

    def __call__(self, seconds: float, frame: UInt8[np.ndarray, "Y X 3"]) -> bool:
        """Whether this frame, shown at `seconds`, is the first of a new shot."""
        reached = [cut for cut in self._left if cut <= seconds]
        self._left = self._left[len(reached) :]
        return bool(reached)


def begin_shots(
    frames: Iterable[tuple[float, float, np.ndarray]],
    size: tuple[int, int],
    fps: float,
    is_cut: CutDetector | GivenCuts,
    most: int | None,
) -> Iterator[tuple[int, UInt8[np.ndarray, "F Y X 3"]]]:
    """How long each shot is, and how it begins. What is held does not grow with the shot beyond `most` frames.

    Args:
        frames: as `decode` gives them.
        size: their height and width.
        fps: the rate of the result.
        is_cut: says where a shot begins.
        most: frames of a shot that are given; None gives all.

    Yields:
        (count, beginning): the number of the shot's frames, and the first `most` of them.
    """
    count, beginning = 0, []
    for start, frame, times in resample(frames, fps):
        if is_cut(start, frame):
            ended, count, beginning = (count, _stack(beginning, size)), 0, []
            yield ended  # a shot shorter than one new frame has none, and keeps its number
        wanted = times if most is None else min(times, most - len(beginning))
        beginning += [frame] * wanted
        count += times
    yield count, _stack(beginning, size)


def _stack(frames: list[np.ndarray], size: tuple[int, int]) -> UInt8[np.ndarray, "F Y X 3"]:
    return np.stack(frames) if frames else np.empty((0, *size, 3), np.uint8)
