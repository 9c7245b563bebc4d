"""The files that people write by hand: YAML, JSON and plain text, read so that nothing in them is lost or misread.

One rule for captions and storyboards: text is UTF-8, with or without a byte order mark; a key that is given twice is an
error, since the readers would drop one of the two; and what is too large, too deep or too long is refused before it is
built. Every problem is a `DocumentError` with its line, where there is one.
"""

import json
import re
import stat
from pathlib import Path

import yaml

from moc_jax.reading import DocumentError, check_digits, decode_text, parse_json
from moc_jax.showing import shown

MAX_BYTES = 32 << 20
MAX_DEPTH = 20
MAX_VALUES = 2_000_000  # in a file; what aliases repeat counts as often as it is repeated
MAX_TEXT = 20_000
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml reads ten times as fast
_TEXT_TAGS = (None, "!", "tag:yaml.org,2002:str")
_NUMBER = re.compile(r"[-+.]?[0-9][-+.:_0-9a-fA-FxX]*")
_OCTAL = re.compile(r"[-+]?0[0-7_]+")


def read_document(file: Path) -> object:
    """The content of a `.json` file, or else of a YAML file; None when it is empty.

    Raises:
        DocumentError: it cannot be read, is not UTF-8 or not well-formed, gives a key twice, or exceeds a limit.
    """
    text = read_text(file)
    if not text.strip():
        return None
    return parse_json(text, deepest=MAX_DEPTH) if file.suffix.lower() == ".json" else _yaml(text)


def read_text(file: Path) -> str:
    """All of a text file.

    Raises:
        DocumentError: it cannot be read, is too large, or is not UTF-8.
    """
    try:
        status = file.stat()
        if not stat.S_ISREG(status.st_mode):
            raise DocumentError("it is not a regular file")
        if status.st_size > MAX_BYTES:
            raise DocumentError(f"it has {status.st_size:,} bytes; the limit is {MAX_BYTES:,}")
        data = file.read_bytes()
    except OSError as error:
        raise DocumentError(error.strerror or str(error)) from error
    return decode_text(data)


def checked_text(value: str) -> str:
    """`value` without the blanks around it.

    Raises:
        DocumentError: it is too long, or holds NUL or half of a character.
    """
    if len(value) > MAX_TEXT:
        raise DocumentError(f"it has {len(value):,} characters; the limit is {MAX_TEXT:,}")
    if "\0" in value:
        raise DocumentError("it holds a NUL character; remove it")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise DocumentError("it holds half of a surrogate pair, which is not a character")
    return value.strip()


# ------------------------------------------------------------------------------------------------ YAML


def _yaml(text: str) -> object:
    try:
        checker = _Checker()
        for event in yaml.parse(text, _LOADER):
            checker.check(event)
        return yaml.load(text, _LOADER)
    except yaml.reader.ReaderError as error:
        raise DocumentError(f"it holds the control character {error.character:#04x}; remove it") from error
    except yaml.MarkedYAMLError as error:
        raise DocumentError(_syntax(text, error)) from error
    except DocumentError:
        raise
    except (ValueError, OverflowError) as error:  # what looks like a date or a number but is none, such as 2024-13-45
        raise DocumentError(f"{error}; text that looks like a date or a number must be in quotes") from error


def _syntax(text: str, error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    if mark is None:
        return str(error.problem)
    lines = text.splitlines()
    line = lines[mark.line] if mark.line < len(lines) else ""
    if "\t" in line[: len(line) - len(line.lstrip())]:
        fix = "indent with spaces, not with tabs"
    else:
        fix = "if it is text with a colon, a # or other special characters in it, put it in quotes"
        before, colon, value = line.strip().partition(": ")
        if colon and ": " in value and value[0] not in "'\"" and not before.lstrip("- ").startswith(("{", "[")):
            fix = f"put it in quotes: {before}: {json.dumps(value.strip()[:80], ensure_ascii=False)}"
    return f"line {mark.line + 1}: {error.problem} in {shown(line.strip())}; {fix}"


class _Checker:
    """Looks at what a YAML text says, event by event, before anything of it is built."""

    def __init__(self):
        self._path: list[_Open] = []  # the lists and mappings around the next event, from outside to inside
        self._sizes: dict[str, int] = {}  # values under each anchor

    def check(self, event: yaml.Event) -> None:
        if isinstance(event, yaml.CollectionEndEvent):
            ended = self._path.pop()
            self._count(ended.values, ended.anchor, event)
        elif isinstance(event, yaml.NodeEvent):
            self._check_key(event)
            if isinstance(event, yaml.AliasEvent):
                if any(event.anchor == opened.anchor for opened in self._path):
                    raise DocumentError(f"{_place(event)}*{event.anchor} is inside itself")
                self._count(self._sizes.get(event.anchor, 1), None, event)
            elif isinstance(event, yaml.ScalarEvent):
                _check_tag(event, _TEXT_TAGS)
                if event.implicit[0]:
                    _check_number(event.value, _place(event))
                self._count(1, event.anchor, event)
            elif isinstance(event, yaml.CollectionStartEvent):
                _check_tag(event, (None,))
                self._path.append(_Open(event))
                if len(self._path) > MAX_DEPTH:
                    raise DocumentError(f"{_place(event)}it nests deeper than {MAX_DEPTH} levels, which is the limit")

    def _check_key(self, event: yaml.NodeEvent) -> None:
        around = self._path[-1] if self._path else None
        if around is None or around.keys is None:
            return
        around.children += 1
        if around.children % 2 and isinstance(event, yaml.ScalarEvent) and event.value != "<<":
            if event.value in around.keys:
                raise DocumentError(
                    f"{_place(event)}the key {shown(event.value)} appears twice; is a `-` missing before an entry "
                    "of a list?"
                )
            around.keys.add(event.value)

    def _count(self, values: int, anchor: str | None, event: yaml.Event) -> None:
        if anchor:
            self._sizes[anchor] = values
        if self._path:
            self._path[-1].values += values
            if self._path[-1].values > MAX_VALUES:
                raise DocumentError(f"{_place(event)}with its aliases it has more than {MAX_VALUES:,} values")


def _check_number(value: str, where: str) -> None:
    if _NUMBER.fullmatch(value):
        check_digits(value, where)
    if _OCTAL.fullmatch(value):
        fix = f"write {value.lstrip('+-0') or 0}, or put it in quotes if it is text"
        raise DocumentError(f"{where}YAML reads {value} in base 8; {fix}")


class _Open:
    """A list or mapping whose end is still to come."""

    def __init__(self, event: yaml.CollectionStartEvent):
        self.anchor: str | None = event.anchor
        self.keys: set[str] | None = set() if isinstance(event, yaml.MappingStartEvent) else None
        self.children, self.values = 0, 1


def _check_tag(event: yaml.ScalarEvent | yaml.CollectionStartEvent, known: tuple[str | None, ...]) -> None:
    if event.tag not in known:
        raise DocumentError(f"{_place(event)}the tag {shown(event.tag)} means nothing here; if it is text, quote it")


def _place(event: yaml.Event) -> str:
    return f"line {event.start_mark.line + 1}: "
