"""The work of preparing: what is lacking is read or encoded, by as many processes as there are."""

import collections
import contextlib
import dataclasses
import functools
import itertools
import math
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO

import av
import numpy as np

from moc_jax.codecs import Codec, fit_sums, pixels_to_unit, sums_of
from moc_jax.config import CodecConfig, Config, DataConfig
from moc_jax.data.cache import NO_SHARD, Cache, Entry, Reading, claimed, load_record, only_one, save_record
from moc_jax.data.copies import Ahead, BucketFile
from moc_jax.data.encode import Encoder, Frames, shots_of
from moc_jax.data.film import Film, mapped
from moc_jax.data.manifest import DataError, ShardEntry, sha256
from moc_jax.data.parts import least_frames, part_lengths, still_frames
from moc_jax.data.shards import ShardWriter
from moc_jax.data.shared_shards import SharedShards
from moc_jax.data.sources import Source, Sources
from moc_jax.data.video import VideoError
from moc_jax.files import whole_file
from moc_jax.progress import Progress
from moc_jax.shapes import Float32
from moc_jax.showing import printable

_FITTED = 8 << 30  # bytes of frames that a codec is fitted on, and that wait on the disk for that
_AHEAD = 2  # files that are fetched from a bucket while one is read
_GROUP_SHARE = 1 / 32  # of all clips before, what one process adds up at a time, if it is more than `_group_bytes`
_LOOK, _SHORTEST_LOOK = 1.0, 0.05  # seconds between two looks at what other processes are at work on
_SORTED = 8  # videos for each process, of which the largest are read first

type _Clip = tuple[Source, int, int]
"""A video, a first frame in what waits of it, and frames."""


