"""Whether a sampled shot shows what an earlier one revealed.

All compare frames with what the renderer draws, after the codec's own reconstruction, which no sample surpasses.
"""

from collections.abc import Callable, Sequence

import numpy as np

from evidence.world import Look, Story, boxes, render_shot
from moc_jax.shapes import Bool, UInt8, typed

Reconstruct = Callable[[np.ndarray], np.ndarray]  # frames -> frames, through the codec


def drawn(story: Story, shot: int, looks: Sequence[Look], reconstruct: Reconstruct) -> UInt8[np.ndarray, "n P 3"]:
    """The pixels of the box around the shot's character, as if it had each of `looks`, in the shot's motion, place and
    light."""
    box = boxes(story.shots[shot])
    return np.stack([reconstruct(render_shot(story, shot, look))[box] for look in looks])


@typed
def nearest(shown: UInt8[np.ndarray, "P 3"], looks: UInt8[np.ndarray, "n P 3"]) -> int:
    """Which of `looks` the pixels are nearest to."""
    return int(np.argmin([np.mean((shown.astype(np.float32) - look) ** 2) for look in looks]))


@typed
def psnr(
    frames: UInt8[np.ndarray, "F Y X 3"], truth: UInt8[np.ndarray, "F Y X 3"], where: Bool[np.ndarray, "F Y X"]
) -> float:
    """Decibels of the pixels in `where`."""
    error = np.mean((frames[where].astype(np.float32) - truth[where]) ** 2)
    return float(10 * np.log10(255**2 / max(error, 1e-10)))


@typed
def dynamic_degree(frames: UInt8[np.ndarray, "F Y X 3"]) -> float:
    """The mean change of a pixel from frame to frame, as a share of its range: 0 for a still."""
    return float(np.abs(np.diff(frames.astype(np.float32), axis=0)).mean() / 255)
