"""A run's folder: proven to be writable, held by one run at a time, and cleared of what dead ones left half-written."""

import contextlib
import functools
import os
from collections.abc import Iterator
from pathlib import Path

import jax
from etils import epath

from moc_jax.files import is_address, prove_folder, remove_leftovers
from moc_jax.processes import main_process_first
from moc_jax.training.lock import Lock

_FIXED = ("config.json.part", "metrics.jsonl.part", "loss.png.part")  # which earlier versions left


@contextlib.contextmanager
def claimed(workdir: str) -> Iterator[Lock | None]:
    """Holds `workdir` while the block runs; all processes call this together, and process 0 alone holds it.

    Yields:
        The lock, to be asked now and then whether it still holds; None on other processes and at an address.

    Raises:
        ConfigError: `workdir` cannot be written, or holds something else in the lock's place.
        LockError: another run is using `workdir`.
        ProcessError: any of it on process 0, as the other processes see it.
    """
    first = jax.process_index() == 0
    with contextlib.ExitStack() as stack:
        take = functools.partial(stack.enter_context, _held(workdir))
        yield main_process_first("use the workdir", take if first else lambda: None)


@contextlib.contextmanager
def _held(workdir: str) -> Iterator[Lock | None]:
    fresh = not is_address(workdir) and not os.path.lexists(workdir)
    prove_folder(workdir, setting="workdir")
    if is_address(workdir):
        print(f"{workdir} is an address, where runs do not lock each other out: start one at a time", flush=True)
        _remove_parts(epath.Path(workdir) / "previews")
        yield None
        return
    lock = Lock(Path(workdir))
    try:
        lock.acquire(say=lambda line: print(line, flush=True))
        clear_leftovers(Path(workdir))
        yield lock
    finally:
        lock.release()
        if fresh:  # what was refused leaves no trace
            with contextlib.suppress(OSError):
                os.rmdir(workdir)


def clear_leftovers(workdir: Path) -> None:
    """Removes the unfinished files of dead runs; to be called with the lock held, so that no run is writing them."""
    for folder in (workdir, workdir / "previews"):
        remove_leftovers(folder)
    for name in _FIXED:
        if (workdir / name).is_file() and not (workdir / name).is_symlink():
            (workdir / name).unlink(missing_ok=True)
    _remove_parts(epath.Path(workdir) / "previews")


def _remove_parts(previews: epath.Path) -> None:
    """Copies that were cut off on their way to an address, and what earlier versions left."""
    for path in previews.iterdir() if previews.is_dir() else ():
        if path.name.startswith(".") and path.name.endswith((".mp4.part", ".png.part")):
            path.unlink(missing_ok=True)