class Work:
    """Reads and encodes what the cache lacks. Several processes may do so at once: each takes a video at a time."""

    def __init__(self, cfg: Config, sources: Sources, cache: Cache, part: tuple[int, int], *, check: bool, shown: bool):
        """`part` (i, n): begin with the i-th of n shares; `check`: compare what is there with its digest; `shown`: with
        progress, that of all processes."""
        self._cfg, self._sources, self._cache, self._part = cfg, sources, cache, part
        self._shown = shown
        self._stride, self._patch = cfg.codec.stride[0], cfg.model.patch[0]
        self._starts = bool(cfg.condition_channels)
        self._size = cfg.data.height, cfg.data.width, 3
        self._most = _FITTED // math.prod(self._size)
        self._still = still_frames(stride=self._stride, patch=self._patch)
        self._entries: dict[Path, Entry] = {}
        self._readings: dict[Path, Reading] = {}
        self._frames = 0  # read by this process
        self._waiting_frames = 0
        self._shards = SharedShards(cache.root, check=check)
        self.notes: list[str] = []
        """What was damaged."""

    # -------------------------------------------------------------------------------------------- the codec

    def fit(self, *, after: int) -> Codec:
        """A codec for the training videos, kept in the cache, unless another process has put one with a number above
        `after` there meanwhile.

        Raises:
            DataError: there is nothing to fit it on.
        """
        chosen = self._to_be_fitted_on()
        groups = self._groups(chosen)

        def found(clips: Sequence[_Clip]) -> bool | None:
            return self._cache.sums(clips).exists() or self._cache.newest_codec() > after or None

        self._all("fitting the codec", groups, self._cache.sums, self._sum, found, unit="part", look=self._cache.look)
        with only_one(self._cache.root):
            self._cache.look()
            kept = self._cache.codec(after=after)
            if kept is not None:
                return kept[0]
            try:
                codec = fit_sums(self._cfg.codec, map(self._summed, groups))
            except ValueError as error:
                reasons = {s.name: self._unused(s, self._readings[self._cache.waiting(s)]) for s in chosen}
                raise DataError(f"no codec can be fitted on the training videos: {error}{listed(reasons)}") from error
            codec = self._cache.keep_codec(codec)
            self._cache.forget(map(self._cache.sums, groups))
        return codec

    def _to_be_fitted_on(self) -> list[Source]:
        """The training videos, or as many as fill `_FITTED`, in an order that no name decides; their frames wait."""
        training = [source for source in self._sources if source.split == "train"]
        training.sort(key=lambda source: (source.digest, self._cache.waiting(source)))
        ahead = itertools.batched(training, _SORTED * self._part[1])
        order, reading = [s for batch in ahead for s in self._large_first(batch)], (self._read, self._reading)
        idle, most = lambda: self._sum_ahead(training), self._most
        self._all("finding shots", order, self._cache.waiting, *reading, until=most, idle=idle)
        chosen, frames = list[Source](), 0
        for source in training:
            if frames >= most:
                break
            self._all("finding shots", [source], self._cache.waiting, *reading)
            chosen.append(source)
            frames += sum(self._readings[self._cache.waiting(source)].shots)
        return chosen

    def _sum_ahead(self, training: Sequence[Source]) -> bool:
        """Adds up clips of the first videos while others are read; whether there were any."""
        read = list(itertools.takewhile(self._reading, training))
        for clips in self._groups(read)[:-1] if self._waiting_frames < self._most else ():
            file = self._cache.sums(clips)
            if not file.exists():
                with claimed(file) as ours:
                    if ours and not file.exists():
                        self._sum(clips)
                        return True
        return False

    def _groups(self, chosen: Sequence[Source]) -> list[list[_Clip]]:
        """What is fitted on, in groups that depend neither on the number of processes nor on what follows."""
        groups, at, end, least = list[list[_Clip]](), 0, 0.0, self._least_group
        for source in chosen:
            shots = self._readings[self._cache.waiting(source)].shots
            for begin, frames in zip(itertools.accumulate(shots, initial=0), shots):
                for length in part_lengths(frames, self._data(source), stride=self._stride, patch=self._patch):
                    if at >= end:
                        groups.append([])
                        end = at + max(least, at * _GROUP_SHARE)
                    groups[-1].append((source, begin, length))
                    begin, at = begin + length, at + length
        return groups

    @functools.cached_property
    def _least_group(self) -> float:
        return _group_bytes(self._cfg.codec) / math.prod(self._size)

    def _sum(self, clips: Sequence[_Clip]) -> None:
        """Where the disk has no room for it, whoever fits the codec adds up again."""
        sums = sums_of(self._cfg.codec, self._pixels(clips))
        file = self._cache.sums(clips)
        with contextlib.suppress(OSError), whole_file(file, lasting=False) as partial, partial.open("wb") as content:
            np.savez(content, allow_pickle=False, **sums)

    def _summed(self, clips: Sequence[_Clip]) -> dict[str, np.ndarray]:
        """From the disk; added up again where that lost it."""
        try:
            with self._cache.sums(clips).open("rb") as content, np.load(content) as arrays:
                return dict(arrays)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile):
            return sums_of(self._cfg.codec, self._pixels(clips))

    def _pixels(self, clips: Sequence[_Clip]) -> Iterator[Float32[np.ndarray, "F Y X 3"]]:
        for source, begin, frames in clips:
            with self._waiting(source) as file:
                yield pixels_to_unit(mapped(file, begin, frames, self._size))
            self._frames += frames

    def _reading(self, source: Source) -> Reading | None:
        file = self._cache.waiting(source)
        if file not in self._readings:
            reading = load_record(Reading, file)
            if reading is None or (not reading.skipped and not file.exists()):
                return None
            self._know(file, reading)
        return self._readings[file]

    def _know(self, file: Path, reading: Reading) -> None:
        self._readings[file] = reading
        self._waiting_frames += sum(reading.shots)

    def _read(self, source: Source) -> None:
        """Leaves the video's frames waiting."""
        file, shots, notes = self._cache.waiting(source), list[int](), list[str]()
        try:
            with whole_file(file) as partial, partial.open("w+b") as frames:
                film = Film(frames, self._cfg.data.height, self._cfg.data.width)
                for shot in shots_of(source, self._cfg.data, film, notes, still=self._still):
                    shots.append(len(shot))
                    self._frames += len(shot)
            reading, lasts = Reading(shots=tuple(shots), notes=tuple(notes), skipped=""), True
        except VideoError as error:
            reading, lasts = Reading(shots=(), notes=(), skipped=error.reason), _lasts(error)
        self._know(file, reading)
        if lasts:
            save_record(file, reading)

    def _waiting(self, source: Source) -> IO[bytes]:
        """A video's frames, open for reading; read again if another process removed them meanwhile."""
        with contextlib.suppress(FileNotFoundError):
            return self._cache.waiting(source).open("rb")
        self._read(source)
        return self._cache.waiting(source).open("rb")

    # -------------------------------------------------------------------------------------------- encoding

    def encode(self, codec: Codec) -> list[Entry]:
        """What each source was encoded to; all of it lies in the cache."""

        def shard(source: Source) -> Path:
            return self._cache.shard(source, codec)

        def entry(source: Source) -> Entry | None:
            return self._entry(shard(source))

        def make(source: Source) -> None:
            self._encode(source, codec, shard(source))

        self._shards.look()
        self._all("encoding", self._large_first(self._sources), shard, make, entry, look=self._shards.look)
        self._cache.forget(map(self._cache.waiting, self._sources))
        return [self._entries[shard(source)] for source in self._sources]

    def _entry(self, shard: Path) -> Entry | None:
        if shard in self._entries:
            return self._entries[shard]
        entry = load_record(Entry, shard)
        problem = self._shards.problem(shard, entry.shard) if entry else ""
        if entry is None and shard.with_suffix(".json").exists():
            problem = "is not described by what lies beside it"
        if problem:
            note = f"{shard.relative_to(self._cache.root)} {problem}; its video was encoded again"
            self.notes += [note] if note not in self.notes else []  # it is looked at again once it is claimed
        if problem or entry is None or (entry.skipped and entry.by != av.__version__):
            return None
        self._entries[shard] = entry
        return entry

    def _encode(self, source: Source, codec: Codec, shard: Path) -> None:
        notes, made, skipped, lasts = list[str](), NO_SHARD, "", True
        shots, encoder = (), None
        try:
            with whole_file(shard) as partial:
                with ShardWriter(partial) as writer:
                    encoder = Encoder(self._data(source), codec, writer, patch=self._patch, starts=self._starts)
                    for shot in self._shots(source, notes):
                        encoder.add(shot)
                shots = tuple(encoder.shots)
                if not encoder.parts:
                    raise VideoError(source.path, self._too_short(shots))
                made = ShardEntry(
                    file=shard.relative_to(self._cache.root).as_posix(),
                    records=writer.records,
                    size=partial.stat().st_size,
                    sha256=sha256(partial),
                )
        except VideoError as error:
            skipped, lasts = error.reason, _lasts(error)
        except ValueError as error:
            skipped = str(error)
        used = encoder is not None and not skipped
        entry = Entry(
            shots=shots,
            parts=tuple(encoder.parts) if used else (),
            psnr=tuple(encoder.psnr) if used else (),
            notes=tuple(notes),
            skipped=skipped,
            by=av.__version__,
            shard=made,
        )
        self._entries[shard] = entry
        if lasts:
            save_record(shard, entry)
            self._shards.send(shard)
            self._cache.forget([self._cache.waiting(source)])

    def _shots(self, source: Source, notes: list[str]) -> Iterator[Frames]:
        """From where they wait, or from the video."""
        reading = self._reading(source)
        if reading is not None and reading.skipped:
            raise VideoError(source.path, reading.skipped)
        if reading is not None:
            notes += reading.notes
            with self._waiting(source) as file:
                for begin, frames in zip(itertools.accumulate(reading.shots, initial=0), reading.shots):
                    yield mapped(file, begin, frames, self._size)
            return
        folder = self._cache.waiting(source).parent
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            film = Film(file, self._cfg.data.height, self._cfg.data.width)
            for shot in shots_of(source, self._cfg.data, film, notes, still=self._still):
                self._frames += len(shot)
                yield shot
                film.forget()

    def _data(self, source: Source) -> DataConfig:
        """A picture is too short for nothing."""
        return dataclasses.replace(self._cfg.data, min_shot_frames=1) if source.still else self._cfg.data

    def _unused(self, source: Source, reading: Reading) -> str:
        """Why nothing of a video is used; empty if something is."""
        least = least_frames(self._data(source), stride=self._stride, patch=self._patch)
        return reading.skipped or (self._too_short(reading.shots) if max(reading.shots) < least else "")

    def _too_short(self, shots: Sequence[int]) -> str:
        least = least_frames(self._cfg.data, stride=self._stride, patch=self._patch)
        return (
            f"too short: its longest shot has {max(shots)} frames at {self._cfg.data.fps:g} fps, but {least} are needed"
        )

    # -------------------------------------------------------------------------------------------- taking turns

    def _large_first(self, sources: Sequence[Source]) -> list[Source]:
        """Where several work, so that they end together; else as they are."""
        return sorted(sources, key=lambda source: -source.size if self._part[1] > 1 else 0)

    def _all[T](
        self,
        what: str,
        items: Sequence[T],
        file: Callable[[T], Path],
        make: Callable[[T], None],
        found: Callable[[T], object],
        *,
        unit: str = "file",
        until: int | None = None,
        idle: Callable[[], bool] = lambda: False,
        look: Callable[[], None] = lambda: None,
    ) -> None:
        """Makes `file(item)` of each item of which None is `found`, its own share first, then what is left.

        What another process is at work on is waited for; if that process dies, it is made here. Meanwhile `idle` does
        other work, and says whether there was any. With `until`, no more is begun than so many frames need.
        `look` learns now and then what other hosts have made.
        """
        index, count = self._part
        turns = itertools.cycle([*range(count), *reversed(range(count))])  # whoever has a larger one has a smaller next
        shares = list(zip(items, turns))
        mine, others = [s for s, turn in shares if turn == index], [s for s, turn in shares if turn != index]
        left = collections.deque(item for item in (*mine, *reversed(others)) if found(item) is None)
        if not left:
            return
        busy, total, begun, due = list[T](), len(items), self._frames, time.monotonic() + _LOOK
        pause = _SHORTEST_LOOK
        with (
            Progress(what, total=total, done=total - len(left), unit=unit, enabled=self._shown) as progress,
            contextlib.closing(Ahead(BucketFile.local, _AHEAD)) as ahead,
        ):
            while left or busy:
                if until is not None and self._waiting_frames >= until:
                    return
                if not left:
                    if not idle():
                        time.sleep(pause)
                    now = time.monotonic()
                    left, busy = collections.deque(item for item in busy if found(item) is None), []
                    pause = min(_LOOK, max(_SHORTEST_LOOK, 20 * (time.monotonic() - now)))
                elif (now := time.monotonic()) > due:  # at what others have made; for a twentieth of the time at most
                    look()
                    left = collections.deque(item for item in left if found(item) is None)
                    due = time.monotonic() + max(_LOOK, 20 * (time.monotonic() - now))
                progress.reach(total - len(left) - len(busy), frames=f"{self._frames - begun:,}")
                if left:
                    ahead.want(_to_be_fetched(itertools.islice(left, 1 + _AHEAD)))
                    item = left.popleft()
                    with claimed(file(item)) as ours:
                        if not ours:
                            busy.append(item)
                        elif found(item) is None:
                            make(item)
            progress.reach(total, frames=f"{self._frames - begun:,}")


def _to_be_fetched(items: Iterable[object]) -> list[BucketFile]:
    """The files of videos that lie in a bucket."""
    return [item.path for item in items if isinstance(item, Source) and isinstance(item.path, BucketFile)]


def _group_bytes(codec: CodecConfig) -> float:
    """Of the frames that one process adds up at a time, at least: what it writes is at most twice as large."""
    return max(8 << 20, sum(array.nbytes for array in sums_of(codec, ()).values()) / 2)


def _lasts(error: VideoError) -> bool:
    """Whether it is the file's content that cannot be read; a disk or a permission may be another the next time."""
    return not isinstance(error.__cause__, OSError)


def listed(reasons: dict[str, str]) -> str:
    """A line for each that has a reason."""
    return "".join("\n  " + printable(f"{name}: {reason}") for name, reason in reasons.items() if reason)
