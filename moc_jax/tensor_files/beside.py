"""Public networks that lie beside transformers: autoencoders and text encoders, in the same kinds of files."""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from moc_jax.showing import Shapes, mismatches, named
from moc_jax.tensor_files.places import network_in
from moc_jax.tensor_files.safetensors import Stored, WeightsError

_RUNS, _RUN = 16, 256  # of each tensor: stretches of it, and numbers of each

Wanted = Mapping[str, tuple[str, tuple[int, ...]]]
"""By the names that a file must have: what the package calls the tensor, and its shape."""


def open_beside[T](
    place: str,
    *,
    folder: str,
    pth: str,
    what: str,
    setting: str,
    recognise: Callable[[Shapes, Mapping[str, object], str], tuple[T, Wanted, list[str]]],
) -> tuple[T, dict[str, Stored]]:
    """What a network is, and its tensors by the package's names; none of the numbers is read.

    Args:
        place: a file, its folder, or the folder of a pipeline or of the Wan team.
        folder: what its folder is called in diffusers' pipelines.
        pth: a pattern, as of a shell, of what its .pth file is called in the Wan team's folders.
        what: what it is, in messages.
        setting: which setting gave `place`.
        recognise: what a network with tensors of these shapes and such a config.json is, what its file must hold, and
            what is wrong with its config.json; begins messages with its third argument.

    Raises:
        WeightsError: nothing is there, or tensors are missing, too many, of other shapes or of others than config.json
            says; all of these are named.
        ConfigError: what `recognise` raises.
    """
    if not place:
        raise WeightsError(f"{setting} is empty; name a file or a folder with the weights of {what}")
    network = network_in(Path(place), folder, pth, what)
    shapes, where = {name: stored.shape for name, stored in network.tensors.items()}, named(network.place)
    lying, alone = where, all(stored.file.suffix != ".pth" for stored in network.tensors.values())
    if alone and network.place == Path(place) and network.place.is_dir():  # perhaps the team's: a transformer's
        lying = f"{where} has no {pth} (add it, or name its file), and what lies there"
    recognised, wanted, problems = recognise(shapes, network.settings, lying)
    if problems := problems + mismatches(shapes, {name: shape for name, (_, shape) in wanted.items()}):
        raise WeightsError("\n".join(f"{where}: {problem}" for problem in problems))
    return recognised, {ours: network.tensors[name] for name, (ours, _) in wanted.items()}


def weights_digest(tensors: Mapping[str, Stored]) -> str:
    """SHA-256 of names, shapes and numbers spread over each tensor, as float32: in whatever files they lie."""
    digest = hashlib.sha256()
    for name, stored in sorted(tensors.items()):
        digest.update(f"{name}{stored.shape}".encode())
        flat = stored.array().reshape(-1)
        for begin in np.linspace(0, max(len(flat) - _RUN, 0), _RUNS).astype(int):
            digest.update(np.asarray(flat[begin : begin + _RUN], np.float32).tobytes())
    return digest.hexdigest()
