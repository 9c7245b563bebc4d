"""Where a lock lies: a file that is looked at under the kernel's lock, or an object that is replaced on a condition.

Either way a turn reads the content first, and what it then writes replaces that content and nothing else.
"""

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from moc_jax import cloud
from moc_jax.config import ConfigError

_LONGEST = 1 << 16  # bytes; beyond it the file is not a lock


class Turn(Protocol):
    """A look at the lock, and a change of it."""

    content: bytes
    """Empty: there is none."""

    def put(self, content: bytes) -> None:
        """Replaces the content that was read; raises ChangedError if it is another by now."""
        ...

    def remove(self) -> None:
        """Removes what was read; errors of `put`."""
        ...


class ObjectTurn:
    """In a bucket: another one's change in between makes ours fail."""

    def __init__(self, address: str):
        """Reads it; raises CloudError."""
        self._address = address
        self.content, self._generation = cloud.read(address) or (b"", 0)

    def put(self, content: bytes) -> None:
        """See `Turn`."""
        try:
            self._generation = cloud.write(self._address, content, generation=self._generation)
        except cloud.ChangedError:  # perhaps by a first attempt of ours, whose answer was lost
            found = cloud.read(self._address)
            if found is None or found[0] != content:
                raise
            self._generation = found[1]

    def remove(self) -> None:
        """See `Turn`."""
        if self._generation:
            cloud.remove(self._address, generation=self._generation)


class FileTurn:
    """In a folder: nobody else looks at it meanwhile."""

    def __init__(self, path: Path, file: int):
        """Reads the open file."""
        self._path, self._file = path, file
        self.content = os.pread(file, _LONGEST, 0)

    def put(self, content: bytes) -> None:
        """See `Turn`."""
        os.pwrite(self._file, content, 0)
        os.ftruncate(self._file, len(content))

    def remove(self) -> None:
        """See `Turn`."""
        os.unlink(self._path)


@contextlib.contextmanager
def file_turn(path: Path, *, make: bool = True) -> Iterator[Turn]:
    """A turn at a file, which is made where there is none.

    Raises:
        ConfigError: something else than a file lies there, or another user's.
        OSError: it can't be read or written; FileNotFoundError if it is not to be made.
    """
    while True:
        file = _open(path, make)
        try:
            with contextlib.suppress(OSError):  # without locks of files, two starts within a moment are not noticed
                fcntl.flock(file, fcntl.LOCK_EX)
            if not _is_at(file, path):  # its holder removed it meanwhile
                continue
            yield FileTurn(path, file)
            return
        finally:
            os.close(file)


def _open(path: Path, make: bool) -> int:
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | (os.O_CREAT if make else 0)
    try:
        file = os.open(path, flags, 0o644)
    except OSError as error:
        kinds = {errno.ELOOP: "a link", errno.EISDIR: "a folder", errno.ENXIO: "not a file"}
        if error.errno in kinds:
            raise ConfigError(f"{path} is {kinds[error.errno]}, not a run's lock; move it away") from error
        if error.errno in (errno.EACCES, errno.EPERM):
            raise ConfigError(
                f"{path} cannot be opened: another user's run made it. Let that run end, or give another folder"
            ) from error
        raise
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise ConfigError(f"{path} is not a file, so it is not a run's lock; move it away")
    return file


def _is_at(file: int, path: Path) -> bool:
    try:
        there = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(file), there)
