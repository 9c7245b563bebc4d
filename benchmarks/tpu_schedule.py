"""How long does the TPU compiler expect a tile of attention to take? No TPU is needed to ask it.

    python -m benchmarks.tpu_schedule                                            # all chips, the usual blocks
    python -m benchmarks.tpu_schedule --chips v6e tpu7x --blocks 512x1024x512    # queries x keys x keys at once

Needs libtpu: pip install -e '.[tpu]'. Kernels are compiled for each chip and read from the compiler's listings (see
benchmarks/tpu/listing.py): cycles of one tile and of one grid step, the share of matrix-unit slots that a tile fills,
the vector registers that it spills, and the bytes that a step moves, with the time they take at the peak rate of HBM
beside the tile's. jax's splash attention, without a mask, is the yardstick. The sizes asked for are blocks of queries
and of keys, and what splash computes at once; ours compute at once what tuned.py has for the chip. Besides, each is
compiled at its best sizes, which benchmarks/tpu_autotune.py found. bfloat16.

Waits for memory are not in it: cycles are lower bounds on time, good for comparing kernels on the same chip. The matrix
units of v6e and tpu7x are 256 wide, and a head of 128 fills half of each at most: splash's slots then are full at half
of the nominal peak.
"""

import concurrent.futures
import dataclasses
import functools
import pathlib
import shlex
import sys
from collections.abc import Sequence
from typing import Any, Literal, cast

import jax
import tyro

from benchmarks import results
from benchmarks.tables import schedule_best_table, schedule_table, separated
from benchmarks.tpu.compiler import CHIPS, CompilationError, compile_for
from benchmarks.tpu.cost import as_json, cost
from benchmarks.tpu.kernels import KERNELS, PASSES, Blocks, Pass
from moc_jax.attention.pallas_tpu import tuning
from moc_jax.attention.pallas_tpu.device import Chip

_BLOCKS = ("512x512x512", "512x1024x512", "1024x1024x512", "1024x1280x640", "2048x2048x256")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Which kernels are compiled, and for which chips."""

    chips: tuple[str, ...] = tuple(CHIPS)
    kernels: tuple[str, ...] = tuple(KERNELS)
    passes: tuple[Pass, ...] = PASSES
    blocks: tuple[str, ...] = _BLOCKS
    """QUERIESxKEYS or QUERIESxKEYSxCOMPUTED: keys that splash computes at once, all if not said."""
    best: bool = True
    """Also compile each at its best sizes."""
    head_dim: int = 128
    jobs: int = 2
    """Compilations at once."""
    timeout: float = 300.0
    """Seconds for one compilation."""
    out: pathlib.Path = results.FOLDER

    def __post_init__(self):
        for name, asked, known in (("chips", self.chips, CHIPS), ("kernels", self.kernels, KERNELS)):
            unknown = [each for each in asked if each not in known]
            if unknown:
                raise ValueError(f"--{name} {' '.join(unknown)}: known are {', '.join(known)}")
        for text in self.blocks:
            Blocks.parse(text)


def main(args: Arguments, command: str) -> None:
    """Compiles, prints and stores, chip by chip."""
    for chip in args.chips:
        work = [(kernel, way, blocks) for kernel in args.kernels for way in args.passes
                for blocks in sizes(args, chip, kernel, way)]  # fmt: skip
        with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
            one = functools.partial(measure, chip, head_dim=args.head_dim, timeout=args.timeout)
            entries = list(pool.map(one, *zip(*work, strict=True)))
        for entry, (kernel, way, blocks) in zip(entries, work, strict=True):
            name = f"{kernel} {way}, {blocks}, {args.head_dim}"
            results.store(args.out, "tpu_schedule", name, command, entry, chip=f"TPU {chip}")
        files = [{"chip": f"TPU {chip}", "entries": dict(enumerate(entries))}]
        tables = separated([schedule_table(files), schedule_best_table(files)])
        print("\n".join([f"TPU {chip}, by the compiler's schedule:", "", *tables, ""]), flush=True)


def sizes(args: Arguments, chip: str, kernel: str, way: Pass) -> list[Blocks]:
    """Those asked for, as the kernel takes them, and its best."""
    found = [own_sizes(chip, kernel, way, Blocks.parse(text), args.head_dim) for text in args.blocks]
    for file in results.load(results.FOLDER, "tpu_autotune") if args.best else ():
        if file["chip"] == f"TPU {chip}":
            found.append(Blocks(**file["entries"][f"{kernel} {way}"]["best"]))
    return list(dict.fromkeys(found))


def own_sizes(chip: str, kernel: str, way: Pass, asked: Blocks, head_dim: int) -> Blocks:
    """The blocks asked for; ours compute at once what the chip's table says."""
    if kernel == "splash":
        return asked
    ours = cast(Literal["anchors", "picks"], kernel)
    if way == "forward":
        return Blocks.of(tuning.forward_tiling(Chip(chip), ours, asked.q, asked.kv))
    return Blocks.of(tuning.backward_tiling(Chip(chip), ours, asked.q, asked.kv, head_dim), asked.kv)


def measure(chip: str, kernel: str, way: Pass, blocks: Blocks, *, head_dim: int, timeout: float) -> dict[str, Any]:
    """One entry: the schedule and what it costs, or why there is none."""
    entry: dict[str, Any] = {"kernel": kernel, "pass": way, "blocks": dataclasses.asdict(blocks), "head_dim": head_dim}
    try:
        compiled = compile_for(chip, kernel, way, blocks, head_dim, timeout)
    except CompilationError as error:
        print(f"not compiled: {error}", file=sys.stderr, flush=True)
        return {**entry, "error": str(error)}
    schedule = dataclasses.asdict(compiled.schedule)
    schedule["slot_fill"] = {kind: round(fill, 4) for kind, fill in schedule["slot_fill"].items()}
    costs = as_json(cost(chip, kernel, way, blocks, compiled.schedule))
    return {**entry, **schedule, **costs, "memory": compiled.memory}


def run(argv: Sequence[str]) -> None:
    """The command line."""
    jax.config.update("jax_platforms", "cpu")  # the TPU runtime would look for one
    args = tyro.cli(Arguments, args=list(argv), description=__doc__)
    main(args, shlex.join(["python", "-m", "benchmarks.tpu_schedule", *argv]))


if __name__ == "__main__":
    run(sys.argv[1:])
