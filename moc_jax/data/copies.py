"""Copies on the local disk of what lies in a bucket: gs://bucket/name is `gs/bucket/name` in the user's cache.

The mark of a copy that agrees with the bucket is that nobody can write it; its time of change is the object's
generation. So it is known what was changed or removed there, and what was made here and is still to be sent. What can
be fetched again one by one (videos, shards) is removed by itself, the longest unused first, where the disk is full.
"""

import concurrent.futures
import contextlib
import os
import secrets
import shutil
import stat
import threading
import time
from collections.abc import Callable, Collection, Iterable
from pathlib import Path, PosixPath

from moc_jax import cloud
from moc_jax.cloud import ChangedError, CloudError, CloudObject
from moc_jax.config.base import user_cache
from moc_jax.files import is_address, whole_file
from moc_jax.progress import Progress

_KEPT, _LOOSE = 0o444, 0o400  # modes of copies: of those that stay, and of those that are removed where space is short
_THREADS = 16  # of requests at once: a small object takes some 50 ms, whatever the line
_FREE = 0.05  # of the disk stays free


class BucketFile(PosixPath):
    """A file in a bucket: its path is where its copy lies, or will lie once it is needed."""

    object: CloudObject

    @classmethod
    def of(cls, found: CloudObject) -> "BucketFile":
        """The file of an object."""
        file = cls(copy_of(found.address))
        file.object = found
        return file

    def with_segments(self, *segments: str | os.PathLike[str]) -> Path:  # pyrefly: ignore[bad-override]
        """Its parent and the like are plain paths."""
        return Path(*segments)

    def __reduce__(self) -> tuple:
        return BucketFile.of, (self.object,)

    def local(self) -> Path:
        """The copy, fetched unless it is there; raises CloudError or OSError."""
        _fetch(Path(self), self.object, _LOOSE)
        return Path(self)

    def read_spans(self, spans: Iterable[tuple[int, int]]) -> list[bytes]:
        """(begin, bytes) of each, from the copy or else from the bucket; errors of `local`."""
        if not _agrees(Path(self), self.object):
            return [cloud.read_span(self.object, *span) for span in spans]
        with self.open("rb") as file:
            return [os.pread(file.fileno(), size, begin) for begin, size in spans]


def copy_of(address: str) -> Path:
    """Where the copy of an address lies.

    Raises:
        CloudError: its name can't be a path's.
    """
    parts = address.removeprefix(cloud.SCHEME).rstrip("/").split("/")
    if not all(part not in ("", ".", "..") and "\0" not in part for part in parts):
        raise CloudError(f"{address!r} has a part that no path can have; give it another name")
    return _root().joinpath(*parts)


def address_of(path: Path) -> str:
    """The address that a path holds the copy of; empty for any other path."""
    try:
        text, root = os.fspath(path), f"{_root()}{os.sep}"
    except RuntimeError:  # without a home there is no user's cache
        return ""
    return cloud.SCHEME + text.removeprefix(root) if text.startswith(root) else ""


def name_of(path: Path) -> str:
    """What a file is called on every host: its path, or the address that it is the copy of."""
    return address_of(path) or path.as_posix()


def place_of(text: str) -> Path:
    """The folder that a setting names: a path, or the copy of an address; raises CloudError."""
    return copy_of(text) if is_address(text) else Path(text)


def _root() -> Path:
    return user_cache() / "gs"


# ------------------------------------------------------------------------------------------------ folders


def pull(
    folder: Path, wanted: Callable[[Path], bool] = lambda _: True, *, deep: bool = True, notes: list[str] | None = None
) -> dict[Path, BucketFile]:
    """Makes a folder's copy agree with the bucket: what is wanted is fetched, what was removed there is removed here.

    Args:
        folder: the copy of an address; for any other path nothing happens.
        wanted: which copies are needed now.
        deep: the folders in it, too.
        notes: gets a line on those that are others in the bucket than their copies here.

    Returns:
        All that lies there in the bucket, by its path.

    Raises:
        CloudError: the bucket can't be read.
        OSError: nothing can be written here.
    """
    if not (address := address_of(folder)):
        return {}
    here = [path for path in (folder.rglob("*") if deep else folder.glob("*")) if is_sent(path)]
    found = files_of(cloud.below(address, deep=deep))  # later than `here`: what another process just sent is in it
    for path in here:
        if path not in found:
            path.unlink(missing_ok=True)
    if notes is not None:
        notes += changes(found.values())
    fetch([file for path, file in found.items() if wanted(path)], f"fetching {address}")
    return found


def sync(folder: Path, *, last: str = "") -> None:
    """`pull`, then sends what only this host has: the file called `last` at the end, and none that are hidden."""
    if address_of(folder):
        found = pull(folder)
        mine = [path for path in folder.glob("[!.]*") if path.is_file() and path not in found]
        for path in sorted(mine, key=lambda path: path.name == last):
            send(path)


def files_of(objects: Iterable[CloudObject]) -> dict[Path, BucketFile]:
    """By their paths; those whose names no path can have are left out."""
    files = {}
    for found in objects:
        with contextlib.suppress(CloudError):
            file = BucketFile.of(found)
            files[Path(file)] = file
    return files


