"""Adapters (LoRA) in public files: read, merged into public weights, written for others, bit for bit.

A place is a file, or a folder with one, or, for two experts, a folder with a folder for each of them, named as those of
their weights.
"""

import collections
import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import jax
import numpy as np

from moc_jax import models
from moc_jax.config import ConfigError, ModelConfig
from moc_jax.config.base import Range
from moc_jax.models import Names
from moc_jax.public_weights import DTYPE_NAMES, Dtype, PublicWeights, WeightsError, new_folder
from moc_jax.sharding import Params, key_path
from moc_jax.showing import grouped, named, shown
from moc_jax.tensor_files.beside import weights_digest
from moc_jax.tensor_files.places import EXPERTS
from moc_jax.tensor_files.safetensors import HALF, Stored, Written, read_described, write_safetensors
from moc_jax.weights.peft import LARGEST, WORDS, PeftSettings, peft_settings

_FILE = "pytorch_lora_weights.safetensors"  # as diffusers calls it
_CLOSE = 1e-6  # between alphas, which files round to float32


@dataclasses.dataclass(frozen=True)
class Adapter:
    """One linear map's: alpha / rank · A B, of which public files have B A."""

    a: Stored  # [rank, inputs]
    b: Stored  # [outputs, rank]
    alpha: float

    @property
    def rank(self) -> int:
        """Inner width."""
        return self.a.shape[0]


@dataclasses.dataclass(frozen=True)
class PublicAdapters:
    """Adapters in public files; of what sizes their model is they don't say."""

    place: Path
    names: Names
    networks: Mapping[str, Mapping[str, Adapter]]  # by network, and by diffusers' name of the linear map

    def described(self) -> str:
        """In words."""
        found = [adapter for of in self.networks.values() for adapter in of.values()]
        sizes = collections.Counter((adapter.rank, adapter.alpha) for adapter in found)
        each = ", ".join(f"{count} of rank {rank} and alpha {alpha:g}" for (rank, alpha), count in sizes.items())
        return f"{len(found)} adapters ({' and '.join(self.networks)}) with {self.names} names: {each}"

    def digest(self, base: str, scale: float) -> str:
        """SHA-256 that names weights of digest `base` with `scale` times these adapters in them."""
        each = {
            f"{part}/{module} {adapter.alpha} {base} {scale} {name}": stored
            for part, of in self.networks.items()
            for module, adapter in of.items()
            for name, stored in (("a", adapter.a), ("b", adapter.b))
        }
        return weights_digest(each)


def open_adapters(place: str | Path) -> PublicAdapters:
    """What lies in a file or folder; none of the numbers but alphas is read, and no device touched.

    Raises:
        WeightsError: it is not whole, or holds tensors of something else; all of these are named.
    """
    place = Path(place)
    folders = [pair for pair in EXPERTS.values() if any((place / folder).is_dir() for folder in pair)]
    if folders:
        found = {part: _read(_file(place / folder)) for part, folder in zip(("high", "low"), folders[0])}
    else:
        found = {"network": _read(_file(place))}
    (names, _), *_ = found.values()
    return PublicAdapters(place, names, {part: of for part, (_, of) in found.items()})


def _file(place: Path) -> Path:
    if place.is_dir():
        files = sorted(place.glob("*.safetensors"))
        if len(files) != 1:
            raise WeightsError(f"{named(place)} has {len(files)} .safetensors files; name the one with the adapters")
        return files[0]
    if not place.is_file():
        raise WeightsError(f"{named(place)} is not there; name a file of adapters, or its folder")
    return place


