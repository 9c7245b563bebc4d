"""Videos inside of tar files, as webdataset lays them out: they are read where they lie, never unpacked."""

import io
import os
import tarfile
from collections.abc import Buffer, Iterable, Iterator
from pathlib import Path, PosixPath

from moc_jax.data.copies import BucketFile


class TarMember(PosixPath):
    """A file in a tar file: a span of its bytes. Its path is that of the tar file with the member's name below it."""

    tar: Path
    begin: int
    """Where its first byte lies in the tar file."""
    size: int

    @classmethod
    def of(cls, tar: Path, name: str, begin: int, size: int) -> "TarMember":
        """The member of a tar file."""
        member = cls(tar, name)
        member.tar, member.begin, member.size = tar, begin, size
        return member

    def with_segments(self, *segments: str | os.PathLike[str]) -> Path:  # pyrefly: ignore[bad-override]
        """Its parent and the like are plain paths."""
        return Path(*segments)

    def __reduce__(self) -> tuple:
        return TarMember.of, (self.tar, os.fspath(self.relative_to(self.tar)), self.begin, self.size)

    def bytes(self) -> io.BufferedReader:
        """Its content."""
        return io.BufferedReader(_Span(self))


class _Span(io.RawIOBase):
    """Part of a file."""

    def __init__(self, member: TarMember):
        self._file = member.tar.open("rb")
        self._begin, self._size, self._at = member.begin, member.size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        self._at = max(0, start + offset)
        return self._at

    def readinto(self, buffer: Buffer, /) -> int:
        view = memoryview(buffer)
        self._file.seek(self._begin + self._at)
        content = self._file.read(max(0, min(len(view), self._size - self._at)))
        view[: len(content)] = content
        self._at += len(content)
        return len(content)

    def close(self) -> None:
        self._file.close()
        super().close()


def open_bytes(path: Path) -> io.BufferedReader:
    """The content of a file, or of a tar file's member; raises OSError."""
    return path.bytes() if isinstance(path, TarMember) else path.open("rb")


def read_spans(path: Path, spans: Iterable[tuple[int, int]]) -> list[bytes]:
    """(begin, bytes) of each; what lies in a bucket need not be fetched for it. Raises OSError or CloudError."""
    if isinstance(path, BucketFile):
        return path.read_spans(spans)
    with open_bytes(path) as file:
        return [file.read(size) for begin, size in spans if file.seek(begin) == begin]


def size_of(path: Path) -> int:
    """Its bytes; raises OSError."""
    if isinstance(path, BucketFile):
        return path.object.size
    return path.size if isinstance(path, TarMember) else path.stat().st_size


def address(path: str | os.PathLike) -> str:
    """What FFmpeg opens; what lies in a bucket is fetched, which raises CloudError or OSError."""
    if isinstance(path, TarMember):
        return f"subfile,,start,{path.begin},end,{path.begin + path.size},,:file:{path.tar}"
    if isinstance(path, BucketFile):
        path = path.local()
    return f"file:{os.fspath(path)}"  # a name may hold a colon, as addresses do


def members(tar: Path) -> Iterator[TarMember]:
    """The files in a tar file, in its order.

    Raises:
        OSError: it cannot be read, is cut off, or is compressed.
    """
    with tar.open("rb") as file:
        if file.read(2) == b"\x1f\x8b":
            raise OSError(0, "it is compressed, so nothing in it can be read by itself; unpack it with gunzip")
        file.seek(0)
        try:
            with tarfile.open(fileobj=file, mode="r:") as archive:
                for info in archive:
                    if info.isreg():
                        yield TarMember.of(tar, info.name.removeprefix("./").lstrip("/"), info.offset_data, info.size)
        except tarfile.TarError as error:
            raise OSError(0, f"it is not a whole tar file: {error}") from error
