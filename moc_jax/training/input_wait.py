"""Whether the devices wait for data: how long they had nothing to do because the next batch was not there yet."""

import contextlib
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping

import jax

from moc_jax.config import DataConfig

_MUCH = 0.15  # of the time; less is not worth a line
_LEAST = 30.0, 20  # seconds and steps over which it is judged


class InputWait:
    """Counts the seconds of waiting, and advises once what helps."""

    def __init__(self, cfg: DataConfig, say: Callable[[str], None], *, clock: Callable[[], float] = time.perf_counter):
        """`say` is given the advice."""
        self._cfg, self._say, self._clock = cfg, say, clock
        self._waited, self._said = 0.0, False
        self._judged = [0.0, 0.0, 0.0]  # seconds, those of them waited, steps
        self._running, self._idle_since = 0, clock()
        self._lock, self._results = threading.Lock(), queue.SimpleQueue[jax.Array | None]()
        self._thread: threading.Thread | None = None

    def batch[T](self, read: Callable[[], T]) -> T:
        """What `read` returns; it counts as waiting from when the devices have done all they were given."""
        begin = self._clock()
        batch = read()
        with self._lock:
            if self._thread is not None and not self._running:  # the first batch is waited for by all that begins
                self._waited += self._clock() - max(begin, self._idle_since)
        return batch

    def given(self, result: jax.Array) -> None:
        """The devices were given a step, which ends with this result."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._watch, name="input", daemon=True)
            self._thread.start()
        with self._lock:
            self._running += 1
        self._results.put(result)

    def waited(self) -> float:
        """Seconds since the last call."""
        with self._lock:
            seconds, self._waited = self._waited, 0.0
        return seconds

    def judge(self, rates: Mapping[str, float], steps: int) -> None:
        """Says what to change, once, if the run is input-bound.

        Args:
            rates: of so many steps: `steps_per_second`, and `input_wait`, the share of the time.
            steps: since the last call.
        """
        seconds = steps / max(rates["steps_per_second"], 1e-9)
        self._judged = [sum(pair) for pair in zip(self._judged, (seconds, seconds * rates["input_wait"], steps))]
        seconds, waited, counted = self._judged
        if self._said or seconds < _LEAST[0] or counted < _LEAST[1]:
            return
        self._judged = [0.0, 0.0, 0.0]
        if waited <= _MUCH * seconds:
            return
        self._said = True
        workers, cores = self._cfg.workers, len(os.sched_getaffinity(0))
        more = max(1, min(2 * workers or 4, cores - 1))
        fix = (
            f"--data.workers {more} reads in {more} processes (now {workers or 'in this one'})"
            if more > workers
            else f"data.workers is {workers} already, and there are {cores} cores: a host with more of them helps"
        )
        if "://" in self._cfg.cache:
            fix += f"; shards are fetched from {self._cfg.cache} until they are here, which the first epoch waits for"
        self._say(f"input-bound: the devices waited for data {waited / seconds:.0%} of the last {seconds:.0f} s. {fix}")

    def close(self) -> None:
        """Ends the thread."""
        if self._thread is not None:
            self._results.put(None)
            self._thread.join(5)

    def _watch(self) -> None:
        while (result := self._results.get()) is not None:
            with contextlib.suppress(Exception):  # who looks at the result reports it
                result.block_until_ready()
            with self._lock:
                self._running -= 1
                self._idle_since = self._clock()
