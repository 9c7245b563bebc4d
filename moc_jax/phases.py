"""Where the seconds before a program's first result go, and what saves some."""

import contextlib
import gc
import threading
import time
from collections.abc import Iterator


class Phases:
    """Seconds by what they were for, from the moment when it is made; after `total` it takes nothing more."""

    def __init__(self) -> None:
        self._begin = self._last = time.perf_counter()
        self._seconds: dict[str, float] = {}
        self._ended = False

    def done(self, what: str) -> None:
        """What took the seconds since this was called last."""
        if not self._ended:
            now = time.perf_counter()
            self._seconds[what] = self._seconds.get(what, 0.0) + now - self._last
            self._last = now

    @property
    def seconds(self) -> float:
        """Since it was made."""
        return time.perf_counter() - self._begin

    def total(self, what: str) -> str:
        """`done(what)`, then all of it in words, but parts below 0.1 s: `14.2 s (imports 3.1, data 0.4, ...)`."""
        self.done(what)
        self._ended = True
        parts = [f"{name} {seconds:.1f}" for name, seconds in self._seconds.items() if seconds >= 0.1]
        return f"{self._last - self._begin:.1f} s" + f" ({', '.join(parts)})" * bool(parts)


_resting = 0  # blocks of `garbage_left`, in all threads
_looked = True  # whether Python looked for garbage before the first of them
_lock = threading.Lock()


@contextlib.contextmanager
def garbage_left() -> Iterator[None]:
    """Here Python looks for no garbage: imports and traces make millions of objects that stay, and are looked at again
    and again, a fifth of the time.
    """
    _rest(1)
    try:
        yield
    finally:
        _rest(-1)


def _rest(change: int) -> None:
    global _resting, _looked
    with _lock:
        before, _resting = _resting, _resting + change
        if before == 0:
            _looked = gc.isenabled()
            gc.disable()
        elif _resting == 0 and _looked:
            gc.enable()
