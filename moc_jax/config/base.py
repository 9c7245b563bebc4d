"""What every setting is checked with, once, when a value is built: type, choices, range, nesting.

A field says all of it by its type hint: `int`, `bool`, `str`, `Literal[...]`, `tuple[...]`, another `Settings`, or one
of these with a rule, `Annotated[int, Range(1, 8)]`. Python, the command line and JSON all pass here.
"""

import contextlib
import dataclasses
import difflib
import functools
import numbers
import operator
import os
import pathlib
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from moc_jax.showing import shown

INT32 = 2**31 - 1  # steps, sizes and positions are 32-bit numbers on the devices


class ConfigError(ValueError):
    """An impossible setting: the message names the value, the limit and the fix."""


def check(ok: bool, message: str) -> None:
    """Raises ConfigError with `message` unless `ok`."""
    if not ok:
        raise ConfigError(message)


class Settings:
    """Base of the frozen dataclasses that hold settings; `at` is where the fields hang: `moc.chunk`.

    Building one converts each field to what its hint says (whole numbers to floats, lists to tuples), and raises
    ConfigError for what can't be; so what is built can be written as JSON and read back equal.
    """

    _prefix = ""

    def __init_subclass__(cls, *, at: str = "", **options: object):
        super().__init_subclass__(**options)
        cls._prefix = f"{at}." if at else ""

    def __post_init__(self):
        for name, kind in field_kinds(type(self)).items():
            object.__setattr__(self, name, checked(kind, getattr(self, name), self._prefix + name))
        self.check_together()

    def check_together(self) -> None:
        """Raises ConfigError where fields that are right one by one don't go together."""


@functools.cache
def field_kinds(kind: type) -> dict[str, Any]:
    """The type hint of each field of a dataclass, rules included."""
    hints = typing.get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


@functools.cache
def kinds_of(hint: Any) -> dict[str, type[Settings]]:
    """The kinds of a tagged union of settings, by the one `name` that each may have; empty for any other type hint.

    A union of one kind is that kind.
    """
    members = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    tags = [field_kinds(m).get("name") if dataclasses.is_dataclass(m) else None for m in members]
    names = [typing.get_args(tag) if typing.get_origin(tag) is Literal else () for tag in tags]
    return dict(zip([name for (name,) in names], members)) if all(len(name) == 1 for name in names) else {}


def kind_named(kinds: Mapping[str, type[Settings]], name: object, at: str) -> type[Settings]:
    """The kind of that name.

    Raises:
        ConfigError: there is none; `at` is where the union hangs: `codec`.
    """
    return kinds[choice(tuple(kinds), name, f"{at}.name")]


def of_another_kind(kinds: Mapping[str, type[Settings]], kind: type[Settings], field: str) -> str:
    """What is wrong with `field` where it belongs to other kinds than `kind`; empty where it belongs to none."""
    owners = [name for name, other in kinds.items() if field in field_kinds(other)]
    if not owners or field in field_kinds(kind):
        return ""
    (name,) = (name for name, other in kinds.items() if other is kind)
    return f"{field} is a setting of {' and '.join(owners)}; {name} has {', '.join(field_kinds(kind))}"


@dataclasses.dataclass(frozen=True)
class Range:
    """Limits of a number, themselves included; NaN and infinity lie in no range."""

    low: float
    """The least."""
    high: float
    """The greatest."""
    note: str = ""
    """What a value means that doesn't speak for itself: `0: no limit`."""

    def __call__(self, kind: Any, value: object, name: str) -> Any:
        number = checked(kind, value, name)
        if not self.low <= number <= self.high:
            raise ConfigError(f"{name} is {shown(value)}; it must lie in {self}")
        return number

    def __str__(self) -> str:
        low, high = (f"{x:.7g}" if isinstance(x, float) else f"{x}" for x in (self.low, self.high))
        return f"{low}..{high}" + (f" ({self.note})" if self.note else "")


@dataclasses.dataclass(frozen=True)
class Place:
    """A path, which may begin with ~."""

    optional: bool = False
    """May be empty."""
    utf8: bool = False
    """Must be UTF-8: TensorStore and ArrayRecord write under no other names."""
    bucket: bool = False
    """May be the address of a bucket of Google Cloud Storage, gs://..."""

    def __call__(self, kind: Any, value: Any, name: str) -> Any:
        try:
            path = os.fspath(value)
        except Exception:  # also what a foreign __fspath__ raises
            path = None
        if not isinstance(path, str):
            raise ConfigError(f"{name} is {shown(value)}; it must be a path, as text")
        if not path.strip() and not self.optional:
            raise ConfigError(f"{name} is empty; name a file or folder (. is the current one)")
        path = expanded(path, name)
        scheme, address, _ = path.partition("://")
        if address and not (self.bucket and scheme == "gs"):
            taken = "a path or a gs:// address" if self.bucket else "a path; copy what lies there to a disk"
            raise ConfigError(f"{name} is {shown(path)}; addresses of {scheme}:// can't be used here: give {taken}")
        return _text(path, name) if self.utf8 else kind(path)


def expanded(path: str, name: str = "the path") -> str:
    """`path` with the home folder in place of a leading ~ or ~user; addresses such as gs://bucket stay.

    Raises:
        ConfigError: no such user, or text that no path can be; `name` says in the message which path it was.
    """
    path = str.__str__(path)
    try:
        ok = b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        ok = False
    check(ok, f"{name} is {shown(path)}; a path can't contain that character")
    if not path.startswith("~"):
        return path
    home = os.path.expanduser(path)
    user = path.split("/")[0]
    check(
        home != path,
        f"{name} is {shown(path)}, but {user} has no home folder here; write the whole path, or ./{user} for a file or "
        "folder of that name",
    )
    return home


