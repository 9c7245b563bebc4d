"""Command lines: `--config configs/x.py --any.nested.field value` -> a `Config`, before jax starts.

Every field of the config is an option, with the comment below the field as its help; an unknown option fails and
suggests the near one. Tuples of small records are written with colons: `--train.chunk-schedule 0:10 500:5`.
"""

import argparse
import contextlib
import dataclasses
import difflib
import importlib.util
import os
import pathlib
import re
import sys
import typing
from collections.abc import Iterator, Sequence

import tyro

from moc_jax import config as config_module
from moc_jax.config import Config, ConfigError
from moc_jax.config_json import config_from_json, config_to_json
from moc_jax.signals import Interrupted

__all__ = ["clean_exit", "config_from_json", "config_to_json", "load_config", "parse", "read_config_file"]


def load_config(argv: Sequence[str]) -> Config:
    """`--config FILE` (a Python file that defines `config: Config`, or a saved config.json), then overrides.

    Raises:
        ConfigError: no such file, or no config in it.
        SystemExit: code 2 for an option or value that can't be (tyro names it), code 0 after `--help`.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    known, rest = first.parse_known_args(list(argv))
    usage = "--config FILE takes a file of configs/ (or a run's config.json); every field below overrides it."
    if known.config is None:
        if not {"-h", "--help"} & set(rest):
            raise ConfigError(
                "no --config given: name an experiment, such as --config configs/demo.py (--help lists every field)"
            )
        return parse(Config, rest, default=Config(), description=usage, flags=False)
    config, about = read_config_file(known.config)
    return parse(Config, rest, default=config, description=f"{about}\n\n{usage}" if about else usage, flags=False)


def parse[T](
    kind: type[T],
    argv: Sequence[str],
    *,
    default: T | None = None,
    description: str | None = None,
    flags: bool = True,
) -> T:
    """`kind`, a dataclass, from the command line; fields that are not given keep `default`'s values.

    Bools are flags (`--dense`), or with `flags=False` options like all others (`--mesh.distributed True`).
    """
    registry = tyro.constructors.ConstructorRegistry()
    registry.primitive_rule(_records_rule)
    return tyro.cli(
        kind,
        args=list(argv),
        default=default,
        description=description,
        registry=registry,
        config=() if flags else (tyro.conf.FlagConversionOff,),
    )


@contextlib.contextmanager
def clean_exit(*failures: type[Exception]) -> Iterator[None]:
    """Prints an expected error as one message, no traceback; a wrong setting exits with code 2, `failures` with 1.

    Ctrl-C, where nothing else is done about it, exits with 130, SIGTERM with 143.
    """
    try:
        yield
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except failures as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt as error:
        caught = error if isinstance(error, Interrupted) else Interrupted()
        print(f"{caught}; what was complete before is kept", file=sys.stderr)
        sys.exit(128 + caught.number)


def read_config_file(file: str) -> tuple[Config, str]:
    """The config that `file` defines, and the file's docstring."""
    path = pathlib.Path(file)
    if not path.is_file():
        there = [str(p) for p in sorted(path.parent.glob("*.py"))] if path.parent.is_dir() else []
        near = difflib.get_close_matches(file, there, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"{path.parent} holds {', '.join(there) or 'no .py file'}"
        raise ConfigError(f"--config {file}: there is no such file; {hint}")
    if path.suffix == ".json":
        return config_from_json(path.read_text(), name=file), ""
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(
            f"--config {file}: not a Python file; give a .py file that defines `config`, or a config.json"
        )
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, os.getcwd())  # a config may start from another one: from configs.demo import config as base
    try:
        spec.loader.exec_module(module)
    except TypeError as error:
        problem = _unknown_field(str(error))
        if problem is None:
            raise
        raise ConfigError(f"--config {file}: {problem}") from error
    finally:
        sys.path.pop(0)
    config = getattr(module, "config", None)
    if not isinstance(config, Config):
        raise ConfigError(
            f"--config {file}: it must define `config`, a moc_jax.config.Config; found {type(config).__name__}"
        )
    return config, (module.__doc__ or "").strip()


def _unknown_field(message: str) -> str | None:
    """What is wrong with MoCConfig(topk=3), by the TypeError's message; None if that was something else."""
    found = re.match(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", message)
    kind = getattr(config_module, found[1], None) if found else None
    if not (found and dataclasses.is_dataclass(kind)):
        return None
    names = [field.name for field in dataclasses.fields(kind)]
    near = difflib.get_close_matches(found[2], names, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(names)}"
    return f"{found[1]} has no setting {found[2]!r}; {hint}"


def _records_rule(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec | None:
    """tuple[Record, ...], Record being a dataclass of ints, as words `1:2:3` in the order of its fields."""
    arguments = typing.get_args(info.type)
    if typing.get_origin(info.type) is not tuple or len(arguments) != 2 or arguments[1] is not Ellipsis:
        return None
    record = arguments[0]
    if not dataclasses.is_dataclass(record) or any(f.type is not int for f in dataclasses.fields(record)):
        return None
    names = [f.name for f in dataclasses.fields(record)]

    def read(word: str):
        values = word.split(":")
        if len(values) != len(names) or not all(v.lstrip("-").isdigit() for v in values):
            raise ValueError(f"{word!r} must be whole numbers {':'.join(names)}")
        return record(**{name: int(value) for name, value in zip(names, values)})

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar=f"[{':'.join(names).upper()} ...]",
        instance_from_str=lambda words: tuple(read(word) for word in words),
        is_instance=lambda value: isinstance(value, tuple) and all(isinstance(v, record) for v in value),
        str_from_instance=lambda value: [":".join(str(getattr(v, name)) for name in names) for v in value],
    )
