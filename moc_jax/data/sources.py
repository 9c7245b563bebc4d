"""Which video files a run is made of, and what tells whether they have changed."""

import collections
import dataclasses
import functools
import hashlib
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Literal, overload

from moc_jax.config import ConfigError, DataConfig
from moc_jax.data.captions import CaptionError, Captions, caption_files, load_captions
from moc_jax.data.folders import Place, count, find_places, some
from moc_jax.showing import printable

_SAMPLE = 1 << 20  # bytes hashed at the beginning, in the middle and at the end of a file

Split = Literal["train", "validation"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """One video file."""

    path: Path
    """Where it was found: a link, if it was found as one."""
    name: str
    """Its path below the folder it was found in, or its file name: the same wherever the data lies."""
    split: Split
    captions: Captions
    digest: str
    """Changes when the file or its caption file does."""


@dataclasses.dataclass(frozen=True)
class Sources(Sequence[Source]):
    """The files of a run."""

    files: tuple[Source, ...]
    notes: tuple[str, ...]
    """What was found and not taken, and what was found twice."""

    def __len__(self) -> int:
        return len(self.files)

    @overload
    def __getitem__(self, index: int) -> Source: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Source]: ...
    def __getitem__(self, index):
        return self.files[index]


def find_sources(cfg: DataConfig) -> Sources:
    """All video files of `data.source` and `data.validation_source`, in the order given and by name.

    A file that is reached by several ways, such as links, is one source, with the caption file of whichever place has
    one; with different captions beside it in several places it is a source for each.

    Raises:
        ConfigError: no sources, a path that does not exist, a folder without videos, or a file in both splits.
        CaptionError: caption files that cannot be used; all of them are named.
    """
    if not cfg.source:
        raise ConfigError("data.source is empty; give at least one video file or a folder of video files")
    training, notes = find_places(cfg.source, "source")
    held_out, more = find_places(cfg.validation_source, "validation_source")
    _check_apart(training, held_out)
    files: dict[Hashable, list[_Captioned]] = {}
    for place, captions in _captioned([*training, *held_out], cfg):
        files.setdefault(place.identity, []).append((place, captions))
    used = {identity: _distinct(places) for identity, places in files.items()}
    taken = collections.Counter(place.name for places in used.values() for place, _ in places)
    held = {place.identity for place in held_out}
    sources, unreadable = [], []
    for identity, places in used.items():
        share = _share(places[0][0].name)  # one file lies in one split, whatever its captions
        split = "validation" if identity in held or (not held and share < cfg.validation_fraction) else "train"
        for place, captions in places:
            name = place.name if taken[place.name] == 1 else place.path.as_posix()  # two folders may hold one name
            try:
                digest = _digest(place.path, captions.file)
            except OSError as error:
                unreadable.append(f"{place.path} cannot be read ({error.strerror})")
                continue
            sources.append(Source(path=place.path, name=name, split=split, captions=captions, digest=digest))
    if not sources:
        raise ConfigError("no file of data.source can be read:\n  " + "\n  ".join(unreadable))
    repeated, remarks = _repeated(files, used), _caption_notes(sources, cfg)
    return Sources(tuple(sources), (*notes, *more, *unreadable, *repeated, *remarks))


def find_file(cfg: DataConfig, name: str, digest: str) -> Path | None:
    """Where the file of a `Source` of this name and digest lies now; None if it is not there.

    Raises:
        ConfigError, CaptionError, OSError: a path of the config, or a caption file, that cannot be read.
    """
    for place in find_places(cfg.source, "source")[0]:
        named = name in (place.name, place.path.as_posix())
        if named and _digest(place.path, load_captions(place.path, cfg).file) == digest:
            return place.path
    return None


_Captioned = tuple[Place, Captions]


def _check_apart(training: list[Place], held_out: list[Place]) -> None:
    trained = {place.identity: place.path for place in training}
    both = [_same(trained[place.identity], place.path) for place in held_out if place.identity in trained]
    if both:
        raise ConfigError(
            f"data.source and data.validation_source share {some(both)}; a video cannot be both held out and trained on"
        )


def _same(path: Path, other: Path) -> str:
    return str(path) if path == other else f"{path} = {other}"


def _captioned(places: list[Place], cfg: DataConfig) -> list[_Captioned]:
    beside = functools.cache(caption_files)
    found, problems = [], []
    for place in places:
        try:
            found.append((place, load_captions(place.path, cfg, beside(place.path.parent))))
        except CaptionError as error:
            problems.append(str(error))
    if problems:
        raise CaptionError("\n".join(map(printable, dict.fromkeys(problems))))
    return found


def _distinct(places: list[_Captioned]) -> list[_Captioned]:
    """Of the places of one file, one for each text: own places before links, caption files before defaults."""
    places = sorted(places, key=lambda found: found[0].linked)
    captioned = [found for found in places if found[1].file] or places[:1]
    kept: dict[tuple, _Captioned] = {}
    for place, captions in captioned:
        kept.setdefault((captions.caption, captions.shots, captions.cuts), (place, captions))
    return list(kept.values())


def _repeated(files: dict[Hashable, list[_Captioned]], used: dict[Hashable, list[_Captioned]]) -> list[str]:
    notes = []
    left = [
        _same(place.path, used[identity][0][0].path)
        for identity, places in files.items()
        for place, _ in places
        if not any(place is other for other, _ in used[identity])
    ]
    if left:
        notes.append(f"{count(len(left), 'duplicate')} left out, each file is used once: {some(left)}")
    for places in used.values():
        if len(places) > 1:
            notes.append(
                f"duplicates of one file with different captions, used {len(places)} times: "
                f"{some([str(place.path) for place, _ in places])}"
            )
    return notes


def _caption_notes(sources: list[Source], cfg: DataConfig) -> list[str]:
    videos: dict[Path, list[str]] = {}
    empty = []
    for source in sources:
        captions = source.captions
        if captions.file:
            videos.setdefault(captions.file, []).append(source.path.name)
            if (captions.caption, captions.shots, captions.cuts) == (cfg.default_caption, (), None):
                empty.append(str(captions.file))
    notes = [f"{file} is the caption file of {some(names)}" for file, names in videos.items() if len(names) > 1]
    if empty:
        notes.append(f"{count(len(empty), 'caption file')} without a caption, the defaults are used: {some(empty)}")
    return notes


def _share(name: str) -> float:
    """A number in [0, 1) that depends on the name alone, so that adding files moves no other file."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:6]) / 2**48


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
        digest.update(captions.suffix.lower().encode())  # the same bytes mean something else as .txt
        digest.update(captions.read_bytes())
    return digest.hexdigest()
