"""Safetensors files: numbers of named tensors, read in place and written one after another, never all at once.

A file is eight bytes with the length of a JSON header, the header, which says type, shape and place of each tensor, and
the numbers. It is read by its own rules and nothing is believed: what does not add up is an error with the file's name.
Not by the safetensors package, which writes from all tensors at once, and so from as much memory as they take.
"""

import dataclasses
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from moc_jax.errors import Failure
from moc_jax.files import whole_file
from moc_jax.reading import DocumentError, parse_json
from moc_jax.showing import named, shown

DTYPES: Mapping[str, np.dtype] = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16)}
HALF: Mapping[str, np.dtype] = {**DTYPES, "F16": np.dtype(np.float16)}
"""Types of adapters, which often are float16."""
NAMES = {dtype: name for name, dtype in HALF.items()}
_LONGEST_HEADER = 100_000_000  # bytes, the limit of the format


class WeightsError(Failure, ValueError):
    """A file of weights that is damaged, or of something else."""


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor in a file."""

    file: Path
    dtype: str  # as the file calls it; one of HALF can be read
    shape: tuple[int, ...]
    offset: int  # of its first byte

    def array(self) -> np.ndarray:
        """Its numbers, read from the file where they are used."""
        dtype = HALF[self.dtype]
        if 0 in self.shape:
            return np.zeros(self.shape, dtype)
        raw = np.memmap(self.file, np.uint8, "r", self.offset, (math.prod(self.shape) * dtype.itemsize,))
        return raw.view(dtype).reshape(self.shape)


def read_safetensors(file: Path) -> dict[str, Stored]:
    """What is in a file, of which only the header is read.

    Raises:
        WeightsError: it can't be read, or is something else, or not all of it.
    """
    return read_described(file)[0]


def read_described(file: Path) -> tuple[dict[str, Stored], Mapping[str, object]]:
    """What is in a file, and what it says about itself in words; else as `read_safetensors`."""
    try:
        size = file.stat().st_size
        with file.open("rb") as data:
            length = int.from_bytes(data.read(8), "little")
            if size < 8 or length > min(size - 8, _LONGEST_HEADER):
                raise WeightsError(f"{named(file)} isn't a safetensors file, or was cut off in its header")
            header = parse_json(data.read(length), deepest=4)
    except OSError as error:
        raise WeightsError(f"{named(file)} can't be read: {error.strerror or error}") from error
    except DocumentError as error:
        raise WeightsError(f"{named(file)} isn't a safetensors file: its header can't be read, {error}") from error
    if not isinstance(header, dict):
        raise WeightsError(f"{named(file)} isn't a safetensors file: its header is {shown(header)}")
    words = header.pop("__metadata__", None)
    found = {name: _entry(file, name, entry, 8 + length) for name, entry in header.items()}
    _check_places(file, header, size - 8 - length)
    return found, words if isinstance(words, dict) else {}


def _entry(file: Path, name: str, entry: object, start: int) -> Stored:
    """A tensor as the header says, if that adds up."""
    fields = entry if isinstance(entry, dict) else {}
    match fields.get("dtype"), fields.get("shape"), fields.get("data_offsets"):
        case str(dtype), [*sizes], [int(begin), int(end)] if _counts(*sizes, begin, end - begin):
            item = HALF[dtype].itemsize if dtype in HALF else None
            if item is None or end - begin == math.prod(sizes) * item:
                return Stored(file, dtype, tuple(sizes), start + begin)
    raise WeightsError(f"{named(file)}: what its header says of {shown(name)} does not add up: {shown(entry)}")


def _counts(*numbers: object) -> bool:
    return all(type(number) is int and number >= 0 for number in numbers)


def _check_places(file: Path, header: Mapping[str, Mapping], size: int) -> None:
    """Tensors lie one behind another, and fill the file."""
    end = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, behind = entry["data_offsets"]
        if begin != end:
            raise WeightsError(f"{named(file)}: {shown(name)} begins at byte {begin} of its numbers, not at {end}")
        end = behind
    if end != size:
        what = f"it was cut off: {end - size:,} bytes are missing" if end > size else f"{size - end:,} bytes too many"
        raise WeightsError(f"{named(file)} has {size:,} bytes of numbers, but its header {end:,}; {what}")


@dataclasses.dataclass(frozen=True)
class Written:
    """A tensor that is to be written."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Its bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_safetensors(
    file: Path, tensors: Iterable[Written], arrays: Iterator[np.ndarray], words: Mapping[str, str] | None = None
) -> None:
    """Writes tensors as their arrays come, in the same order; the file appears when it is whole.

    Args:
        words: what it says about itself.

    Raises:
        OSError: it can't be written.
    """
    tensors, header, end = list(tensors), {}, 0
    for tensor in tensors:
        places = [end, end := end + tensor.size]
        header[tensor.name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": places}
    text = json.dumps({"__metadata__": {"format": "pt", **(words or {})}} | header).encode()
    text += b" " * (-len(text) % 8)
    with whole_file(file) as partial, partial.open("wb") as data:
        data.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            array = next(arrays)
            assert (array.dtype, array.shape) == (tensor.dtype, tensor.shape), tensor
            data.write(np.ascontiguousarray(array).view(np.uint8).data if array.size else b"")
