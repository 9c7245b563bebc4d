"""Where public weights lie: a file, a folder of one network, or a folder of a pipeline with one network or two.

    transformer/ [transformer_2/] model_index.json    as diffusers has them; the second is for low noise
    high_noise_model/ low_noise_model/                as the Wan team has its Wan 2.2 A14B; the package adds an index
    config.json *.safetensors [*.index.json]          one network: one file, or several with an index
    *.pth                                             as PyTorch saves it

Only lists and headers are read here.
"""

import dataclasses
import fnmatch
import re
from collections.abc import Mapping
from pathlib import Path

from moc_jax.reading import DocumentError, parse_json
from moc_jax.showing import named, shown
from moc_jax.tensor_files.pickled import read_pickled
from moc_jax.tensor_files.safetensors import DTYPES, Stored, WeightsError, read_safetensors

EXPERTS = {"diffusers": ("transformer", "transformer_2"), "original": ("high_noise_model", "low_noise_model")}
"""Folders of two experts, for high and for low noise."""
INDEX = "model_index.json"
LICENCE = "Apache-2.0 for what the Wan team published (https://github.com/Wan-Video); what others trained has their own"
_SHARD = r"(.+)-\d{5}-of-(\d{5})\.safetensors"
_BESIDE = "models_*.pth", "*vae*.pth"  # beside a transformer in the Wan team's folders: text encoder and autoencoder


@dataclasses.dataclass(frozen=True)
class Network:
    """The tensors of one network."""

    place: Path
    tensors: dict[str, Stored]
    settings: Mapping[str, object]  # of its config.json; empty where there is none


def are_public(place: str) -> bool:
    """Whether `place` is a file, or a folder as the networks of others lie in; a run's workdir isn't."""
    path = Path(place)
    patterns = INDEX, "transformer", "*_noise_model", "*.safetensors", "*.safetensors.index.json", "*.pth"
    return path.is_file() or any(any(path.glob(pattern)) for pattern in patterns)


def networks_in(place: Path) -> tuple[dict[str, Network], Mapping[str, object]]:
    """Networks by what they are for, `network`, or `high` and `low` noise; and what model_index.json says.

    Raises:
        WeightsError: nothing is there, or what is there is not whole; every file and type that can't be read is named.
    """
    if place.is_file():
        return {"network": _network(place)}, {}
    if not place.is_dir():
        raise WeightsError(f"{named(place)} is not there; name a file, or a folder of weights")
    index = settings_of(place / INDEX)
    for high, low in EXPERTS.values():
        present = [folder for folder in (high, low) if (place / folder).is_dir()]
        if present == [high] and high == "transformer":
            if index.get("boundary_ratio") is not None:
                raise WeightsError(f"{named(place)} has two experts by its model_index.json, but no {low}")
            return {"network": _network(place / high)}, index
        if len(present) == 1:
            raise WeightsError(f"{named(place)} has {present[0]} alone; its other expert, {high} or {low}, is missing")
        if present:
            return {"high": _network(place / high), "low": _network(place / low)}, index
    return {"network": _network(place)}, index


def network_in(place: Path, folder: str, pth: str, what: str) -> Network:
    """A network that lies beside transformers, of a file, of its own folder or of that of a pipeline.

    Args:
        folder: its folder in diffusers' pipelines.
        pth: a pattern, as of a shell, of its .pth file's name in the Wan team's folders.
        what: what it is, in messages.

    Raises:
        WeightsError: as `networks_in`.
    """
    inside = place / folder if (place / folder).is_dir() else place
    if not inside.is_file() and not inside.is_dir():
        raise WeightsError(f"{named(place)} is not there; name a file or a folder with the weights of {what}")
    return _network(inside, pth, what)


def _network(place: Path, pth: str = "", what: str = "the transformer") -> Network:
    files, folder = ([place], place.parent) if place.is_file() else (_files(place, pth, what), place)
    tensors: dict[str, Stored] = {}
    for file in files:
        found = read_safetensors(file) if file.suffix == ".safetensors" else read_pickled(file)
        if twice := sorted(tensors.keys() & found.keys()):
            raise WeightsError(f"{named(file)} has {twice[0]}, which {named(tensors[twice[0]].file)} has, too")
        tensors |= found
    if not tensors:
        raise WeightsError(f"{named(place)} holds no tensors")
    others: dict[str, list[str]] = {}
    for name, stored in tensors.items():
        if stored.dtype not in DTYPES:
            others.setdefault(stored.dtype, []).append(name)
    if others:
        which = "; ".join(f"{len(of)} of {dtype}, such as {of[0]}" for dtype, of in sorted(others.items()))
        raise WeightsError(f"{named(place)} holds tensors of types other than {' and '.join(DTYPES)}: {which}")
    return Network(place, tensors, settings_of(folder / "config.json"))


def _files(folder: Path, pth: str, what: str) -> list[Path]:
    """The files of a folder's network; raises WeightsError unless it is clear which."""
    team = [
        file
        for file in sorted(folder.glob("*.pth"))
        if (_is_called(file, pth) if pth else not any(_is_called(file, other) for other in _BESIDE))
    ]
    if pth and len(team) > 1:
        raise WeightsError(
            f"{named(folder)} has several {pth}: {', '.join(x.name for x in team)}; name the file of {what}"
        )
    if pth and team:  # beside a transformer's .safetensors
        return team
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if len(indices) > 1:
        raise WeightsError(f"{named(folder)} has several indices: {', '.join(x.name for x in indices)}; keep one")
    if indices:
        return _indexed(indices[0])
    found = sorted(folder.glob("*.safetensors"))
    shards = [file for file in found if re.fullmatch(_SHARD, file.name)]
    if shards:
        index = re.sub(_SHARD, r"\1.safetensors.index.json", shards[0].name)
        raise WeightsError(f"{named(folder)} has {shards[0].name}, one file of several, but no index {index}")
    found = found or team
    if len(found) != 1:
        several = f"several files: {', '.join(file.name for file in found)}"
        has = several if found else f"no .safetensors and no {pth or '.pth file'}"
        raise WeightsError(f"{named(folder)} has {has}; name the file of {what}, or the folder of its files")
    return found


def _is_called(file: Path, pattern: str) -> bool:
    return fnmatch.fnmatchcase(file.name.lower(), pattern)


def _indexed(index: Path) -> list[Path]:
    of = settings_of(index).get("weight_map")
    if not isinstance(of, dict) or not all(isinstance(x, str) and Path(x).name == x for x in of.values()):
        raise WeightsError(f"{named(index)} has no weight_map of names of files: {shown(of)}")
    files = [index.parent / name for name in sorted(set(of.values()))]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise WeightsError(f"{named(index)} names files that are not there: {', '.join(missing)}")
    apart = [name for file in files for name in read_safetensors(file) if of.get(name) != file.name]
    if apart:
        raise WeightsError(f"{named(index)} does not know where these lie: {', '.join(sorted(apart))}")
    return files


def settings_of(file: Path) -> Mapping[str, object]:
    """What a JSON file says; nothing where it isn't there. Raises WeightsError: it is damaged."""
    if not file.is_file():
        return {}
    try:
        tree = parse_json(file.read_bytes(), deepest=8)
    except (OSError, DocumentError) as error:
        raise WeightsError(f"{named(file)} can't be read: {error}") from error
    if not isinstance(tree, dict):
        raise WeightsError(f"{named(file)} is {shown(tree)}; it must be an object")
    return tree
