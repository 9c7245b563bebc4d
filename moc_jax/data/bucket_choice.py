"""The bucket shapes that waste least: an exact dynamic programme over the scenes' latent frames.

(a) Scenes are sorted by their frames; a bucket takes those of one interval, and its shape is the interval's maxima.
(b) cost(i, j), for the distinct frame counts i to j, is their scenes times the tokens of that shape.
(c) best(k, j) = min over i of best(k - 1, i - 1) + cost(i, j): k shapes for the frame counts up to j.
"""

import itertools

import numpy as np

from moc_jax.config import BucketConfig
from moc_jax.shapes import Int

_SHOTS, _FRAMES, _TEXT = range(3)  # columns of sizes


def video_tokens(frames: int, per_frame: float) -> int:
    """Tokens of so many latent frames, which fill whole patches."""
    return round(frames * per_frame)


def best_shapes(sizes: Int[np.ndarray, "N 3"], per_frame: float, most: int) -> list[tuple[BucketConfig, ...]]:
    """For k = 1, 2, ... the k shapes that hold all scenes with the fewest tokens; their number is at most `most`.

    The list ends where a further shape would save nothing.

    Args:
        sizes: shots, latent frames and text tokens of each scene; at least one scene.
        per_frame: video tokens of a latent frame.
        most: how many shapes to try.
    """
    frames, which = np.unique(sizes[:, _FRAMES], return_inverse=True)
    count = np.bincount(which)
    text, shots = np.zeros_like(frames), np.zeros_like(frames)
    np.maximum.at(text, which, sizes[:, _TEXT])
    np.maximum.at(shots, which, sizes[:, _SHOTS])
    starts = _interval_starts(frames, count, text, per_frame, min(most, len(frames)))
    return [
        tuple(
            BucketConfig(
                shots=int(shots[first:end].max()), frames=int(frames[end - 1]), text_tokens=int(text[first:end].max())
            )
            for first, end in itertools.pairwise([*firsts, len(frames)])
        )
        for firsts in starts
    ]


def _interval_starts(
    frames: Int[np.ndarray, " D"],
    count: Int[np.ndarray, " D"],
    text: Int[np.ndarray, " D"],
    per_frame: float,
    most: int,
) -> list[list[int]]:
    """For each number of intervals, from 1 on, where the intervals of the least cost begin."""
    number = len(frames)
    best = np.full((most + 1, number + 1), np.iinfo(np.int64).max // 2)  # [k, j]: k intervals over the first j
    best[0, 0] = 0
    begins = np.zeros((most + 1, number + 1), np.int32)
    scenes = np.cumsum(count)
    longest = np.zeros(number, np.int64)  # [i]: text of the interval from i to the present one
    for j in range(number):
        np.maximum(longest[: j + 1], text[j], out=longest[: j + 1])
        held = scenes[j] - np.concatenate([[0], scenes[:j]])
        costs = held * (longest[: j + 1] + video_tokens(int(frames[j]), per_frame))
        totals = best[:-1, : j + 1] + costs
        begins[1:, j + 1] = np.argmin(totals, axis=1)
        best[1:, j + 1] = np.min(totals, axis=1)
    found: list[list[int]] = []
    for k in range(1, most + 1):
        if k > 1 and best[k, number] >= best[k - 1, number]:
            break
        firsts, end = [], number
        for left in range(k, 0, -1):
            end = int(begins[left, end])
            firsts.append(end)
        found.append(firsts[::-1])
    return found
