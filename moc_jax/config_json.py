"""A config as JSON: what lies beside a run and inside each checkpoint. The round trip is exact.

Reading is strict: an unknown key, a key given twice or a value of the wrong type is an error that names it. A key that
is missing, because the file is older than the field, takes the field's default and is named in a warning; but `name`,
which says of what kind model, codec and text encoder are, must be there. Types and ranges are checked by the config
itself.
"""

import dataclasses
import json
import typing
import warnings
from typing import Any

from moc_jax.config import Config, ConfigError
from moc_jax.config.base import Settings, checked, field_kinds, kind_named, kinds_of, nearest, of_another_kind
from moc_jax.reading import parse_json
from moc_jax.showing import shown


def config_to_json(config: Config) -> str:
    """Every field, nested as the dataclasses are; tuples become lists."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def config_from_json[C: Config](text: str, *, name: str = "config.json", kind: type[C] = Config) -> C:
    """The config that `config_to_json` wrote.

    Raises:
        ConfigError: not JSON, an unknown key (with the nearest known one), a key given twice, a value of the wrong
            type, or an impossible setting. `name` says in the message which file it was.
    """
    try:
        return settings_from_tree(kind, parse_json(text), name=name)
    except ValueError as error:
        raise ConfigError(f"{name}: {error}") from error


def settings_from_tree[S](hint: type[S], tree: object, at: str = "", *, name: str) -> S:
    """Settings, or one kind of a tagged union of them, from what JSON gives.

    Args:
        at: where they hang in a config: `codec`.
        name: of the file, for warnings.

    Raises:
        ConfigError: as `config_from_json`.
    """
    return _value(hint, tree, at, name)


def differences(a: object, b: object, path: str = "") -> dict[str, tuple[object, object]]:
    """The fields in which two configs of one kind differ: dotted name -> (value in `a`, value in `b`)."""
    if type(a) is not type(b) and hasattr(a, "name") and hasattr(b, "name"):  # two kinds of a union
        return {f"{path}.name": (a.name, b.name)}
    if not dataclasses.is_dataclass(a) or type(a) is not type(b):
        return {} if a == b else {path: (a, b)}
    found = {}
    for field in dataclasses.fields(a):
        inner = f"{path}.{field.name}" if path else field.name
        found |= differences(getattr(a, field.name), getattr(b, field.name), inner)
    return found


def _object(tree: object, path: str, fields: str) -> dict[str, object]:
    if not isinstance(tree, dict):
        raise ConfigError(f"{path or 'the file'} is {shown(tree)}; it must be an object with the fields of {fields}")
    return tree


def _of_kind(union: dict[str, type[Settings]], value: object, path: str, name: str) -> Any:
    tree = _object(value, path, " or ".join(kind.__name__ for kind in union.values()))
    if "name" not in tree:
        raise ConfigError(f"{path} lacks name, which says what it is; it must be one of {', '.join(union)}")
    kind = kind_named(union, tree["name"], path)
    for key in tree:
        if problem := of_another_kind(union, kind, key):
            raise ConfigError(f"unknown key {path}.{key}: {problem}")
    return _dataclass(kind, tree, path, name)


def _dataclass(kind: type, value: object, path: str, name: str) -> Any:
    tree = _object(value, path, kind.__name__)
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
    if union := kinds_of(kind):
        return _of_kind(union, value, path, name)
    if dataclasses.is_dataclass(kind):
        return _dataclass(typing.cast(type, kind), value, path, name)
    if typing.get_origin(kind) is tuple and isinstance(value, list):
        record = typing.get_args(kind)[0]
        if dataclasses.is_dataclass(record):
            value = [_value(record, v, f"{path}[{i}]", name) for i, v in enumerate(value)]
    return checked(kind, value, path)
