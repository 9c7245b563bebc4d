"""The same work for many seeds, by processes that are started once."""

import concurrent.futures
import contextlib
import itertools
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence

# A matrix product of one clip is too small to be shared: each process's threads would wait for all others'.
_ALONE = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL")} | {"JAX_PLATFORMS": "cpu"}
_MOST = 32  # seeds that a process is given at a time


class Spread:
    """So many processes of one thread each; with 1, the work is done here. A context manager that ends them."""

    def __init__(self, processes: int = 1):
        self._processes = processes
        self._pool: concurrent.futures.ProcessPoolExecutor | None = None

    def start(self) -> None:
        """Starts them, which takes them seconds of imports: best called before other work."""
        if self._processes > 1 and self._pool is None:
            self._pool = concurrent.futures.ProcessPoolExecutor(self._processes, multiprocessing.get_context("spawn"))
            with _environment(**_ALONE):
                self._pool.submit(int)  # the first task starts all processes

    def once[T](self, work: Callable[[], T]) -> T:
        """The result of `work`, by one of the processes."""
        self.start()
        return work() if self._pool is None else self._pool.submit(work).result()

    def __call__[T](self, work: Callable[[int], T], seeds: Sequence[int]) -> list[T]:
        """`work` of each seed, which is pickled, as are its results."""
        self.start()
        if self._pool is None:
            return list(map(work, seeds))
        begin, size = time.perf_counter(), max(1, min(_MOST, len(seeds) // (4 * self._processes)))
        parts = [seeds[first : first + size] for first in range(0, len(seeds), size)]
        found, took = zip(*self._pool.map(_timed, itertools.repeat(work), parts))
        print(
            f"{len(seeds)} stories by {self._processes} processes: {time.perf_counter() - begin:.1f} s, "
            f"{1e3 * sum(took) / len(seeds):.1f} ms of processor time each",
            flush=True,
        )
        return list(itertools.chain(*found))

    def __enter__(self) -> "Spread":
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None


ALONE = Spread()


def _timed[T](work: Callable[[int], T], seeds: Sequence[int]) -> tuple[list[T], float]:
    begin = time.process_time()
    return list(map(work, seeds)), time.process_time() - begin


@contextlib.contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """What processes that start meanwhile find in their environment."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
