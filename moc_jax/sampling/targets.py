"""Which files to write; those that cannot be written are errors before anything is computed."""

import os
from collections.abc import Sequence
from pathlib import Path

from moc_jax.config import ConfigError
from moc_jax.files import prove_file


def target_files(
    path: Path | None, names: Sequence[str], suffix: str, *, overwrite: bool, setting: str = "--out"
) -> list[Path]:
    """The file for each of `names`: `path` itself for a single one, else `path`/<name><suffix>; without `path` none.

    Each is proven to be writable; what killed processes left half-written of it is removed.

    Args:
        setting: what the user gave `path` by.

    Raises:
        ConfigError: a wrong ending, a file where a folder is needed, a file that exists, two names of one file, or a
            place where nothing can be written.
    """
    if path is None:
        return []
    if os.path.isdir(path) or len(names) > 1:
        if path.suffix in (".mp4", ".png", ".html") and not os.path.isdir(path):
            raise ConfigError(f"{path} is one file, but there are {len(names)} storyboards; give a folder")
        targets = [path / f"{name}{suffix}" for name in names]
    else:
        targets = [path]
        if path.suffix != suffix:
            raise ConfigError(f"{setting}: {path} must end in {suffix}")
    for target in targets:
        if targets.count(target) > 1:
            raise ConfigError(f"two storyboards would both be written to {target}; give them different names")
        if os.path.isfile(target) and not overwrite:
            raise ConfigError(f"{target} exists; give another name, or --overwrite")
        prove_file(target, setting=setting)
    return targets
