"""What videos were encoded to, by what is in them: so nothing is encoded twice, and what is damaged is again.

    encoded/<2 digits>/<key>.array_record   the parts of a video's shots, one record each
                       <key>.json           what is in it; with this file the entry is complete
                       <key>.claim          a process is at work on it
    waiting/<key>.frames, .json, .claim     frames that wait for a codec that is still to be fitted
            <key>.npz, .claim               what that codec needs of some of them
    codecs/<key>-<number>.npz               codecs that were fitted, by their settings; the highest number counts
    <fingerprint>/                          a run's data: whose shots its scenes are, and their captions

Of a cache in a bucket all this is a copy (copies.py). What is complete is sent: a shard before its .json, a manifest
last. Claims and frames that wait are of this host alone; what two hosts make is the same.

A key is a hash of the video's bytes, of how it is cut and sized, and of the codec. Names, captions and splits are not
in it: they belong to the run.
"""

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from moc_jax.cloud import ChangedError
from moc_jax.codecs import Codec, load_codec
from moc_jax.config import CodecConfig, Config
from moc_jax.data.copies import pull, send, sync
from moc_jax.data.filters import Look
from moc_jax.data.manifest import ENCODED, DataError, ShardEntry, sha256
from moc_jax.data.parts import least_frames
from moc_jax.data.sources import Source
from moc_jax.data.typed_json import fields_of
from moc_jax.files import remove_leftovers, whole_file
from moc_jax.reading import parse_json

WAITING, CODECS = "waiting", "codecs"
_FORMAT = 2  # of keys and entries
_NO_LOCKS = errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL  # what a file system without them answers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """A shot, or a part of a long one, as it was encoded."""

    shot: int
    """Number of the shot in the video."""
    start: int
    """Its first frame in the video, at the rate of the data."""
    frames: int
    latent_frames: int
    look: Look


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """What one video was encoded to."""

    shots: tuple[int, ...]
    """Frames of each shot, used or not."""
    parts: tuple[Part, ...]
    """In the order of the shard's records."""
    psnr: tuple[float, ...]
    """Of the codec's reconstruction of the beginning of some parts, in dB."""
    notes: tuple[str, ...]
    skipped: str
    """Why there is none of it; empty if there is."""
    by: str
    """The decoder's version: another one may read what this one does not."""
    shard: ShardEntry


NO_SHARD = ShardEntry(file="", records=0, size=0, sha256="")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """What was found in a video whose frames wait."""

    shots: tuple[int, ...]
    notes: tuple[str, ...]
    skipped: str


class Cache:
    """The cache of a config; see the file's docstring."""

    def __init__(self, root: Path, cfg: Config):
        self.root = root
        data, stride, patch = cfg.data, cfg.codec.stride[0], cfg.model.patch[0]
        self._reading = [_FORMAT, data.height, data.width, data.fps]
        least = least_frames(data, stride=stride, patch=patch)
        self._parts = [least, data.max_shot_frames, patch, data.keyframes, *["starts"] * bool(cfg.condition_channels)]
        self._threshold = data.shot_threshold
        self._codec = cfg.codec
        self._fitted = key_of(self._reading, type(cfg.codec).__name__, dataclasses.asdict(cfg.codec))

    def waiting(self, source: Source) -> Path:
        """Where a video's frames wait for a codec; what was found in it lies beside them, as .json.

        Each codec and each way of cutting has its own: whoever is done with them removes them.
        """
        return self.root / WAITING / f"{key_of(self._key(source), self._parts, self._fitted)}.frames"

    def sums(self, clips: Iterable[tuple[Source, int, int]]) -> Path:
        """Where what a codec needs of clips lies; each is a video, a first frame of what waits of it, and frames."""
        key = key_of(*((self.waiting(source).stem, begin, frames) for source, begin, frames in clips))
        return self.root / WAITING / f"{key}.npz"

    def shard(self, source: Source, codec: Codec) -> Path:
        """Where what it is encoded to lies; what is in that lies beside it, as .json."""
        key = key_of(self._key(source), self._parts, source.still, codec.fingerprint)
        return self.root / ENCODED / key[:2] / f"{key}.array_record"

    def _key(self, source: Source) -> str:
        captions = source.captions
        if source.still:
            return key_of(self._reading, source.digest, self._parts)  # how long it is shown depends on them
        cuts = self._threshold if captions.cuts is None else (captions.cut_unit, captions.cuts)
        return key_of(self._reading, source.digest, cuts)

    def forget(self, files: Iterable[Path]) -> None:
        """Removes what waits there."""
        for file in files:
            for path in (file.with_suffix(".json"), file, file.with_suffix(".claim")):
                path.unlink(missing_ok=True)

    def clear(self) -> None:
        """Removes what dead processes left half-written."""
        for folder in (self.root / WAITING, self.root / CODECS, *(self.root / ENCODED).glob("??")):
            remove_leftovers(folder)

    def look(self) -> None:
        """Learns which codecs other hosts have sent, if it is the copy of a cache in a bucket."""
        sync(self.root / CODECS)

    def codec(self, *, after: int = -1) -> tuple[Codec, Path] | None:
        """The newest codec of these settings and its file, if its number is above `after`.

        Raises:
            DataError: it cannot be read.
        """
        number = self.newest_codec()
        if number <= after:
            return None
        file = self._codec_file(number)
        return read_codec(file, self._codec, "put it back, or fit another with --data.refit-codec True"), file

    def newest_codec(self) -> int:
        """Its number; -1 if there is none."""
        numbers = (file.stem.rpartition("-")[2] for file in self._codec_file(0).parent.glob(f"{self._fitted}-*.npz"))
        return max((int(number) for number in numbers if number.isdecimal()), default=-1)

    def keep_codec(self, codec: Codec) -> Codec:
        """From now on it is the newest, unless it is that already.

        Returns:
            The codec that counts: where another host was quicker to put one in the bucket, that.
        """
        number = self.newest_codec()
        if number >= 0:
            with contextlib.suppress(DataError):
                newest = self.codec()
                if newest is not None and newest[0].fingerprint == codec.fingerprint:
                    return codec
        file = self._codec_file(number + 1)
        write_codec(file, codec)
        try:
            send(file, create=True)
        except ChangedError:
            pull(file.parent)
            return read_codec(file, self._codec, "fit another with --data.refit-codec True")
        return codec

    def _codec_file(self, number: int) -> Path:
        return self.root / CODECS / f"{self._fitted}-{number}.npz"


