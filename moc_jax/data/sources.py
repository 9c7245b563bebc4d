"""Which video files a run is made of, and what tells whether they have changed."""

import collections
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Literal, overload

from moc_jax.config import ConfigError, DataConfig
from moc_jax.data.captions import CaptionError, Captions, Content, caption_files, filled, load_captions
from moc_jax.data.copies import BucketFile, name_of, side_by_side
from moc_jax.data.folders import Place, count, find_places, some
from moc_jax.data.tables import Row
from moc_jax.data.tars import TarMember, read_spans, size_of
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
    """Changes when the file's content does."""
    size: int
    """Bytes of the file."""
    weight: int = 1
    """How often its scenes are shown in an epoch."""
    still: bool = False
    """Whether it is a picture."""


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
    training, notes = find_places(cfg.source, "source", stills=cfg.stills)
    held_out, more = find_places(cfg.validation_source, "validation_source", stills=cfg.stills)
    _check_apart(training, held_out)
    files: dict[Hashable, list[_Captioned]] = {}
    for place, captions in _captioned([*training, *held_out], cfg):
        files.setdefault(place.identity, []).append((place, captions))
    used = {identity: _distinct(places) for identity, places in files.items()}
    taken = collections.Counter(name for name, _ in {(p.name, p.path) for places in used.values() for p, _ in places})
    held, digests = {place.identity for place in held_out}, _in_buckets([*training, *held_out])
    sources, decided, unreadable = [], dict[str, set[Split]](), []
    for identity, places in used.items():
        share = _share(places[0][0].name)  # one file lies in one split, whatever its captions
        split = "validation" if identity in held or (not held and share < cfg.validation_fraction) else "train"
        said = {place.row.split for place, _ in files[identity] if place.row and place.row.split}
        if len(said) > 1:
            raise ConfigError(f"{places[0][0].path} is in both splits, according to {_rows(files[identity])}; keep one")
        for place, captions in places:
            name = place.name if taken[place.name] == 1 else name_of(place.path)  # two folders may hold one name
            lines = [other for other in places if other[0].path == place.path]
            if len(lines) > 1:  # of a table, or of several
                name = _names_of_line(name, captions)[sum(other[1].line == captions.line for other in lines) > 1]
            try:
                digest, size = digests.get(place.path) or _digest(place.path)
            except OSError as error:
                unreadable.append(f"{place.path} cannot be read ({error.strerror})")
                continue
            source = Source(
                path=place.path,
                name=name,
                split=next(iter(said), split),
                captions=captions,
                digest=digest,
                size=size,
                weight=_weight(place.path, captions, files[identity]),
                still=place.still,
            )
            sources.append(source)
            if said or identity in held:
                decided.setdefault(digest, set()).add(source.split)
    if not sources:
        raise ConfigError("no file of data.source can be read:\n  " + "\n  ".join(unreadable))
    sources, equal = _together(sources, decided, {place.path for place in held_out})
    repeated, remarks = _repeated(files, used), _caption_notes(sources, cfg)
    return Sources(tuple(sources), (*notes, *more, *unreadable, *repeated, *equal, *remarks))


def find_file(cfg: DataConfig, name: str, digest: str) -> Path | None:
    """Where the file of a `Source` of this name and digest lies now; None if it is not there.

    Raises:
        ConfigError, CaptionError, OSError: a path of the config, or a table, that cannot be read.
    """
    for place in find_places(cfg.source, "source", stills=cfg.stills)[0]:
        names = place.name, name_of(place.path)
        lines = [of for known in names if place.row for of in _names_of_line(known, place.row)]
        if name in (*names, *lines) and _digest(place.path)[0] == digest:
            return place.path
    return None


_Captioned = tuple[Place, Captions]


def _names_of_line(name: str, line: Captions | Row) -> tuple[str, str]:
    """What a video is called of which several lines speak: by the line, and where tables share its number."""
    return f"{name}:{line.line}", f"{name}:{line.file}:{line.line}"


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
            found.append((place, _captions(place, cfg, beside)))
        except CaptionError as error:
            problems.append(str(error))
    if problems:
        raise CaptionError("\n".join(map(printable, dict.fromkeys(problems))))
    return found


