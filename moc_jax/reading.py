"""Strict reading of text and JSON: nothing is lost, guessed or misread, and every problem is a `DocumentError`.

It takes the standard library alone, so that a command line is read before any package is.
"""

import json
from collections.abc import Iterator
from typing import Any

from moc_jax.showing import shown

MAX_DIGITS = 64
_MARKS = {b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}


class DocumentError(ValueError):
    """What is wrong in a text, without its file's name: `reason`, and `line` where there is one."""

    def __init__(self, reason: str, line: int | None = None):
        super().__init__(reason if line is None else f"line {line}: {reason}")
        self.reason, self.line = reason, line


def decode_text(data: bytes) -> str:
    """UTF-8, with or without a byte order mark.

    Raises:
        DocumentError: another encoding, or a NUL byte; says on which line.
    """
    marked = next((encoding for mark, encoding in _MARKS.items() if data.startswith(mark)), None)
    if marked or b"\0" in data[:2]:
        raise DocumentError(f"it is {marked or 'text in UTF-16 or UTF-32'}; save it as UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DocumentError(
            f"byte {error.start} ({data[error.start]:#04x}) is not UTF-8; save it as UTF-8", line
        ) from error
    if "\0" in text:
        raise DocumentError("it holds a NUL byte; it is not a text file", text.count("\n", 0, text.index("\0")) + 1)
    return text


def parse_json(text: str | bytes, *, deepest: int | None = None) -> Any:
    """What a JSON text says.

    Args:
        text: bytes are read by `decode_text`.
        deepest: levels that may be nested; None: as many as Python's own reader takes.

    Raises:
        DocumentError: it is not JSON, gives a key twice, holds NaN, infinity or an endless number, or is too deep.
    """
    text = decode_text(text) if isinstance(text, bytes) else text.removeprefix("\ufeff")
    try:
        tree = json.loads(text, object_pairs_hook=_unique, parse_int=_int, parse_float=_float, parse_constant=_constant)
    except json.JSONDecodeError as error:
        raise DocumentError(f"it is not JSON: {error}") from error
    except RecursionError:
        raise _too_deep(deepest) from None
    if deepest is not None and any(level > deepest for level in _levels(tree)):
        raise _too_deep(deepest)
    return tree


def check_digits(number: str, where: str = "") -> None:
    """Raises DocumentError for a number that takes seconds to read; `where` begins the message."""
    if len(number) > MAX_DIGITS:
        raise DocumentError(f"{where}a number has {len(number):,} digits; the limit is {MAX_DIGITS}")


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    tree = dict(pairs)
    if len(tree) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise DocumentError(f"the key {shown(twice)} appears twice in one object; keep one")
    return tree


def _int(digits: str) -> int:
    check_digits(digits)
    return int(digits)


def _float(digits: str) -> float:
    check_digits(digits)
    return float(digits)


def _constant(name: str) -> float:
    raise DocumentError(f"it holds {name}, which is not JSON; give a finite number")


def _too_deep(deepest: int | None) -> DocumentError:
    if deepest is None:
        return DocumentError("it is nested too deeply")
    return DocumentError(f"it nests deeper than {deepest} levels, which is the limit")


def _levels(tree: object) -> Iterator[int]:
    """How deep each list and object lies, itself included."""
    opened = [(tree, 1)]
    while opened:
        value, level = opened.pop()
        if isinstance(value, list | dict):
            yield level
            opened += [(inner, level + 1) for inner in (value.values() if isinstance(value, dict) else value)]
