"""What a user sees while waiting: a bar on a terminal; where there is none, a plain line every half minute.

encoding: 12 of 40 files (30%), 2.5 s/file, 1:10 left, frames 18,230
"""

import collections
import contextlib
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Self, TextIO

from tqdm import tqdm

EVERY = 30.0
"""Seconds between two lines where there is no terminal."""
_REMEMBERED = 10  # lines over which the rate is taken: the last minutes say more about what is left than the first


class Progress:
    """How far some work is; a context manager, so that the bar and the thread that prints the lines end with the work.

    The lines come from a thread: work of which a single piece takes minutes is seen to be alive, too.
    """

    def __init__(
        self,
        what: str,
        *,
        total: int,
        unit: str,
        done: int = 0,
        enabled: bool = True,
        keep: bool = True,
        file: TextIO | None = None,
        every: float | None = None,
    ):
        """Begins to show `done` of `total`.

        Args:
            what: the work: `encoding`.
            unit: one piece of it: `file`.
            done: pieces that were done earlier, which count for no rate.
            enabled: False shows nothing, for instance on all processes but the main one.
            keep: whether the bar stays when the work is done; lines always do.
            file: where it is shown; None: stderr.
            every: seconds between two lines; None: `EVERY`.
        """
        self._file = sys.stderr if file is None else file
        self._bar: tqdm | None = None
        self._lines: _Lines | None = None
        if not enabled:
            return
        if self._file.isatty():
            self._bar = tqdm(
                total=total,
                initial=done,
                desc=what,
                unit=unit,
                file=self._file,
                leave=keep,
                dynamic_ncols=True,
                mininterval=0.5,
                smoothing=0.1,
            )
        else:
            self._lines = _Lines(what, total, unit, done, self._file, EVERY if every is None else every)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def reach(self, done: int, **shown: str) -> None:
        """`done` pieces are done, those of earlier included; `shown` is printed beside it: `loss="0.123"`."""
        if self._bar is not None:
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update(done - self._bar.n)
        elif self._lines is not None:
            self._lines.reach(done, shown)

    def leave_out(self, seconds: float) -> None:
        """Seconds that just passed and were another kind of work: the rate and the time left do not count them."""
        if self._bar is not None:
            self._bar.start_t += seconds
            self._bar.last_print_t += seconds
        elif self._lines is not None:
            self._lines.leave_out(seconds)

    def say(self, text: str) -> None:
        """A line on stdout, above the bar if there is one."""
        if self._bar is not None:
            tqdm.write(text)
        else:
            print(text, flush=True)

    def close(self) -> None:
        """Ends the bar or the lines."""
        if self._bar is not None:
            self._bar.close()
        elif self._lines is not None:
            self._lines.close()


def track[T](items: Sequence[T], what: str, *, unit: str, keep: bool = True) -> Iterator[T]:
    """The items one after another; shows how many are done."""
    with Progress(what, total=len(items), unit=unit, keep=keep) as progress:
        for done, item in enumerate(items, 1):
            yield item
            progress.reach(done)


class _Lines:
    """A thread that says every so often how far the work is."""

    def __init__(self, what: str, total: int, unit: str, done: int, file: TextIO, every: float):
        self._what, self._total, self._unit, self._file, self._every = what, total, unit, file, every
        self._done, self._shown = done, dict[str, str]()
        self._begin = time.monotonic()
        self._points = collections.deque([(self._begin, done)], maxlen=_REMEMBERED)
        self._printed = False
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"progress of {what}", daemon=True)
        self._thread.start()

    def reach(self, done: int, shown: dict[str, str]) -> None:
        with self._lock:
            self._done, self._shown = done, shown

    def leave_out(self, seconds: float) -> None:
        with self._lock:
            later = [(then + seconds, done) for then, done in self._points]
            self._points.clear()
            self._points.extend(later)

    def close(self) -> None:
        """A last line, if there were any: short work needs none."""
        self._ended.set()
        self._thread.join()
        if self._printed:
            took = tqdm.format_interval(time.monotonic() - self._begin)
            self._print(f"{self._counted()} in {took}{_listed(self._shown)}")

    def _run(self) -> None:
        while not self._ended.wait(self._every):
            with self._lock:
                line = self._line(time.monotonic())
            self._print(line)
            self._printed = True

    def _line(self, now: float) -> str:
        then, before = self._points[0]
        rate = (self._done - before) / max(now - then, 1e-9)
        self._points.append((now, self._done))
        left = (self._total - self._done) / rate if rate else 0
        speed = f", {_rate(rate, self._unit)}, {tqdm.format_interval(left)} left" if rate else ""
        return f"{self._counted()} ({self._done / max(self._total, 1):.0%}){speed}{_listed(self._shown)}"

    def _counted(self) -> str:
        return f"{self._what}: {self._done:,} of {self._total:,} {self._unit}{'s' * (self._total != 1)}"

    def _print(self, line: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # a log that is full, or closed, ends no work
            print(line, file=self._file, flush=True)


def _rate(rate: float, unit: str) -> str:
    return f"{rate:.3g} {unit}s/s" if rate >= 1 else f"{1 / rate:.3g} s/{unit}"


def _listed(shown: dict[str, str]) -> str:
    return "".join(f", {name} {value}" for name, value in shown.items())
