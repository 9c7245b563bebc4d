"""Many records of one dataclass as arrays, a column for each field; a record is made when it is looked at.

A million scenes are a few hundred megabytes that are mapped into memory, instead of gigabytes of Python objects.
"""

import array
import bisect
import dataclasses
import functools
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal, Self, overload

import numpy as np

from moc_jax.shapes import Int

_Columns = Mapping[str, np.ndarray]
_TEXTS, _TEXT_ENDS = "texts", "text_ends"
_INT32 = np.iinfo(np.int32)


class Texts(Sequence[str]):
    """Texts as one blob; what was not UTF-8 in a file's name is kept."""

    def __init__(self, blob: np.ndarray, ends: np.ndarray):
        self._blob, self._ends = blob, ends

    def __len__(self) -> int:
        return len(self._ends)

    def raw(self, index: int) -> bytes:
        """A text's bytes."""
        begin = int(self._ends[index - 1]) if index else 0
        return self._blob[begin : int(self._ends[index])].tobytes()

    def __getitem__(self, index):
        return self.raw(index).decode("utf-8", "surrogatepass")


class Table[T](Sequence[T]):
    """Records of a dataclass of texts, Literals, bools, ints and tuples of such records.

    Texts are kept once, and numbered; the tuples of all records lie one after another.
    """

    def __init__(self, kind: type[T], columns: _Columns, at: str = "", rows: np.ndarray | None = None):
        """A view of columns that `of` or `checked` made.

        Args:
            kind: the dataclass.
            columns: arrays by name.
            at: what the names of this table's columns begin with.
            rows: which records, in which order; None: all.
        """
        self.kind, self._columns, self._at, self._rows = kind, columns, at, rows

    def __reduce__(self) -> tuple:
        return Table, (self.kind, self._columns, self._at, self._rows)

    @classmethod
    def of(cls, kind: type[T], records: Iterable[T], at: str = "") -> Self:
        """The records as columns."""
        columns = _Builder(kind, texts := {})
        for record in records:
            columns.add(record)
        raw = [text.encode("utf-8", "surrogatepass") for text in texts]
        arrays = columns.arrays(at)
        arrays[at + _TEXTS] = np.frombuffer(b"".join(raw), np.uint8)
        arrays[at + _TEXT_ENDS] = np.cumsum([len(text) for text in raw], dtype=np.int64)
        return cls(kind, arrays, at)

    @classmethod
    def checked(cls, kind: type[T], columns: _Columns, at: str) -> Self:
        """A table of columns that come from a file.

        Raises:
            ValueError: they are not what `of` makes; names the column.
        """
        ends = _column(columns, at + _TEXT_ENDS, "i", None)
        _check_ends(ends, len(_column(columns, at + _TEXTS, "u", None)), at + _TEXT_ENDS)
        _check(kind, columns, at, len(ends), None)
        return cls(kind, columns, at)

    @property
    def columns(self) -> dict[str, np.ndarray]:
        """What to write to a file: all columns, whichever rows are shown."""
        return {name: self._columns[name] for name in self._columns if name.startswith(self._at)}

    def __len__(self) -> int:
        return self._size if self._rows is None else len(self._rows)

    @functools.cached_property
    def _size(self) -> int:
        name, hint = next(iter(_hints(self.kind).items()))
        return len(self._columns[self._at + name + _suffix(hint)])

    @functools.cached_property
    def texts(self) -> Texts:
        """What the numbers of text columns are numbers of."""
        return Texts(self._columns[self._at + _TEXTS], self._columns[self._at + _TEXT_ENDS])

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> "Table[T]": ...
    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.select(np.arange(len(self))[index])
        row = range(len(self))[index]
        return self._record(self.kind, self._at, row if self._rows is None else int(self._rows[row]))

    def __iter__(self) -> Iterator[T]:
        return (self[row] for row in range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str) or len(self) != len(other):
            return NotImplemented
        return all(ours == theirs for ours, theirs in zip(self, other))

    __hash__ = None  # type: ignore[assignment]

    def select(self, rows: Int[np.ndarray, " n"]) -> "Table[T]":
        """These of the records, by their number here."""
        return Table(self.kind, self._columns, self._at, rows if self._rows is None else self._rows[rows])

    def column(self, field: str) -> np.ndarray:
        """A field of all records: ints and bools as they are, the numbers of texts, and of choices of a Literal."""
        found = self._columns[self._at + field]
        return found if self._rows is None else found[self._rows]

    def values(self, field: str) -> Iterator[str]:
        """The texts of a text column."""
        return (self.texts[number] for number in self.column(field).tolist())

    def chosen(self, field: str, choice: str) -> np.ndarray:
        """Which records have this choice of a Literal."""
        return self.column(field) == typing.get_args(_hints(self.kind)[field]).index(choice)

    def inner(self, field: str, inner: str) -> np.ndarray:
        """A field of the inner records of the whole table, whichever rows are shown."""
        return self._columns[f"{self._at}{field}.{inner}"]

    def inner_of(self, field: str, inner: str) -> Iterator[np.ndarray]:
        """A field of the inner records of each record."""
        return self.per_record(field, self.inner(field, inner))

    def per_record(self, field: str, values: np.ndarray) -> Iterator[np.ndarray]:
        """Each record's part of `values`, which has one for each of `inner`."""
        return (values[first:end] for first, end in zip(*self._spans(field)))

    def counts(self, field: str) -> np.ndarray:
        """How many inner records each record has."""
        first, end = self._spans(field)
        return end - first

    def sums(self, field: str, values: np.ndarray) -> np.ndarray:
        """The sum over each record's inner records of `values`, which has one for each of `inner`."""
        first, end = self._spans(field)
        total = np.concatenate([np.zeros(1, np.int64), np.cumsum(values, dtype=np.int64)])
        return total[end] - total[first]

    def _spans(self, field: str) -> tuple[np.ndarray, np.ndarray]:
        ends = self._columns[f"{self._at}{field}.ends"]
        firsts = np.concatenate([np.zeros(1, ends.dtype), ends[:-1]])
        return (firsts, ends) if self._rows is None else (firsts[self._rows], ends[self._rows])

    def _record(self, kind: type, at: str, row: int):
        values: dict[str, object] = {}
        for name, hint in _hints(kind).items():
            if inner := _inner(hint):
                ends = self._columns[f"{at}{name}.ends"]
                span = range(int(ends[row - 1]) if row else 0, int(ends[row]))
                values[name] = tuple(self._record(inner, f"{at}{name}.", k) for k in span)
                continue
            value = self._columns[at + name][row].item()
            choices = typing.get_args(hint)
            values[name] = choices[value] if choices else self.texts[value] if hint is str else value
        return kind(**values)


