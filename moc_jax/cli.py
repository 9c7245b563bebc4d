"""Command lines: `--config demo --any.nested.field value` -> a `Config`, before jax starts; and exit codes.

Every field of the config is an option, with the comment below the field as its help; an unknown option fails and
suggests the near one. Tuples of small records are written with colons: `--train.chunk-schedule 0:10 500:5`.

Importing this takes the standard library alone, so that `run` can say what is missing.
"""

import argparse
import contextlib
import dataclasses
import importlib
import importlib.util
import io
import os
import pathlib
import select
import signal
import sys
import tempfile
import threading
import traceback
import typing
import warnings
from collections.abc import Iterator, Sequence
from typing import NoReturn, TextIO

import moc_jax
from moc_jax.config import Config, ConfigError
from moc_jax.config.base import Settings, field_kinds
from moc_jax.config.file import read_config_text, run_config_file
from moc_jax.config.presets import PRESETS, with_preset
from moc_jax.config.shipped import shipped_names, shipped_or
from moc_jax.config.switch import switched
from moc_jax.config_json import config_from_json
from moc_jax.errors import Failure
from moc_jax.signals import Interrupted, Signals

if typing.TYPE_CHECKING:
    import tyro

__all__ = [
    "clean_exit",
    "load_config",
    "parse",
    "plan",
    "prepare",
    "read_config_file",
    "run",
    "sample",
    "train",
]

_Code = int | str | None  # as sys.exit takes it
UNEXPECTED = 70  # exit code: EX_SOFTWARE of sysexits.h
# What is imported of the packages that pyproject.toml asks for: always, and by the extra that programs need.
CORE = "jax flax numpy einops jaxtyping beartype"
TRAIN = "optax orbax grain array_record tyro yaml etils av scenedetect PIL matplotlib tqdm"
_CLONE = pathlib.Path(__file__).parents[1]
_CORE_ALONE = ("moc_jax.attention.", "moc_jax.models.")  # modules, run as programs, that need no more


def load_config(argv: Sequence[str]) -> Config:
    """`--config`, then overrides: a Python file that defines `config: Config`, a saved config.json, or a shipped name.

    Raises:
        ConfigError: no such config or preset, no config in the file, or several of either given.
        SystemExit: code 2 for an impossible option or value (tyro names it), code 0 after `--help`.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--config", action="append")
    first.add_argument("--preset", action="append")
    try:
        known, rest = first.parse_known_args(list(argv))
    except argparse.ArgumentError as error:
        raise ConfigError(f"{error.argument_name}: {error.message}") from error
    usage = (
        f"--config takes a name ({', '.join(shipped_names())}), a .py file of yours, or a run's config.json; --preset "
        f"takes a size of the model ({', '.join(PRESETS)}); every field below overrides them."
    )
    if known.config is None:
        if not {"-h", "--help"} & set(rest):
            raise ConfigError("no --config given: name an experiment, such as --config demo (--help lists every field)")
        return parse(Config, rest, default=Config(), description=usage, flags=False)
    for option, given in vars(known).items():
        if given and len(given) > 1:
            raise ConfigError(f"--{option} is given {len(given)} times: {', '.join(given)}; give one")
    config, about = read_config_file(known.config[0])
    if known.preset is not None:
        config = with_preset(config, known.preset[0])
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

    Args:
        flags: Bools are flags (`--dense`), or else options like all others (`--mesh.distributed True`).

    Raises:
        ConfigError: a `name` of no kind (`--codec.name`), or an option of another kind than the one named.
        SystemExit: code 2 for any other option or value that can't be, code 0 after `--help`.
    """
    import tyro

    if isinstance(default, Settings):
        default = switched(default, argv)
    registry = tyro.constructors.ConstructorRegistry()
    registry.primitive_rule(_records_rule)
    return tyro.cli(
        kind,
        args=list(argv),
        default=default,
        description=description,
        registry=registry,
        config=(tyro.conf.AvoidSubcommands, *(() if flags else (tyro.conf.FlagConversionOff,))),
    )


