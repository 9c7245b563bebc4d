"""Small synthetic videos with known shots, for the tests of any room."""

import os

import numpy as np

from moc_jax.data.video import write_video

# Far apart in hue and brightness, so that every change of shot is a cut that any detector finds.
_GROUNDS = np.array([(200, 40, 40), (30, 160, 60), (40, 60, 210), (220, 210, 60), (70, 20, 90), (240, 240, 240)])


def make_frames(
    *, shots: int = 3, frames_per_shot: int | tuple[int, ...] = 13, size: tuple[int, int] = (32, 48), seed: int = 0
):
    """uint8 [F Y X 3]: in each shot a square of its own colour moves over a shaded ground of its own colour."""
    lengths = (frames_per_shot,) * shots if isinstance(frames_per_shot, int) else frames_per_shot
    height, width = size
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(_GROUNDS))
    shade = np.linspace(0.7, 1.0, width)[None, :, None]
    side = max(2, min(size) // 4)
    clip = []
    for shot, length in enumerate(lengths):
        ground = _GROUNDS[order[shot % len(order)]]
        y, dy = int(rng.integers(0, height - side)), int(rng.choice([-1, 1]))
        x, dx = int(rng.integers(0, width - side)), int(rng.choice([-2, 2]))
        for t in range(length):
            frame = np.broadcast_to(ground * shade, (height, width, 3)).copy()
            top, left = (y + dy * t) % (height - side + 1), (x + dx * t) % (width - side + 1)
            frame[top : top + side, left : left + side] = 255 - ground
            clip.append(frame.astype(np.uint8))
    return np.stack(clip)


def make_clip(
    path: str | os.PathLike,
    *,
    shots: int = 3,
    frames_per_shot: int | tuple[int, ...] = 13,
    size: tuple[int, int] = (32, 48),
    fps: float = 12.0,
    seed: int = 0,
):
    """Writes `make_frames` as an MP4 and returns its path; `frames_per_shot` may be a tuple, one per shot."""
    write_video(path, make_frames(shots=shots, frames_per_shot=frames_per_shot, size=size, seed=seed), fps)
    return path