class TextMap(Mapping[str, str]):
    """Texts by names, as a table sorted by name."""

    @dataclasses.dataclass(frozen=True)
    class Entry:
        """A name and its text."""

        name: str
        text: str

    def __init__(self, table: "Table[Entry]"):
        self.table = table

    @classmethod
    def of(cls, texts: Mapping[str, str], at: str = "") -> Self:
        """The same mapping as columns."""
        return cls(Table.of(cls.Entry, (cls.Entry(name, texts[name]) for name in sorted(texts)), at))

    def __getitem__(self, name: str) -> str:
        row = bisect.bisect_left(range(len(self.table)), name, key=lambda row: self.table[row].name)
        if row < len(self.table) and (entry := self.table[row]).name == name:
            return entry.text
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return (entry.name for entry in self.table)

    def __len__(self) -> int:
        return len(self.table)


class _Builder:
    """Columns that grow by a record at a time."""

    def __init__(self, kind: type, texts: dict[str, int]):
        """`texts`: the number of each text so far."""
        self._texts, self._count = texts, 0
        self._plain = {name: array.array("q") for name, hint in _hints(kind).items() if not _inner(hint)}
        self._hints = {name: hint for name, hint in _hints(kind).items() if not _inner(hint)}
        self._inner = {name: _Builder(inner, texts) for name, hint in _hints(kind).items() if (inner := _inner(hint))}
        self._ends = {name: array.array("q") for name in self._inner}

    def add(self, record: object) -> None:
        for name, hint in self._hints.items():
            value = getattr(record, name)
            choices = typing.get_args(hint)
            if choices:
                value = choices.index(value)
            elif hint is str:
                value = self._texts.setdefault(value, len(self._texts))
            self._plain[name].append(value)
        for name, builder in self._inner.items():
            for inner in getattr(record, name):
                builder.add(inner)
            self._ends[name].append(builder._count)
        self._count += 1

    def arrays(self, at: str) -> dict[str, np.ndarray]:
        found = {}
        for name, hint in self._hints.items():
            values = np.frombuffer(self._plain[name], np.int64) if self._count else np.zeros(0, np.int64)
            small = values.size == 0 or (_INT32.min <= values.min() and values.max() <= _INT32.max)
            kind = np.bool_ if hint is bool else np.uint8 if typing.get_args(hint) else np.int32 if small else np.int64
            found[at + name] = values.astype(kind)
        for name, builder in self._inner.items():
            found[f"{at}{name}.ends"] = np.array(self._ends[name], np.int64)
            found |= builder.arrays(f"{at}{name}.")
        return found


@functools.cache
def _hints(kind: type) -> dict[str, type]:
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _inner(hint: type) -> type | None:
    """The dataclass of a tuple of records."""
    return typing.get_args(hint)[0] if typing.get_origin(hint) is tuple else None


def _suffix(hint: type) -> str:
    return ".ends" if _inner(hint) else ""


def _check(kind: type, columns: _Columns, at: str, texts: int, size: int | None) -> None:
    for name, hint in _hints(kind).items():
        if inner := _inner(hint):
            ends = _column(columns, f"{at}{name}.ends", "i", size)
            held = len(columns.get(f"{at}{name}.{next(iter(_hints(inner)))}", ()))
            _check_ends(ends, held, f"{at}{name}.ends")
            _check(inner, columns, f"{at}{name}.", texts, held)
            size = len(ends)
            continue
        choices = typing.get_args(hint) if typing.get_origin(hint) is Literal else ()
        values = _column(columns, at + name, "b" if hint is bool else "u" if choices else "i", size)
        size = len(values)
        limit = len(choices) if choices else texts if hint is str else None
        if limit is not None and size and not 0 <= values.min() <= values.max() < limit:
            raise ValueError(f"{at}{name} must lie in 0..{limit - 1}")


def _column(columns: _Columns, name: str, kind: str, size: int | None) -> np.ndarray:
    found = columns.get(name)
    if found is None or found.ndim != 1 or found.dtype.kind != kind or size not in (None, len(found)):
        what = "is missing" if found is None else f"is {found.dtype.name}{list(found.shape)}"
        raise ValueError(f"the column {name} {what}")
    return found


def _check_ends(ends: np.ndarray, held: int, name: str) -> None:
    if (ends[-1] if len(ends) else 0) != held or (np.diff(ends, prepend=0) < 0).any():
        raise ValueError(f"the column {name} does not divide what it should")
