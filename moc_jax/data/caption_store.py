"""Embedded captions: each is encoded once per encoder and cache, in batches, and only read from then on.

A store is a folder of parts, each written whole, so what a killed preparation has encoded stays. Captions are found by
their hashes; embeddings are mapped into memory, so a store may be larger than that. Each embedding's checksum is
compared when it is read.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from moc_jax.config import ConfigError, TextConfig
from moc_jax.data.arrays_file import ArraysFile, write_arrays
from moc_jax.data.captions import CaptionError
from moc_jax.data.copies import remove, send, sync
from moc_jax.data.manifest import DataError, Manifest, SceneEntry
from moc_jax.data.table import Table
from moc_jax.files import remove_leftovers, whole_file
from moc_jax.progress import Progress, track
from moc_jax.shapes import Float, Int
from moc_jax.showing import shown
from moc_jax.text import TextEncoder, build_text_encoder, encoder_fingerprint

_SUFFIX = ".captions"
_KEY = 16  # bytes of a caption's hash
_PART_BYTES, _PART_SECONDS = 1 << 26, 60.0  # a part is written when it has as much, or took as long
_TYPES = "float32", "float16", "bfloat16"


class _Part:
    """One file of a store."""

    def __init__(self, file: Path):
        """Raises OSError or ValueError: there is no such file, or it is damaged."""
        arrays = self.arrays = ArraysFile(file)
        if arrays.keys() != {"keys", "ends", "checksums", "rows"}:
            raise ValueError("it holds something else")
        self.keys, self.ends = arrays["keys"], arrays["ends"]
        self.layout = arrays["rows"].shape[1], arrays["rows"].dtype.name
        if len(self.keys) != len(self.ends) or self.ends[-1] != len(arrays["rows"]):
            raise ValueError("its index does not fit its embeddings")

    def __reduce__(self) -> tuple:
        return _Part, (self.arrays.path,)

    def read(self, index: int) -> Float[np.ndarray, "L E"] | None:
        """An embedding; None if it is not what was written."""
        rows = self.arrays["rows"][int(self.ends[index - 1]) if index else 0 : int(self.ends[index])]
        return rows if zlib.crc32(rows.view(np.uint8)) == self.arrays["checksums"][index] else None

    def damaged(self) -> str:
        """Reads everything; what is wrong, empty if nothing is."""
        bad = sum(self.read(index) is None for index in range(len(self.keys)))
        return f"{bad} of {len(self.keys)} embeddings have another checksum" if bad else ""


class CaptionStore:
    """Reads a store as it is now."""

    def __init__(self, folder: Path):
        """Reads the indices; a folder that does not exist has no captions."""
        self.folder = folder
        self.damaged: dict[Path, str] = {}
        """Parts that cannot be read, with the reason."""
        self._parts: list[_Part] = []
        for file in sorted(folder.glob(f"*{_SUFFIX}")):
            try:
                self._parts.append(_Part(file))
            except (OSError, ValueError, LookupError, TypeError) as error:
                self.damaged[file] = str(error)
        if len(layouts := {part.layout for part in self._parts}) > 1:
            raise DataError(f"{folder} holds embeddings of different kinds, {layouts}; delete it and prepare the data")
        counts = [len(part.keys) for part in self._parts]
        keys = _searchable(np.concatenate([np.zeros((0, _KEY), np.uint8), *(part.keys for part in self._parts)]))
        order = np.argsort(keys, kind="stable")
        self._keys = keys[order]
        self._part = np.repeat(np.arange(len(counts), dtype=np.int32), counts)[order]
        self._index = np.concatenate([np.zeros(0, np.int32), *(np.arange(n, dtype=np.int32) for n in counts)])[order]
        rows = [np.diff(part.ends, prepend=0) for part in self._parts]
        self._rows = np.concatenate([np.zeros(0, np.int64), *rows])[order]

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def dim(self) -> int:
        """Width of an embedding."""
        return self._parts[0].layout[0]

    def lengths(self, captions: Iterable[str]) -> Int[np.ndarray, " n"]:
        """Rows of each caption's embedding; 0: the store lacks it."""
        wanted = _searchable(np.frombuffer(b"".join(map(_key, captions)), np.uint8).reshape(-1, _KEY))
        if not len(self):
            return np.zeros(len(wanted), np.int64)
        at = np.minimum(np.searchsorted(self._keys, wanted), len(self) - 1)
        return np.where(self._keys[at] == wanted, self._rows[at], 0)

    def read(self, caption: str) -> Float[np.ndarray, "L E"]:
        """The embedding of a caption, in the type that its encoder gave.

        Raises:
            DataError: the store lacks it, or it is damaged.
        """
        (key,) = _searchable(np.frombuffer(_key(caption), np.uint8).reshape(1, _KEY))
        at = int(np.searchsorted(self._keys, key))
        if at == len(self) or self._keys[at] != key:
            raise DataError(f"{self.folder} lacks the caption {shown(caption)}; prepare the data again")
        part = self._parts[self._part[at]]
        embedding = part.read(int(self._index[at]))
        if embedding is None:
            raise DataError(
                f"{part.arrays.path} is damaged: the embedding of {shown(caption)} has another checksum; prepare the "
                "data with --data.verify full, which encodes it again"
            )
        return embedding

    def verify(self) -> None:
        """Reads everything, and adds to `damaged` the parts that are not what was written."""
        for part in track(self._parts, "checking captions", unit="file", keep=False):
            if reason := part.damaged():
                self.damaged[part.arrays.path] = reason


