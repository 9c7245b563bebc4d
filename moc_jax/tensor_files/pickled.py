"""PyTorch's .pth files without PyTorch: a zip of a pickle, which says what the tensors are, and of their numbers.

A pickle can call anything. This one may make dictionaries and tensors and nothing else: whatever else it asks for is an
error that names it, before it is called. The numbers are read from the file in place.
"""

import collections
import functools
import io
import math
import pickle
import pickletools
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

from moc_jax.showing import named, shown
from moc_jax.tensor_files.safetensors import DTYPES, Stored, WeightsError

_LARGEST_PICKLE = 2**26  # bytes; the numbers lie outside
_LOCAL_HEADER = 30  # bytes before an entry's name in a zip
_STORAGES = {
    "FloatStorage": "F32",
    "BFloat16Storage": "BF16",
    "HalfStorage": "F16",
    "DoubleStorage": "F64",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}
_DAMAGED = pickle.UnpicklingError, EOFError, ValueError, OverflowError, TypeError, AttributeError, LookupError
_DAMAGED += RuntimeError, zlib.error  # of an encrypted zip, or one that is compressed in another way


class _Storage(NamedTuple):
    """Numbers of one type, an entry of the zip."""

    dtype: str
    entry: str
    count: int


class _Tensor(NamedTuple):
    """A part of a storage."""

    storage: _Storage
    first: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_pickled(file: Path) -> dict[str, Stored]:
    """What is in a file, of which the numbers are not read.

    Raises:
        WeightsError: it can't be read, holds something else than named tensors, or not all of their numbers.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            found = [info for info in archive.infolist() if info.filename.endswith("/data.pkl")]
            if len(found) != 1 or found[0].file_size > _LARGEST_PICKLE:
                raise WeightsError(f"{named(file)} is a zip, but not one of PyTorch's")
            (pickled,) = found
            with archive.open(pickled) as data:
                read = data.read()
            _check_sizes(read)
            root = pickled.filename.removesuffix("data.pkl")
            _check_order(file, archive, f"{root}byteorder")
            tree, folder = _Restricted(io.BytesIO(read), file).load(), f"{root}data/"
            tensors = _tensors(file, tree)
            return {name: _stored(file, archive, folder, name, tensor) for name, tensor in tensors.items()}
    except WeightsError:
        raise
    except zipfile.BadZipFile as error:
        what = "it was cut off, or is of PyTorch's format before 1.6, or none of PyTorch's"
        raise WeightsError(f"{named(file)} isn't a zip file: {what}") from error
    except _DAMAGED as error:
        raise WeightsError(f"{named(file)}: its pickle is damaged: {error}") from error
    except OSError as error:
        raise WeightsError(f"{named(file)} can't be read: {error.strerror or error}") from error


def _check_sizes(pickled: bytes) -> None:
    """Raises ValueError: it claims more than it holds, for which `pickle` would take memory before it looks."""
    for code, argument, _ in pickletools.genops(pickled):  # which reads no more than there is
        if code.name.endswith("PUT") and isinstance(argument, int) and argument > len(pickled):
            raise ValueError(f"it has {len(pickled):,} bytes, but numbers one of its objects {argument:,}")


def _check_order(file: Path, archive: zipfile.ZipFile, entry: str) -> None:
    """Files from before PyTorch 2.1 don't say in which order their bytes are."""
    if entry in archive.namelist():
        with archive.open(entry) as data:
            order = data.read(16)
        if order != b"little":
            raise WeightsError(
                f"{named(file)} has the byte order {shown(order.decode(errors='replace'))}; only little can be read: "
                "save it again on a processor of that order"
            )


class _Restricted(pickle.Unpickler):
    """Makes `_Tensor`s and dictionaries."""

    def __init__(self, data, file: Path):
        super().__init__(data)
        self._file = file

    def find_class(self, module: str, name: str) -> object:
        """What a pickle may ask for."""
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return functools.partial(_rebuilt)
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return functools.partial(_of_parameter)
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        raise WeightsError(
            f"{named(self._file)} asks for {shown(f'{module}.{name}')}, which weights have no need of; it is not run"
        )

    def persistent_load(self, pid: object) -> _Storage:
        """Where the numbers of a tensor lie."""
        match pid:
            case ("storage", str(dtype), str(entry), str(), int(count)) if entry.isalnum():
                return _Storage(dtype, entry, count)
        raise WeightsError(f"{named(self._file)} refers to {shown(pid)}, where a tensor's numbers can't lie")


def _rebuilt(storage, first, shape, strides, requires_grad=False, hooks=None, metadata=None) -> _Tensor:
    whole = [first, *shape, *strides]
    if not isinstance(storage, _Storage) or not all(type(number) is int and number >= 0 for number in whole):
        raise ValueError("a tensor of something else than numbers")
    return _Tensor(storage, first, tuple(shape), tuple(strides))


def _of_parameter(tensor, requires_grad=False, hooks=None) -> _Tensor:
    return tensor


def _tensors(file: Path, tree: object) -> dict[str, _Tensor]:
    """By name; some files hold them below `state_dict`, `model` or `module`."""
    for key in ("state_dict", "model", "module"):
        if isinstance(tree, dict) and isinstance(tree.get(key), dict):
            tree = tree[key]
    if not isinstance(tree, dict) or not all(type(x) is _Tensor and isinstance(k, str) for k, x in tree.items()):
        raise WeightsError(f"{named(file)} holds something else than named tensors")
    return tree


def _stored(file: Path, archive: zipfile.ZipFile, folder: str, name: str, tensor: _Tensor) -> Stored:
    storage, shape = tensor.storage, tensor.shape
    dense = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    if any(stride != want for stride, want, size in zip(tensor.strides, dense, shape) if size > 1):
        raise WeightsError(f"{named(file)}: {shown(name)} is not stored row by row: {tensor.strides} for {shape}")
    if storage.dtype not in DTYPES:
        return Stored(file, storage.dtype, shape, 0)
    item = DTYPES[storage.dtype].itemsize
    info = archive.getinfo(folder + storage.entry)
    there = info.file_size == storage.count * item and tensor.first + math.prod(shape) <= storage.count
    if not there or info.compress_type != zipfile.ZIP_STORED:
        raise WeightsError(f"{named(file)}: the numbers of {shown(name)} are not all there, or compressed")
    return Stored(file, storage.dtype, shape, _begin(file, info) + tensor.first * item)


def _begin(file: Path, info: zipfile.ZipInfo) -> int:
    """Where the bytes of an entry begin, which its own header says, not the zip's list."""
    with file.open("rb") as data:
        data.seek(info.header_offset)
        header = data.read(_LOCAL_HEADER)
    name, extra = (int.from_bytes(header[i : i + 2], "little") for i in (26, 28))
    return info.header_offset + _LOCAL_HEADER + name + extra
