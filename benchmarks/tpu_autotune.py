"""Which block sizes are best, by the TPU compiler's own schedule? No TPU is needed to ask it.

    python -m benchmarks.tpu_autotune                         # all chips; writes moc_jax/attention/pallas_tpu/tuned.py
    python -m benchmarks.tpu_autotune --chips v5e --no-write  # prints and stores alone

Needs libtpu: pip install -e '.[tpu]'. For each chip and kernel a few dozen sizes are compiled in bfloat16 with heads of
128: what is computed at once, and then, with the best of that, the rows of blocks. Best is what
takes the fewest cycles per pair of the reference scene, padding, initialisation and write-out included
(benchmarks/tpu/cost.py). jax's splash attention is tuned beside them, so that it is compared at its best.
"""

import concurrent.futures
import dataclasses
import itertools
import pathlib
import shlex
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import tyro

from benchmarks import results
from benchmarks.tpu.compiler import CHIPS, CompilationError, compile_for
from benchmarks.tpu.cost import scene_cycles
from benchmarks.tpu.kernels import KERNELS, PASSES, Blocks, Pass
from moc_jax.attention.pallas_tpu import tuned

_FILE = pathlib.Path(tuned.__file__)
_CHUNKS = (1408, 1536)
"""Blocks that hold a chunk of 1280 wherever it begins, and whose keys can be cut."""
_SIZES = (512, 1024, 2048)
_AT_ONCE = (
    *((256, 256, 1), (256, 256, 2), (256, 512, 0), (512, 128, 2)),
    *((128, 256, 1), (128, 256, 2), (128, 512, 0), (128, 512, 1)),
)
"""Keys, queries, and parts ahead. Larger parts spill more, smaller ones wait for the matrix units."""
_PICKS_AT_ONCE = ((256, 256, 2), (256, 256, 3), (256, 256, 4), (256, 128, 4), (128, 256, 4), (256, 512, 2))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """For which chips and kernels the best sizes are looked for."""

    chips: tuple[str, ...] = tuple(CHIPS)
    kernels: tuple[str, ...] = tuple(KERNELS)
    passes: tuple[Pass, ...] = PASSES
    jobs: int = 2
    """Compilations at once."""
    timeout: float = 300.0
    """Seconds for one compilation."""
    write: bool = True
    """Put the best sizes into the package."""
    out: pathlib.Path = results.FOLDER


def main(args: Arguments, command: str) -> None:
    """Tunes, prints, stores, and writes the package's table."""
    for chip, kernel, way in itertools.product(args.chips, args.kernels, args.passes):
        with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
            search = _Search(chip, kernel, way, args.timeout, pool)
            search.run()
        if not search.tried:
            raise RuntimeError(f"TPU {chip}, {kernel} {way}: nothing compiles, see {search.errors}")
        ranked = sorted(search.tried, key=search.tried.__getitem__)
        entry = {
            "kernel": kernel,
            "pass": way,
            "best": dataclasses.asdict(ranked[0]),
            "scene_per_pairs": {str(blocks): round(search.tried[blocks], 1) for blocks in ranked},
            "errors": {str(blocks): error for blocks, error in search.errors.items()},
        }
        results.store(args.out, "tpu_autotune", f"{kernel} {way}", command, entry, chip=f"TPU {chip}")
        print(f"TPU {chip}, {kernel} {way}: {ranked[0]}, {search.tried[ranked[0]]:,.0f} cycles", flush=True)
    if args.write:
        _FILE.write_text(tables(results.load(args.out, "tpu_autotune")))


