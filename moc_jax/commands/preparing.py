"""How several processes prepare one run's data: those of a cluster, and those that `moc-prepare` starts on a host."""

import contextlib
import dataclasses
import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from multiprocessing.process import BaseProcess

import jax

from moc_jax import data
from moc_jax.cli import clean_exit
from moc_jax.codecs import Codec
from moc_jax.config import Config, ConfigError
from moc_jax.data import Manifest
from moc_jax.processes import main_process_first, together


def prepared(config: Config, codec: Codec | None, *, known: str | None = None) -> Manifest:
    """A run's data, of which each of its processes prepares a share; all call this together. Arguments of `prepare`."""
    index, count, full = jax.process_index(), jax.process_count(), config.data.verify == "full"
    check = full and index == 0  # one reads what is there, all encode what is damaged
    if count > 1:
        main_process_first("find the videos and their captions", lambda: data.check_sources(config))
    manifest = together(
        "prepare the data",
        lambda: data.prepare(config, codec, part=(index, count), check=check, shown=index == 0, known=known),
    )
    return dataclasses.replace(manifest, compared=full)


def prepared_by(processes: int, config: Config, part: tuple[int, int]) -> Manifest:
    """The data, prepared by so many processes on this host, each with cores of its own.

    Args:
        part: (i, n): this host is the i-th of n.

    Raises:
        ConfigError, CaptionError, DataError: see `prepare`.
        SystemExit: none of them could do it; each has reported its error.
    """
    (index, count), check = part, config.data.verify == "full"
    if processes == 1:
        return data.prepare(config, part=part, check=check)
    data.check_sources(config)
    cores = sorted(os.sched_getaffinity(0))
    context = multiprocessing.get_context("spawn")
    with _ended() as started:
        for k in range(processes):
            share = index * processes + k, count * processes
            process = context.Process(target=_share, args=(config, share, check and k == 0, k == 0))
            with _on(cores[k % len(cores) :: processes]):
                process.start()
            started.append(process)
        for process in started:
            process.join()
    codes = [process.exitcode or 0 for process in started]
    if all(codes):
        sys.exit(max(codes[0], 1))
    if lost := sum(map(bool, codes)):  # the others did their share, too
        print(f"{lost} of {processes} processes ended early", file=sys.stderr)
    fitted = dataclasses.replace(config.data, refit_codec=False)  # they have
    return data.prepare(dataclasses.replace(config, data=fitted))


def _share(config: Config, part: tuple[int, int], check: bool, shown: bool) -> None:
    with clean_exit(Exception):
        data.prepare(config, part=part, check=check, shown=shown)


@contextlib.contextmanager
def _ended() -> Iterator[list[BaseProcess]]:
    """Processes that do not outlive the block."""
    started: list[BaseProcess] = []
    try:
        yield started
    finally:
        for process in started:
            process.terminate()
            process.join()


@contextlib.contextmanager
def _on(cores: Sequence[int]) -> Iterator[None]:
    """A process that is started here runs on these cores, with as many threads."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def part_of(text: str) -> tuple[int, int]:
    """`0/4` -> (0, 4).

    Raises:
        ConfigError: it is none of its parts.
    """
    first, slash, last = text.partition("/")
    if slash and first.isdecimal() and last.isdecimal() and int(first) < int(last):
        return int(first), int(last)
    raise ConfigError(f"--part is {text!r}; it must be i/n with i from 0 to n - 1, such as 0/4")
