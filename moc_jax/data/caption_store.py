"""Embedded captions, in a file beside the shards: each is encoded once per encoder, and only read from then on.

The file holds the rows of all captions one after another, then an index in JSON, then a footer with the index's length
and digest. It is written whole or not at all; readers map it into memory, so it may be larger than that.
"""

import contextlib
import dataclasses
import hashlib
import json
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Self

import jax.numpy as jnp
import numpy as np

from moc_jax.config import ConfigError, TextConfig
from moc_jax.data.captions import CaptionError
from moc_jax.data.manifest import DataError, Manifest
from moc_jax.files import remove_leftovers, whole_file
from moc_jax.progress import track
from moc_jax.reading import parse_json
from moc_jax.shapes import Float
from moc_jax.showing import shown
from moc_jax.text import TextEncoder, build_text_encoder, encoder_fingerprint

_FOOTER = struct.Struct("<Q32s16s")  # bytes of the index, its SHA-256, what the file is
_KIND = b"moc_jax captions"
_TYPES = "float32", "float16", "bfloat16"


class CaptionStoreError(ValueError):
    """A store that cannot be read: says why."""

    def __init__(self, file: Path, reason: str):
        super().__init__(f"{file} cannot be read ({reason})")
        self.reason = reason


@dataclasses.dataclass(frozen=True)
class _Entry:
    first: int
    tokens: int
    checksum: int


class CaptionStore:
    """Reads a store; the file is mapped at first use, so that a reader can be sent to another process."""

    def __init__(self, file: Path):
        """Reads the index.

        Raises:
            CaptionStoreError: there is no such file, or it is damaged.
        """
        self.file = file
        try:
            self._entries, self.dim, self._type = _read_index(file)
        except (OSError, ValueError, LookupError, TypeError, struct.error) as error:
            raise CaptionStoreError(file, str(error)) from error
        self.tokens: dict[str, int] = {caption: entry.tokens for caption, entry in self._entries.items()}
        """Rows of each caption's embedding."""
        self._mapped: np.ndarray | None = None

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_mapped": None}

    @property
    def layout(self) -> tuple[int, str]:
        """Width and type of a row."""
        return self.dim, self._type

    def read(self, caption: str) -> Float[np.ndarray, "L E"]:
        """The embedding of a caption, in the type that its encoder gave.

        Raises:
            DataError: the store lacks it.
        """
        if caption not in self._entries:
            raise DataError(f"{self.file} lacks the caption {shown(caption)}; prepare the data again")
        return self.raw(caption).view(jnp.dtype(self._type))

    def raw(self, caption: str) -> np.ndarray:
        """Its bytes as they are stored, a row per token."""
        entry = self._entries[caption]
        return self._bytes()[entry.first : entry.first + entry.tokens]

    def intact(self, caption: str) -> bool:
        """Whether what is stored of it is what was written."""
        return zlib.crc32(self.raw(caption)) == self._entries[caption].checksum

    def damaged(self) -> str | None:
        """Reads everything; the first caption that is damaged, None if none is."""
        captions = track(list(self._entries), "checking captions", unit="caption", keep=False)
        return next((caption for caption in captions if not self.intact(caption)), None)

    def _bytes(self) -> np.ndarray:
        if self._mapped is None:
            width = self.dim * jnp.dtype(self._type).itemsize
            rows = sum(self.tokens.values())
            self._mapped = np.asarray(np.memmap(self.file, np.uint8, "r", shape=(rows, width)))
        return self._mapped


def _read_index(file: Path) -> tuple[dict[str, _Entry], int, str]:
    size = file.stat().st_size
    with file.open("rb") as data:
        data.seek(max(0, size - _FOOTER.size))
        length, digest, kind = _FOOTER.unpack(data.read(_FOOTER.size))
        if kind != _KIND or length > size - _FOOTER.size:
            raise ValueError("its end is damaged")
        data.seek(size - _FOOTER.size - length)
        text = data.read(length)
    if hashlib.sha256(text).digest() != digest:
        raise ValueError("its index is damaged")
    index = parse_json(text)
    entries, first = {}, 0
    for caption, tokens, checksum in index["captions"]:
        entries[caption] = _Entry(first, tokens, checksum)
        first += tokens
    rows = first * index["dim"] * jnp.dtype(index["dtype"]).itemsize
    if rows != size - _FOOTER.size - length:
        raise ValueError(f"it holds {size - _FOOTER.size - length} bytes of embeddings instead of {rows}")
    return entries, index["dim"], index["dtype"]


