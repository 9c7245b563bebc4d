"""Which video files a run is made of, and what tells whether they have changed."""

import collections
import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from moc_jax.config import ConfigError, DataConfig
from moc_jax.data.captions import CaptionError, Captions, load_captions

_SUFFIXES = {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".ogv", ".wmv", ".flv", ".gif"}
_SAMPLE = 1 << 20  # bytes hashed at the beginning, in the middle and at the end of a file

Split = Literal["train", "validation"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """One video file."""

    path: Path
    name: str
    """Its path below the folder it was found in, or its file name: the same wherever the data lies."""
    split: Split
    captions: Captions
    digest: str
    """Changes when the file or its caption file does."""


def find_sources(cfg: DataConfig) -> list[Source]:
    """All video files of `data.source` and `data.validation_source`, in the order of their names.

    Raises:
        ConfigError: no sources, a path that does not exist, a folder without videos, or a file in both splits.
        CaptionError: caption files that cannot be used; all of them are named.
    """
    if not cfg.source:
        raise ConfigError("data.source is empty; give at least one video file or a folder of video files")
    training, held_out = dict(_walk(cfg.source, "source")), dict(_walk(cfg.validation_source, "validation_source"))
    both = sorted(str(path) for path in set(training) & set(held_out))
    if both:
        raise ConfigError(
            f"data.source and data.validation_source share {', '.join(both[:3])}; a video can't be held out and shown"
        )
    sources, problems = [], []
    files = training | held_out
    taken = collections.Counter(files.values())
    for path, name in files.items():
        name = name if taken[name] == 1 else path.as_posix()  # two folders may hold files of one name
        try:
            captions = load_captions(path, cfg)
        except CaptionError as error:
            problems.append(str(error))
            continue
        split = (
            "validation" if path in held_out or (not held_out and _share(name) < cfg.validation_fraction) else "train"
        )
        sources.append(
            Source(path=path, name=name, split=split, captions=captions, digest=_digest(path, captions.file))
        )
    if problems:
        raise CaptionError("\n".join(problems))
    return sources


def _walk(given: tuple[str, ...], field: str) -> Iterator[tuple[Path, str]]:
    """(resolved path, name) of each video file; a file that is reached twice is yielded twice with the same path."""
    for entry in given:
        root = Path(entry).expanduser()
        if root.is_file():
            yield root.resolve(), root.name
        elif root.is_dir():
            files = sorted(
                p for p in root.rglob("*") if p.suffix.lower() in _SUFFIXES and p.is_file() and p.name[0] != "."
            )
            if not files:
                raise ConfigError(
                    f"data.{field}: the folder {root} holds no video file ({' '.join(sorted(_SUFFIXES))})"
                )
            yield from ((p.resolve(), p.relative_to(root).as_posix()) for p in files)
        else:
            raise ConfigError(f"data.{field}: {root} does not exist (seen from {Path.cwd()})")


def _share(name: str) -> float:
    """A number in [0, 1) that depends on the name alone, so that adding files moves no other file."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6]) / 2**48


def _digest(video: Path, captions: Path | None) -> str:
    """Size and samples of the video (all of it up to 3 MiB) and all of the caption file.

    Times of change are left out: a copied or downloaded file is the same file.
    """
    size = video.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with video.open("rb") as file:
        for offset in sorted({0, max(0, (size - _SAMPLE) // 2), max(0, size - _SAMPLE)}):
            file.seek(offset)
            digest.update(file.read(_SAMPLE))
    if captions:
        digest.update(captions.read_bytes())
    return digest.hexdigest()
