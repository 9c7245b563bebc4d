"""How long does a TPU's compiler take over a training step, and what does a layer move beside attention's kernels?

    python -m benchmarks.tpu_step                                     # bytes per layer on v5p and v6e, of two layers
    python -m benchmarks.tpu_step --chips v5p v5p:4x4x4 --depth 30    # the whole model, for one device and for a pod

Needs libtpu: pip install -e '.[tpu]'. The step of benchmarks/model.py (1536 wide, 8 shots of 22 500 tokens, layers
recomputed) is compiled for a chip, or for all chips of a topology, weights split over them and a scene on each. Stored
are the seconds that it took, what it needs in HBM, and for one layer, forward and backward, the bytes that its
operations read and write there (benchmarks/tpu/traffic.py): those of neither attention's kernels nor matrix products
by what they are for. A fusion counts as what most of its elements are for. Products that look up a shot's numbers or
exchange halves count as what they are for, not as matrix products. XLA fuses much of the rest into those of weights,
where it costs no bytes.
"""

import collections
import concurrent.futures
import dataclasses
import json
import pathlib
import re
import shlex
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import tyro

from benchmarks import results
from benchmarks.tables import traffic_table
from benchmarks.tpu import compiler
from benchmarks.tpu.compiler import CHIPS
from benchmarks.tpu.traffic import Program, Traffic, kind_of

KINDS = (
    ("attention's own", r"^attention/"),
    ("rotary", r"^models/rope"),
    ("norms of q and k", r"HeadNorm|normed_and_turned"),
    ("modulation", r"Modulation|of_groups"),
    ("norms", r"modulated_norm|StreamBlock.before"),
    ("residuals and gates", r"gated_sum|StreamBlock.after"),
    ("q, k, v", r"Linear.__call__|StreamBlock.project|:Block.__call__"),
    ("MLP", r"Mlp|gelu"),
    ("loop", r"_run_blocks"),
)  # by file:function; the first that fits
_LOOPS = {"forward": r"\)/jvp\(\)/while$", "backward": r"\)/transpose\(jvp\(\)\)/while$"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """For what the step is compiled."""

    chips: tuple[str, ...] = ("v5p", "v6e")
    """One of a kind, or a topology with all of its chips, as v5p:4x4x4."""
    depth: int = 2
    """Layers: they are a loop, so that bytes per layer and compilation do not depend on it, but memory does."""
    shots: int = 8
    jobs: int = 1
    """Compilations at once."""
    timeout: float = 1800.0
    """Seconds for one compilation."""
    out: pathlib.Path = results.FOLDER

    def __post_init__(self):
        unknown = [each for each in self.chips if each.split(":")[0] not in CHIPS]
        if unknown:
            raise ValueError(f"--chips {' '.join(unknown)}: known are {', '.join(CHIPS)}, and their topologies")


def main(args: Arguments, command: str) -> None:
    """Compiles, stores and prints."""
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        entries = pool.map(lambda chip: measure(chip, args), args.chips)
        for chip, entry in zip(args.chips, entries, strict=True):
            kind = chip.split(":")[0]
            name = f"{chip}, {args.depth} layers, {args.shots} shots"
            results.store(args.out, "tpu_step", name, command, entry, chip=f"TPU {kind}")
            gib = {what: round(size / 2**30, 1) for what, size in entry.get("memory", {}).items()}
            print(entry.get("error") or f"{name}: {entry['seconds']} s, GiB {gib}", flush=True)
            print("\n".join(traffic_table([{"chip": f"TPU {kind}", "entries": {name: entry}}])), flush=True)


def measure(chip: str, args: Arguments) -> dict[str, Any]:
    """One entry; if code generation does not end in time, its bytes by the program that it was for.

    Raises:
        CompilationError: the step doesn't compile.
    """
    with tempfile.TemporaryDirectory(prefix="tpu_step_") as temporary:
        folder = pathlib.Path(temporary)
        what = [chip, str(args.depth), str(args.shots), temporary]
        try:
            name = f"a training step for {chip}"
            compiler.run("benchmarks.tpu.step", what, name, args.timeout, folder, stages=())
            found = json.loads((folder / "step.json").read_text())
            text = (folder / "step.txt").read_text()
        except compiler.CompilationError as error:
            programs = list(folder.glob(f"*{compiler.PROGRAM}"))
            if not programs:
                raise
            found, text = {"error": str(error)}, max(programs, key=lambda path: path.stat().st_size).read_text()
    return {"topology": chip, "depth": args.depth, "shots": args.shots, **found, **of_a_layer(text, chip)}


def of_a_layer(text: str, chip: str) -> dict[str, Any]:
    """GB of one layer's forward and backward pass by kind of work, and milliseconds where the compiler has estimates.

    Raises:
        ValueError: the program has not one loop over layers for each pass.
    """
    program, of = Program(text), CHIPS[chip.split(":")[0]]
    entry: dict[str, Any] = {}
    for way, body in bodies(program).items():
        moves = list(program.walk(body))
        estimated = any(moved.cycles for moved in moves)  # not before code is generated
        sums: dict[str, dict[str, float]] = collections.defaultdict(lambda: collections.defaultdict(float))
        for moved in moves:
            found = sums[_kind(moved)]
            found["gb"] += moved.bytes / 1e9
            if estimated:
                found["ms"] += milliseconds(moved, of)
        entry[way] = {kind: {what: round(x, 3) for what, x in sums[kind].items()} for kind in sorted(sums)}
    return entry


def bodies(program: Program) -> dict[str, str]:
    """The computation of a turn of the loop over layers, by pass."""
    loops = program.loops()
    found = {way: [body for name, body in loops.items() if re.search(loop, name)] for way, loop in _LOOPS.items()}
    if any(len(all_of_them) != 1 for all_of_them in found.values()):
        raise ValueError(f"expected one loop over layers for each pass, found {', '.join(loops)}")
    return {way: body for way, (body,) in found.items()}


def milliseconds(moved: Traffic, chip: compiler.Chip) -> float:
    """XLA's estimate, or that of the bytes at the peak of HBM where it has none or less."""
    transfer = moved.bytes / (chip.info.mem_bw_bytes_per_second * chip.cores)
    return 1e3 * max(transfer, (moved.cycles or 0.0) * moved.turns / chip.clock)


def _kind(moved: Traffic) -> str:
    if moved.kernel:
        return "kernels"
    if any("->" not in name for name in moved.products):  # einsums only look up or exchange
        return "matrix products"
    return kind_of(moved, KINDS)


def run(argv: Sequence[str]) -> None:
    """The command line."""
    args = tyro.cli(Arguments, args=list(argv), description=__doc__)
    main(args, shlex.join(["python", "-m", "benchmarks.tpu_step", *argv]))


if __name__ == "__main__":
    run(sys.argv[1:])
