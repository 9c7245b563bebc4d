"""Prompts -> token ids as Wan makes them: cleaned, cut into pieces by a SentencePiece model, and ended."""

import functools
import hashlib
import html
import importlib
import re
import types
from pathlib import Path
from typing import Protocol

from moc_jax.config import ConfigError
from moc_jax.reading import DocumentError, parse_json
from moc_jax.showing import named

_MODEL, _JSON = "spiece.model", "tokenizer.json"
_PLACES = ".", "tokenizer", "google/umt5-xxl", "../tokenizer", "../google/umt5-xxl"  # from the folder of the weights
END, UNKNOWN = 1, 2


class _Pieces(Protocol):
    def encode(self, text: str) -> list[int]: ...

    def is_byte(self, piece: int) -> bool: ...

    def get_piece_size(self) -> int: ...


def cleaned(prompt: str) -> str:
    """Broken encodings mended, HTML's characters unescaped, each run of white space one space.

    Raises:
        ConfigError: ftfy isn't installed.
    """
    text = html.unescape(html.unescape(_package("ftfy").fix_text(prompt))).strip()
    return re.sub(r"\s+", " ", text).strip()


def _package(name: str) -> types.ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        message = f"text.name umt5 needs {name}, which is not installed: pip install 'moc_jax[wan]'"
        raise ConfigError(message) from error


def tokenizer_file(tokenizer: str, weights: str) -> Path:
    """The file of a tokenizer: `tokenizer` itself, or in that folder; if that is empty, where it lies beside weights.

    Raises:
        ConfigError: it isn't there.
    """
    if tokenizer:
        place = Path(tokenizer)
        places = [place] if place.is_file() else [place / _MODEL]
    else:
        base = Path(weights).parent if Path(weights).is_file() else Path(weights)
        places = [base / place / _MODEL for place in _PLACES]
    for place in places:
        if place.is_file():
            return place
    where = tokenizer or weights
    raise ConfigError(f"{named(where)} has no {_MODEL} of umT5's tokenizer; name the file with text.tokenizer")


class Tokenizer:
    """Of one file."""

    def __init__(self, file: Path):
        """Raises ConfigError: sentencepiece isn't installed, or the file is damaged."""
        build = _package("sentencepiece").SentencePieceProcessor
        try:
            self._pieces: _Pieces = build(model_file=str(file))
        except (OSError, RuntimeError) as error:
            raise ConfigError(f"{named(file)} isn't a SentencePiece model: {error}") from error
        self._bytes = by_bytes(file)
        self.pieces = self._pieces.get_piece_size()

    def __call__(self, prompt: str) -> list[int]:
        """Ids of a prompt, of any length; its last is `END`."""
        ids: list[int] = []
        for piece in self._pieces.encode(cleaned(prompt)):
            if self._bytes or not self._pieces.is_byte(piece):
                ids.append(piece)
            elif not ids or ids[-1] != UNKNOWN:
                ids.append(UNKNOWN)
        return [*ids, END]


@functools.lru_cache
def by_bytes(file: Path) -> bool:
    """Whether what no piece covers is written in bytes, which a tokenizer.json beside the file decides: many were made
    when it couldn't, and with those it is `UNKNOWN`, as the models are used with.

    Raises:
        ConfigError: it is damaged.
    """
    beside = file.parent / _JSON
    if not beside.is_file():
        return True
    try:
        tree = parse_json(beside.read_bytes())
    except (OSError, DocumentError) as error:
        raise ConfigError(f"{named(beside)} can't be read: {error}") from error
    model = tree.get("model") if isinstance(tree, dict) else None
    if not isinstance(model, dict):
        raise ConfigError(f"{named(beside)} isn't a tokenizer's: it has no model")
    return model.get("byte_fallback") is True


def tokenizer_digest(file: Path) -> str:
    """SHA-256 of what decides on ids."""
    with file.open("rb") as data:
        return f"{hashlib.file_digest(data, 'sha256').hexdigest()}{by_bytes(file)}"