def user_cache() -> pathlib.Path:
    """This package's folder in the user's cache by the XDG rules: `$XDG_CACHE_HOME/moc_jax`, or `~/.cache/moc_jax`.

    Raises:
        RuntimeError: nothing says where the home folder is.
    """
    base = pathlib.Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else pathlib.Path.home() / ".cache") / "moc_jax"


Count = Annotated[int, Range(1, INT32)]
Natural = Annotated[int, Range(0, INT32)]
Every = Annotated[int, Range(0, INT32, "0: never")]
Size = Annotated[int, Range(1, 2**16)]
Stride = Annotated[int, Range(1, 256)]  # of patches
Seed = Annotated[int, Range(0, 2**32 - 1)]
Fraction = Annotated[float, Range(0, 1)]
Below1 = Annotated[float, Range(0, 0.9999999)]  # what is nearer to 1 is 1 in float32
Folder = Annotated[str, Place(bucket=True)]
OwnFolder = Annotated[str, Place(utf8=True, bucket=True)]  # one that is written
OptionalPath = Annotated[str, Place(optional=True)]
Workdir = Annotated[str, Place(utf8=True, bucket=True)]  # of a run; checkpoints lie in it
OptionalPlace = Annotated[str, Place(optional=True, bucket=True)]
File = Annotated[pathlib.Path, Place()]


def checked(kind: Any, value: object, name: str) -> Any:
    """`value` as the type hint `kind` says, made of plain Python values.

    Raises:
        ConfigError: another type, none of the choices, outside the range; it begins with `name`.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return arguments[1](arguments[0], value, name)
    if origin is Literal:
        return choice(arguments, value, name)
    if origin is tuple:
        return _entries(arguments, value, name)
    kinds = kinds_of(kind)
    if len(kinds) > 1:
        names = " or a ".join(member.__name__ for member in kinds.values())
        check(type(value) in kinds.values(), f"{name} is {shown(value)}; it must be a {names}")
        return value
    if type(None) in arguments:  # a type or None
        return None if value is None else checked(arguments[0], value, name)
    if dataclasses.is_dataclass(kind):
        # No subclass either: it would come back from JSON as another class.
        check(type(value) is kind, f"{name} is {shown(value)}; it must be a {getattr(kind, '__name__', kind)}")
        return value
    return {int: _int, float: _float, bool: _bool, str: _text}[kind](value, name)


def nearest(word: str, known: typing.Iterable[str]) -> str:
    """ "; did you mean ...?" for the one of `known` that `word` resembles, else nothing."""
    near = difflib.get_close_matches(word[:100], list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def choice(choices: tuple[str, ...], value: object, name: str) -> str:
    """`value`, which is one of `choices`.

    Raises:
        ConfigError: it is none of them, with the nearest; it begins with `name`.
    """
    if not isinstance(value, str) or value not in choices:
        near = nearest(value.lower(), choices) if isinstance(value, str) else ""
        raise ConfigError(f"{name} is {shown(value)}; it must be one of {', '.join(choices)}{near}")
    return choices[choices.index(value)]


def _entries(kinds: tuple[Any, ...], value: object, name: str) -> tuple[Any, ...]:
    if not isinstance(value, (tuple, list)):
        fix = "" if kinds[-1] is Ellipsis else f" of {len(kinds)}"
        with contextlib.suppress(ConfigError):
            _entries(kinds, (value,), name)
            fix = f": ({shown(value)},) in Python, [{shown(value)}] in JSON"
        raise ConfigError(f"{name} is {shown(value)}; it must be a list{fix}")
    if kinds[-1] is Ellipsis:
        kinds = (kinds[0],) * len(value)
    check(len(kinds) == len(value), f"{name} has {len(value)} entries; it must have {len(kinds)}")
    return tuple(checked(k, v, f"{name}[{i}]") for i, (k, v) in enumerate(zip(kinds, value)))


def _wrong_type(kind: type, value: object, name: str, fix: str = "") -> ConfigError:
    return ConfigError(f"{name} is {shown(value)}; it must be of type {kind.__name__}{fix}")


def _bool(value: object, name: str) -> bool:
    if not isinstance(value, bool):
        raise _wrong_type(bool, value, name, ": True or False")
    return value


def _int(value: Any, name: str) -> int:
    if isinstance(value, float) and value.is_integer() and abs(value) <= INT32:
        raise _wrong_type(int, value, name, f": write {int(value)}")
    if isinstance(value, bool):
        raise _wrong_type(int, value, name)
    try:
        return operator.index(value)  # numpy's whole numbers too
    except Exception:  # also what a foreign __index__ raises
        raise _wrong_type(int, value, name) from None


def _float(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise _wrong_type(float, value, name)
    try:
        return float(value)
    except OverflowError:
        raise ConfigError(f"{name} is {shown(value)}, which is more than a float can hold") from None
    except Exception:  # numpy's durations pass for numbers
        raise _wrong_type(float, value, name) from None


def _text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise _wrong_type(str, value, name, ": put it in quotes")
    text = str.__str__(value)  # plain, also from a subclass
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{name} is {shown(text)}, which is not UTF-8 text") from None
    return text