def key_of(*parts: object) -> str:
    """A hash of what JSON can say."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


# ------------------------------------------------------------------------------------------------ records in JSON


def save_record(file: Path, record: Entry | Reading) -> None:
    """Beside `file`, as .json, with a digest of what it says; with it, what `file` holds is complete."""
    content = dataclasses.asdict(record)
    text = json.dumps({"sha256": _digest(content), **content})
    with whole_file(file.with_suffix(".json")) as partial:
        partial.write_text(text, encoding="utf-8")


def load_record[T: Entry | Reading](kind: type[T], file: Path) -> T | None:
    """What lies beside `file`; None if there is nothing that can be read."""
    try:
        content = parse_json(file.with_suffix(".json").read_bytes())
        if isinstance(content, dict) and content.pop("sha256", None) == _digest(content):
            return kind(**fields_of(kind, content))
    except (OSError, ValueError):
        pass
    return None


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def damage(file: Path, shard: ShardEntry, *, read: bool) -> str:
    """What is wrong with a shard; empty if nothing is. `read`: its content is compared with its digest, too."""
    if not shard.file:
        return ""
    try:
        size = file.stat().st_size
        if size != shard.size:
            return f"has {size} bytes instead of {shard.size}"
        return "has another SHA-256 than when it was written" if read and sha256(file) != shard.sha256 else ""
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


# ------------------------------------------------------------------------------------------------ codecs


def write_codec(file: Path, codec: Codec) -> None:
    """All of it or nothing."""
    with whole_file(file) as partial, partial.open("wb") as content:
        np.savez(content, allow_pickle=False, **codec.state())


def read_codec(file: Path, cfg: CodecConfig, remedy: str) -> Codec:
    """The codec in a file.

    Raises:
        DataError: it is missing or damaged; ends with `remedy`.
    """
    try:
        with file.open("rb") as content, np.load(content) as arrays:
            return load_codec(cfg, dict(arrays))
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        reason = error.strerror if isinstance(error, OSError) else None  # NumPy advises to load pickles
        raise DataError(f"{file} cannot be read ({reason or 'it is damaged'}); {remedy}") from error


# ------------------------------------------------------------------------------------------------ several processes


@contextlib.contextmanager
def claimed(file: Path) -> Iterator[bool]:
    """Whether this process may make `file`: no other one that lives is at it."""
    claim = file.with_suffix(".claim")
    claim.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(claim, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError as error:  # not every file system has locks; what two make is the same
            if error.errno not in _NO_LOCKS:
                raise
        yield True
        if file.with_suffix(".json").exists():
            claim.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def only_one(cache: Path) -> Iterator[None]:
    """Processes that share the cache wait here for the one that writes there, and then find its work.

    Raises:
        DataError: there is a link in the lock's place.
        OSError: nothing can be written there.
    """
    lock = cache / ".lock"
    cache.mkdir(parents=True, exist_ok=True)
    # Neither emptied nor followed: under this name may lie a link to a file that is somebody's.
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP and os.path.islink(lock):
            raise DataError(f"{lock} is a link; it must be a regular file, so remove it") from error
        raise
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def at_work(cache: Path, *, alone: bool = False) -> Iterator[None]:
    """Marks the cache as one that is being filled; `alone`: as one that nobody fills.

    Raises:
        DataError: with `alone`, somebody does.
        OSError: nothing can be written there.
    """
    descriptor = os.open(cache / ".work", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB if alone else fcntl.LOCK_SH)
    except BlockingIOError:
        os.close(descriptor)
        raise DataError(f"another process is preparing data in {cache}; prune it when that has ended") from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    try:
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def explained(cache: Path) -> Iterator[None]:
    """Turns a disk that is full, or cannot be written, into a DataError that says what is kept."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"the encoded scenes cannot be written to {cache}: {error}. What was completed is kept and nothing "
            "half-written was left; free some space, or point data.cache to another disk"
        ) from error