def _key(caption: str) -> bytes:
    return hashlib.blake2b(caption.encode("utf-8", "surrogatepass"), digest_size=_KEY).digest()


def _searchable(keys: np.ndarray) -> np.ndarray:
    """[n, 16] bytes as n values that can be sorted and compared."""
    return np.ascontiguousarray(keys).view(f"S{_KEY}").reshape(-1)


# ------------------------------------------------------------------------------------------------ filling


def fill_store(folder: Path, cfg: TextConfig, captions: Mapping[str, str]) -> None:
    """Encodes the captions that the store lacks, in batches of similar length. Several processes may do so at once.

    Args:
        folder: `store_folder`.
        cfg: the encoder; it is built only when something is to be encoded.
        captions: each with where it stands, which a message begins with.

    Raises:
        CaptionError: a caption is too long, or its embedding holds NaN or infinite values.
        OSError: nothing can be written there.
    """
    names = list(captions)
    sync(folder)
    lengths = CaptionStore(folder).lengths(names)
    for index in np.flatnonzero(lengths > cfg.max_tokens).tolist():
        raise _too_long(names[index], lengths[index], cfg, captions[names[index]])
    lacking = sorted((names[index] for index in np.flatnonzero(lengths == 0).tolist()), key=len)
    if not lacking:
        return
    encoder, part = build_text_encoder(cfg), _Filling(folder)
    with Progress("encoding captions", total=len(lacking), unit="caption") as progress, contextlib.closing(part):
        for number, batch in enumerate(itertools.batched(lacking, encoder.batch_size)):
            for caption, embedding in zip(batch, _encoded(encoder, batch, captions)):
                part.add(caption, embedding)
            progress.reach(min((number + 1) * encoder.batch_size, len(lacking)))


def _encoded(
    encoder: TextEncoder, batch: tuple[str, ...], captions: Mapping[str, str]
) -> Iterator[Float[np.ndarray, "L E"]]:
    try:
        embeddings = encoder.batch(batch)
    except ValueError as error:
        for caption in batch if len(batch) > 1 else ():
            yield from _encoded(encoder, (caption,), captions)  # ends with the one that is meant
        raise CaptionError(f"{captions[batch[0]]}: {error}") from error
    for caption, embedding in zip(batch, embeddings):
        embedding = np.ascontiguousarray(embedding)
        if embedding.dtype.name not in _TYPES:
            raise TypeError(f"the text encoder gives {embedding.dtype.name}; a store holds {', '.join(_TYPES)}")
        if not np.isfinite(embedding.astype(np.float32)).all():
            raise CaptionError(f"{captions[caption]}: the embedding of {shown(caption)} holds NaN or infinite values")
        yield embedding


class _Filling:
    """Embeddings on their way to parts."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._begin()

    def _begin(self) -> None:
        self._keys: list[bytes] = []
        self._rows: list[np.ndarray] = []
        self._bytes, self._since = 0, time.monotonic()

    def add(self, caption: str, embedding: np.ndarray) -> None:
        if self._rows and self._rows[0][0].dtype != embedding.dtype:
            raise TypeError(f"{shown(caption)} is encoded as {embedding.dtype}, others as {self._rows[0].dtype}")
        self._keys.append(_key(caption))
        self._rows.append(embedding)
        self._bytes += embedding.nbytes
        if self._bytes >= _PART_BYTES or time.monotonic() - self._since > _PART_SECONDS:
            self.close()

    def close(self) -> None:
        """Writes what there is; also after an error, since it was encoded."""
        if not self._rows:
            return
        name = hashlib.blake2b(b"".join(self._keys), digest_size=_KEY).hexdigest()
        arrays = {
            "keys": np.frombuffer(b"".join(self._keys), np.uint8).reshape(-1, _KEY),
            "ends": np.cumsum([len(rows) for rows in self._rows], dtype=np.int64),
            "checksums": np.array([zlib.crc32(rows.view(np.uint8)) for rows in self._rows], np.uint32),
            "rows": np.concatenate(self._rows),
        }
        file = self._folder / f"{name}{_SUFFIX}"
        with whole_file(file) as partial:
            write_arrays(partial, arrays)
        send(file)
        self._begin()


# ------------------------------------------------------------------------------------------------ of scenes


@dataclasses.dataclass(frozen=True)
class SceneCaptions:
    """The captions of a manifest's scenes."""

    store: CaptionStore
    lengths: Int[np.ndarray, " n"]
    """Rows of the embedding of each of the scenes' texts, by its number; 0 for those that are not captions."""