def fetch(files: Collection[BucketFile], what: str) -> None:
    """Fetches those that are not here, several at once, to stay; errors of `pull`."""
    left = [file for file in files if not _agrees(Path(file), file.object)]
    if not left:
        return
    pool = concurrent.futures.ThreadPoolExecutor(_THREADS)
    with Progress(what, total=len(left), unit="file", keep=False) as progress:
        try:
            running = [pool.submit(_fetch, Path(file), file.object, _KEPT) for file in left]
            for done, future in enumerate(concurrent.futures.as_completed(running), 1):
                future.result()
                progress.reach(done)
        finally:
            pool.shutdown(cancel_futures=True)


def side_by_side[T, R](action: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """`action` of each item, several at once."""
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(action, items))


def changes(files: Iterable[BucketFile]) -> list[str]:
    """A note on those that have another content than when they were fetched."""
    others = [f.object.address for f in files if Path(f).exists() and not _agrees(Path(f), f.object)]
    more = f" and {len(others) - 3:,} more" if len(others) > 3 else ""
    return [f"changed in the bucket, and fetched again: {', '.join(others[:3])}{more}"] if others else []


# ------------------------------------------------------------------------------------------------ single files


def fetched(path: Path, size: int) -> bool:
    """Makes a file of `size` bytes be here, if it is a copy; whether it had to be fetched.

    Raises:
        CloudError, OSError: see `pull`.
    """
    if not (address := address_of(path)):
        return False
    try:
        status = path.stat()
        if status.st_size == size:
            os.utime(path, ns=(time.time_ns(), status.st_mtime_ns))  # when it was last used
            return False
    except FileNotFoundError:
        pass
    found = cloud.look(address)
    if found is None:
        raise CloudError(f"{address} does not exist")
    _fetch(path, found, _LOOSE)
    return True


def send(path: Path, *, loose: bool = False, create: bool = False) -> None:
    """Puts a file where it is the copy of; nothing for any other path.

    Args:
        path: what was made here, complete.
        loose: whether it may be removed here where space is short.
        create: only if there is none yet.

    Raises:
        ChangedError: there is one.
        CloudError: the bucket can't be written.
    """
    if address := address_of(path):
        sent = cloud.upload(path, address, generation=0 if create else None)
        _mark(path, sent, _LOOSE if loose else _KEPT)


def prove(folder: Path) -> None:
    """Writes and removes a small object where a folder is the copy of, as `prove_folder`; raises CloudError."""
    address = f"{address_of(folder)}/.probe-{secrets.token_hex(8)}"
    cloud.write(address, b"probe")
    cloud.remove(address)


def remove(path: Path) -> None:
    """Removes a file here, and where it is the copy of."""
    path.unlink(missing_ok=True)
    if (address := address_of(path)) and cloud.look(address):
        cloud.remove(address)


def is_sent(path: Path) -> bool:
    """Whether it is a file that came from the bucket, or was sent there."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return False
    return stat.S_ISREG(mode) and not mode & 0o200


_locks: dict[Path, threading.Lock] = {}


def _fetch(path: Path, found: CloudObject, mode: int) -> None:
    with _locks.setdefault(path, threading.Lock()):
        if _agrees(path, found):
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        _free(path.parent, found.size)
        try:
            with whole_file(path) as partial:
                cloud.download(found, partial)
                _mark(partial, found, mode)
        except ChangedError as error:
            raise CloudError(f"{error}: run the same command again") from error


def _mark(path: Path, found: CloudObject, mode: int) -> None:
    os.utime(path, ns=(time.time_ns(), _stamp(found)))
    path.chmod(mode)


def _agrees(path: Path, found: CloudObject) -> bool:
    try:
        status = path.stat()
    except FileNotFoundError:
        return False
    return (status.st_size, status.st_mtime_ns) == (found.size, _stamp(found))


def _stamp(found: CloudObject) -> int:
    """Generations are microseconds today; any number is a time."""
    return found.generation * 1000 % (1 << 62)


def _free(folder: Path, size: int) -> None:
    """Removes loose copies, the longest unused first, until there is space for so many bytes."""
    disk = shutil.disk_usage(folder)
    lacking = size + _FREE * disk.total - disk.free
    if lacking <= 0:
        return
    loose = [(file.stat(), file) for file in _root().rglob("*") if file.is_file() and not file.is_symlink()]
    for status, file in sorted(loose, key=lambda found: found[0].st_atime_ns):
        if status.st_mode & 0o777 == _LOOSE and lacking > -_FREE * disk.total:  # some more, since looking takes time
            file.unlink(missing_ok=True)
            lacking -= status.st_size


class Ahead[T]:
    """Does in the background what will be needed next; what fails there fails again where it is needed."""

    def __init__(self, action: Callable[[T], object], threads: int):
        self._action, self._threads = action, threads
        self._pool: concurrent.futures.ThreadPoolExecutor | None = None
        self._begun: dict[T, concurrent.futures.Future] = {}

    def want(self, items: Iterable[T]) -> None:
        """Begins with those that were not wanted before; those that are not wanted any more, and wait, are left."""
        wanted = dict.fromkeys(items)
        for item in [item for item in self._begun if item not in wanted]:
            self._begun.pop(item).cancel()
        for item in wanted:
            if item not in self._begun:
                self._pool = self._pool or concurrent.futures.ThreadPoolExecutor(self._threads)
                self._begun[item] = self._pool.submit(self._action, item)

    def close(self) -> None:
        """What waits is left, what was begun is waited for."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        self._pool, self._begun = None, {}
