"""Whether a sampled shot shows what an earlier one revealed.

All compare frames with what the renderer draws, after the codec's own reconstruction, which no sample surpasses.
"""

from collections.abc import Callable, Sequence

import numpy as np

from evidence.world import Look, Story, boxes, distinct_looks, render_shot
from moc_jax.shapes import Bool, UInt8, typed

CANDIDATES = 16

Reconstruct = Callable[[np.ndarray], np.ndarray]  # frames -> frames, through the codec


def candidates(story: Story, seed: int) -> tuple[Look, ...]:
    """The story's looks, then looks of no scene, up to `CANDIDATES`: chance is 1 of `CANDIDATES`, and 1 of the story's
    characters for who knows the scene but not which of them."""
    random = np.random.default_rng((seed, CANDIDATES))
    return *story.looks, *distinct_looks(random, CANDIDATES - len(story.looks), story.looks)


@typed
def identify(
    frames: UInt8[np.ndarray, "F Y X 3"],
    story: Story,
    shot: int,
    looks: Sequence[Look],
    reconstruct: Reconstruct = lambda frames: frames,
) -> int:
    """Which of `looks` is nearest to what `frames` show in the box around the shot's character.

    Frames are those of shot `shot`, whose motion, place and light the candidates share.
    """
    box = boxes(story.shots[shot])
    shown = frames[box].astype(np.float32)
    drawn = (reconstruct(render_shot(story, shot, look))[box].astype(np.float32) for look in looks)
    return int(np.argmin([np.mean((shown - candidate) ** 2) for candidate in drawn]))


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
