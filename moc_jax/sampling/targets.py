"""Which files to write; those that cannot be written are errors before anything is computed."""

import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from moc_jax.config import ConfigError
from moc_jax.files import identity, prove_file
from moc_jax.sampling.storyboard import Storyboard
from moc_jax.showing import named


def target_files(
    path: Path | None,
    names: Sequence[str],
    suffix: str,
    *,
    overwrite: bool,
    setting: str = "--out",
    apart: bool = False,
) -> list[Path]:
    """The file for each of `names`: `path` itself for a single one, else `path`/<name><suffix>; without `path` none.

    Each is proven to be writable; what killed processes left half-written of it is removed.

    Args:
        setting: what the user gave `path` by.
        apart: a single one has its own name, too.

    Raises:
        ConfigError: a wrong ending, a file where a folder is needed, a file that exists, two names of one file, or a
            place where nothing can be written.
    """
    if path is None:
        return []
    if os.path.isdir(path) or len(names) > 1 or apart:
        what = "videos of single shots" if apart else "storyboards"
        if path.suffix in (".mp4", ".png", ".html") and not os.path.isdir(path):
            raise ConfigError(f"{path} is one file, but there are {len(names)} {what}; give a folder")
        targets = [path / f"{name}{suffix}" for name in names]
    else:
        targets = [path]
        if path.suffix != suffix:
            raise ConfigError(f"{setting}: {path} must end in {suffix}")
    for target in targets:
        if targets.count(target) > 1:
            raise ConfigError(f"two storyboards would both be written to {target}; give them different names")
        if os.path.lexists(target) and not (overwrite or os.path.isdir(target)):
            raise ConfigError(f"{target} exists; give another name, or --overwrite")
        prove_file(target, setting=setting)
    return targets


def video_files(out: Path, names: Sequence[str], boards: Sequence[Storyboard], *, overwrite: bool) -> list[list[Path]]:
    """The file for each storyboard, or, where its shots have names, for each of them: `<storyboard>/<shot>.mp4`.

    Raises:
        ConfigError: as `target_files`.
    """
    shots = [[f"{name}/{shot.file}" for shot in board.shots if shot.file] for name, board in zip(names, boards)]
    wanted = [of or [name] for of, name in zip(shots or [[]], names)]
    files = target_files(out, [*itertools.chain(*wanted)], ".mp4", overwrite=overwrite, apart=any(shots))
    taken = iter(files)
    return [list(itertools.islice(taken, len(of))) for of in wanted]


def check_apart(targets: Mapping[str, Sequence[Path]], boards: Sequence[Storyboard], read: Sequence[Path] = ()) -> None:
    """Raises ConfigError where two files that are to be written are one, or one of them is read.

    Args:
        targets: by what the user gave them by.
        boards: their pictures and videos are read.
        read: what else is.
    """
    given = [path for board in boards for shot in board.shots for path in (shot.image, shot.video) if path]
    taken = {identity(path): f"{named(path)}, which is read," for path in [*read, *given]}
    for setting, paths in targets.items():
        for path in paths:
            this, key = f"{setting} {named(path)}", identity(path)
            if key in taken:
                raise ConfigError(f"{taken[key]} and {this} are one file; give another name")
            taken[key] = this
