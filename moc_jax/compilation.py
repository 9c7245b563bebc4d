"""Compiled programs are kept: by jax's persistent cache, in the user's cache folder unless a setting names another.

A program's key is made of its code, the compiler's version and flags, and the devices with all their features, so
different machines may share a folder. Of several processes the first one writes. Two things would keep a program from
being found again: a callback into Python inside it, which is never stored, and a shape that differs between starts.

To ask jax, a program has to be traced and lowered, which for a training step takes longer than to load it. So on
accelerators those of a run of one process are kept a second time, under what they are made of: settings, shapes, the
package's source and all versions. Whoever can write to the folder can have code executed, as with jax's cache.
"""

import contextlib
import functools
import hashlib
import importlib
import importlib.metadata
import os
import pathlib
import pickle
import re
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence

import jax
from etils import epath
from jax.experimental import serialize_executable
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from moc_jax.config.base import user_cache
from moc_jax.files import is_address, remove_leftovers, whole_file
from moc_jax.phases import garbage_left

LIMIT = 8 << 30
"""Bytes that a folder may hold when a run starts; the demo's programs take 5 MB, those of a large model some 100 MB."""

_IN_TURN = "xla_gpu_disable_async_collectives", "ALLCOLLECTIVES"  # see `mesh_options`
_TRACED = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "einops",
    "numpy",
    "jaxtyping",
    "beartype",
)  # whose code programs are made of
_FLAGS = "XLA_FLAGS", "LIBTPU_INIT_ARGS"
_UNFIT = {"cpu"}  # platforms, of which nothing says which machine's instructions a program takes
_RUNTIMES = {"gpu": "jax.experimental.mosaic.gpu"}  # loads what kernels call; tracing one would have imported it
_folder: epath.Path | None = None  # of `kept_programs`, while it runs
_FAILED = re.compile(r"Error (reading|writing) persistent compilation cache entry for '(.*?)': (.*)", re.DOTALL)
_KEEP_ALL = {
    "jax_persistent_cache_min_compile_time_secs": (1.0, 0.0),
    "jax_persistent_cache_min_entry_size_bytes": (0, -1),
}


@contextlib.contextmanager
def kept_programs(setting: str) -> Iterator[None]:
    """While the block runs, what is compiled is taken from the cache, or written there; no failure of it stops a run.

    Args:
        setting: a folder or address; `auto`: what jax was given (JAX_COMPILATION_CACHE_DIR), else `user_folder`; empty:
            nothing is kept.
    """
    before = {name: getattr(jax.config, name) for name in ("jax_compilation_cache_dir", *_KEEP_ALL)}
    given = before["jax_compilation_cache_dir"]
    folder = _made(given or user_folder) if setting == "auto" else _made(setting) if setting else None
    if folder is not None and str(folder) != given and not is_address(folder):
        remove_leftovers(pathlib.Path(folder))
        prune(pathlib.Path(folder), LIMIT)
    values = {name: keep for name, (usual, keep) in _KEEP_ALL.items() if before[name] == usual}  # else the user's own
    show = warnings.showwarning
    global _folder
    try:
        _folder = folder
        _configure({"jax_compilation_cache_dir": None if folder is None else str(folder), **values})
        warnings.showwarning = show if folder is None else _reported_once(folder, show)
        yield
    finally:
        _folder = None
        warnings.showwarning = show
        _configure(before)


def _configure(values: dict[str, str | float | None]) -> None:
    if values["jax_compilation_cache_dir"] != jax.config.jax_compilation_cache_dir:
        reset_cache()  # jax looks at the folder once
    for name, value in values.items():
        jax.config.update(name, value)


def mesh_options(mesh: jax.sharding.Mesh) -> dict[str, str] | None:
    """What a program over a mesh is compiled with, but for what XLA_FLAGS names.

    On GPUs that NVLink joins, nothing is computed while devices exchange. NCCL would take multiprocessors from kernels
    that fill the GPU, one thread block on each, and these would wait for the slowest as long as the exchange takes;
    it takes longer, too, as it waits for theirs to end on every GPU. Measured: docs/performance.md.
    """
    devices = [] if mesh.empty else list(mesh.devices.flat)
    if len(devices) < 2 or devices[0].platform != "gpu" or _IN_TURN[0] in os.environ.get("XLA_FLAGS", ""):
        return None
    joined = {getattr(device, "slice_index", device.process_index) for device in devices}
    return dict([_IN_TURN]) if len(joined) == 1 else None


def built(mesh: jax.sharding.Mesh, function: jax.stages.Wrapped, *args: object) -> jax.stages.Compiled:
    """`function` compiled for these arguments, with the mesh in context, of which each thread has its own."""
    with contextlib.nullcontext() if mesh.empty else jax.set_mesh(mesh):
        with garbage_left():
            lowered = function.lower(*args)
        _listen()
        hits = _built.hits
        program = lowered.compile(compiler_options=mesh_options(mesh))
        _built.last_was_found = _built.hits > hits
        return program


class _Built(threading.local):
    """Of this thread: how many programs jax found in its cache, and whether the last `built` one was among them."""

    hits = 0
    last_was_found = False


_built = _Built()


@functools.cache
def _listen() -> None:
    def heard(event: str, **_: object) -> None:
        _built.hits += event == "/jax/compilation_cache/cache_hits"

    jax.monitoring.register_event_listener(heard)


# ------------------------------------------------------------------------------------------------ found without tracing


