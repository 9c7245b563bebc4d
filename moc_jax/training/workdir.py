"""A run's folder: proven to be writable, held by one run at a time, and cleared of what dead ones left half-written."""

import contextlib
import functools
import os
import secrets
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import jax
from etils import epath

from moc_jax.config import ConfigError
from moc_jax.files import is_address, prove_folder, remove_leftovers
from moc_jax.processes import gather, main_process_first
from moc_jax.training.lock import Lock

_PATIENCE = 10  # s for a new file to be seen on other hosts
_FIXED = ("config.json.part", "metrics.jsonl.part", "loss.png.part")  # which earlier versions left


@contextlib.contextmanager
def claimed(workdir: str) -> Iterator[Lock | None]:
    """Holds `workdir` while the block runs; all processes call this together, and process 0 alone holds it.

    Yields:
        The lock, to be asked now and then whether it still holds; None on other processes.

    Raises:
        ConfigError: `workdir` cannot be written, holds something else in the lock's place, or is not the same folder on
            this process's host as on that of process 0.
        LockError: another run is using `workdir`.
        CloudError: its bucket can't be read or written.
        ProcessError: any of it on process 0, as the other processes see it.
    """
    first = jax.process_index() == 0
    with contextlib.ExitStack() as stack:
        take = functools.partial(stack.enter_context, _held(workdir))
        lock = main_process_first("use the workdir", take if first else lambda: None)
        if jax.process_count() > 1 and not is_address(workdir):
            _prove_shared(Path(workdir))
        yield lock


def _prove_shared(workdir: Path) -> None:
    """Else processes on other hosts would wait in the first save for files that never come."""
    first = jax.process_index() == 0
    file = workdir / gather(f".{secrets.token_hex(8)}.{os.getpid()}.tmp")[0]  # of process 0

    def see() -> None:
        deadline = time.monotonic() + _PATIENCE
        while not file.exists():
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"workdir {workdir.absolute()} on host {socket.gethostname()} is not the folder that process 0 "
                    f"uses: a file written there did not show up here in {_PATIENCE} s; give a --workdir on storage "
                    "that all hosts share"
                )
            time.sleep(0.05)

    try:
        main_process_first("see the workdir of process 0", file.touch if first else see)
    finally:
        if first:
            file.unlink(missing_ok=True)


@contextlib.contextmanager
def _held(workdir: str) -> Iterator[Lock]:
    fresh = not is_address(workdir) and not os.path.lexists(workdir)
    prove_folder(workdir, setting="workdir")
    lock = Lock(workdir)
    try:
        lock.acquire(say=lambda line: print(line, flush=True))
        if is_address(workdir):
            _remove_parts(epath.Path(workdir) / "previews")
        else:
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
