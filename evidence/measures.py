"""Whether a sampled shot shows what an earlier one revealed.

All compare frames with what the renderer draws, after the codec's own reconstruction, which no sample surpasses.
"""

from collections.abc import Callable, Sequence

import numpy as np

from evidence.stories import Story
from moc_jax.shapes import Bool, UInt8, typed

_NEAR = 5  # patches around a pixel that have a say in its reconstruction, at most
Reconstruct = Callable[[np.ndarray], np.ndarray]  # frames -> frames, through the codec


def drawn[Look](
    story: Story[Look], shot: int, looks: Sequence[Look], reconstruct: Reconstruct, patch: int = 8
) -> UInt8[np.ndarray, "n P 3"]:
    """The pixels of the box around the shot's character, as if it had each of `looks`, in the shot's motion, place and
    light.

    Of large frames a part is reconstructed, in whole patches of so many rows and columns.
    """
    box = story.shots[shot].box
    rows, columns = (_around(box.any(axis=(0, 3 - axis)), patch) for axis in (1, 2))
    inside = box[:, rows, columns]
    return np.stack([reconstruct(story.render_shot(shot, look)[:, rows, columns])[inside] for look in looks])


def _around(inside: Bool[np.ndarray, " n"], patch: int) -> slice:
    at = np.flatnonzero(inside)
    first, last = at[0] // patch - _NEAR, at[-1] // patch + 1 + _NEAR
    return slice(max(first, 0) * patch, min(last * patch, len(inside)))


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


@typed
def consistency(frames: UInt8[np.ndarray, "F Y X 3"]) -> float:
    """The mean cosine of neighboring frames, as pixels less gray: 1 for a still, be it right or wrong."""
    pixels = frames.reshape(len(frames), -1).astype(np.float32) - 127.5
    lengths = np.linalg.norm(pixels, axis=1)
    return float(np.mean((pixels[1:] * pixels[:-1]).sum(axis=1) / (lengths[1:] * lengths[:-1])))
