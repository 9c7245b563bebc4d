"""Where files lie: what a folder holds, links followed, with a word on everything that is not taken.

A file's *place* is the path by which it was reached: it decides name and captions. Its *identity* is the file behind
all links, and serves to find duplicates only.
"""

import collections
import dataclasses
import functools
import os
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path

from moc_jax import cloud
from moc_jax.cloud import CloudError
from moc_jax.config import ConfigError
from moc_jax.data import captions
from moc_jax.data.copies import BucketFile, address_of, changes, copy_of, fetch, name_of, pull
from moc_jax.data.tables import SUFFIXES as TABLES
from moc_jax.data.tables import Row, Table, is_table, read_table, row_of
from moc_jax.data.tars import TarMember, members
from moc_jax.documents import MAX_BYTES, MAX_DEPTH, DocumentError
from moc_jax.files import is_address
from moc_jax.reading import decode_text, parse_json
from moc_jax.showing import named, shown

# Containers and streams that FFmpeg reads and that hold moving pictures.
_NAMES = """
264 265 266 3g2 3gp 3gpp amv apng apv asf avc avi avif avs2 avs3 bik cavs cdxl cine dav dif divx dnxhd dnxhr drc dv
dvd dvr-ms evc evo f4p f4v flc fli flm flv gif gxf h261 h263 h264 h265 h266 h26l hevc ifv imx insv ism isma ismv ivf ivr
kux lrv lxf m1v m2p m2t m2ts m2v m4v mj2 mjpeg mjpg mk3d mkv mlv mod moflex mov mp2v mp4 mp4v mpe mpeg mpegts mpg mpg2
mpg4 mpv mpv2 mqv mts mxf mxg nsv nut nuv obu ogg ogm ogv ogx psp pva qt r3d rcv rm rmvb roq rv ser smk svi swf thp tod
tp trp ts ty usm vc1 vc2 viv vob vro vvc webm webp wm wmv wtv xmv xvid y4m
"""
SUFFIXES = frozenset(f".{name}" for name in _NAMES.split())
STILLS = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff"})
"""Of pictures that stand still."""
_MOST_NOTES = 50  # of one kind, per folder
_DEMO = Path("cache/demo")  # where the config `demo` looks for its clip


_Held = Mapping[Path, BucketFile]
"""What lies in a folder in a bucket, by the paths of copies."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """Where a video file was found."""

    path: Path
    """As it was reached, absolute; links are not resolved."""
    name: str
    """The path below the folder that was searched, or the file's name."""
    identity: Hashable
    """Equal for all places of one file."""
    linked: bool
    """Whether a link lies on the way from the folder that was searched."""
    row: Row | None = None
    """What a table or a tar file says about it; None: captions lie beside it."""

    @property
    def still(self) -> bool:
        """Whether it is a picture."""
        return self.path.suffix.lower() in STILLS


def find_places(given: Iterable[str], field: str, *, stills: bool = False) -> tuple[list[Place], list[str]]:
    """The videos of files, folders, tar files and tables, in the order given and by name, and notes on what is left.

    Args:
        given: paths, or addresses in buckets.
        field: of `data`, for messages.
        stills: whether pictures in folders and tar files are taken, too.

    Raises:
        ConfigError: an entry that does not exist or cannot be read, or a folder without a video; names `data.field`.
        CaptionError: a table that cannot be used; names the lines.
    """
    try:
        return _places(given, field, stills)
    except CloudError as error:
        raise ConfigError(f"data.{field}: {error}") from error