def find_program(made_of: object, devices: Sequence[jax.Device]) -> jax.stages.Compiled | None:
    """What `keep_program` was given with an equal `made_of`, by an equal version of everything, for equal devices.

    None where it was not, or can't be read. Always at an address, where nothing is kept this way, and with several
    processes: compilers may work together, and those of all processes then have to be asked.

    Args:
        made_of: what the program is made of, code apart; its repr says all of it.
        devices: those that it runs on, in the order of its mesh.
    """
    file = _program_file(made_of, devices)
    if file is None or not file.exists():
        return None
    try:
        if devices[0].platform in _RUNTIMES:
            importlib.import_module(_RUNTIMES[devices[0].platform])
        program = pickle.loads(file.read_bytes())
        return serialize_executable.deserialize_and_load(*program, execution_devices=devices)
    except Exception as error:  # cut off, or of another kind of machine under the same name
        warnings.warn(f"{file} can't be used, and is removed: {error}", stacklevel=2)
        with contextlib.suppress(OSError):
            file.unlink()
        return None


def keep_program(made_of: object, devices: Sequence[jax.Device], program: jax.stages.Compiled) -> None:
    """Keeps what this thread has `built` where `find_program` looks; where that fails, the next start traces it again.

    What jax found in its own cache may lack the machine code when it is serialized again, which shows when it runs.
    """
    file = _program_file(made_of, devices)
    if file is None or _built.last_was_found:
        return
    with contextlib.suppress(Exception):  # some can't be serialized, and jax reports a folder that can't be written
        data = pickle.dumps(serialize_executable.serialize(program))
        with whole_file(file) as partial:
            partial.write_bytes(data)


def kept_program(
    made_of: object, devices: Sequence[jax.Device], build: Callable[[], jax.stages.Compiled]
) -> jax.stages.Compiled:
    """What was kept, or else `build()`, which is kept then; arguments of `find_program`."""
    program = find_program(made_of, devices)
    if program is None:
        keep_program(made_of, devices, program := build())
    return program


def _program_file(made_of: object, devices: Sequence[jax.Device]) -> epath.Path | None:
    if _folder is None or is_address(_folder) or jax.process_count() > 1 or devices[0].platform in _UNFIT:
        return None
    there = [(repr(device), device.device_kind, device.client.platform_version) for device in devices]  # a TPU's place
    options = {name: value for name, value in jax.config.values.items() if "cache" not in name}
    flags = [os.environ.get(name) for name in _FLAGS]
    key = repr((made_of, _source_digest(), there, sorted(options.items(), key=str), flags))
    return _folder / f"moc_jax-{hashlib.sha256(key.encode()).hexdigest()}-cache"


@functools.cache
def _source_digest() -> str:
    """Of this package's source, and the versions of what it is built on."""
    found = hashlib.sha256()
    for path in sorted(pathlib.Path(__file__).parent.rglob("*.py")):
        found.update(path.read_bytes())
    for name in _TRACED:
        found.update(importlib.metadata.version(name).encode())
    return found.hexdigest()


# ------------------------------------------------------------------------------------------------ the folder


def user_folder() -> pathlib.Path:
    """Where a user's programs lie; RuntimeError as `user_cache`."""
    return user_cache() / "programs"


def prune(folder: pathlib.Path, limit: int) -> None:
    """Removes what was not used for the longest time, until `folder` holds at most `limit` bytes.

    Not by jax's own limit: it needs another package, and makes processes wait for each other at every program.
    """
    with contextlib.suppress(OSError):  # another start may be at it, or the folder be read-only
        found = [(entry, entry.stat()) for entry in folder.glob("*-cache")]
        size = sum(stat.st_size for _, stat in found)
        for entry, stat in sorted(found, key=lambda one: max(one[1].st_atime, one[1].st_mtime)):
            if size <= limit:
                break
            entry.unlink(missing_ok=True)
            size -= stat.st_size


def _made(place: str | Callable[[], pathlib.Path]) -> epath.Path | None:
    """The folder, which exists; None, after a warning, where none can be made."""
    try:
        folder = epath.Path(place() if callable(place) else place)
        if not is_address(folder):
            os.makedirs(folder, 0o700, exist_ok=True)
        return folder
    except (OSError, RuntimeError) as error:
        warnings.warn(
            f"compiled programs are not kept, so every start compiles them again: {error}. Name a folder with "
            "--compilation-cache, or give '' to keep none",
            stacklevel=3,
        )
        return None


def _reported_once(folder: epath.Path, show: Callable[..., None]) -> Callable[..., None]:
    """`show`, for `warnings.showwarning`; of jax's warnings about each program, one is shown, in words.

    Entries of such a program are removed: one that was cut off, by a full disk or a kill, would never be replaced.
    """
    reported = False

    def shown(message: Warning | str, *place: object, **more: object) -> None:
        nonlocal reported
        failed = _FAILED.match(str(message))
        if failed is None:
            show(message, *place, **more)
            return
        did, program, cause = failed.groups()
        for entry in folder.glob(f"{program}-*-cache"):
            with contextlib.suppress(OSError):
                entry.unlink()
        if not reported:
            reported = True
            words = {"reading": "read", "writing": "written"}[did]
            show(
                UserWarning(
                    f"the compilation cache {folder} could not be {words} ({cause.splitlines()[0]}): what is missing "
                    "there is compiled. Free some space or repair it, or name another folder with --compilation-cache"
                ),
                *place,
                **more,
            )

    return shown
