"""Every field of the config, found by reflection, so that a new one is tested without a word."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from moc_jax.config import Config
from moc_jax.config.base import field_kinds, kinds_of


def fields(settings: type = Config, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The path of each field that holds a value; of a union, those of its first kind, as in Config."""
    for name, hint in field_kinds(settings).items():
        kind = next(iter(kinds_of(hint).values()), hint)
        if dataclasses.is_dataclass(kind):
            yield from fields(kind, (*path, name))
        else:
            yield (*path, name)


def get(config: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        config = getattr(config, name)
    return config


def put(config: Any, path: tuple[str, ...], value: Any) -> Any:
    """`config` with another value in one place."""
    name, *rest = path
    new = put(getattr(config, name), tuple(rest), value) if rest else value
    return dataclasses.replace(config, **{name: new})


def option(path: tuple[str, ...]) -> str:
    return "--" + ".".join(path).replace("_", "-")