def _places(given: Iterable[str], field: str, stills: bool) -> tuple[list[Place], list[str]]:
    places: list[Place] = []
    notes: list[str] = []
    passed: list[str] = []
    for entry in given:
        root, there = _in_bucket(entry, notes) if is_address(entry) else (_existing(entry, field), None)
        if there is not None or root.is_dir():
            walk = _Walk(root, stills, there)
            if not walk.places:
                held = f"; it holds {_counted(walk.other)}" if walk.other else ""
                reasons = "".join(f"\n  {reason}" for reason in walk.left_out[:_MOST_NOTES])
                raise ConfigError(
                    f"data.{field}: the folder {root} holds no video file{held}. A file with another suffix can be "
                    f"named directly{reasons}"
                )
            places += walk.places
            notes += walk.notes()
        elif is_table(root, named=True):
            listed, more = _listed(read_table(root), root.parent)
            places += listed
            notes += more
            if not listed:
                raise ConfigError(f"data.{field}: of the videos that {root} lists none is there; {more[-1]}")
        elif root.suffix.lower() in captions.SUFFIXES:  # as from my_videos/* on the command line
            passed.append(root.name)
        elif root.suffix.lower() == ".tar":
            held, more = _in_tar(root, root.name, stills)
            places += held
            notes += more
            if not held:
                raise ConfigError(f"data.{field}: the tar file {root} holds no video; {'; '.join(more)}")
        else:
            places.append(_place(root, root.name, linked=_is_link(root)))
    if passed:
        notes.append(f"data.{field} names {count(len(passed), 'caption file')}, not taken as video: {some(passed)}")
        if not places:
            raise ConfigError(f"data.{field} names caption files only ({some(passed)}); name the videos")
    return places, notes


def some(names: Sequence[str], most: int = 3) -> str:
    """The first few of many."""
    return ", ".join(names[:most]) + ", ..." * (len(names) > most)


def count(number: int, thing: str) -> str:
    """`1 file`, `2 files`."""
    return f"{number:,} {thing}{'s' * (number != 1)}"


def _existing(entry: str, field: str) -> Path:
    root = Path(entry)
    try:
        root.stat()
    except FileNotFoundError:
        problem = "is a dangling link" if os.path.islink(root) else "does not exist"
        fix = f"; `python -m moc_jax.data.demo_clip {root}` fetches the demo's clip" if root == _DEMO else ""
        raise ConfigError(f"data.{field}: {root} {problem} (seen from {Path.cwd()}){fix}") from None
    except OSError as error:
        raise ConfigError(f"data.{field}: {named(entry)} cannot be read: {error.strerror}") from error
    if not (root.is_file() or root.is_dir()):
        raise ConfigError(f"data.{field}: {root} is neither a file nor a folder")
    return root.absolute()


def _in_bucket(address: str, notes: list[str]) -> tuple[Path, _Held | None]:
    """Where a file's or a folder's copy will lie, and what the folder holds. What tells of videos is fetched.

    Raises:
        CloudError: there is neither, or it can't be read.
    """
    root, found = copy_of(address), cloud.look(address)
    if found is None:
        held = _held(root, notes, deep=True)
        if not held:
            raise CloudError(f"{address} does not exist: there is neither an object nor a folder of that name")
        return root, held
    if _is_text(root) or root.suffix.lower() == ".tar":
        notes += changes([BucketFile.of(found)])
        fetch([BucketFile.of(found)], f"fetching {address}")
        return root, None
    return _held(root.parent, notes, deep=False)[root], None


def _held(folder: Path, notes: list[str], *, deep: bool) -> _Held:
    """What lies in a folder in a bucket; its texts, and `deep` its tar files, are fetched."""

    def wanted(path: Path) -> bool:
        return _is_text(path) or (deep and path.suffix.lower() == ".tar")

    found, other = pull(folder, wanted, deep=deep, notes=notes), captions.mirror(folder)
    if other is not None and address_of(other).split("/")[:3] == address_of(folder).split("/")[:3]:  # of one bucket
        pull(other, _is_text, deep=deep, notes=notes)
    return found


def _is_text(path: Path) -> bool:
    return path.suffix.lower() in TABLES or path.suffix.lower() in captions.SUFFIXES


def _place(path: Path, name: str, *, linked: bool) -> Place:
    if isinstance(path, BucketFile):
        return Place(path=path, name=name, identity=path.object.address, linked=False)
    status = path.stat()
    # Numbers of inodes serve for hard links alone: some network file systems make them up.
    hard_linked = status.st_nlink > 1 and status.st_ino
    identity = (status.st_dev, status.st_ino) if hard_linked else os.path.realpath(path)
    return Place(path=path, name=name, identity=identity, linked=linked)


def _is_link(path: Path) -> bool:
    return not isinstance(path, BucketFile) and path.is_symlink()


