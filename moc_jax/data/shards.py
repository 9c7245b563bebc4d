"""Encoded videos <-> ArrayRecord shards. A record holds the latents and keyframes of a shot, in half precision; for
models that read first frames as a condition, also the latents of its first frame with nothing behind it.

Latents have unit variance, so float16 costs them 1e-3 at most, far below what the codec itself loses.
"""

import contextlib
import fcntl
import functools
import io
import os
import weakref
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from moc_jax.data.manifest import MANIFEST, REMEDY, DataError, Manifest, SceneEntry, shard_here
from moc_jax.files import is_locked
from moc_jax.shapes import Float, typed

_OPEN = 256  # shards at once


class ShardWriter:
    """Writes the shots of one video, each a record; a context manager, whose end completes the file."""

    def __init__(self, path: Path):
        """No file is made before there is a shot."""
        self.records = 0
        self._path = path
        self._writer: ArrayRecordWriter | None = None

    @typed
    def write(
        self,
        video: Float[np.ndarray, "F Y X Z"],
        keyframes: Float[np.ndarray, "n p Y X Z"],
        start: Float[np.ndarray, "F Y X Z"] | None = None,
    ) -> None:
        """Adds a shot: its latents, n stills of p latent frames each, and latents of its first frame, then grey.

        Raises:
            ValueError: values that are not finite.
            OSError: the disk is full or the folder cannot be written.
        """
        buffer = io.BytesIO()
        starts = {} if start is None else {"start": _half(start)}
        np.savez(buffer, allow_pickle=False, video=_half(video), keyframes=_half(keyframes), **starts)
        try:
            if self._writer is None:
                self._writer = ArrayRecordWriter(str(self._path), "group_size:1")
            self._writer.write(buffer.getvalue())
            if not self._writer.ok():
                self._writer.close()  # raises with the cause
        except RuntimeError as error:
            raise OSError(f"{self._path} cannot be written: {error}") from error
        self.records += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._writer is None:
            return
        try:
            if self._writer.is_open():
                self._writer.close()
        except RuntimeError as problem:
            raise OSError(f"{self._path} cannot be written: {problem}") from problem


def _half(array: np.ndarray) -> np.ndarray:
    half = array.astype(np.float16)
    if not np.isfinite(half).all():
        raise ValueError("its latents hold NaN or infinite values")
    return half


class ShardReader:
    """Reads scenes back; files are opened at first use, so that a reader can be sent to another process."""

    def __init__(self, manifest: Manifest):
        self._manifest = manifest
        self._opened = functools.lru_cache(_OPEN)(_opened)
        # `read` and `starts` are asked for the same scene, one after the other.
        self._records = functools.lru_cache(1)(functools.partial(_records, self._opened))
        held = hold(manifest)
        if held is not None:
            weakref.finalize(self, os.close, held)

    def __getstate__(self):
        return {"_manifest": self._manifest}

    def __setstate__(self, state):
        self.__init__(state["_manifest"])

    def read(self, scene: SceneEntry) -> tuple[list[Float[np.ndarray, "f Y X Z"]], Float[np.ndarray, "S n p Y X Z"]]:
        """The latents of each shot, and its keyframes: n stills per shot of p latent frames each.

        Raises:
            DataError: the shard is damaged or does not hold what the manifest says; names shard and scene.
            CloudError: it lies in a bucket that can't be read.
        """
        path, videos, keyframes = self._arrays(scene, "video", "keyframes")
        shape = self._manifest.latent_shape
        for shot, video, stills in zip(scene.shots, videos, keyframes, strict=True):
            if video.shape != (shot.frames, *shape) or stills.shape[2:] != shape:
                raise _damaged(path, scene, f"it holds latents {video.shape} and keyframes {stills.shape}")
        return videos, np.stack(keyframes)

    def starts(self, scene: SceneEntry) -> list[Float[np.ndarray, "f Y X Z"]]:
        """Of each shot the latents of its first frame, then grey, where the data was prepared for a model that reads
        them; errors of `read`."""
        path, starts = self._arrays(scene, "start")
        for shot, start in zip(scene.shots, starts, strict=True):
            if start.shape != (shot.frames, *self._manifest.latent_shape):
                raise _damaged(path, scene, f"it holds latents {start.shape} of a first frame")
        return starts

    def _arrays(self, scene: SceneEntry, *names: str) -> tuple[Path, *tuple[list[np.ndarray], ...]]:
        """The scene's shard, and arrays of each shot by name."""
        path = shard_here(self._manifest, scene.shard)
        try:
            records = self._records(path, scene.record, len(scene.shots))
            read = [_named(record, names) for record in records]
        except (RuntimeError, OSError, ValueError, KeyError, IndexError, zipfile.BadZipFile) as error:
            raise _damaged(path, scene, str(error)) from error
        if not all(np.isfinite(array).all() for arrays in read for array in arrays):
            raise _damaged(path, scene, "its latents hold NaN or infinite values")
        return path, *(list(arrays) for arrays in zip(*read))


def hold(manifest: Manifest) -> int | None:
    """Marks a prepared folder as one that is read, until the file descriptor is closed; None: it can't be marked."""
    try:
        descriptor = os.open(manifest.folder / MANIFEST, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    with contextlib.suppress(OSError):  # not every file system has locks
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    return descriptor


def in_use(folder: Path) -> bool:
    """Whether a process is reading what a prepared folder names."""
    with (folder / MANIFEST).open("rb") as file:
        return is_locked(file.fileno())


def _opened(path: Path) -> ArrayRecordReader:
    return ArrayRecordReader(str(path), "readahead_buffer_size:0,max_parallelism:0")  # for random access


def _records(opened: Callable[[Path], ArrayRecordReader], path: Path, first: int, count: int) -> list[bytes]:
    return opened(path).read(list(range(first, first + count)))


def _named(record: bytes, names: Sequence[str]) -> list[np.ndarray]:
    with np.load(io.BytesIO(record)) as arrays:
        return [arrays[name].astype(np.float32) for name in names]


def _damaged(path: Path, scene: SceneEntry, reason: str) -> DataError:
    return DataError(f"the shard {path} is damaged at record {scene.record} (scene {scene.name}): {reason}; {REMEDY}")
