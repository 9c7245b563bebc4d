"""A config as JSON: what lies beside a run and inside each checkpoint. The round trip is exact.

Reading is strict: an unknown key or a value of the wrong type is an error that names it. A key that is missing, because
the file is older than the field, takes the field's default and is named in a warning.
"""

import dataclasses
import difflib
import json
import types
import typing
import warnings
from typing import Any, Literal

from moc_jax.config import Config, ConfigError


def config_to_json(config: Config) -> str:
    """Every field, nested as the dataclasses are; tuples become lists."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def config_from_json(text: str, *, name: str = "config.json") -> Config:
    """The config that `config_to_json` wrote.

    Raises:
        ConfigError: not JSON, an unknown key (with the nearest known one), a value of the wrong type, or a setting
            that can't be. `name` says in the message which file it was.
    """
    try:
        tree = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{name} is no JSON: {error}") from error
    return _dataclass(Config, tree, "", name)


def differences(a: Any, b: Any, path: str = "") -> dict[str, tuple[Any, Any]]:
    """The fields in which two configs of one kind differ: dotted name -> (value in `a`, value in `b`)."""
    if not dataclasses.is_dataclass(a) or type(a) is not type(b):
        return {} if a == b else {path: (a, b)}
    found = {}
    for field in dataclasses.fields(a):
        inner = f"{path}.{field.name}" if path else field.name
        found |= differences(getattr(a, field.name), getattr(b, field.name), inner)
    return found


def _dataclass(kind: type, tree: Any, path: str, name: str) -> Any:
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{name}: {path or 'the file'} is {tree!r}; it must be an object with the fields of {kind.__name__}"
        )
    hints = typing.get_type_hints(kind)
    fields = {f.name: hints[f.name] for f in dataclasses.fields(kind)}
    prefix = f"{path}." if path else ""
    for key in tree:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known are {', '.join(fields)}"
            raise ConfigError(f"{name}: unknown key {prefix}{key}; {hint}")
    missing = [key for key in fields if key not in tree]
    if missing:
        warnings.warn(f"{name} lacks {', '.join(prefix + m for m in missing)}: the defaults are used", stacklevel=2)
    return kind(**{key: _value(fields[key], tree[key], prefix + key, name) for key in tree})


def _value(kind: Any, value: Any, path: str, name: str) -> Any:
    """`value` as `kind` says: a nested dataclass, a tuple, a Literal or a plain int, float, bool or str."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _dataclass(typing.cast(type, kind), value, path, name)
    if origin is Literal:
        if value not in arguments:
            near = difflib.get_close_matches(str(value), [str(a) for a in arguments], n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"{name}: {path} is {value!r}; it must be one of {', '.join(map(str, arguments))}{hint}")
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise ConfigError(f"{name}: {path} is {value!r}; it must be a list")
        kinds = (arguments[0],) * len(value) if arguments[-1] is Ellipsis else arguments
        if len(kinds) != len(value):
            raise ConfigError(f"{name}: {path} has {len(value)} entries; it must have {len(kinds)}")
        return tuple(_value(k, v, f"{path}[{i}]", name) for i, (k, v) in enumerate(zip(kinds, value)))
    if isinstance(kind, types.UnionType):
        raise TypeError(f"{path}: {kind} can't be told apart in JSON; give the field one type")
    accepted = {int: (int,), float: (int, float), bool: (bool,), str: (str,)}[kind]
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise ConfigError(f"{name}: {path} is {value!r}; it must be of type {kind.__name__}")
    return kind(value)
