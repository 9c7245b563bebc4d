"""One run per workdir, one process per generation: a file that names its holder, and is free when the holder is gone.

    workdir/run.lock    {"host", "boot", "space", "pid", "started", "since", "command", "sign"}

Whether the holder lives is decided without comparing the clocks of two machines:

    a process of this host    there is one of that id, and it started when the holder did
    any other                 the holder changes `sign` every 10 s; whoever waits watches the file by its own clock, and
                              takes over what has not changed for 60 s

Another container and the host before a reboot count as other hosts. Every look and every change is made under the
kernel's lock of the file, or in a bucket on the condition that nobody else changed it since the look, so of two starts
at once one gets it. A holder that slept beyond the 60 s finds another's name in the file, and stops instead of writing
over the other's work.
"""

import contextlib
import dataclasses
import json
import os
import platform
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from moc_jax.cloud import ChangedError, CloudError
from moc_jax.config import ConfigError
from moc_jax.errors import Failure
from moc_jax.files import is_address
from moc_jax.reading import parse_json
from moc_jax.training.lock_place import ObjectTurn, Turn, file_turn

NAME = "run.lock"
REFRESH = 10.0  # seconds between two signs of life
LEASE = 60.0  # seconds without one, after which a holder that cannot be looked up counts as gone


class LockError(Failure):
    """The folder is another run's: says whose, and what to do."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Holder:
    """A process, so that no other one on any machine is taken for it."""

    host: str
    boot: str  # the kernel's run; empty where it can't be found out
    space: str  # which processes' ids these are: containers have their own
    pid: int
    started: str  # the kernel's clock at the process's start, since ids are used again
    since: str  # for people
    command: str

    def __str__(self) -> str:
        return f"process {self.pid} on host {self.host}, since {self.since} ({self.command})"

    def is_gone(self) -> bool | None:
        """None: it can't be looked up from here."""
        if (self.boot, self.space, self.host) != _here():
            return None
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except (PermissionError, OverflowError):
            pass
        started = _started(self.pid)
        return started is not None and started != self.started


def this_process() -> Holder:
    """The holder that this process would be."""
    boot, space, host = _here()
    return Holder(
        host=host,
        boot=boot,
        space=space,
        pid=os.getpid(),
        started=_started(os.getpid()) or "",
        since=time.strftime("%Y-%m-%d %H:%M:%S"),
        command=" ".join(sys.argv)[:500],
    )


