"""How long does the TPU compiler expect a tile of attention to take? No TPU is needed to ask it.

    python -m benchmarks.tpu_schedule                                            # v5p and v5e, the usual blocks
    python -m benchmarks.tpu_schedule --chips v6e tpu7x --blocks 512x1024x512    # queries x keys x keys at once

Needs libtpu: pip install -e '.[tpu]'. Kernels are compiled for each chip and read from the compiler's listings (see
benchmarks/tpu/listing.py): cycles of one tile and of one grid step, the share of matrix-unit slots that a tile fills,
and the vector registers that it spills. bfloat16. Waits for memory are not in it: cycles are lower bounds on time,
good for comparing kernels on the same chip. The matrix units of v6e and tpu7x are 256 wide, and a head of 128 fills
half of each at most: their slots then are full at half of the nominal peak.
"""

import dataclasses
import pathlib
import shlex
import sys
from collections.abc import Sequence
from typing import Any

import tyro

from benchmarks import results
from benchmarks.tables import markdown
from benchmarks.tpu.compiler import CHIPS, CompilationError, compile_for
from benchmarks.tpu.kernels import KERNELS, Blocks

_BLOCKS = ("128x128", "256x256", "512x512", "512x1024x512", "1024x1024x512", "512x1280x640", "1024x1280x640")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    chips: tuple[str, ...] = ("v5p", "v5e")
    """Of v4, v5e, v5p, v6e, tpu7x."""
    kernels: tuple[str, ...] = tuple(KERNELS)
    blocks: tuple[str, ...] = _BLOCKS
    """QUERIESxKEYS or QUERIESxKEYSxCOMPUTED: keys that are computed at once, all if not said."""
    head_dim: int = 128
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
        entries = []
        for text in args.blocks:
            blocks = Blocks.parse(text)
            for kernel in args.kernels:
                entry = measure(chip, kernel, blocks, args.head_dim, args.timeout)
                name = f"{kernel}, {blocks}, {args.head_dim}"
                results.store(args.out, "tpu_schedule", name, command, entry, chip=f"TPU {chip}")
                entries.append(entry)
        print("\n".join([f"TPU {chip}, by the compiler's schedule:", "", *schedule_table(entries), ""]), flush=True)


def measure(chip: str, kernel: str, blocks: Blocks, head_dim: int, timeout: float) -> dict[str, Any]:
    """One entry: the schedule of each pass, or why there is none."""
    entry: dict[str, Any] = {"kernel": kernel, "blocks": dataclasses.asdict(blocks), "head_dim": head_dim}
    try:
        compiled = compile_for(chip, kernel, str(blocks), head_dim, timeout)
    except CompilationError as error:
        print(f"not compiled: {error}", file=sys.stderr, flush=True)
        return {**entry, "error": str(error)}
    passes = {way: dataclasses.asdict(schedule) for way, schedule in compiled.passes.items()}
    return {**entry, "passes": passes, "memory": compiled.memory}


def schedule_table(entries: Sequence[dict[str, Any]]) -> list[str]:
    """Lines of markdown: each kernel at each size, both passes."""
    head = ["kernel", "queries / keys / at once"]
    for way in ("forward", "backward"):
        head += [f"{way}: cycles per tile", "matrix units filled", "cycles per step", "spills: stores / loads"]
    rows = []
    for e in entries:
        row = [e["kernel"], " / ".join(str(size) for size in e["blocks"].values())]
        for way in ("forward", "backward"):
            if "error" in e:
                row += ["does not compile", "", "", ""]
                continue
            found = e["passes"][way]
            spills = f"{found['spill_stores']:,} / {found['spill_fills']:,}"
            row += [f"{found['tile_cycles']:,}", f"{found['matrix_fill']:.0%}", f"{found['step_cycles']:,}", spills]
        rows.append(row)
    return markdown(head, rows)


def run(argv: Sequence[str]) -> None:
    """The command line."""
    args = tyro.cli(Arguments, args=list(argv), description=__doc__)
    main(args, shlex.join(["python", "-m", "benchmarks.tpu_schedule", *argv]))


if __name__ == "__main__":
    run(sys.argv[1:])
