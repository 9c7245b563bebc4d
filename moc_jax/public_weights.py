"""Weights that others made and use: read into a mesh, written for them again, bit for bit.

`python -m moc_jax.weights` checks, converts and exports. Licences are the weights' own: `PublicWeights.licence`.
"""

import contextlib
import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Literal

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from moc_jax import models
from moc_jax.config import ConfigError, ModelConfig
from moc_jax.files import cause, prove_new_folder, whole_folder
from moc_jax.models import Names, PublicTensor
from moc_jax.sharding import Params, key_path, logical_axes, tree_shardings
from moc_jax.sharding import Path as KeyPath
from moc_jax.showing import named
from moc_jax.tensor_files.beside import weights_digest
from moc_jax.tensor_files.places import EXPERTS, INDEX, LICENCE, are_public, networks_in
from moc_jax.tensor_files.safetensors import DTYPES, Stored, WeightsError, Written, write_safetensors

__all__ = [
    "LICENCE",
    "PublicWeights",
    "WeightsError",
    "are_public",
    "check_model",
    "convert",
    "export",
    "load",
    "open_weights",
]

Dtype = Literal["keep", "float32", "bfloat16"]
DTYPE_NAMES = {"float32": DTYPES["F32"], "bfloat16": DTYPES["BF16"]}
_FILE = "diffusion_pytorch_model"
SHARD_BYTES = 5 * 10**9


@dataclasses.dataclass(frozen=True)
class PublicWeights:
    """Weights in public files, checked: every tensor is there, and of its shape."""

    place: Path
    config: ModelConfig
    names: Names
    licence: str
    tensors: Mapping[str, tuple[tuple[PublicTensor, Stored], ...]]  # by network

    @property
    def parameters(self) -> int:
        """Numbers in all."""
        return sum(math.prod(tensor.shape) for of in self.tensors.values() for tensor, _ in of)

    @property
    def digest(self) -> str:
        """SHA-256 of numbers from all over them, the same in whatever files and names."""
        each = {f"{part}/{tensor.names[0]}": stored for part, of in self.tensors.items() for tensor, stored in of}
        return weights_digest(each)

    @property
    def dtypes(self) -> dict[str, int]:
        """Tensors of each type."""
        kinds = [stored.dtype for of in self.tensors.values() for _, stored in of]
        return {kind: kinds.count(kind) for kind in sorted(set(kinds))}


def open_weights(place: str | Path) -> PublicWeights:
    """What lies in a file or folder; none of the numbers is read, and no device touched.

    Raises:
        WeightsError: it is not whole, or tensors are missing, too many, of other shapes or of others than config.json
            says; all of these are named.
        ConfigError: it is of no model that is known here.
    """
    place = Path(place)
    networks, index = networks_in(place)
    where = named(place / INDEX)
    models.check_index(index, where)
    known = {
        part: models.recognised({name: x.shape for name, x in of.tensors.items()}, of.settings, named(of.place))
        for part, of in networks.items()
    }
    problems = [f"{named(networks[part].place)}: {text}" for part, of in known.items() for text in of.problems]
    if problems:
        raise WeightsError("\n".join(problems))
    (first, *rest) = known.values()
    if any(of.config != first.config or of.names != first.names for of in rest):
        raise WeightsError(f"{named(place)} has two experts of different sizes or names")
    alone, other = EXPERTS["diffusers"]
    if not rest and first.config.condition_channels and networks["network"].place == place / alone:
        raise WeightsError(f"{named(place)} has {alone} alone, an expert of Wan 2.2 I2V A14B; {other} is missing")
    found = {
        part: tuple((tensor, networks[part].tensors[name]) for name, tensor in of.tensors.items())
        for part, of in known.items()
    }
    config = models.with_experts(first.config, index.get("boundary_ratio"), where) if rest else first.config
    return PublicWeights(place, config, first.names, LICENCE, found)


def check_model(weights: PublicWeights, model: ModelConfig, setting: str) -> None:
    """Raises ConfigError, naming each field, unless the weights are of such a model; `setting` is what named them."""
    theirs, ours = (dataclasses.asdict(cfg) for cfg in (weights.config, model))
    differ = [f"model.name is {weights.config.name!r} there and {model.name!r} here"] * (theirs["name"] != ours["name"])
    for name in () if differ else models.SIZES:
        if theirs[name] != ours[name]:
            differ.append(f"model.{name} is {theirs[name]!r} there and {ours[name]!r} here")
    if differ:
        raise ConfigError(
            f"{setting} {named(weights.place)} is of another model: {'; '.join(differ)}. Give this run the same values"
        )


def load(
    weights: PublicWeights, places: Mesh | Params, *, dtype: Literal["float32", "bfloat16", "mixed"] = "float32"
) -> Params:
    """The weights where they belong. Each host reads what its devices hold, a weight at a time.

    Args:
        places: a mesh, over which they are sharded by the rules; or for each of them a sharding, or a ShapeDtypeStruct
            with one, whose type it then has.
        dtype: `mixed`: blocks' matrices in bfloat16, in which a model of that type reads them, all else in float32.
    """
    axes = models.abstract(weights.config)[1]
    shapes = nnx.to_pure_dict(axes)
    shardings = tree_shardings(shapes, logical_axes(axes), places) if isinstance(places, Mesh) else places
    of_path: dict[KeyPath, list[tuple[PublicTensor, Stored]]] = {}
    for part, of in weights.tensors.items():
        for tensor, stored in of:
            of_path.setdefault((part, *tensor.path), []).append((tensor, stored))

    def placed(path, leaf, place):
        names = key_path(path)
        kind = dtype if dtype != "mixed" else "bfloat16" if {"blocks", "kernel"} <= set(names) else "float32"
        like = isinstance(place, jax.ShapeDtypeStruct)
        sharding, held = (place.sharding, np.dtype(place.dtype)) if like else (place, DTYPE_NAMES[kind])
        return jax.make_array_from_callback(leaf.shape, sharding, _reader(of_path[names], leaf.shape, held))

    return jax.tree.map_with_path(placed, shapes, shardings)