class Lock:
    """Holds a folder from `acquire` to `release`; `check` says, in between, whether it is still held."""

    def __init__(self, folder: str | Path, *, setting: str = "--workdir", clock: Callable[[], float] = time.monotonic):
        """`folder`: a path, or an address in a bucket; `setting` names it."""
        self._folder, self._setting, self._clock = os.fspath(folder).rstrip("/"), setting, clock
        self._path = f"{self._folder}/{NAME}"
        self._me = this_process()
        self._signs = secrets.randbelow(1 << 30)  # no other one writes the same
        self._seen = clock()  # when the file last was this process's
        self._lost = ""
        self._held = False
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._refresh_until_over, name="run.lock", daemon=True)

    def acquire(self, say: Callable[[str], None] = lambda _: None) -> None:
        """Takes the folder; waits up to 60 s for a sign of life of a holder that cannot be looked up.

        Args:
            say: is given the line that explains a wait.

        Raises:
            LockError: its holder lives.
            ConfigError: what lies in the lock's place is not a lock, or can't be opened.
            CloudError: the bucket can't be read or written.
        """
        watched, since = self._try(None), self._clock()
        if watched is not None:
            say(f"{self._path} is held by {watched[0]}; waiting up to {LEASE:.0f} s for a sign of life")
        while watched is not None:
            self._over.wait(min(1.0, LEASE / 10))
            watched = self._try(watched, expired=self._clock() - since >= LEASE)
        self._held, self._seen = True, self._clock()
        self._thread.start()

    def check(self, *, now: bool = False) -> None:
        """Raises LockError once another run has taken the folder; `now` reads the file, else it was lately read."""
        if self._held and not self._lost and (now or self._clock() - self._seen > 2 * REFRESH):
            self._refresh()
        if self._lost:
            raise LockError(self._lost)

    def release(self) -> None:
        """Gives the folder up, if it is still this process's."""
        if not self._held:
            return
        self._over.set()
        self._thread.join(5)  # storage that is out of reach must not keep the process
        self._held = False
        with contextlib.suppress(OSError, ConfigError, CloudError), self._turn() as turn:
            if self._is_mine(turn.content):
                turn.remove()

    def _try(self, watched: tuple[Holder, int] | None, *, expired: bool = False) -> tuple[Holder, int] | None:
        """Takes the lock if it is free; else the holder and its sign, to be watched."""
        with self._turn() as turn:
            found = _parse(self._path, turn.content)
            if found is not None and (gone := found[0].is_gone()) is not True:
                if gone is False or (watched is not None and found != watched):
                    raise LockError(
                        f"{self._folder} is in use by {found[0]}. Wait until it ends or stop it, or give another "
                        f"{self._setting}"
                    )
                if not expired:
                    return found
            try:
                self._write(turn)
            except ChangedError:  # another one was quicker
                return self._try(watched)
        return None

    @contextlib.contextmanager
    def _turn(self, *, make: bool = True) -> Iterator[Turn]:
        if is_address(self._path):
            yield ObjectTurn(self._path)
        else:
            with file_turn(Path(self._path), make=make) as turn:
                yield turn

    def _refresh_until_over(self) -> None:
        while not self._over.wait(REFRESH):
            self._refresh()

    def _refresh(self) -> None:
        try:
            with self._turn(make=False) as turn:
                content = turn.content
                if self._is_mine(content):
                    self._write(turn)
                    self._seen = self._clock()
                    return
        except FileNotFoundError:
            content = b""
        except (OSError, ConfigError, CloudError):
            return  # storage that is out of reach for a while proves nothing; who changed it is seen the next time
        with contextlib.suppress(ConfigError):
            found = _parse(self._path, content)
            what = f"was taken over by {found[0]}" if found else "was removed"
            self._lost = self._lost or (
                f"{self._path} {what}: this run stops, so that it does not write over another's work. What it saved "
                "before is kept"
            )

    def _is_mine(self, content: bytes) -> bool:
        with contextlib.suppress(ConfigError):
            found = _parse(self._path, content)
            return found is not None and found[0] == self._me
        return False

    def _write(self, turn: Turn) -> None:
        self._signs += 1
        turn.put(json.dumps({**dataclasses.asdict(self._me), "sign": self._signs}).encode())


# ------------------------------------------------------------------------------------------------ its content


def _parse(path: str, content: bytes) -> tuple[Holder, int] | None:
    """The holder and its sign; None for a file that was just made, or never written before the power failed.

    Raises:
        ConfigError: it is something else.
    """
    if not content.strip(b"\0 \r\n"):
        return None
    try:
        fields = parse_json(content)
        sign = fields.pop("sign")
        holder = Holder(**fields)
        whole = [holder.pid, sign]
        texts = [value for name, value in dataclasses.asdict(holder).items() if name != "pid"]
        if not all(type(x) is int and 0 < x < 2**31 for x in whole) or not all(type(x) is str for x in texts):
            raise ValueError("a field of another type")
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise ConfigError(
            f"{path} is not a run's lock, or a damaged one; if no run is using {os.path.dirname(path)}, delete it"
        ) from error
    return holder, sign


# ------------------------------------------------------------------------------------------------ processes


def _here() -> tuple[str, str, str]:
    """The kernel's run, the space of process ids, the host's name."""
    boot = space = ""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        space = os.readlink("/proc/self/ns/pid")
    host = platform.node()
    return (boot or f"no boot id on {host}", space, host)


def _started(pid: int) -> str | None:
    """When the process began, by the kernel's clock; empty for one that has ended; None where nobody says."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    return "" if fields[0] in (b"Z", b"X") else fields[19].decode()
