"""Files that appear whole or not at all, and places that are proven to be writable before any work."""

import contextlib
import errno
import fcntl
import itertools
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from moc_jax.config import ConfigError
from moc_jax.errors import Failure
from moc_jax.showing import named

_PARTIAL = re.compile(r"\.(?P<name>.+)\.(?P<pid>\d{1,10})\.tmp", re.DOTALL)
_PARTIAL_FOLDER = ".partial"
_WRONG_SCHEME = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+:/(?!/)")  # one slash is missing; "C:/" is a Windows drive

_FIXES = {
    errno.EROFS: "the file system is read-only; give a path on another one",
    errno.EACCES: "this user may not write there; change its permissions, or give another path",
    errno.EPERM: "this user may not write there; change its permissions, or give another path",
    errno.ENOSPC: "the disk is full; free some space, or give a path on another one",
    errno.EDQUOT: "the disk quota is used up; free some space, or give a path on another one",
    errno.ENAMETOOLONG: "a name in it is too long for the file system; give a shorter one",
    errno.ELOOP: "its links lead nowhere; give another path",
}


def is_address(path: str | os.PathLike) -> bool:
    """Whether `path` is a bucket's address (gs://bucket/run), not a path of a file system."""
    return "://" in os.fspath(path)


def identity(path: Path) -> tuple[int | str, ...]:
    """Equal for paths of one file, there or not: through links, and in other letters where the folder ignores case."""
    path = Path(os.path.realpath(path))
    there = next(place for place in (path, *path.parents) if place.exists())
    other, new = there.with_name(there.name.swapcase()) if there.name else there, path.relative_to(there).parts
    ignored = other.name != there.name and other.exists() and other.samefile(there)
    return there.stat().st_dev, there.stat().st_ino, *(map(str.casefold, new) if ignored else new)


# ------------------------------------------------------------------------------------------------ whole files


class TakenError(Failure):
    """A file that was to be new found its name taken: says where it lies instead."""