def _reader(
    parts: list[tuple[PublicTensor, Stored]], shape: tuple[int, ...], dtype: np.dtype
) -> Callable[[tuple[slice, ...] | None], np.ndarray]:
    """Reads a slice of a weight; neighbours that hold the same one share it, and no more than one is kept."""
    by_layer = {tensor.layer: (tensor, stored) for tensor, stored in parts}

    @functools.lru_cache(maxsize=1)
    def read(bounds: tuple[tuple[int, int, int], ...]) -> np.ndarray:
        slices = [slice(*each) for each in bounds]
        if None in by_layer:
            tensor, stored = by_layer[None]
            return np.ascontiguousarray(tensor.of_file(stored.array())[tuple(slices)].astype(dtype))
        layers = range(*bounds[0])
        out = np.empty([len(range(*each)) for each in bounds], dtype)
        for i, layer in enumerate(layers):
            tensor, stored = by_layer[layer]
            out[i] = tensor.of_file(stored.array())[tuple(slices[1:])]
        return out

    return lambda index: read(tuple(each.indices(size) for each, size in zip(index or (), shape, strict=True)))


# ------------------------------------------------------------------------------------------------ writing


def convert(
    weights: PublicWeights, folder: Path, *, names: Names, dtype: Dtype = "keep", shard_bytes: int = SHARD_BYTES
) -> None:
    """Writes public weights with other names, or in another type, a tensor at a time.

    Raises:
        ConfigError, WeightsError: see `new_folder`.
    """

    def of(part: str, tensor: PublicTensor, stored: Stored) -> tuple[np.dtype, Callable[[], np.ndarray]]:
        kind = DTYPES[stored.dtype] if dtype == "keep" else DTYPE_NAMES[dtype]
        return kind, lambda: np.asarray(stored.array()).astype(kind)

    networks = {
        part: [(tensor, *of(part, tensor, stored)) for tensor, stored in found]
        for part, found in weights.tensors.items()
    }
    _write(weights.config, networks, folder, names, shard_bytes)


def export(
    config: ModelConfig,
    params: Params,
    folder: Path,
    *,
    names: Names,
    dtype: Literal["float32", "bfloat16"] = "float32",
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a model's weights as others read them, a tensor at a time.

    Raises:
        ConfigError: the model has no public names.
        ConfigError, WeightsError: see `new_folder`.
    """

    by_path = {key_path(path): leaf for path, leaf in jax.tree.leaves_with_path(params)}

    def array(part: str, tensor: PublicTensor) -> np.ndarray:
        leaf = by_path[(part, *tensor.path)]
        return tensor.to_file(np.asarray(leaf if tensor.layer is None else leaf[tensor.layer])).astype(
            DTYPE_NAMES[dtype]
        )

    networks = {
        part: [(tensor, DTYPE_NAMES[dtype], functools.partial(array, part, tensor)) for tensor in of]
        for part, of in models.public_tensors(config).items()
    }
    _write(config, networks, folder, names, shard_bytes)


_Source = tuple[PublicTensor, np.dtype, Callable[[], np.ndarray]]


def _write(
    config: ModelConfig, networks: Mapping[str, list[_Source]], folder: Path, names: Names, shard_bytes: int
) -> None:
    size = sum(math.prod(tensor.shape) * dtype.itemsize for of in networks.values() for tensor, dtype, _ in of)
    with new_folder(folder, size) as made:
        for i, of in enumerate(networks.values()):
            inside = made if len(networks) == 1 else made / EXPERTS.get(names, EXPERTS["original"])[i]
            inside.mkdir(exist_ok=True)
            _write_network(of, inside, names, math.inf if names == "comfyui" else shard_bytes)
            settings = models.public_settings(config, names)
            (inside / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        if index := models.public_index(config, names):
            (made / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def new_folder(folder: Path, size: int) -> Iterator[Path]:
    """Where to make what will be `folder`, which appears when the block succeeds.

    Raises:
        ConfigError: it exists, cannot be made, or has no room for `size` bytes; nothing was written.
        WeightsError: writing failed, and nothing is left.
    """
    prove_new_folder(folder, setting="the folder", size=size)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with whole_folder(folder) as made:
            yield made
    except OSError as error:
        raise WeightsError(f"the folder {named(folder)} cannot be written: {cause(error, str(folder))}") from error


def _write_network(of: list[_Source], folder: Path, names: Names, shard_bytes: float) -> None:
    files: list[list[tuple[Written, _Source]]] = []
    size = 0
    for source in of:
        tensor, dtype, _ = source
        written = Written(tensor.name(names), dtype, tensor.shape)
        if not files or size + written.size > shard_bytes:
            files.append([])
            size = 0
        files[-1].append((written, source))
        size += written.size
    count = len(files)
    ends = [""] if count == 1 else [f"-{i + 1:05}-of-{count:05}" for i in range(count)]
    for end, shard in zip(ends, files, strict=True):
        arrays: Iterator[np.ndarray] = (read() for _, (_, _, read) in shard)
        write_safetensors(folder / f"{_FILE}{end}.safetensors", [written for written, _ in shard], arrays)
    if count > 1:
        places = {written.name: f"{_FILE}{end}.safetensors" for end, shard in zip(ends, files) for written, _ in shard}
        total = sum(written.size for shard in files for written, _ in shard)
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / f"{_FILE}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
