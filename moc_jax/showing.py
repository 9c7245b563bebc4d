"""How messages show values and names: on one line, in letters that any terminal has, and never at great length."""

import os
import re
import reprlib
from collections.abc import Iterable, Mapping

_LONGEST_NAME = 200  # characters

Shapes = Mapping[str, tuple[int, ...]]
"""Of named tensors."""


def shown(value: object) -> str:
    """repr(value), cut short and on one line, whatever the value is."""
    try:
        return printable(_SHORT.repr(value))
    except Exception:  # whatever a foreign __repr__ raises
        return f"one {type(value).__name__} too long to show"


def printable(text: str) -> str:
    """All of a text on one line: names of files may hold newlines, and bytes that are not UTF-8."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def named(path: str | os.PathLike[str]) -> str:
    """A path or an address as `printable`, cut short."""
    text = printable(os.fspath(path))
    return text if len(text) <= _LONGEST_NAME else f"{text[:120]}… ({len(text)} characters)"


def mismatches(shapes: Shapes, wanted: Shapes) -> list[str]:
    """All that is wrong with named tensors: which are missing, which too many, which of other shapes."""
    found = []
    if missing := grouped(name for name in wanted if name not in shapes):
        found.append(f"missing: {', '.join(missing)}")
    if extra := grouped(name for name in shapes if name not in wanted):
        found.append(f"not of this model: {', '.join(extra)}")
    for name in sorted(shapes.keys() & wanted.keys()):
        if tuple(shapes[name]) != wanted[name]:
            found.append(f"{name} has shape {tuple(shapes[name])}, not {wanted[name]}")
    return found


def contradictions(settings: Mapping[str, object], wanted: Mapping[str, object]) -> list[str]:
    """All fields of a network's config.json that say something else than its tensors; null says nothing."""
    return [
        f"its config.json says {name} {shown(settings[name])}, but by its tensors it is {shown(value)}"
        for name, value in wanted.items()
        if settings.get(name) not in (None, value)
    ]


def grouped(names: Iterable[str]) -> list[str]:
    """Names, those of several blocks together: `blocks.{0-29}.ffn.0.weight`."""
    blocks: dict[str, list[int]] = {}
    for name in names:
        found = re.search(r"blocks?\.(\d+)\.", name)
        key = name if found is None else f"{name[: found.start(1)]}{{}}{name[found.end(1) :]}"
        blocks.setdefault(key, []).extend([] if found is None else [int(found[1])])
    return sorted(key.replace("{}", _ranges(sorted(of))) if of else key for key, of in blocks.items())


def _ranges(numbers: list[int]) -> str:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    text = ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in runs)
    return text if len(numbers) == 1 else f"{{{text}}}"


class _Short(reprlib.Repr):
    def repr_int(self, x: int, level: int) -> str:
        if x.bit_length() < 400:
            return repr(x)
        return f"an integer of about {x.bit_length() * 3 // 10:,} digits"  # Python refuses to write the largest


_SHORT = _Short(maxstring=120, maxother=160, maxlist=4, maxtuple=4, maxdict=4, maxlevel=3)