class _Search:
    """Tries sizes, the best of one stage being where the next starts."""

    def __init__(self, chip: str, kernel: str, way: Pass, timeout: float, pool: concurrent.futures.Executor):
        self.chip, self.kernel, self.way, self.timeout, self.pool = chip, kernel, way, timeout, pool
        self.tried: dict[Blocks, float] = {}
        self.errors: dict[Blocks, str] = {}

    def run(self) -> None:
        self._try(first_stage(self.kernel, self.way))
        if self.tried:
            self._try(second_stage(self.kernel, min(self.tried, key=self.tried.__getitem__)))

    def _try(self, candidates: Iterable[Blocks]) -> None:
        new = list(dict.fromkeys(b for b in candidates if b not in self.tried and b not in self.errors))
        for blocks, found in zip(new, self.pool.map(self._cycles, new)):
            if isinstance(found, str):
                self.errors[blocks] = found
            else:
                self.tried[blocks] = found

    def _cycles(self, blocks: Blocks) -> float | str:
        try:
            schedule = compile_for(self.chip, self.kernel, self.way, blocks, timeout=self.timeout).schedule
        except CompilationError as error:
            return str(error)
        return scene_cycles(self.chip, self.kernel, self.way, blocks, schedule)


def first_stage(kernel: str, way: Pass) -> Iterable[Blocks]:
    """What is computed at once, in blocks of usual size."""
    for kv in _CHUNKS if kernel == "picks" else (1024,):
        if kernel == "splash":
            yield from (Blocks(1024, kv, at) for at in _divisors(kv, (256, 512, 1024)))
        elif way == "forward" and kernel == "picks":
            short = kv - 128  # of chunks as long as the block allows, and of those that begin at a multiple of 8
            if short % 256 == 0:
                yield from (Blocks(1024, kv, 128, rows, ahead, short=(short, at)) for at, rows, ahead in _PICKS_AT_ONCE)
        elif way == "forward":
            yield from (Blocks(1024, kv, at, rows, ahead) for at, rows, ahead in _AT_ONCE)
        else:
            at_once = _divisors(kv, (256, 512, 768, 1024))
            yield from (Blocks(1024, kv, at, transposed=t) for at in at_once for t in (False, True))


def second_stage(kernel: str, best: Blocks) -> Iterable[Blocks]:
    """Rows of the blocks."""
    for q, kv in itertools.product(_SIZES, [best.kv] if kernel == "picks" else _SIZES):
        if q * kv >= 1024 * 1024 or kernel == "picks":
            whole = kernel == "splash" and best.compute == best.kv
            yield dataclasses.replace(best, q=q, kv=kv, compute=kv if whole else min(best.compute, kv))


def _divisors(keys: int, sizes: Sequence[int]) -> list[int]:
    """Those that divide; where none does, the least that a register is wide."""
    return [size for size in sizes if keys % size == 0] or [128]


def tables(files: Sequence[dict[str, Any]]) -> str:
    """The module that the package ships."""
    lines = [
        '"""The best sizes of blocks of each chip by its compiler\'s schedule, for bfloat16 and heads of 128.',
        "",
        "Written by python -m benchmarks.tpu_autotune; `tuning.py` says how they are used.",
        '"""',
    ]
    for name, kernel, way, fields, what in _TABLES:
        lines += ["", f"{name} = {{  # {what}"]
        for file in files:
            best = file["entries"][f"{kernel} {way}"]["best"]
            best["short_compute"] = best["short"][1] if best.get("short") else None
            sizes = ", ".join(str(best[field]) for field in fields)
            lines.append(f'    "{file["chip"].removeprefix("TPU ")}": ({sizes}),')
        lines.append("}")
    return "\n".join(lines) + "\n"


_FORWARD, _BACKWARD = ("q", "kv", "rows", "compute", "ahead"), ("q", "kv", "compute", "transposed")
_TABLES = (
    ("ANCHORS", "anchors", "forward", _FORWARD, "queries, keys, queries and keys at once, parts ahead"),
    ("PICKS", "picks", "forward", (*_FORWARD, "short_compute"), "the same, and keys at once of short blocks; for 1280"),
    ("ANCHOR_GRADIENTS", "anchors", "backward", _BACKWARD, "queries, keys, keys at once, transposed"),
    ("PICK_GRADIENTS", "picks", "backward", _BACKWARD, "the same; for chunks of 1280"),
)


def run(argv: Sequence[str]) -> None:
    """The command line."""
    jax.config.update("jax_platforms", "cpu")  # the TPU runtime would look for one
    args = tyro.cli(Arguments, args=list(argv), description=__doc__)
    main(args, shlex.join(["python", "-m", "benchmarks.tpu_autotune", *argv]))


if __name__ == "__main__":
    run(sys.argv[1:])
