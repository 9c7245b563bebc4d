"""How messages show values and names: on one line, in letters that any terminal has, and never at great length."""

import os
import reprlib

_LONGEST_NAME = 200  # characters


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


class _Short(reprlib.Repr):
    def repr_int(self, x: int, level: int) -> str:
        if x.bit_length() < 400:
            return repr(x)
        return f"an integer of about {x.bit_length() * 3 // 10:,} digits"  # Python refuses to write the largest


_SHORT = _Short(maxstring=120, maxother=160, maxlist=4, maxtuple=4, maxdict=4, maxlevel=3)