def store_folder(cache: Path, cfg: TextConfig) -> Path:
    """Where a cache holds the captions of an encoder."""
    return cache / f"captions-{encoder_fingerprint(cfg)}"


def embed_captions(manifest: Manifest, cfg: TextConfig, *, full: bool = False) -> list[str]:
    """Makes the cache hold the captions of a manifest in it.

    Args:
        manifest: of a prepared folder.
        cfg: the encoder.
        full: whether all that lies there is read and compared first.

    Returns:
        A note on each part of the store that was damaged and is made again.

    Raises:
        CaptionError, OSError: see `fill_store`.
    """
    folder = store_folder(manifest.folder.parent, cfg)
    sync(folder)
    store = CaptionStore(folder)
    if full:
        store.verify()
    for file in store.damaged:
        remove(file)
    notes = [
        f"{file.name} of {folder.name} was damaged ({why}); it is made again" for file, why in store.damaged.items()
    ]
    if store.damaged:
        store = CaptionStore(folder)
    remove_leftovers(folder)
    numbers, texts = caption_numbers(manifest.scenes), manifest.scenes.texts
    lacking = numbers[store.lengths(texts[number] for number in numbers.tolist()) == 0].tolist()
    captions = {"": "the empty caption"} | {texts[number]: f"a caption of {manifest.folder}" for number in lacking}
    fill_store(folder, cfg, captions)
    return notes


def open_captions(manifest: Manifest, cfg: TextConfig) -> SceneCaptions:
    """The manifest's captions as the encoder `cfg` embeds them.

    Raises:
        DataError: they were never encoded by it, or the store is damaged.
        ConfigError: one is longer than `text.max_tokens`.
    """
    folder, scenes = store_folder(manifest.folder.parent, cfg), manifest.scenes
    if not folder.exists():
        raise DataError(
            f"{folder} is missing: the captions are not encoded by text encoder {cfg.name}; prepare the data"
        )
    store, numbers = CaptionStore(folder), caption_numbers(scenes)
    lengths = np.zeros(len(scenes.texts), np.int64)
    lengths[numbers] = store.lengths(scenes.texts[number] for number in numbers.tolist())
    if (lacking := numbers[lengths[numbers] == 0]).size or not store.lengths([""]).all():
        caption = shown(scenes.texts[int(lacking[0])]) if lacking.size else "the empty caption"
        damage = "".join(f"; {file.name} is damaged ({reason})" for file, reason in store.damaged.items())
        raise DataError(f"{folder} lacks {caption}{damage}; prepare the data again")
    if (long := np.flatnonzero(lengths > cfg.max_tokens)).size:
        where = _scene_with(scenes, int(long[0]))
        raise ConfigError(str(_too_long(scenes.texts[int(long[0])], int(lengths[long[0]]), cfg, where)))
    return SceneCaptions(store, lengths)


def caption_numbers(scenes: Table[SceneEntry]) -> Int[np.ndarray, " n"]:
    """Which of the scenes' texts are captions, each once."""
    return np.unique(np.concatenate([scenes.column("caption"), scenes.inner("shots", "caption")]))


def _scene_with(scenes: Table[SceneEntry], text: int) -> str:
    of_shots = scenes.sums("shots", scenes.inner("shots", "caption") == text) > 0
    row = int(np.flatnonzero((scenes.column("caption") == text) | of_shots)[0])
    return f"scene {scenes[row].name}"


def _too_long(caption: str, tokens: int, cfg: TextConfig, where: str) -> CaptionError:
    return CaptionError(
        f"{where}: the caption {shown(caption)} has {tokens} tokens, but text.max_tokens is {cfg.max_tokens}; "
        "shorten it or raise text.max_tokens"
    )