def read_config_file(file: str) -> tuple[Config, str]:
    """The config in `file`, .py or .json, or of a shipped one's name, and the docstring of a .py file.

    Raises:
        ConfigError: with the file, the line and the cause.
    """
    file = shipped_or(file)
    if pathlib.Path(file).suffix.lower() == ".json":
        return config_from_json(read_config_text(file), name=file), ""
    return run_config_file(file)


def _records_rule(info: "tyro.constructors.PrimitiveTypeInfo") -> "tyro.constructors.PrimitiveConstructorSpec | None":
    """tuple[Record, ...], Record being a dataclass of ints, as words `1:2:3` in the order of its fields.

    Where only some have defaults, these may be left out.
    """
    import tyro

    arguments = typing.get_args(info.type)
    if typing.get_origin(info.type) is not tuple or len(arguments) != 2 or arguments[1] is not Ellipsis:
        return None
    record = arguments[0]
    if not dataclasses.is_dataclass(record):
        return None
    kinds = field_kinds(typing.cast(type, record))
    names, fields = list(kinds), dataclasses.fields(typing.cast(type, record))
    least = sum(field.default is dataclasses.MISSING for field in fields) or len(names)

    def read(word: str):
        values = word.split(":")
        if not least <= len(values) <= len(names) or not all(v.removeprefix("-").isdecimal() for v in values):
            raise ValueError(f"{word!r} must be whole numbers {':'.join(names)}")
        return record(**{name: int(value) for name, value in zip(names, values)})

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar=f"[{':'.join(names).upper()} ...]",
        instance_from_str=lambda words: tuple(read(word) for word in words),
        is_instance=lambda value: isinstance(value, tuple) and all(isinstance(v, record) for v in value),
        str_from_instance=lambda value: [":".join(str(getattr(v, name)) for name in names) for v in value],
    )


# ------------------------------------------------------------------------------------------------ how a program ends


@contextlib.contextmanager
def clean_exit(*failures: type[Exception]) -> Iterator[None]:
    """Prints an expected error as one message: a Failure or one of `failures` exits with 1, a wrong setting with 2.

    Ctrl-C, where nothing else is done about it, exits with 130, SIGTERM with 143.
    """
    try:
        yield
    except ConfigError as error:
        _say(_message(error))
        sys.exit(2)
    except (Failure, *failures) as error:
        _say(_message(error))
        sys.exit(1)
    except KeyboardInterrupt as error:
        caught = error if isinstance(error, Interrupted) else Interrupted()
        print(f"{caught}; what was completed before is kept", file=sys.stderr)
        sys.exit(128 + caught.number)


def train() -> NoReturn:
    """`moc-train`, and train.py."""
    run("moc_jax.commands.train")


def prepare() -> NoReturn:
    """`moc-prepare`, and prepare.py."""
    run("moc_jax.commands.prepare")


def plan() -> NoReturn:
    """`moc-plan`, and plan.py."""
    run("moc_jax.commands.plan")


def sample() -> NoReturn:
    """`moc-sample`, and sample.py."""
    run("moc_jax.commands.sample")


