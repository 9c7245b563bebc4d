"""Config files written in Python. Whatever is wrong with one is a ConfigError with the file, the line and the cause."""

import contextlib
import dataclasses
import difflib
import os
import pathlib
import re
import sys
import traceback
import types

from moc_jax import config as config_module
from moc_jax.config import Config, ConfigError
from moc_jax.config.base import check, expanded, nearest
from moc_jax.config.shipped import shipped_names
from moc_jax.reading import DocumentError, decode_text
from moc_jax.showing import shown


def read_config_text(file: str) -> str:
    """The text of a config file, of whichever kind.

    Raises:
        ConfigError: no such file (with the nearest name), no file at all, one that can't be read, or no UTF-8 text.
    """
    path = pathlib.Path(expanded(file, "--config"))
    try:
        _check_is_file(file, path)
        check(
            path.suffix.lower() in (".py", ".json"),
            f"--config {file}: give a .py file that defines `config`, or a .json",
        )
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"--config {file} can't be read: {error.strerror or error}") from error
    try:
        return decode_text(data)
    except DocumentError as error:
        where = file if error.line is None else f"line {error.line} of {file}"
        raise ConfigError(f"--config, {where}: {error.reason}") from error


def _check_is_file(file: str, path: pathlib.Path) -> None:
    if path.is_file():
        return
    folder = path if path.is_dir() else path.parent
    there = [str(p) for p in sorted(folder.glob("*.py"))] if folder.is_dir() else []
    near = difflib.get_close_matches(str(path), there, n=1, cutoff=0.5)
    listed = f"{', '.join(there[:20])}{', ...' * (len(there) > 20)}" if there else "no .py file"
    hint = f"did you mean {near[0]}?" if near else f"{folder} holds {listed}"
    if not folder.is_dir():
        hint = f"nor is there a folder {shown(str(folder))}, seen from {os.getcwd()}"
    what = "that is a folder" if path.is_dir() else "that is not a file" if path.exists() else "there is no such file"
    names = shipped_names()
    if path.stem in names:
        what += f" (`--config {path.stem}` is the one that moc_jax comes with)"
    elif file and file == path.stem and not path.exists():  # meant as a name
        what, hint = "there is no config of that name", f"there are: {', '.join(names)}{nearest(file, names)}"
    raise ConfigError(f"--config {shown(file) if not file.strip() else file}: {what}; {hint}")


def run_config_file(file: str) -> tuple[Config, str]:
    """The config that a Python file defines as `config`, and the file's docstring.

    Raises:
        ConfigError: as `read_config_text`; a file that is not Python, that fails, or that defines no config.
    """
    source, path = read_config_text(file), expanded(file)
    module = types.ModuleType(f"config_{pathlib.Path(path).stem}")
    module.__file__ = path
    sys.modules[module.__name__] = module  # where a dataclass looks for the names in its type hints
    here = os.getcwd()
    sys.path.insert(0, here)  # a config may start from another one: from configs.demo import config as base
    try:
        # Compiled here, since Python's own cache takes a file for unchanged that was edited within a second.
        exec(compile(source, path, "exec"), module.__dict__)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        line, cause = _cause(error, path)
        where = f"line {line} of {file}" if line else file
        raise ConfigError(f"--config, {where}: {cause}") from error
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(here)
    config = getattr(module, "config", None)
    if type(config) is not Config:  # nor a subclass, which would come back from JSON as another class
        raise ConfigError(
            f"--config {file}: it must define `config`, a moc_jax.config.Config; found {type(config).__name__}"
        )
    return config, (module.__doc__ or "").strip()


def _cause(error: BaseException, path: str) -> tuple[int | None, str]:
    """The line of the file at `path` that failed, and why."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    lines = [frame.lineno for frame in frames if frame.filename == path]
    # Not str(error), which may fail as well.
    text = " ".join(traceback.format_exception_only(error)[0].partition(": ")[2].split())[:500]
    at = (frames[-1].filename, frames[-1].lineno) if frames else (path, None)
    if isinstance(error, SyntaxError):
        at, text = (error.filename, error.lineno), f"{error.msg}: {shown((error.text or '').strip())}"
    if at[0] == path:
        lines.append(at[1])
    unknown = _unknown_field(text) if isinstance(error, TypeError) else ""
    if unknown or isinstance(error, ConfigError):
        cause = unknown or text
    else:
        elsewhere = f" (line {at[1]} of {at[0]})" if at[0] != path else ""
        cause = f"{type(error).__name__}{': ' * bool(text)}{text}{elsewhere}"
    return (lines[-1] if lines else None), cause


def _unknown_field(problem: str) -> str:
    """What is wrong with MoCConfig(topk=3), by the TypeError's message; empty if that was something else."""
    found = re.match(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", problem)
    kind = getattr(config_module, found[1], None) if found else None
    if not (found and dataclasses.is_dataclass(kind)):
        return ""
    names = [field.name for field in dataclasses.fields(kind)]
    near = difflib.get_close_matches(found[2], names, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(names)}"
    return f"{found[1]} has no setting {found[2]!r}; {hint}"
