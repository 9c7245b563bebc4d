"""What JSON holds -> the values that a dataclass's fields must be, or the first one that they are not."""

import dataclasses
import functools
import typing
from typing import Any, Literal

from moc_jax.showing import shown


def fields_of(kind: type, tree: object, where: str = "", left_out: tuple[str, ...] = ()) -> dict[str, Any]:
    """The fields of the dataclass `kind`, each of its type.

    Args:
        kind: a dataclass whose fields are dataclasses, tuples, dicts, Literals, ints, floats and texts.
        tree: as JSON gave it.
        where: what a message begins with.
        left_out: fields that JSON does not have.

    Raises:
        ValueError: names the first that is not.
    """
    hints = _hints(kind)
    names = hints.keys() - set(left_out)
    if not isinstance(tree, dict) or tree.keys() != names:
        raise ValueError(f"{where or 'it'} must have the fields {', '.join(sorted(names))}, not {shown(tree)}")
    return {name: _value(hints[name], tree[name], f"{where}.{name}".lstrip(".")) for name in tree}


@functools.cache
def _hints(kind: type) -> dict[str, object]:
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _value(kind: Any, tree: object, where: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return typing.cast(type, kind)(**fields_of(typing.cast(type, kind), tree, where))
    if origin is tuple and isinstance(tree, list):
        kinds = arguments[:1] * len(tree) if arguments[-1] is Ellipsis else arguments
        if len(kinds) == len(tree):
            return tuple(_value(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(kinds, tree)))
    if origin is dict and isinstance(tree, dict):
        return {key: _value(arguments[1], value, f"{where}[{shown(key)}]") for key, value in tree.items()}
    if (
        kind is object
        or (origin is Literal and tree in arguments)
        or (kind in (bool, int, float, str) and type(tree) is kind)
    ):
        return tree
    raise ValueError(f"{where} is {shown(tree)}; it must be {getattr(kind, '__name__', kind)}")
