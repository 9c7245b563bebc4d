"""The process beside each of a run of several: it reports which of those is gone, and ends what waits for that one.

    python watcher.py   (started by moc_jax/processes.py; the standard library is all it needs)

(a) Each watcher looks after the process that started it: has it ended without a goodbye, is it stopped?
(b) All watchers are connected to that of process 0, which decides who is lost: whoever was first. A process that has
    ended is lost at once. One that is stopped, or whose watcher is silent, is suspected, and lost after the heartbeat.
(c) Every watcher prints the verdict and ends its own process, which might wait for the lost one for good. Where jax,
    which has heartbeats of its own, ends the process first, the watcher prints all the same.
"""

import contextlib
import json
import os
import pathlib
import selectors
import signal
import socket
import sys
import time
from typing import Any, NamedTuple

PULSE = 0.5  # seconds between two signs of life
SILENCE = 5.0  # seconds without one that make a suspect


Message = dict[str, Any]
"""What one watcher sends another: JSON, one of a few keys."""


class Lost(NamedTuple):
    """A verdict."""

    process: int
    why: str


class Peer:
    """Another watcher, at the other end of a connection."""

    def __init__(self, connection: socket.socket, process: int | None):
        self.connection, self.process = connection, process  # None: it has not said yet
        self.heard, self.left, self._rest = time.monotonic(), False, b""
        connection.setblocking(False)

    def send(self, message: Message) -> None:
        """Says it; on a broken connection nothing happens, for `read` reports that."""
        with contextlib.suppress(OSError):
            self.connection.send(json.dumps(message).encode() + b"\n")

    def read(self) -> list[Message] | None:
        """What it said since; None where the connection has ended, or is with something else."""
        try:
            data = self.connection.recv(1 << 16)
            *lines, self._rest = (self._rest + data).split(b"\n")
            messages = [json.loads(line) for line in lines]
        except BlockingIOError:
            return []
        except (OSError, ValueError):
            return None
        self.heard = time.monotonic()
        return messages if data and all(isinstance(message, dict) for message in messages) else None


