"""A folder of videos -> frames of one size and rate, decoded once into a file that all processes map."""

import dataclasses
import functools
import hashlib
import pathlib
import tempfile

import numpy as np

from evidence.cache import mapped
from moc_jax.data.film import Film
from moc_jax.data.shots import CutDetector, find_shots
from moc_jax.data.video import decode
from moc_jax.shapes import Int, UInt8

FOLDERS = "training", "choices", "final"
"""Where the videos of each split lie."""
HEIGHT, WIDTH = 144, 256  # of each frame
FPS = 16
_THRESHOLD = 27.0  # of a cut, as PySceneDetect counts
_EDGE = 1  # frames at each end of a take that are left out: cuts are seldom clean


@dataclasses.dataclass(frozen=True)
class Footage:
    """All videos of a folder, in the order of their names."""

    frames: UInt8[np.ndarray, "N 3 Y X"]
    takes: Int[np.ndarray, "takes 2"]  # first frame and end of what was filmed without a cut
    digest: str


@functools.cache
def footage(folder: pathlib.Path) -> Footage:
    """The videos of a folder; what is decoded is kept in `frames` beside it.

    Raises:
        ValueError: there is none.
        VideoError: one cannot be decoded.
    """
    paths = sorted(path for path in folder.glob("*") if path.is_file() and not path.name.startswith("."))
    if not paths:
        raise ValueError(
            f"no videos in {folder}: `python -m evidence.clips {folder.parent}` fetches those of the evidence, or put "
            f"any others into its folders {', '.join(FOLDERS)}"
        )
    digest = hashlib.sha256()
    for path in paths:
        digest.update(repr((path.name, hashlib.sha256(path.read_bytes()).hexdigest())).encode())
    takes = functools.cache(lambda: _takes(paths))
    keep = functools.partial(mapped, folder.parent / "frames", parts=digest.hexdigest(), source="footage.py")
    ends = keep(f"{folder.name}-ends", make=lambda: np.cumsum([len(take) for take in takes()]))
    frames = keep(folder.name, make=lambda: np.concatenate(takes()))
    return Footage(frames=frames, takes=np.stack([[0, *ends[:-1]], ends], axis=1), digest=digest.hexdigest())


def _takes(paths: list[pathlib.Path]) -> list[np.ndarray]:
    found = []
    for path in paths:
        with tempfile.TemporaryFile() as file:
            film = Film(file, HEIGHT, WIDTH)
            for frames in find_shots(decode(path, HEIGHT, WIDTH), FPS, CutDetector(_THRESHOLD), film):
                found.append(np.moveaxis(frames[_EDGE:-_EDGE], 3, 1).copy())
                film.forget()
    return found
