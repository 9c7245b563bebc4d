"""Where files lie: what a folder holds, links followed, with a word on everything that is not taken.

A file's *place* is the path by which it was reached: it decides name and captions. Its *identity* is the file behind
all links, and serves to find duplicates only.
"""

import collections
import dataclasses
import os
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path

from moc_jax.config import ConfigError
from moc_jax.data import captions
from moc_jax.showing import named

# Containers and streams that FFmpeg reads and that hold moving pictures. Still pictures are not among them.
_NAMES = """
264 265 266 3g2 3gp 3gpp amv apng apv asf avc avi avif avs2 avs3 bik cavs cdxl cine dav dif divx dnxhd dnxhr drc dv
dvd dvr-ms evc evo f4p f4v flc fli flm flv gif gxf h261 h263 h264 h265 h266 h26l hevc ifv imx insv ism isma ismv ivf ivr
kux lrv lxf m1v m2p m2t m2ts m2v m4v mj2 mjpeg mjpg mk3d mkv mlv mod moflex mov mp2v mp4 mp4v mpe mpeg mpegts mpg mpg2
mpg4 mpv mpv2 mqv mts mxf mxg nsv nut nuv obu ogg ogm ogv ogx psp pva qt r3d rcv rm rmvb roq rv ser smk svi swf thp tod
tp trp ts ty usm vc1 vc2 viv vob vro vvc webm webp wm wmv wtv xmv xvid y4m
"""
SUFFIXES = frozenset(f".{name}" for name in _NAMES.split())
_MOST_NOTES = 50  # of one kind, per folder
_DEMO = Path("cache/demo")  # where the config `demo` looks for its clip


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


def find_places(given: Iterable[str], field: str) -> tuple[list[Place], list[str]]:
    """The video files of files and folders, in the order given and by name, and notes on what was not taken.

    Raises:
        ConfigError: an entry that does not exist or cannot be read, or a folder without a video; names `data.field`.
    """
    places: list[Place] = []
    notes: list[str] = []
    passed: list[str] = []
    for entry in given:
        root = _existing(entry, field)
        if root.is_dir():
            walk = _Walk(root)
            if not walk.places:
                held = f"; it holds {_counted(walk.other)}" if walk.other else ""
                reasons = "".join(f"\n  {reason}" for reason in walk.left_out[:_MOST_NOTES])
                raise ConfigError(
                    f"data.{field}: the folder {root} holds no video file{held}. A file with another suffix can be "
                    f"named directly{reasons}"
                )
            places += walk.places
            notes += walk.notes()
        elif root.suffix.lower() in captions.SUFFIXES:  # as from my_videos/* on the command line
            passed.append(root.name)
        else:
            places.append(_place(root, root.name, linked=root.is_symlink()))
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


def _place(path: Path, name: str, *, linked: bool) -> Place:
    status = path.stat()
    # Numbers of inodes serve for hard links alone: some network file systems make them up.
    hard_linked = status.st_nlink > 1 and status.st_ino
    identity = (status.st_dev, status.st_ino) if hard_linked else os.path.realpath(path)
    return Place(path=path, name=name, identity=identity, linked=linked)


class _Walk:
    """All that lies below a folder.

    Links to folders are followed last, so that what has a place of its own is found there; each folder is walked once,
    which ends loops of links.
    """

    def __init__(self, root: Path):
        self.places: list[Place] = []
        self.other: collections.Counter[str] = collections.Counter()
        self.left_out: list[str] = []
        self._root, self._captions = root, list[Path]()
        self._seen: set[tuple[int, int]] = set()
        self._folders: list[tuple[Path, bool]] = [(root, False)]
        self._links: collections.deque[Path] = collections.deque()
        while self._folders or self._links:
            folder, linked = self._folders.pop() if self._folders else (self._links.popleft(), True)
            self._list(folder, linked)
        self.places.sort(key=lambda place: place.path)
        videos = {(place.path.parent, place.path.stem) for place in self.places}
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
        return notes

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
        suffix = path.suffix.lower()
        if entry.is_dir():
            if entry.is_symlink():
                self._links.append(path)
            else:
                self._folders.append((path, linked))
        elif not entry.is_file():
            self.left_out.append(f"{self._name(path)} is {'a dangling link' if entry.is_symlink() else 'not a file'}")
        elif path.name.startswith("."):
            self.other["hidden"] += 1
        elif suffix in captions.SUFFIXES:
            self._captions.append(path)
        elif suffix in SUFFIXES:
            self.places.append(_place(path, self._name(path), linked=linked or entry.is_symlink()))
        else:
            self.other[suffix or "without suffix"] += 1


def _counted(kinds: collections.Counter[str]) -> str:
    return ", ".join(f"{number:,} {kind}" for kind, number in kinds.most_common())