class CaptionWriter:
    """Fills a store: what other stores hold is copied, the rest encoded; a context manager, whose end completes it.

    Memory does not grow with the embeddings; an encoder is built only when something is to be encoded.
    """

    def __init__(self, file: Path, cfg: TextConfig, others: Iterable[Path] = ()):
        """Begins with no caption.

        Args:
            file: where to write.
            cfg: the encoder.
            others: stores of the same encoder to copy from; those that cannot be read are passed over.
        """
        self._cfg, self._others = cfg, list(others)
        self._index: dict[str, tuple[int, int]] = {}
        self._layout: tuple[int, str] | None = None
        self._encoder: TextEncoder | None = None
        self._stack = contextlib.ExitStack()
        self._path = file

    def __enter__(self) -> Self:
        self._file = self._stack.enter_context(self._path.open("wb"))
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        with self._stack:
            if kind is None:
                self._finish()

    def add(self, captions: Mapping[str, str]) -> None:
        """Adds the captions that are not there yet.

        Args:
            captions: each with where it stands, which a message begins with.

        Raises:
            CaptionError: a caption is too long, or its embedding holds NaN or infinite values.
        """
        lacking = {caption: where for caption, where in captions.items() if caption not in self._index}
        for store in _readable(self._others) if lacking else ():
            for caption in [caption for caption in lacking if caption in store.tokens and store.intact(caption)]:
                where = lacking.pop(caption)
                check_length(caption, store.tokens[caption], self._cfg, where)
                self._write(caption, store.raw(caption), store.layout)
            if not lacking:
                break
        for caption, where in track(list(lacking.items()), "encoding captions", unit="caption"):
            embedding = self._encoded(caption, where)
            self._write(caption, embedding.view(np.uint8), (embedding.shape[1], embedding.dtype.name))
        self._encoder = None  # it may be large, and the videos come next

    def _encoded(self, caption: str, where: str) -> Float[np.ndarray, "L E"]:
        if self._encoder is None:
            self._encoder = build_text_encoder(self._cfg)
        try:
            embedding = np.ascontiguousarray(self._encoder(caption))
        except ValueError as error:
            raise CaptionError(f"{where}: {error}") from error
        if embedding.dtype.name not in _TYPES:
            raise TypeError(f"the text encoder gives {embedding.dtype.name}; a store holds {', '.join(_TYPES)}")
        if not np.isfinite(embedding.astype(np.float32)).all():
            raise CaptionError(f"{where}: the embedding of {shown(caption)} holds NaN or infinite values")
        return embedding

    def _write(self, caption: str, rows: np.ndarray, layout: tuple[int, str]) -> None:
        if self._layout not in (None, layout):
            raise TypeError(f"{shown(caption)} is encoded as {layout}, other captions as {self._layout}")
        self._layout = layout
        self._file.write(rows.data)
        self._index[caption] = len(rows), zlib.crc32(rows)

    def _finish(self) -> None:
        dim, dtype = self._layout or (self._cfg.dim, _TYPES[0])
        captions = [(caption, *entry) for caption, entry in self._index.items()]
        text = json.dumps({"dim": dim, "dtype": dtype, "captions": captions}).encode()
        self._file.write(text + _FOOTER.pack(len(text), hashlib.sha256(text).digest(), _KIND))


def _readable(files: Iterable[Path]) -> Iterator[CaptionStore]:
    """The stores among `files` that can be read, one at a time."""
    for file in files:
        try:
            yield CaptionStore(file)
        except CaptionStoreError:
            continue


def check_length(caption: str, tokens: int, cfg: TextConfig, where: str) -> None:
    """Raises CaptionError for a caption that was stored under another limit than today's."""
    if tokens > cfg.max_tokens:
        raise CaptionError(
            f"{where}: the caption {shown(caption)} has {tokens} tokens, but text.max_tokens is {cfg.max_tokens}; "
            "shorten it or raise text.max_tokens"
        )


def store_file(folder: Path, cfg: TextConfig) -> Path:
    """Where a prepared folder holds the captions of an encoder."""
    return folder / f"captions-{encoder_fingerprint(cfg)}"


def captions_of(manifest: Manifest) -> dict[str, str]:
    """Every caption that training may show, with the scene it belongs to; the empty one stands for dropped ones."""
    captions = {"": "the empty caption"}
    for scene in manifest.scenes:
        for caption in scene.captions:
            captions.setdefault(caption, f"scene {scene.name}")
    return captions


def embed_captions(manifest: Manifest, cfg: TextConfig, others: Iterable[Path] = ()) -> str:
    """Makes the manifest's folder hold its captions, embedded.

    Args:
        manifest: of the folder.
        cfg: the encoder.
        others: see `CaptionWriter`.

    Returns:
        What was wrong with the store that was there; empty if it was sound, or if there was none.

    Raises:
        CaptionError: see `CaptionWriter.add`.
        OSError: the store cannot be written.
    """
    file = store_file(manifest.folder, cfg)
    problem = _problem(file, manifest) if file.exists() else ""
    if file.exists() and not problem:
        return ""
    remove_leftovers(file.parent, file.name)
    with whole_file(file) as partial, CaptionWriter(partial, cfg, [file, *others]) as writer:
        writer.add(captions_of(manifest))  # what is intact in a damaged store is copied from there
    return f"{file.name} was damaged ({problem}); it was made again" if problem else ""


def is_sound(manifest: Manifest, cfg: TextConfig) -> bool:
    """Whether the manifest's folder holds all its captions, undamaged: reads all of the store."""
    file = store_file(manifest.folder, cfg)
    return file.exists() and not _problem(file, manifest)


def _problem(file: Path, manifest: Manifest) -> str:
    try:
        store = CaptionStore(file)
    except CaptionStoreError as error:
        return error.reason
    lacking = captions_of(manifest).keys() - store.tokens.keys()
    if lacking:
        return f"it lacks {shown(min(lacking))}"
    damaged = store.damaged()
    return "" if damaged is None else f"the embedding of {shown(damaged)} has another checksum"


def open_captions(manifest: Manifest, cfg: TextConfig) -> CaptionStore:
    """The manifest's captions as the encoder `cfg` embeds them.

    Raises:
        DataError: they were never encoded by it, or the store is damaged.
        ConfigError: one is longer than `text.max_tokens`.
    """
    file = store_file(manifest.folder, cfg)
    if not file.exists():
        raise DataError(f"{file} is missing: the captions are not encoded by text encoder {cfg.name}; prepare the data")
    try:
        store = CaptionStore(file)
        for caption, where in captions_of(manifest).items():
            if caption not in store.tokens:
                raise DataError(f"{file} lacks {shown(caption)} of {where}; prepare the data again")
            check_length(caption, store.tokens[caption], cfg, where)
    except CaptionStoreError as error:
        raise DataError(f"{error}; prepare the data again") from error
    except CaptionError as error:
        raise ConfigError(str(error)) from error
    return store