def run(module: str) -> NoReturn:
    """The program in `module`: imports it, calls its `main(argv, signals)`, and exits, never with a traceback.

    Codes: 0; those of `clean_exit`; 2 without the packages that it needs; 141 when what read the output is gone, as
    shells have it; and `UNEXPECTED` with the place of a file that holds the traceback.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the shell
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files may be no text
    with Signals(whole_process=True) as signals:
        code: _Code = 0
        try:
            report_errors(os.path.basename(sys.argv[0]), f"{CORE} {TRAIN}")
            with clean_exit():
                with signals.deferred(line=""):  # an extension that is interrupted while it loads is broken
                    program = importlib.import_module(module)
                signals.check()
                program.main(sys.argv[1:], signals)
            sys.stdout.flush()
        except SystemExit as end:
            code = end.code
        except BaseException as error:
            code = _report(error)
        sys.exit(_flushed(code))


def report_errors_of(module: str) -> None:
    """`report_errors` for python -m `module`."""
    report_errors("-m ...", CORE if module.startswith(_CORE_ALONE) else f"{CORE} {TRAIN}")


def report_errors(program: str, packages: str) -> None:
    """From here on no error is shown as a traceback, wherever it arises; exits with 2 where packages are missing."""
    sys.excepthook = lambda kind, error, trace: sys.exit(_report(error))
    threading.excepthook = lambda failed: _report(failed.exc_value)
    sys.unraisablehook = lambda failed: _report(failed.exc_value)
    warnings.showwarning = show_warning
    with clean_exit():
        _check_packages(program, packages)


def show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """A warning in one line, as errors are shown; where it arose only if it is none of ours. Above a progress bar."""
    elsewhere = "" if category is UserWarning else f" ({category.__name__} in {filename}, line {lineno})"
    tqdm = getattr(sys.modules.get("tqdm"), "tqdm", None)
    with contextlib.suppress(OSError):
        (tqdm.write if tqdm else print)(f"warning: {message}{elsewhere}", file=file or sys.stderr)


def _check_packages(program: str, packages: str) -> None:
    missing = [name for name in packages.split() if importlib.util.find_spec(name) is None]
    if not missing:
        return
    named = f"this Python ({sys.executable}) lacks {', '.join(missing[:4])}{', ...' * (len(missing) > 4)}"
    extra = bool(set(missing) & set(TRAIN.split()))
    if (_CLONE / "pyproject.toml").is_file():
        command = f"python {program}" if program.startswith("-m") or program.endswith(".py") else program
        here = "'.[train]'" if extra else "."
        raise ConfigError(
            f"{named}: run `make setup` once, then .venv/bin/{command}; or `pip install -e {here}` with this one"
        )
    what = "the extra `train` brings them: pip install 'moc_jax[train]'" if extra else "pip install moc_jax brings them"
    raise ConfigError(f"{named}; {what}")


def _flushed(code: _Code) -> _Code:
    """The exit code once all output is out. What can't be goes nowhere, or Python would complain at its end."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            code = code or _report(error)
    return code


def _report(error: BaseException | None) -> int:
    """Says in one line what nobody expected, and where its traceback lies; returns the exit code."""
    if isinstance(error, BrokenPipeError) and _reader_gone():
        _say("stopped: the reader of the output is gone")
        return 128 + signal.SIGPIPE
    if error is None or isinstance(error, (SystemExit, KeyboardInterrupt)):
        return 130
    place = "".join(f" in {f.filename}, line {f.lineno}" for f in traceback.extract_tb(error.__traceback__)[-1:])
    what = " ".join("".join(traceback.format_exception_only(error)).split())[:300] + place
    try:
        with tempfile.NamedTemporaryFile("w", prefix="moc_jax-", suffix=".txt", delete=False, errors="replace") as file:
            file.write(f"moc_jax {moc_jax.__version__}, Python {sys.version}\n{sys.argv}\n")
            traceback.print_exception(error, file=file)
        kept = f"the traceback is in {file.name}; please report it"
    except Exception as problem:
        kept = f"its traceback could not be written: {problem}"
    _say(f"error: unexpected {what}; {kept}")
    return UNEXPECTED


def _reader_gone() -> bool:
    """Whether the pipe that takes our output has no other end; the error itself doesn't say which pipe it was."""
    poll = select.poll()
    for stream in (sys.stdout, sys.stderr):
        poll.register(stream.fileno(), 0)
    return bool(poll.poll(0))


def _message(error: BaseException) -> str:
    """The message, and what else went wrong on the way out; not what JAX says of tracebacks, which are not shown."""
    notes = [note for note in getattr(error, "__notes__", ()) if "JAX_TRACEBACK_FILTERING" not in note]
    return "\n".join([f"error: {error}", *(f"  {note}" for note in notes)])


def _say(line: str) -> None:
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)
