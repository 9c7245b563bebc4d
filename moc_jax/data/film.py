"""Frames on disk, shot after shot: what is held in memory grows neither with a video nor with a shot."""

from typing import IO

import numpy as np

from moc_jax.shapes import UInt8


class Film:
    """Appends frames to a file, and gives them back as arrays that are mapped into memory."""

    def __init__(self, file: IO[bytes], height: int, width: int):
        """`file` is open for writing and reading, and empty; frames have this size."""
        self._file, self._size = file, (height, width, 3)
        self._begin = self._end = 0

    def add(self, frame: UInt8[np.ndarray, "Y X 3"], times: int) -> None:
        """Appends a frame that is shown so many times.

        Raises:
            OSError: the disk is full.
        """
        for _ in range(times):
            self._file.write(frame.data)
        self._end += times

    def shot(self) -> UInt8[np.ndarray, "F Y X 3"]:
        """The frames since this was called last."""
        self._file.flush()
        frames = mapped(self._file, self._begin, self._end - self._begin, self._size)
        self._begin = self._end
        return frames

    def forget(self) -> None:
        """Gives the disk its room back; no array that was given may be used any more."""
        self._file.seek(0)
        self._file.truncate()
        self._begin = self._end = 0


def mapped(file: IO[bytes], begin: int, frames: int, size: tuple[int, int, int]) -> UInt8[np.ndarray, "F Y X 3"]:
    """Frames of a file of frames of one size, from number `begin` on."""
    if not frames:
        return np.empty((0, *size), np.uint8)
    return np.memmap(file, np.uint8, "r", begin * int(np.prod(size)), (frames, *size))