class Watcher:
    """Watches the process `parent`, which is number `process` of its run.

    Args:
        heartbeat: seconds after which a suspect is lost.
        token: what only the watchers of this run know.
        address: of process 0's watcher; None there.
        grace: seconds that jax gets after its heartbeat, and a process to end by itself.
    """

    def __init__(
        self,
        *,
        process: int,
        parent: int,
        heartbeat: float,
        token: str,
        address: tuple[str, int] | None = None,
        grace: float = 3.0,
    ):
        self.parent, self.grace = parent, grace
        self._process, self._heartbeat = process, heartbeat
        self._token, self._address = token, address  # None: there is nothing to connect to, or no longer
        self._left = False  # the parent said goodbye
        self._verdict: Lost | None = None
        self._suspects: dict[int, tuple[float, str]] = {}  # process -> since when, why
        self._peers: list[Peer] = []
        self._next_pulse = 0.0
        self._met = False  # whether there was ever a connection to process 0's watcher
        self._patience: float | None = time.monotonic() + heartbeat + grace  # for the first one
        self._selector = selectors.DefaultSelector()
        self._selector.register(sys.stdin, selectors.EVENT_READ)
        self.port = 0  # where process 0's watcher listens to the others
        if process == 0:
            both = socket.has_dualstack_ipv6()
            family = socket.AF_INET6 if both else socket.AF_INET
            listener = socket.create_server(("", 0), family=family, dualstack_ipv6=both)
            self._selector.register(listener, selectors.EVENT_READ, lambda: self._accept(listener))
            self.port = listener.getsockname()[1]

    def run(self) -> Lost | None:
        """Until a process is lost; None where the parent ended after a goodbye."""
        while self._verdict is None:
            if os.getppid() != self.parent:
                if self._left:
                    return None
                self._verdict = self._ended()
                break
            self._mark(self._process, "it is stopped" if _stopped(self.parent) else "")
            self._pulse()
            self._listen()
            self._judge()
        self._tell({"lost": self._verdict})
        return self._verdict

    def _ended(self) -> Lost:
        """The parent ended without a goodbye: for another's sake, if that one is suspected or news of it comes."""
        mine = Lost(self._process, "it was killed or crashed")
        if self._address and not self._peers:  # before the first pulse
            self._connect(self._address)
        self._tell({"ended": mine.why})
        deadline = time.monotonic() + (self.grace if self._process else 0)
        while not (self._verdict or self._suspect(self._process)) and time.monotonic() < deadline:
            self._listen()
        return self._verdict or self._suspect(self._process) or mine

    # -------------------------------------------------------------------------------------------- suspicion

    def _mark(self, process: int, why: str, since: float | None = None) -> None:
        """Suspects a process, or no longer where `why` is empty."""
        if why:
            self._suspects.setdefault(process, (time.monotonic() if since is None else since, why))
        else:
            self._suspects.pop(process, None)

    def _suspect(self, besides: int) -> Lost | None:
        """A process that is suspected, besides one that has ended, maybe for its sake."""
        return next((Lost(process, why) for process, (_, why) in self._suspects.items() if process != besides), None)

    def _judge(self) -> None:
        """Silence makes suspects; process 0's watcher decides about all, the others about process 0 alone."""
        now = time.monotonic()
        for peer in self._peers:
            if peer.process is not None and not peer.left and now - peer.heard > SILENCE:
                self._mark(peer.process, "it can't be reached", peer.heard)
        for process, (since, why) in self._suspects.items():
            if now - since > self._heartbeat + self.grace and 0 in (process, self._process):
                self._verdict = self._verdict or Lost(process, why)

    # -------------------------------------------------------------------------------------------- talking

    def _tell(self, message: Message) -> None:
        for peer in self._peers:
            if peer.process is not None:
                peer.send(message)

    def _pulse(self) -> None:
        if time.monotonic() < self._next_pulse:
            return
        self._next_pulse = time.monotonic() + PULSE
        if self._process == 0:
            self._tell({"suspects": {process: why for process, (_, why) in self._suspects.items()}})
            return
        if self._address and not self._peers:
            self._connect(self._address)
        self._tell({"suspect": self._suspects.get(self._process, (0, ""))[1]})

    def _listen(self) -> None:
        """Waits for news, for a pulse at most; the parent's come first."""
        ready = sorted((key for key, _ in self._selector.select(PULSE)), key=lambda key: key.fileobj is not sys.stdin)
        for key in ready:
            if key.fileobj is not sys.stdin:
                key.data()
            elif os.read(sys.stdin.fileno(), 64):
                self._left = True
                self._tell({"left": True})
            else:  # it has ended, or will have in a moment
                self._selector.unregister(sys.stdin)
                _wait_for_end(self.parent, self.grace)
                return

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            self._add(listener.accept()[0], None)

    def _connect(self, address: tuple[str, int]) -> None:
        try:
            connection = socket.create_connection(address, timeout=PULSE)
        except OSError:
            if self._met:
                self._mark(0, "it can't be reached")
            elif self._patience is not None and time.monotonic() > self._patience:
                self._patience = None
                _say(
                    f"note: process {self._process} can't reach {address[0]} at port {address[1]}, where losses of "
                    "processes are reported; it will end with an abort of jax where one is lost"
                )
            return
        self._met = True
        self._add(connection, 0)
        self._tell({"token": self._token, "process": self._process})

    def _add(self, connection: socket.socket, process: int | None) -> None:
        peer = Peer(connection, process)
        self._peers.append(peer)
        self._selector.register(connection, selectors.EVENT_READ, lambda: self._hear(peer))

    def _drop(self, peer: Peer) -> None:
        if peer.process is not None and not peer.left:
            self._mark(peer.process, "it can't be reached")
        self._peers.remove(peer)
        self._selector.unregister(peer.connection)
        peer.connection.close()

    def _hear(self, peer: Peer) -> None:
        messages = peer.read()
        for message in messages or []:
            if peer.process is None:
                if message.get("token") != self._token:
                    messages = None
                    break
                for old in [old for old in self._peers if old.process == message["process"]]:
                    self._drop(old)  # it lost that connection, and has a new one
                peer.process = message["process"]
                self._mark(peer.process, "")
            elif "lost" in message:
                self._verdict = self._verdict or Lost(*message["lost"])
            elif "ended" in message:
                self._verdict = self._verdict or self._suspect(peer.process) or Lost(peer.process, message["ended"])
            elif "left" in message:
                peer.left, self._address = True, None
            elif "suspects" in message:
                mine = self._suspects.get(self._process)
                self._suspects = {int(process): (peer.heard, why) for process, why in message["suspects"].items()}
                self._suspects.pop(self._process, None)
                self._suspects |= {self._process: mine} if mine else {}
            else:
                self._mark(peer.process, message["suspect"])
        if messages is None:
            self._drop(peer)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _stopped(process: int) -> bool:
    """Whether a signal or a debugger holds it; where there is no /proc, jax's heartbeats have to do."""
    try:
        return pathlib.Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2][:1] in ("T", "t")
    except OSError:
        return False


def _wait_for_end(process: int, seconds: float) -> None:
    """Until `process` is no longer our parent, which its pipes do not tell."""
    deadline = time.monotonic() + seconds
    while os.getppid() == process and time.monotonic() < deadline:
        time.sleep(0.01)


def main() -> None:
    """Reads its settings from the first line of stdin; writes its port to stdout, and a line when a process is lost."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # meant for the run, which says goodbye when it has served it
    with open(0, "rb", buffering=0, closefd=False) as unbuffered:  # for the selector sees the pipe alone
        settings = json.loads(unbuffered.readline())
    watcher = Watcher(**settings)
    print(watcher.port, flush=True)
    lost = watcher.run()
    if lost is None:
        return
    _say(
        f"\nerror: process {lost.process} is gone ({lost.why}), and the run can't continue without it. Checkpoints are "
        "intact: once all processes are started again, the same command resumes from the newest"
    )
    if os.getppid() == watcher.parent:
        with contextlib.suppress(OSError):
            print("lost", flush=True)
        _wait_for_end(watcher.parent, watcher.grace)
    if os.getppid() == watcher.parent:
        os.kill(watcher.parent, signal.SIGKILL)


if __name__ == "__main__":
    main()