def _listed(table: Table, folder: Path) -> tuple[list[Place], list[str]]:
    """The videos that a table names, from its folder on, and notes on those that are not there."""
    places, missing, notes = [], [], list(table.notes)
    held = functools.cache(lambda folder: _held(folder, notes, deep=False))
    for media, row in table.rows:
        path = folder / media
        try:
            path = copy_of(media) if media.startswith(cloud.SCHEME) else path
            if address_of(path):
                path = held(Path(os.path.normpath(path.parent))).get(Path(os.path.normpath(path)), path)
            if not (isinstance(path, BucketFile) or path.is_file()):
                raise OSError(0, "there is no such file")
            name = path.relative_to(folder).as_posix() if path.is_relative_to(folder) else name_of(path)
            places.append(dataclasses.replace(_place(path, name, linked=_is_link(path)), row=row))
        except (OSError, ValueError) as error:
            missing.append(f"{row.where}: {path} cannot be read ({getattr(error, 'strerror', error)})")
    left = [f"and {len(missing) - _MOST_NOTES:,} more of its videos"] * (len(missing) > _MOST_NOTES)
    return places, [*notes, *missing[:_MOST_NOTES], *left]


def _in_tar(tar: Path, name: str, stills: bool) -> tuple[list[Place], list[str]]:
    """The videos in a tar file, each with the texts that have its name up to the first dot, as webdataset has it."""
    groups: dict[str, list[TarMember]] = {}
    found: dict[str, TarMember] = {}  # of several of one name the last counts, as for tar itself
    other, notes, left_out = collections.Counter[str](), dict[str, None](), list[str]()
    try:
        for member in members(tar):
            suffix = member.suffix.lower()
            if suffix in SUFFIXES or (stills and suffix in STILLS):
                found[os.fspath(member)] = member
            elif suffix in (".txt", ".json"):
                groups.setdefault(_key(member), []).append(member)
            else:
                other[suffix or "without suffix"] += 1
    except OSError as error:
        left_out.append(f"{tar} cannot be read ({error.strerror})")
    places, problems, status = [], [], tar.stat()
    for member in found.values():
        try:
            row = _row_in_tar(groups.get(_key(member), []), notes)
        except DocumentError as error:
            problems.append(f"{member}: {error}")
            continue
        inner = member.relative_to(tar).as_posix()
        identity = (status.st_dev, status.st_ino or os.path.realpath(tar), member.begin)
        places.append(Place(path=member, name=f"{name}/{inner}", identity=identity, linked=tar.is_symlink(), row=row))
    if problems:
        raise captions.CaptionError("\n".join(problems[:_MOST_NOTES]))
    if other:
        left_out.append(f"{tar}: {count(other.total(), 'other file')} not taken as video: {_counted(other)}")
    return places, [*left_out, *(f"{tar}: {note}" for note in notes)]


def _key(member: TarMember) -> str:
    return os.fspath(member.parent / member.name.partition(".")[0])


def _row_in_tar(texts: Sequence[TarMember], notes: dict[str, None]) -> Row | None:
    values: dict[str, object] = {}
    for member in texts:
        if member.size > MAX_BYTES:
            raise DocumentError(f"{member.name} has {member.size:,} bytes; the limit is {MAX_BYTES:,}")
        with member.bytes() as file:
            text = decode_text(file.read())
        content = parse_json(text, deepest=MAX_DEPTH) if member.suffix.lower() == ".json" else {"caption": text}
        if not isinstance(content, dict):
            raise DocumentError(f"{member.name} holds {shown(content)}; it must be an object")
        values = content | values if member.suffix.lower() == ".json" else values | content
    return row_of(values, texts[0], None, notes) if texts else Row.silent()


