"""Where one shot of a video ends and the next begins."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import numpy as np

from moc_jax.data.film import Film
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
    """Cuts that the caption file names, in seconds or in frames of the file."""

    def __init__(self, cuts: Sequence[float], unit: Literal["seconds", "frames"] = "seconds"):
        self._left, self._unit = list(cuts), unit
        self._number = -1

    def __call__(self, seconds: float, frame: UInt8[np.ndarray, "Y X 3"]) -> bool:
        """Whether this frame, shown at `seconds`, is the first of a new shot."""
        self._number += 1
        now = seconds if self._unit == "seconds" else self._number
        reached = [cut for cut in self._left if cut <= now]
        self._left = self._left[len(reached) :]
        return bool(reached)


def find_shots(
    frames: Iterable[tuple[float, float, np.ndarray]], fps: float, is_cut: CutDetector | GivenCuts, film: Film
) -> Iterator[UInt8[np.ndarray, "F Y X 3"]]:
    """The shots of a video, one after another. Memory grows with none of them: their frames go to `film`.

    Args:
        frames: as `decode` gives them.
        fps: the rate of the result.
        is_cut: says where a shot begins.
        film: takes the frames; it may forget a shot before the next one is asked for.
    """
    for start, frame, times in resample(frames, fps):
        if is_cut(start, frame):
            yield film.shot()  # a shot shorter than one new frame has none, and keeps its number
        film.add(frame, times)
    yield film.shot()
