"""When a run stops: a signal asks one process, and all of them stop at the same point."""

import contextlib
import threading
from collections.abc import Callable, Iterator

import jax

from moc_jax.processes import StopPoint
from moc_jax.signals import Interrupted, Signals


class RunStop:
    """`Signals` for a run of one process or several; all processes call every method together."""

    def __init__(self, signals: Signals):
        self._signals = signals
        self._point: StopPoint | None = None
        self._reached = False

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """From here on a signal is answered by `check`, so that the run can save."""
        with contextlib.ExitStack() as stack:
            if jax.process_count() > 1:
                self._point = StopPoint()
                stack.callback(self._part)
                self._signals.forward = True
            stack.enter_context(self._signals.deferred())
            yield

    def check(self) -> None:
        """Raises Interrupted at the point where all processes stop."""
        if self._point is None:
            self._signals.check()
            return
        self._reached = self._reached or self._point.reached()
        if self._reached:
            raise Interrupted

    def _part(self) -> None:
        assert self._point is not None
        point, self._point = self._point, None
        point.close()

    def unless_asked[T](self, action: Callable[[], T]) -> T:
        """`action()`, which may take minutes; of several processes none can leave it alone, so there it ends first."""
        return self._signals.unless_asked(action) if jax.process_count() == 1 else action()

    def leave(self, thread: threading.Thread) -> None:
        """The end of the process waits for this thread, which may be in native code, only if there are several."""
        thread.join(None if jax.process_count() > 1 else 0.5)
        if thread.is_alive():
            self._signals.leave(thread)
