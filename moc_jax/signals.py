"""SIGINT and SIGTERM: acknowledged at once, obeyed as soon as nothing is lost by it; the second one ends at once.

A Python signal handler runs between two bytecodes of the main thread, so not while that compiles or waits for a device.
A thread that reads the signals' numbers from a pipe (signal.set_wakeup_fd) receives them whatever the main thread does:

    raising    the main thread gets `Interrupted` as soon as it runs Python; if it does not for 5 s, the process ends
    deferred   (inside `Signals.deferred`) nothing is raised: the work asks now and then whether to stop, and saves
    again      the same signal for the second time ends the process at once

What has no place to ask, such as a compilation, runs in a thread that is left behind when a stop is requested.
"""

import collections
import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Protocol, Self

_HEARD = (signal.SIGINT, signal.SIGTERM)
_Handler = Callable[[int, FrameType | None], object] | int | None
_PATIENCE = 5.0  # seconds that the main thread has to come back from native code before the process ends without it


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM asks to end."""

    def __init__(self, number: int = signal.SIGINT):
        super().__init__(number)
        self.number = number

    def __str__(self) -> str:
        return "interrupted" if self.number == signal.SIGINT else "terminated"


class Stop(Protocol):
    """What long work asks now and then."""

    def check(self) -> None:
        """Raises Interrupted when the work should stop."""

    def unless_asked[T](self, action: Callable[[], T]) -> T:
        """`action()`, which may take minutes and cannot ask; raises Interrupted when it should stop meanwhile."""
        ...


class Signals:
    """Listens for both signals between enter and exit; outside of it, or of the main thread, nothing is ever asked."""

    def __init__(self, *, whole_process: bool = False) -> None:
        """`whole_process`: the process ends with this block, even where a thread was left behind in native code."""
        self.forward = False  # SIGINT also becomes SIGTERM, which jax tells to the other processes
        self._heard: int | None = None
        self._whole_process = whole_process
        self._deferred, self._line = False, ""
        self._saying, self._acknowledged = threading.Lock(), set[int]()
        self._obeyed = threading.Event()
        self._before: dict[int, _Handler] = {}
        self._wakeup_before = -1
        self._pipe: tuple[int, int] | None = None
        self._listener: threading.Thread | None = None
        self._left_behind: list[threading.Thread] = []

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._pipe = os.pipe()
            os.set_blocking(self._pipe[1], False)
            self._wakeup_before = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
            self._listener = threading.Thread(target=self._listen, args=(self._pipe[0],), name="signals", daemon=True)
            self._listener.start()
            for number in _HEARD:
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._obeyed.set()
        if self._whole_process and any(thread.is_alive() for thread in self._left_behind):
            if error is not None and not isinstance(error, SystemExit):
                sys.excepthook(type(error), error, trace)
            sys.stdout.flush()
            sys.stderr.flush()
            code = error.code if isinstance(error, SystemExit) else int(error is not None)
            os._exit(code if isinstance(code, int) else int(code is not None))
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._pipe is not None and self._listener is not None:
            signal.set_wakeup_fd(self._wakeup_before)
            os.close(self._pipe[1])  # ends the listener
            self._listener.join()
            os.close(self._pipe[0])
            self._pipe = None

    @contextlib.contextmanager
    def deferred(self, line: str = "stopping after this step and saving") -> Iterator[None]:
        """Here a signal is not raised, but acknowledged by `line` (unless it is empty) and answered by `asked`."""
        self._deferred, self._line = True, line
        try:
            yield
        finally:
            self._deferred = False

    def asked(self) -> bool:
        """Whether a signal has asked to stop."""
        if self._heard is None:
            return False
        self._acknowledge(self._heard)
        return True

    def check(self) -> None:
        """Raises Interrupted once `asked`."""
        if self.asked():
            raise Interrupted(self._heard or signal.SIGINT)

    def leave(self, thread: threading.Thread) -> None:
        """A thread that the process does not wait for when it ends with this block, as `whole_process` says."""
        self._left_behind.append(thread)

    def unless_asked[T](self, action: Callable[[], T]) -> T:
        """`action()` in a thread of its own, which is left behind when a stop is requested.

        Raises:
            Interrupted: stop was asked first.
        """
        if self._pipe is None:
            return action()
        results: list[T] = []
        errors: list[BaseException] = []

        def run() -> None:
            try:
                results.append(action())
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        try:
            while thread.is_alive():
                self.check()
                thread.join(0.1)
        except Interrupted:
            self.leave(thread)
            raise
        for error in errors:
            raise error
        return results[0]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._heard = self._heard or number
        if not self._deferred:
            self._obeyed.set()
            raise Interrupted(number)

    def _listen(self, pipe: int) -> None:
        times = collections.Counter()
        while heard := os.read(pipe, 1):
            number = heard[0]
            if number not in _HEARD:
                continue
            times[number] += 1
            if times[number] > 1:
                _end(number, f"{Interrupted(number)} again: stopped at once; what was saved before is kept")
            self._heard = self._heard or number
            if not self._deferred:
                threading.Thread(target=self._end_unless_obeyed, args=(number,), daemon=True).start()
                continue
            self._acknowledge(number)
            if self.forward:
                os.kill(os.getpid(), signal.SIGTERM)

    def _acknowledge(self, number: int) -> None:
        """Each signal once, by the thread that is first: the listener may be late, and the main thread busy."""
        with self._saying:
            if self._deferred and self._line and number not in self._acknowledged:
                self._acknowledged.add(number)
                again = "; press Ctrl-C again to stop at once" if number == signal.SIGINT else ""
                _print(f"{Interrupted(number)}: {self._line}{again}")

    def _end_unless_obeyed(self, number: int) -> None:
        if number == signal.SIGINT and not self._obeyed.wait(0.5):
            _print("interrupted: stopping as soon as the running operation allows; press Ctrl-C again to stop at once")
        if not self._obeyed.wait(_PATIENCE):
            _end(number, f"{Interrupted(number)}; what was completed before is kept")


def _print(line: str) -> None:
    """Past sys.stderr, whose lock the main thread may hold."""
    with contextlib.suppress(OSError):
        os.write(2, f"{line}\n".encode())


def _end(number: int, line: str) -> None:
    _print(line)
    with contextlib.suppress(Exception):
        for child in multiprocessing.active_children():  # processes that read ahead would stay
            child.kill()
    os._exit(128 + number)


def _forget_in_child() -> None:
    """A forked child would write into its parent's pipe, and not end when it is terminated."""
    signal.set_wakeup_fd(-1)
    for number in _HEARD:
        if getattr(signal.getsignal(number), "__func__", None) is Signals._handle:
            signal.signal(number, signal.SIG_DFL)


os.register_at_fork(after_in_child=_forget_in_child)
