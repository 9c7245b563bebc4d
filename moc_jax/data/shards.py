"""Encoded scenes <-> ArrayRecord shards. A record holds a scene's latents and its keyframes, in half precision.

Latents have unit variance, so float16 costs them 1e-3 at most, far below what the codec itself loses.
"""

import io
import zipfile
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from moc_jax.data.manifest import DataError, Manifest, SceneEntry, ShardEntry, sha256
from moc_jax.shapes import Float, typed

_SHARD_BYTES = 1 << 28  # a new shard begins past this size


class ShardWriter:
    """Appends scenes to numbered shards in a folder."""

    def __init__(self, folder: Path):
        self.shards: list[ShardEntry] = []
        self._folder = folder
        self._writer: ArrayRecordWriter | None = None
        self._records = self._bytes = 0

    @typed
    def write(
        self, video: Float[np.ndarray, "F Y X Z"], keyframes: Float[np.ndarray, "S n p Y X Z"]
    ) -> tuple[int, int]:
        """Adds a scene; returns (shard, record).

        Raises:
            ValueError: values that are not finite.
            OSError: the disk is full or the folder cannot be written.
        """
        buffer = io.BytesIO()
        np.savez(buffer, video=_half(video), keyframes=_half(keyframes))
        try:
            if self._writer is None:
                self._writer = ArrayRecordWriter(str(self._path), "group_size:1")
            self._writer.write(buffer.getvalue())
            if not self._writer.ok():
                self._writer.close()  # raises with the cause
        except RuntimeError as error:
            raise OSError(f"{self._path} cannot be written: {error}") from error
        place = len(self.shards), self._records
        self._records += 1
        self._bytes += buffer.tell()
        if self._bytes >= _SHARD_BYTES:
            self.close()
        return place

    def close(self) -> None:
        """Completes the current shard."""
        if self._writer is None:
            return
        try:
            self._writer.close()
        except RuntimeError as error:
            raise OSError(f"{self._path} cannot be written: {error}") from error
        path = self._path
        entry = ShardEntry(file=path.name, records=self._records, size=path.stat().st_size, sha256=sha256(path))
        self.shards.append(entry)
        self._writer, self._records, self._bytes = None, 0, 0

    @property
    def _path(self) -> Path:
        return self._folder / f"scenes-{len(self.shards):05d}.array_record"


def _half(array: np.ndarray) -> np.ndarray:
    half = array.astype(np.float16)
    if not np.isfinite(half).all():
        raise ValueError("its latents hold NaN or infinite values")
    return half


class ShardReader:
    """Reads scenes back; files are opened at first use, so that a reader can be sent to another process."""

    def __init__(self, manifest: Manifest):
        self._manifest = manifest
        self._readers: dict[int, ArrayRecordReader] = {}

    def __getstate__(self):
        return {"_manifest": self._manifest, "_readers": {}}

    def read(self, scene: SceneEntry) -> tuple[list[Float[np.ndarray, "f Y X Z"]], Float[np.ndarray, "S n p Y X Z"]]:
        """The latents of each shot, and its keyframes: n stills per shot of p latent frames each.

        Raises:
            DataError: the shard is damaged or does not hold what the manifest says; names shard and scene.
        """
        path = self._manifest.folder / self._manifest.shards[scene.shard].file
        try:
            if scene.shard not in self._readers:
                options = "readahead_buffer_size:0,max_parallelism:0"  # for random access
                self._readers[scene.shard] = ArrayRecordReader(str(path), options)
            (record,) = self._readers[scene.shard].read([scene.record])
            with np.load(io.BytesIO(record)) as arrays:
                video, keyframes = (arrays[name].astype(np.float32) for name in ("video", "keyframes"))
        except (RuntimeError, OSError, ValueError, KeyError, IndexError, zipfile.BadZipFile) as error:
            raise self._damaged(path, scene, str(error)) from error
        if video.shape != (scene.frames, *self._manifest.latent_shape) or len(keyframes) != len(scene.shots):
            raise self._damaged(path, scene, f"it holds latents {video.shape} and keyframes {keyframes.shape}")
        if not (np.isfinite(video).all() and np.isfinite(keyframes).all()):
            raise self._damaged(path, scene, "its latents hold NaN or infinite values")
        ends = np.cumsum([shot.frames for shot in scene.shots])
        return np.split(video, ends[:-1]), keyframes

    def _damaged(self, path: Path, scene: SceneEntry, reason: str) -> DataError:
        return DataError(
            f"the shard {path} is damaged at record {scene.record} (scene {scene.name}): {reason}; "
            f"delete {path.parent} and prepare the data again"
        )
