"""Named arrays in one file, which readers map into memory: it may be larger than that.

The file holds the arrays one after another, then an index in JSON, then a footer with the index's length and digest.
"""

import hashlib
import json
import math
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from moc_jax.reading import parse_json

_FOOTER = struct.Struct("<Q32s16s")  # bytes of the index, its SHA-256, what the file is
_KIND = b"moc_jax arrays 1"
_ALIGNED = 64  # bytes


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays of any numbers, bfloat16 included; raises OSError."""
    index, at = [], 0
    with path.open("wb") as file:
        for name, array in arrays.items():
            array = np.ascontiguousarray(array)
            file.write(bytes(-at % _ALIGNED))
            at += -at % _ALIGNED
            index.append([name, array.dtype.name, list(array.shape), at])
            file.write(array.reshape(-1).view(np.uint8).data)
            at += array.nbytes
        text = json.dumps(index).encode()
        file.write(text + _FOOTER.pack(len(text), hashlib.sha256(text).digest(), _KIND))


class ArraysFile(Mapping[str, np.ndarray]):
    """The arrays of a file, read-only. Sent to another process it is opened there again."""

    def __init__(self, path: Path):
        """Reads the index.

        Raises:
            OSError, ValueError: there is no such file, or it is damaged; says why, not which file.
        """
        self.path = path
        size = path.stat().st_size
        with path.open("rb") as file:
            file.seek(max(0, size - _FOOTER.size))
            end = file.read(_FOOTER.size)
            if len(end) < _FOOTER.size:
                raise ValueError("its end is damaged")
            length, digest, kind = _FOOTER.unpack(end)
            if kind != _KIND or length > size - _FOOTER.size:
                raise ValueError("its end is damaged")
            file.seek(size - _FOOTER.size - length)
            text = file.read(length)
        if hashlib.sha256(text).digest() != digest:
            raise ValueError("its index is damaged")
        self._places: dict[str, tuple[str, tuple[int, ...], int]] = {}
        for name, dtype, shape, at in parse_json(text):
            self._places[name] = dtype, tuple(shape), at
        held = size - _FOOTER.size - length
        needed = max((at + _bytes(dtype, shape) for dtype, shape, at in self._places.values()), default=0)
        if needed != held:
            raise ValueError(f"it holds {held} bytes of arrays instead of {needed}")
        self._mapped: np.ndarray | None = None

    def __reduce__(self) -> tuple:
        return ArraysFile, (self.path,)

    def __getitem__(self, name: str) -> np.ndarray:
        dtype, shape, at = self._places[name]
        number = _bytes(dtype, shape)
        if not number:
            return np.zeros(shape, jnp.dtype(dtype))
        if self._mapped is None:
            self._mapped = np.asarray(np.memmap(self.path, np.uint8, "r"))
        return self._mapped[at : at + number].view(jnp.dtype(dtype)).reshape(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def _bytes(dtype: str, shape: tuple[int, ...]) -> int:
    return jnp.dtype(dtype).itemsize * math.prod(shape)