@contextlib.contextmanager
def whole_file(path: str | os.PathLike, *, lasting: bool = True, replace: bool = True) -> Iterator[Path]:
    """Where to write what will be at `path`: it appears there when the block succeeds; else nothing is left.

    A local file is written as `.<name>.<process>.tmp` in its own folder; for an address it is made on the local disk
    and copied. What a killed process leaves is removed by `remove_leftovers`.

    Args:
        path: of the finished file.
        lasting: also after a power failure; False: who reads it finds that out by a checksum, and makes it again.
        replace: what lies at `path` by then; False (not for addresses): the file is kept beside it, and TakenError says
            so.

    Raises:
        OSError: the folder or the file cannot be made.
        TakenError: see `replace`.
    """
    if is_address(path):
        with _copied_to(epath.Path(path)) as partial:
            yield partial
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(path)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(_locked(partial))
            yield partial
            if lasting:
                _flush(partial)
            if replace:
                os.replace(partial, path)
            else:
                _place(partial, path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                partial.unlink()


def _place(partial: Path, path: Path) -> None:
    """Gives a finished file its name, or where that is taken another one: <name>-2, and so on."""
    others = (path.with_stem(f"{path.stem}-{number}") for number in itertools.count(2))
    place = next(name for name in itertools.chain([path], others) if _is_placed(partial, name))
    if place != path:
        raise TakenError(
            f"{named(path)} was written by another process meanwhile, and stays; this one is {named(place)}"
        )


def _is_placed(partial: Path, path: Path) -> bool:
    """Whether the file has the name now; False: it is taken."""
    try:
        os.link(partial, path)
    except FileExistsError:
        return False
    except OSError:  # not every file system has links
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        os.replace(partial, path)
    return True


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Where to make what will be the folder `path`: it appears there when the block succeeds; else nothing is left.

    It is made as `.<name>.partial` beside it, in place of what a killed process left of the same folder. A locked file,
    `.<name>.<process>.tmp`, tells other processes that it is being made.

    Raises:
        ConfigError: another process is making it.
        OSError: the folder, or a file in it, cannot be made.
    """
    partial, mark = path.with_name(f".{path.name}{_PARTIAL_FOLDER}"), _partial(path)
    remove_leftovers(path.parent, path.name)
    try:
        with _locked(mark):
            _check_alone(path)
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            try:
                yield partial
                for file in filter(Path.is_file, partial.rglob("*")):
                    _flush(file)
                partial.rename(path)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    finally:
        mark.unlink(missing_ok=True)


def remove_partial_folders(parent: Path, names: str) -> None:
    """Removes what killed processes left of a `whole_folder` in `parent`, where nobody may be making one.

    Args:
        names: a pattern, as of a shell, of the finished folders' names: others' folders may lie there, too.
    """
    for leftover in parent.glob(f".{names}{_PARTIAL_FOLDER}"):
        shutil.rmtree(leftover, ignore_errors=True)
        remove_leftovers(parent, leftover.name[1:].removesuffix(_PARTIAL_FOLDER))


def _check_alone(folder: Path) -> None:
    """Raises ConfigError: another process is making the folder."""
    for name in sorted(os.listdir(folder.parent)) if folder.parent.is_dir() else ():
        found = _PARTIAL.fullmatch(name)
        if found and found["name"] == folder.name and name != _partial(folder).name:
            raise ConfigError(
                f"{named(folder)} is being written by process {found['pid']}; wait for it, or give another name (if it "
                f"writes no more, remove {name} beside the folder)"
            )


def _flush(path: Path) -> None:
    """To the disk: a file that took its name before its content would be half-written after a power failure."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


@contextlib.contextmanager
def _copied_to(path: epath.Path) -> Iterator[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder, path.name)
        yield made
        epath.Path(made).copy(path.parent / f".{path.name}.part", overwrite=True).replace(path)


def write_text(path: str | os.PathLike, text: str, *, replace: bool = True) -> None:
    """All of it or nothing, as `whole_file`; raises OSError, TakenError."""
    with whole_file(path, replace=replace) as partial:
        partial.write_text(text, encoding="utf-8")


def remove_leftovers(folder: Path, name: str = "") -> list[str]:
    """Removes the unfinished files that dead processes of this program left in `folder`; returns their names.

    Args:
        folder: need not exist.
        name: of the finished file; empty: any.
    """
    removed = []
    for entry in sorted(os.scandir(folder), key=lambda e: e.name) if folder.is_dir() else ():
        found = _PARTIAL.fullmatch(entry.name)
        if not found or (name and found["name"] != name) or not entry.is_file(follow_symlinks=False):
            continue
        with contextlib.suppress(OSError):  # it stays; whatever is wrong there is reported when something is written
            if not _in_use(Path(entry.path), int(found["pid"])):
                os.unlink(entry.path)
                removed.append(entry.name)
    return removed


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


@contextlib.contextmanager
def _locked(partial: Path) -> Iterator[None]:
    """Holds a lock that ends with the process, so that others see that `partial` is being written."""
    file = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        with contextlib.suppress(OSError):  # not every file system has locks
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(file)


def _in_use(partial: Path, pid: int) -> bool:
    """Whether its writer may still live: here, or (another container, another host) where its lock is seen here."""
    if pid != os.getpid() and _exists(pid):
        return True
    file = os.open(partial, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        return is_locked(file)
    finally:
        os.close(file)


def is_locked(file: int) -> bool:
    """Whether another process holds a lock on an open file; where a file system has no locks, no."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return pid > 0


# ------------------------------------------------------------------------------------------------ proofs


def prove_folder(folder: str | os.PathLike, *, setting: str) -> None:
    """Makes the folder, and writes and removes a small file in it: what fails then fails before any work.

    Args:
        folder: a path or an address.
        setting: what the user gave it by, such as `workdir` or `--out`.

    Raises:
        ConfigError: it names the folder, the cause and the fix.
    """
    text = os.fspath(folder)
    _check_spelling(text, setting)
    probe = f".probe.{os.getpid()}.tmp"
    try:
        if is_address(text):
            place = epath.Path(text)
            place.mkdir(parents=True, exist_ok=True)
            (place / probe).write_text("probe")
            (place / probe).unlink()
        else:
            os.makedirs(text, exist_ok=True)
            _write_probe(Path(text, probe))
    except Exception as error:  # an address asks for packages, credentials and networks: anything may be raised
        raise ConfigError(f"{setting} {named(text)} cannot be written: {cause(error, text)}") from error


def prove_file(path: Path, *, setting: str) -> None:
    """The same for a file that is to be written: its folder, its name, and what lies there already.

    Folders that are made for the proof are removed again.
    """
    if _WRONG_SCHEME.match(os.fspath(path)):
        raise ConfigError(f"{setting} {named(path)} is an address; give a path of a file system")
    _check_spelling(os.fspath(path), setting)
    made = [folder for folder in path.absolute().parents if not os.path.lexists(folder)]
    try:
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder")
        os.makedirs(path.parent, exist_ok=True)
        remove_leftovers(path.parent, path.name)
        _write_probe(_partial(path))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{setting} {named(path)} cannot be written: {cause(error, os.fspath(path))}") from error
    finally:
        for folder in made:  # the deepest first
            with contextlib.suppress(OSError):
                folder.rmdir()


def prove_new_folder(folder: Path, *, setting: str, size: int = 0) -> None:
    """The same for a folder that is to be made as a `whole_folder`, and is not there yet.

    Args:
        size: bytes that it will hold, for which there must be room.
    """
    if os.path.lexists(folder):
        raise ConfigError(f"{setting} {named(folder)} exists; give the name of a new folder")
    prove_file(folder, setting=setting)
    _check_alone(folder)
    free = shutil.disk_usage(next(place for place in folder.absolute().parents if place.exists())).free
    if size > free:
        raise ConfigError(
            f"{setting} {named(folder)} will hold {size:,} bytes, but {free:,} are free there; free some space, or "
            "give a path on another disk"
        )


def _check_spelling(text: str, setting: str) -> None:
    if not text.strip():
        raise ConfigError(f"{setting} is empty; give a path")
    if "\0" in text:
        raise ConfigError(f"{setting} {named(text)} holds a NUL character, which no path can contain; give another")
    if _WRONG_SCHEME.match(text):
        raise ConfigError(f"{setting} {named(text)} lacks a slash; an address begins with {text.split(':')[0]}://")


def _write_probe(probe: Path) -> None:
    """Content too: on a full disk an empty file can still be made."""
    file = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o666)
    try:
        os.write(file, b"probe" * 1000)
        os.fsync(file)
    finally:
        os.close(file)
        os.unlink(probe)


def cause(error: Exception, text: str) -> str:
    """Why a path or an address cannot be written, and what to do, as the end of a message."""
    if is_address(text):
        if isinstance(error, KeyError):
            return f"addresses that begin with {text.split('://')[0]}:// are not known; give one of gs://, or a path"
        if isinstance(error, ImportError):
            return f"{error}. Install what buckets need, pip install 'moc_jax[gcs]', or give a path of a file system"
        return f"{error or type(error).__name__}. Check the address and your access to it"
    if isinstance(error, (FileExistsError, NotADirectoryError)):
        return f"{_in_the_way(text)} is a file; give another name"
    if isinstance(error, IsADirectoryError):
        return "it is a folder; give another name"
    known = _FIXES.get(error.errno or 0) if isinstance(error, OSError) else None
    return known or f"{getattr(error, 'strerror', None) or error}; give another path"


def _in_the_way(text: str) -> str:
    for path in reversed([Path(text).absolute(), *Path(text).absolute().parents]):
        if os.path.lexists(path) and not path.is_dir():
            return str(path)
    return text