def _read(file: Path) -> tuple[Names, dict[str, Adapter]]:
    tensors, words = read_described(file)
    parts: dict[str, dict[str, Stored]] = {}
    spellings: dict[str, Names] = {}
    known, problems = {name: models.adapter_part(name) for name in tensors}, []
    if tensors and not any(known.values()) and not any("lora" in name for name in tensors):
        held = f"whole weights ({len(tensors)} tensors, such as {shown(min(tensors))}) and no adapters"
        raise WeightsError(f"{named(file)} holds {held}; name a file of adapters (LoRA)")
    names: dict[tuple[str, str], str] = {}
    for name, stored in tensors.items():
        if (found := known[name]) is None:
            problems.append(f"{name} is not of an adapter of a linear map of Wan")
        elif stored.dtype not in HALF:
            problems.append(f"{name} is of type {stored.dtype}; it must be one of {', '.join(HALF)}")
        elif (other := names.setdefault(found[:2], name)) != name:
            problems.append(f"{other} and {name} are the same part of one adapter; keep one")
        else:
            module, part, spellings[module] = found
            parts.setdefault(module, {})[part] = stored
    settings, adapters = peft_settings(file, words), {}
    for module, of in parts.items():
        own = module if spellings[module] == "diffusers" else models.original_name(module)
        try:
            adapters[module] = _adapter(of, own, settings)
        except WeightsError as error:
            problems.append(f"{module}{error}")
    if problems or not adapters:
        raise WeightsError("\n".join(f"{named(file)}: {x}" for x in problems or ["it holds no adapters"]))
    return ("original" if "original" in spellings.values() else "diffusers"), adapters


def _adapter(of: Mapping[str, Stored], own: str, settings: PeftSettings) -> Adapter:
    """From its parts; errors lack the linear map's name, of which `own` is the file's."""
    if not {"a", "b"} <= of.keys():
        raise WeightsError(f" has {' and '.join(sorted(of))} alone")
    a, b = of["a"].shape, of["b"].shape
    if len(a) < 2 or a[0] < 1 or b != (*b[:1], a[0], *[1] * (len(b) - 2)):
        raise WeightsError(
            f": A of {a} and B of {b} don't go together; they are [rank, inputs] and [outputs, rank], with a rank of 1 "
            "or more"
        )
    rank, stored = a[0], of.get("alpha")
    if (said := settings.rank(own)) not in (None, rank):
        raise WeightsError(f" has rank {rank}, but its settings say {said:g}; give them the rank that it has")
    alpha = settings.alpha(own, rank)
    if stored is not None:
        if math.prod(stored.shape) != 1:
            raise WeightsError(f": alpha is of shape {stored.shape}; it must be one number")
        held = float(stored.array().reshape(()))
        if not abs(held) <= LARGEST:
            raise WeightsError(f": alpha is {held:g}; it must be a number of at most {LARGEST:,.0f}")
        if alpha is not None and not math.isclose(held, alpha, rel_tol=_CLOSE):
            raise WeightsError(f" has alpha {held:g}, but its settings say {alpha:g}; keep one")
        alpha = held
    return Adapter(of["a"], of["b"], float(rank) if alpha is None else alpha)


# ------------------------------------------------------------------------------------------------ beside weights


@dataclasses.dataclass(frozen=True)
class _Merged(Stored):
    """A tensor of a file with an adapter in it."""

    adapter: Adapter
    scale: float

    def array(self) -> np.ndarray:
        """W + alpha / rank · B A, added up in float32 and rounded once."""
        weight, (a, b) = super().array(), (x.array().astype(np.float32) for x in (self.adapter.a, self.adapter.b))
        added = b.reshape(len(b), -1) @ a.reshape(len(a), -1)
        scale = np.float32(self.scale * self.adapter.alpha / self.adapter.rank)
        return (weight.astype(np.float32) + scale * added.reshape(weight.shape)).astype(weight.dtype)


