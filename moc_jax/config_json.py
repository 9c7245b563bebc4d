"""A config as JSON: what lies beside a run and inside each checkpoint. The round trip is exact.

Reading is strict: an unknown key, a key given twice or a value of the wrong type is an error that names it. A key that
is missing, because the file is older than the field, takes the field's default and is named in a warning. Types and
ranges are checked by the config itself.
"""

import dataclasses
import json
import typing
import warnings
from typing import Any

from moc_jax.config import Config, ConfigError
from moc_jax.config.base import checked, field_kinds, nearest
from moc_jax.reading import parse_json
from moc_jax.showing import shown


def config_to_json(config: Config) -> str:
    """Every field, nested as the dataclasses are; tuples become lists."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def config_from_json(text: str, *, name: str = "config.json") -> Config:
    """The config that `config_to_json` wrote.

    Raises:
        ConfigError: not JSON, an unknown key (with the nearest known one), a key given twice, a value of the wrong
            type, or an impossible setting. `name` says in the message which file it was.
    """
    try:
        return _dataclass(Config, parse_json(text), "", name)
    except ValueError as error:
        raise ConfigError(f"{name}: {error}") from error


def differences(a: object, b: object, path: str = "") -> dict[str, tuple[object, object]]:
    """The fields in which two configs of one kind differ: dotted name -> (value in `a`, value in `b`)."""
    if not dataclasses.is_dataclass(a) or type(a) is not type(b):
        return {} if a == b else {path: (a, b)}
    found = {}
    for field in dataclasses.fields(a):
        inner = f"{path}.{field.name}" if path else field.name
        found |= differences(getattr(a, field.name), getattr(b, field.name), inner)
    return found


def _dataclass(kind: type, tree: object, path: str, name: str) -> Any:
    if not isinstance(tree, dict):
        what = f"{path or 'the file'} is {shown(tree)}"
        raise ConfigError(f"{what}; it must be an object with the fields of {kind.__name__}")
    kinds = field_kinds(kind)
    prefix = f"{path}." if path else ""
    for key in tree:
        if key not in kinds:
            hint = nearest(key, kinds).replace("mean ", f"mean {prefix}") or f"; known are {', '.join(kinds)}"
            raise ConfigError(f"unknown key {prefix}{key}{hint}")
    missing = [key for key in kinds if key not in tree]
    for field in dataclasses.fields(kind):
        if field.name in missing and field.default is dataclasses.MISSING:
            raise ConfigError(f"{path} lacks {field.name}; it must be an object with {' and '.join(kinds)}")
    if missing:
        warnings.warn(f"{name} lacks {', '.join(prefix + m for m in missing)}: the defaults are used", stacklevel=2)
    return kind(**{key: _value(kinds[key], tree[key], prefix + key, name) for key in tree})


def _value(kind: Any, value: object, path: str, name: str) -> Any:
    """`value`, checked here, where the place in the file is known, with a dataclass in place of every object."""
    if dataclasses.is_dataclass(kind):
        return _dataclass(typing.cast(type, kind), value, path, name)
    if typing.get_origin(kind) is tuple and isinstance(value, list):
        record = typing.get_args(kind)[0]
        if dataclasses.is_dataclass(record):
            value = [_value(record, v, f"{path}[{i}]", name) for i, v in enumerate(value)]
    return checked(kind, value, path)
