"""How fast videos are prepared: `python -m benchmarks.preparing VIDEO_OR_FOLDER...`.

A bare loop in PyAV that decodes every frame and drops it, and the whole preparation (finding shots, resizing, fitting
the codec, encoding), each by one process with one thread; then the preparation by two processes on two cores. Seconds
on the clock and of the processor, and what other work took of the cores meanwhile: where it is more than a few percent,
only seconds of the processor can be compared, and the gain by several processes is not known.
"""

import argparse
import dataclasses
import multiprocessing
import os
import tempfile
import time

import av

from moc_jax.config.file import run_config_file
from moc_jax.config.shipped import shipped_or
from moc_jax.data import prepare
from moc_jax.data.sources import find_sources


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="+", help="video files or folders of them")
    parser.add_argument("--size", nargs=2, type=int, default=(96, 160), metavar=("ROWS", "COLUMNS"))
    parser.add_argument("--fps", type=float, default=16)
    parser.add_argument("--processes", type=int, default=2, help="0: only one")
    args = parser.parse_args()

    height, width = args.size
    config = run_config_file(shipped_or("own_videos"))[0]
    data = dataclasses.replace(config.data, source=tuple(args.source), height=height, width=width, fps=args.fps)
    config = dataclasses.replace(config, data=data)
    paths = [source.path for source in find_sources(data)]
    bare = _timed(_decode, [(paths,)])
    print(f"{len(paths)} files, {bare.count:,} frames, prepared at {width}x{height} and {args.fps:g} frames/s")
    _print("bare decoding", bare)
    one = _prepared(config, 1)
    _print("preparation", one)
    print(f"  {bare.clock / one.clock:.2f} of the bare rate by the clock, {bare.cpu / one.cpu:.2f} by the processor")
    if args.processes > 1:
        several = _prepared(config, args.processes)
        _print(f"by {args.processes} processes", several)
        print(f"  {one.clock / several.clock:.2f} times as fast as by one")


@dataclasses.dataclass(frozen=True)
class _Result:
    count: int
    clock: float
    """Seconds until the last process ended."""
    cpu: float
    """Seconds of the processor, of all processes."""
    others: float
    """What other work took of the cores meanwhile, of 1."""


def _print(what: str, result: _Result) -> None:
    rate = f", {result.count / result.clock:,.0f} frames/s" if result.count else ""
    times = f"{result.clock:8.2f} s on the clock, {result.cpu:8.2f} s of the processor"
    print(f"{what:16} {times}{rate}; other work took {result.others:.0%} of the cores", flush=True)


def _prepared(config, processes: int) -> _Result:
    with tempfile.TemporaryDirectory() as cache:
        data = dataclasses.replace(config.data, cache=cache)
        config = dataclasses.replace(config, data=data)
        return _timed(_prepare, [(config, (k, processes)) for k in range(processes)])


def _timed(work, arguments: list[tuple]) -> _Result:
    """Each call in a process with a core, and so a thread, of its own; they begin together."""
    context, cores = multiprocessing.get_context("spawn"), sorted(os.sched_getaffinity(0))
    used = [cores[k % len(cores)] for k in range(len(arguments))]
    begin, results = context.Barrier(len(arguments) + 1), context.Queue()
    started = []
    for core, each in zip(used, arguments):
        os.sched_setaffinity(0, {core})
        started.append(context.Process(target=_run, args=(begin, results, work, each)))
        started[-1].start()
        os.sched_setaffinity(0, cores)
    begin.wait()
    clock, busy = time.perf_counter(), _busy(used)
    counts, times = zip(*[results.get() for _ in started])
    clock, busy, cpu = time.perf_counter() - clock, _busy(used) - busy, sum(times)
    for process in started:
        process.join()
    return _Result(sum(counts), clock, cpu, max(0.0, busy - cpu) / (clock * len(set(used))))


def _busy(cores) -> float:
    """Seconds that these cores have worked since the machine was started."""
    with open("/proc/stat") as file:
        ticks = {line.split()[0]: list(map(int, line.split()[1:9])) for line in file if line.startswith("cpu")}
    idle = 3, 4  # and waiting for a disk
    worked = (sum(t for k, t in enumerate(ticks[f"cpu{core}"]) if k not in idle) for core in set(cores))
    return sum(worked) / os.sysconf("SC_CLK_TCK")


def _run(begin, results, work, arguments: tuple) -> None:
    begin.wait()
    cpu = time.process_time()
    count = work(*arguments)
    results.put((count, time.process_time() - cpu))


def _decode(paths) -> int:
    count = 0
    for path in paths:
        with av.open(os.fspath(path)) as container:
            container.streams.video[0].codec_context.thread_count = 1
            count += sum(1 for _ in container.decode(video=0))
    return count


def _prepare(config, part: tuple[int, int]) -> int:
    prepare(config, part=part, shown=False)
    return 0


if __name__ == "__main__":
    main()