def merged(weights: PublicWeights, adapters: PublicAdapters, scale: float = 1.0) -> PublicWeights:
    """Weights with `scale` times the adapters in them; each tensor is read and added up when it is used.

    Raises:
        ConfigError: the scale is not a number, or too large.
        WeightsError: adapters of other maps, sizes or networks; all of these are named.
    """
    Range(-LARGEST, LARGEST)(float, scale, "the scale of adapters")
    if adapters.networks.keys() != weights.tensors.keys():
        raise WeightsError(
            f"{named(adapters.place)} has adapters of {' and '.join(adapters.networks)}, but {named(weights.place)} is "
            f"{' and '.join(weights.tensors)}"
        )
    networks, problems = {}, []
    for part, of in weights.tensors.items():
        left = dict(adapters.networks[part])
        tensors = []
        for tensor, stored in of:
            adapter = left.pop(tensor.names[0].removesuffix(".weight"), None)
            if adapter is not None:
                fits = adapter.b.shape[:1] + adapter.a.shape[1:] == tensor.shape
                if not fits:
                    problems.append(
                        f"{tensor.names[0]} is {tensor.shape}, not A of {adapter.a.shape} and B of {adapter.b.shape}"
                    )
                stored = _Merged(stored.file, stored.dtype, stored.shape, stored.offset, adapter, scale)
            tensors.append((tensor, stored))
        networks[part] = tuple(tensors)
        problems += [f"{module} is not a linear map of {named(weights.place)}" for module in left]
    if problems:
        raise WeightsError("\n".join(f"{named(adapters.place)}: {x}" for x in problems))
    return dataclasses.replace(weights, tensors=networks)


def check_adapters(adapters: PublicAdapters, model: ModelConfig, setting: str) -> None:
    """Looks at all but the numbers.

    Raises:
        ConfigError: they are not those that `model.lora` says; all that differ are named. `setting` is what named them.
    """

    def flat[T](networks: Mapping[str, Mapping[str, T]]) -> dict[str, T]:
        each = ((part, *item) for part, of in networks.items() for item in of.items())
        return {module if part == "network" else f"{part}/{module}": x for part, module, x in each}

    found, wanted, lora = flat(adapters.networks), flat(_of_model(model)), model.lora
    alpha, differ = float(lora.alpha or lora.rank), dict[str, list[str]]()
    for name, adapter in found.items():
        shapes = adapter.a.shape, adapter.b.shape
        here = tuple(tensor.shape for tensor in wanted.get(name, ()))
        if name not in wanted:
            differ.setdefault("there, but not by model.lora.targets", []).append(name)
        elif adapter.rank != lora.rank or not math.isclose(adapter.alpha, alpha, rel_tol=_CLOSE):
            what = f"of rank {adapter.rank} and alpha {_exact(adapter.alpha)}, here of {lora.rank} and {_exact(alpha)}"
            differ.setdefault(what, []).append(name)
        elif shapes != here:
            differ.setdefault("of shapes {} and {}, here of {} and {}".format(*shapes, *here), []).append(name)
    if missing := [name for name in wanted if name not in found]:
        differ["by model.lora.targets, but not there"] = missing
    if differ:
        raise ConfigError(
            f"{setting} {named(adapters.place)} has other adapters than model.lora says: "
            f"{'; '.join(f'{", ".join(grouped(names))}: {what}' for what, names in differ.items())}. Give this run the "
            "same rank, alpha and targets"
        )


def _exact(alpha: float) -> str:
    return str(float(alpha)).removesuffix(".0")


def load_adapters(adapters: PublicAdapters, model: ModelConfig, like: Params, setting: str) -> Params:
    """The adapters of a model, where `like`, ShapeDtypeStructs with shardings, says.

    Raises:
        ConfigError: see `check_adapters`.
    """
    check_adapters(adapters, model, setting)
    arrays: dict[tuple[str, ...], dict[int | None, np.ndarray]] = {}
    for part, of in _of_model(model).items():
        for module, (a, b) in of.items():
            adapter = adapters.networks[part][module]
            for tensor, stored in ((a, adapter.a), (b, adapter.b)):
                whole = arrays.setdefault((part, *tensor.path), {})
                whole[tensor.layer] = tensor.of_file(stored.array()).astype(np.float32)

    def placed(path, place):
        of = arrays[key_path(path)]
        whole = of[None] if None in of else np.stack([of[layer] for layer in range(len(of))])
        return jax.make_array_from_callback(place.shape, place.sharding, lambda index: whole[index])

    return jax.tree.map_with_path(placed, like)


def _of_model(model: ModelConfig) -> dict[str, dict[str, tuple[models.PublicTensor, models.PublicTensor]]]:
    models.public_tensors(model)
    return models.public_adapters(model, model.lora)


