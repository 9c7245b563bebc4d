"""Which files to write; those that cannot be written are errors before anything is computed."""

from collections.abc import Sequence
from pathlib import Path

from moc_jax.config import ConfigError


def target_files(path: Path | None, names: Sequence[str], suffix: str, *, overwrite: bool) -> list[Path]:
    """The file for each of `names`: `path` itself for a single one, else `path`/<name><suffix>; without `path` none.

    Raises:
        ConfigError: a wrong ending, a file where a folder is needed, a file that exists, or two names of one file.
    """
    if path is None:
        return []
    if path.is_dir() or len(names) > 1:
        if path.suffix in (".mp4", ".png") and not path.is_dir():
            raise ConfigError(f"{path} is one file, but there are {len(names)} storyboards; give a folder")
        targets = [path / f"{name}{suffix}" for name in names]
    else:
        targets = [path]
        if path.suffix != suffix:
            raise ConfigError(f"{path} must end in {suffix}")
    for target in targets:
        nearest = next(folder for folder in target.parents if folder.exists())
        if not nearest.is_dir():
            raise ConfigError(f"{target} cannot be written, since {nearest} is a file; give another name")
        if targets.count(target) > 1:
            raise ConfigError(f"two storyboards would both be written to {target}; give them different names")
        if target.exists() and not overwrite:
            raise ConfigError(f"{target} exists; give another name, or --overwrite")
    return targets