class _Walk:
    """All that lies below a folder.

    Links to folders are followed last, so that what has a place of its own is found there; each folder is walked once,
    which ends loops of links.
    """

    def __init__(self, root: Path, stills: bool, held: _Held | None):
        """`stills`: whether pictures are taken, too; `held`: what lies there in a bucket; None: look in the folder."""
        self._suffixes = SUFFIXES | STILLS if stills else SUFFIXES
        self._stills, self._notes = stills, list[str]()
        self._tables: list[Path] = []
        self._tars: list[Path] = []
        self.places: list[Place] = []
        self.other: collections.Counter[str] = collections.Counter()
        self.left_out: list[str] = []
        self._root, self._captions = root, list[Path]()
        self._seen: set[tuple[int, int]] = set()
        self._folders: list[tuple[Path, bool]] = [(root, False)] if held is None else []
        self._links: collections.deque[Path] = collections.deque()
        while self._folders or self._links:
            folder, linked = self._folders.pop() if self._folders else (self._links.popleft(), True)
            self._list(folder, linked)
        for path, file in sorted((held or {}).items()):
            self._sort(file if path.suffix.lower() in self._suffixes else path, linked=False)
        for table in self._tables:
            self._take_table(table)
        for tar in self._tars:
            places, notes = _in_tar(tar, self._name(tar), stills)
            self.places += places
            self._notes += notes
        self.places.sort(key=lambda place: place.path)
        videos = {
            (folder, p.path.stem) for p in self.places for folder in (p.path.parent, captions.mirror(p.path.parent))
        }
        self._orphans = [self._name(path) for path in self._captions if (path.parent, path.stem) not in videos]
        self.other.update(Path(name).suffix.lower() for name in self._orphans)

    def notes(self) -> list[str]:
        """What was not taken."""
        notes = [f"{self._root}: {reason}" for reason in self.left_out[:_MOST_NOTES]]
        if len(self.left_out) > _MOST_NOTES:
            notes.append(f"{self._root}: and {len(self.left_out) - _MOST_NOTES:,} more of this kind")
        if self.other:
            total = count(self.other.total(), "other file")
            notes.append(f"{self._root}: {total} not taken as video: {_counted(self.other)}")
        if self._orphans:
            orphans = f"{count(len(self._orphans), 'caption file')}: {some(sorted(self._orphans))}"
            notes.append(f"{self._root}: no video has the name of {orphans}")
        if not self._stills and (pictures := sum(self.other[suffix] for suffix in STILLS)):
            notes.append(
                f"{self._root}: --data.stills True takes the {count(pictures, 'picture')}, as shots of a frame"
            )
        return [*notes, *self._notes]

    def _take_table(self, table: Path) -> None:
        """What it says about videos that were found, and those that it names besides."""
        listed, notes = _listed(read_table(table), table.parent)
        named = {place.path for place in listed}
        # What another table says stands beside it, as lines of one table do.
        self.places = [place for place in self.places if place.row or place.path not in named]
        self.places += [
            dataclasses.replace(place, name=self._name(place.path)) if place.path.is_relative_to(self._root) else place
            for place in listed
        ]
        self._notes += notes

    def _name(self, path: Path) -> str:
        return path.relative_to(self._root).as_posix()

    def _list(self, folder: Path, linked: bool) -> None:
        try:
            status = folder.stat()
            if (status.st_dev, status.st_ino) in self._seen:
                self.left_out.append(f"{self._name(folder)} leads to a folder that was searched already")
                return
            self._seen.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as entries:
                found = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            self.left_out.append(f"the folder {self._name(folder)} cannot be read ({error.strerror})")
            return
        for entry in found:
            try:
                self._take(folder / entry.name, entry, linked)
            except OSError as error:
                self.left_out.append(f"{self._name(folder / entry.name)} cannot be read ({error.strerror})")

    def _take(self, path: Path, entry: os.DirEntry, linked: bool) -> None:
        if entry.is_dir():
            if entry.is_symlink():
                self._links.append(path)
            else:
                self._folders.append((path, linked))
        elif not entry.is_file():
            self.left_out.append(f"{self._name(path)} is {'a dangling link' if entry.is_symlink() else 'not a file'}")
        else:
            self._sort(path, linked=linked or entry.is_symlink())

    def _sort(self, path: Path, *, linked: bool) -> None:
        suffix = path.suffix.lower()
        if path.name.startswith("."):
            self.other["hidden"] += 1
        elif is_table(path, named=False):
            self._tables.append(path)
        elif suffix == ".tar":
            self._tars.append(path)
        elif suffix in captions.SUFFIXES:
            self._captions.append(path)
        elif suffix in self._suffixes:
            self.places.append(_place(path, self._name(path), linked=linked))
        else:
            self.other[suffix or "without suffix"] += 1


def _counted(kinds: collections.Counter[str]) -> str:
    return ", ".join(f"{number:,} {kind}" for kind, number in kinds.most_common())