def _captions(
    place: Place, cfg: DataConfig, beside: Callable[[Path], Mapping[str, Sequence[Path]]] | None = None
) -> Captions:
    """From its line of a table, or from beside it, where the table says nothing, too."""
    row = place.row
    if row is not None and (row.content != Content() or isinstance(place.path, TarMember)):
        return filled(row.content, place.path, cfg, row.file, row.line)
    return load_captions(place.path, cfg, beside)


def _rows(places: list[_Captioned]) -> str:
    return some([place.row.where for place, _ in places if place.row])


def _distinct(places: list[_Captioned]) -> list[_Captioned]:
    """Of the places of one file, one for each text: own places before links, caption files before defaults."""
    places = sorted(places, key=lambda found: found[0].linked)
    captioned = [found for found in places if found[1].file] or places[:1]
    kept: dict[tuple, _Captioned] = {}
    for place, captions in captioned:
        kept.setdefault(_texts(captions), (place, captions))
    return list(kept.values())


def _weight(path: Path, captions: Captions, places: list[_Captioned]) -> int:
    """What the lines say that have these captions; 1 if there are none.

    Raises:
        ConfigError: they say different weights.
    """
    said = dict[int, str]()
    for place, other in places:
        if place.row and _texts(other) == _texts(captions):
            said.setdefault(place.row.weight, f"{place.row.weight} ({place.row.where})")
    if len(said) > 1:
        raise ConfigError(
            f"{path} has several weights with the same captions: {some(list(said.values()))}; keep one line, with the "
            "weight that is meant"
        )
    return next(iter(said), 1)


def _texts(captions: Captions) -> tuple[object, ...]:
    return captions.caption, captions.shots, captions.cuts, captions.cut_unit


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


def _together(
    sources: list[Source], decided: Mapping[str, set[Split]], held: set[Path]
) -> tuple[list[Source], list[str]]:
    """Videos of equal content lie in one split: the one that was named for them, or where the first by name lies.

    Raises:
        ConfigError: both were named.
    """
    equal: dict[str, list[Source]] = {}
    for source in sorted((s for s in sources if s.size), key=lambda source: source.name):  # of nothing all are equal
        equal.setdefault(source.digest, []).append(source)
    notes, splits = [], dict[str, Split]()
    for digest, group in equal.items():
        names, named = some([str(source.path) for source in group]), decided.get(digest, set())
        if len(named) > 1 or len({source.path in held for source in group}) > 1:
            raise ConfigError(
                f"{names} have equal content and lie in both splits; a video cannot be both held out and trained on"
            )
        splits[digest] = next(iter(named), group[0].split)
        if len({source.path for source in group}) > 1:
            notes.append(f"{names} have equal content: encoded once, shown {len(group)} times in an epoch")
    return [dataclasses.replace(source, split=splits.get(source.digest, source.split)) for source in sources], notes


def _caption_notes(sources: list[Source], cfg: DataConfig) -> list[str]:
    videos: dict[Path, list[str]] = {}
    empty = []
    for source in sources:
        captions = source.captions
        if captions.file and captions.line is None:
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


def _in_buckets(places: Sequence[Place]) -> dict[Path, tuple[str, int]]:
    """The digests of files in buckets, where many requests at once take as long as one."""
    paths = list({place.path for place in places if isinstance(place.path, BucketFile)})
    return dict(zip(paths, side_by_side(_digest, paths)))


def _digest(video: Path) -> tuple[str, int]:
    """Of size and samples of the video (all of it up to 3 MiB), and its size.

    Times of change are left out: a copied or downloaded file is the same file.
    """
    size = size_of(video)
    digest = hashlib.sha256(str(size).encode())
    offsets = sorted({0, max(0, (size - _SAMPLE) // 2), max(0, size - _SAMPLE)})
    for sample in read_spans(video, [(offset, min(_SAMPLE, size - offset)) for offset in offsets]):
        digest.update(sample)
    return digest.hexdigest(), size