# ------------------------------------------------------------------------------------------------ writing

_Pair = list[tuple[np.dtype, tuple[int, ...], Stored | np.ndarray]]  # A and B
_Written = tuple[str, float, _Pair]  # a linear map, alpha


def convert_adapters(adapters: PublicAdapters, folder: Path, *, names: Names, dtype: Dtype = "keep") -> None:
    """Writes adapters with other names, or in another type.

    Raises:
        ConfigError, WeightsError: see `public_weights.new_folder`.
    """

    def listed(of: Mapping[str, Adapter]) -> Iterator[_Written]:
        for module, adapter in of.items():
            pair: _Pair = [
                (HALF[x.dtype] if dtype == "keep" else DTYPE_NAMES[dtype], x.shape, x) for x in (adapter.a, adapter.b)
            ]
            yield module, adapter.alpha, pair

    _write({part: list(listed(of)) for part, of in adapters.networks.items()}, folder, names)


def export_adapters(
    model: ModelConfig, params: Params, folder: Path, *, names: Names, dtype: Literal["float32", "bfloat16"] = "float32"
) -> None:
    """Writes a model's adapters as others read them.

    Raises:
        ConfigError: the model has none, or no public names.
        ConfigError, WeightsError: see `public_weights.new_folder`.
    """
    if not model.lora.rank:
        raise ConfigError("model.lora.rank is 0: the run trained all weights, and has no adapters")
    by_path = {key_path(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(params)}

    def listed(part: str, of: Mapping[str, tuple[models.PublicTensor, models.PublicTensor]]) -> Iterator[_Written]:
        for module, pair in of.items():
            arrays: list[np.ndarray] = []
            for tensor in pair:
                leaf = by_path[(part, *tensor.path)]
                arrays.append(tensor.to_file(leaf if tensor.layer is None else leaf[tensor.layer]))
            alpha = model.lora.scale * model.lora.rank
            yield module, alpha, [(DTYPE_NAMES[dtype], x.shape, x) for x in arrays]

    _write({part: list(listed(part, of)) for part, of in _of_model(model).items()}, folder, names)


def _write(networks: Mapping[str, list[_Written]], folder: Path, names: Names) -> None:
    size = sum(math.prod(shape) * dtype.itemsize for of in networks.values() for *_, p in of for dtype, shape, _ in p)
    with new_folder(folder, size) as made:
        for i, of in enumerate(networks.values()):
            inside = made if len(networks) == 1 else made / EXPERTS.get(names, EXPERTS["original"])[i]
            inside.mkdir(exist_ok=True)
            _write_file(inside / _FILE, of, names)


def _write_file(file: Path, of: list[_Written], names: Names) -> None:
    written: list[tuple[Written, Stored | np.ndarray]] = []
    for module, alpha, pair in of:
        *both, of_alpha = models.written_names(module, names)
        written += [(Written(name, kind, shape), x) for name, (kind, shape, x) in zip(both, pair, strict=True)]
        if names != "diffusers":
            written.append((Written(of_alpha, np.dtype(np.float32), ()), np.array(alpha, np.float32)))
    arrays = ((x.array() if isinstance(x, Stored) else x).astype(tensor.dtype) for tensor, x in written)
    words = {WORDS: json.dumps(_described(of), indent=2, sort_keys=True)} if names == "diffusers" else {}
    write_safetensors(file, [tensor for tensor, _ in written], arrays, words)


def _described(of: list[_Written]) -> dict[str, object]:
    """PEFT's settings of them."""
    ranks = {module: pair[0][1][0] for module, _, pair in of}
    alphas = {module: int(alpha) if alpha.is_integer() else alpha for module, alpha, _ in of}
    (rank, _), (alpha, _) = (collections.Counter(x.values()).most_common(1)[0] for x in (ranks, alphas))
    found = {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {module: x for module, x in ranks.items() if x != rank},
        "alpha_pattern": {module: x for module, x in alphas.items() if x != alpha},
        "target_modules": list(ranks),
    }
    return {f"transformer.{name}": value for name, value in found.items()}
