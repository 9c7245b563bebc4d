"""How long would the whole operation take on a TPU? No TPU is needed for an estimate.

    python -m benchmarks.tpu_estimate                       # all chips, forward, and forward with backward
    python -m benchmarks.tpu_estimate --chips v5p --passes forward

Needs libtpu: pip install -e '.[tpu]'. Attention with its routing is compiled for each chip at 180 504 tokens (8 shots
of 22 500 tokens, 9 captions, 12 heads of 128, bfloat16, random routes). A kernel takes the cycles of its listing, each
loop as often as it turns in this scene (benchmarks/tpu/counting.py), or its bytes at the peak rate of HBM if that is
longer; XLA's own operations what XLA expects (benchmarks/tpu/hlo.py). Beside it jax's splash attention without a mask
at its best block sizes, its kernel alone.

Waits for memory and between kernels are in neither. tpu7x is one of a chip's two cores, a device of its own.
"""

import collections
import concurrent.futures
import dataclasses
import itertools
import math
import pathlib
import re
import shlex
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import tyro

from benchmarks import results
from benchmarks.tables import estimate_parts_table, estimate_table, separated
from benchmarks.tpu import compiler, hlo, listing, walks
from benchmarks.tpu.compiler import CHIPS
from benchmarks.tpu.counting import Call, turns
from benchmarks.tpu.kernels import PASSES, Pass
from benchmarks.tpu.real_sizes import SCENES

_SCENE = SCENES["multi_shot"]
_PARTS: dict[Pass, str] = {"forward": "forward", "backward": "gradients"}
_KERNEL = re.compile(r"%(moc_[\w.\-]+) = ")
_BYTES = re.compile(r'%(?P<name>moc_[\w.\-]+) = .*"bytes_accessed":"(?P<bytes>\d+)"')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Which operation is estimated, and for which chips."""

    chips: tuple[str, ...] = tuple(CHIPS)
    passes: tuple[Pass, ...] = PASSES
    """backward: both."""
    jobs: int = 2
    """Compilations at once."""
    timeout: float = 1800.0
    """Seconds for one compilation."""
    out: pathlib.Path = results.FOLDER


def main(args: Arguments, command: str) -> None:
    """Compiles, prints and stores."""
    work = list(itertools.product(args.chips, args.passes))
    found: dict[str, dict[str, Any]] = {chip: {} for chip in args.chips}
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        running = {pool.submit(estimate, chip, way, args.timeout): (chip, way) for chip, way in work}
        for one in concurrent.futures.as_completed(running):
            chip, way = running[one]
            found[chip][way] = one.result()
            results.store(args.out, "tpu_estimate", way, command, found[chip][way], chip=f"TPU {chip}")
    files = [{"chip": f"TPU {chip}", "entries": entries} for chip, entries in found.items()]
    print("\n".join(separated([estimate_table(files), *(estimate_parts_table(file) for file in files)])))


def estimate(chip: str, way: Pass, timeout: float) -> dict[str, Any]:
    """One entry: milliseconds of each part, of all, and of splash attention.

    Raises:
        CompilationError: the program doesn't compile in time.
    """
    target, calls = CHIPS[chip], walks.scene_calls(_SCENE, _PARTS[way], chip)
    rate = target.info.mem_bw_bytes_per_second * target.cores
    with tempfile.TemporaryDirectory(prefix="tpu_estimate_") as temporary:
        folder = pathlib.Path(temporary)
        text = _compile(chip, way, folder, timeout)
        sizes = {found["name"]: int(found["bytes"]) for found in _BYTES.finditer(text)}
        kernels: dict[str, dict[str, float]] = {}
        for (kernel, call), listed in listings(pair(_KERNEL.findall(text), calls), listing.kernels(folder, "moc_")):
            bundles, slots = (path.read_text() for path in listing.find(folder, listed))
            cycles = call.times * walks.cycles(call.name, turns(call), bundles, slots, target.granule)
            compute = 1e3 * cycles / target.cores / target.clock
            moving = 1e3 * sizes.get(kernel, 0) * call.times / rate
            found = kernels.setdefault(call.name, {"calls": 0, "cycles": 0.0, "ms": 0.0})
            found["calls"] += 1
            found["cycles"] += cycles
            found["ms"] += max(compute, moving)
    others = hlo.operations(text, max(call.times for call in calls))
    of_xla = 1e3 * sum((x.cycles or 0.0) * x.turns for x in others) / target.clock
    without = 1e3 * sum(2 * x.bytes * x.turns for x in others if x.cycles is None) / rate
    total = sum(found["ms"] for found in kernels.values()) + of_xla + without
    splash, blocks = splash_ms(chip, way)
    return {
        "pass": way,
        "setting": "multi_shot",
        "tokens": _SCENE.setting.shape.tokens,
        "heads": _SCENE.heads,
        "head_dim": _SCENE.dim,
        "cores": target.cores,
        "kernels": {name: {key: round(x, 3) for key, x in found.items()} for name, found in kernels.items()},
        "xla_ms": round(of_xla, 3),
        "xla_without_estimate_ms": round(without, 3),
        "total_ms": round(total, 2),
        "splash_ms": round(splash, 2),
        "splash_blocks": blocks,
        "ratio": round(splash / total, 3),
    }


def pair(names: Sequence[str], calls: Sequence[Call]) -> Iterator[tuple[str, Call]]:
    """The compiled kernels and the calls that they are: of each name in the order of XLA's numbers.

    Raises:
        ValueError: there are more or fewer of a name.
    """
    compiled = collections.defaultdict(list)
    for name in sorted(names, key=lambda name: [int(x) for x in re.findall(r"\.(\d+)", name)]):
        compiled[re.sub(r"\..*", "", name)].append(name)
    for name in dict.fromkeys([*compiled, *(call.name for call in calls)]):
        own = [call for call in calls if call.name == name]
        if len(own) != len(compiled[name]):
            raise ValueError(f"{name}: {len(own)} calls are traced, but compiled are {compiled[name]}")
        yield from zip(compiled[name], own)


def listings(pairs: Iterable[tuple[str, Call]], listed: Sequence[str]) -> Iterator[tuple[tuple[str, Call], str]]:
    """With each compiled kernel the one whose listing it has: of those with the same code the compiler lists one.

    Raises:
        ValueError: none is listed.
    """
    pairs = list(pairs)
    of_code = {call.code: name for name, call in pairs if name in listed}
    for name, call in pairs:
        if name not in listed and call.code not in of_code:
            raise ValueError(f"{name} is compiled, but listed are {sorted(listed)}")
        yield (name, call), name if name in listed else of_code[call.code]


def splash_ms(chip: str, way: Pass, folder: pathlib.Path = results.FOLDER) -> tuple[float, list[dict[str, Any]]]:
    """Of splash attention over all tokens at the block sizes that take it least, as tpu_schedule stored them.

    Raises:
        RuntimeError: nothing is stored for the chip.
    """
    (file,) = [f for f in results.load(folder, "tpu_schedule") if f["chip"] == f"TPU {chip}"] or [None]
    if file is None:
        raise RuntimeError(f"splash attention's schedule is not known for {chip}: run benchmarks.tpu_schedule first")
    tokens, total, blocks = _SCENE.setting.shape.tokens, 0.0, []
    for one in PASSES if way == "backward" else (way,):
        found = []
        for e in file["entries"].values():
            if (e["kernel"], e["pass"]) == ("splash", one) and "error" not in e:
                tile, step = (e["blocks"]["q"], e["blocks"]["kv"])[:: 1 if one == "forward" else -1]
                steps = math.ceil(tokens / step)
                cycles = math.ceil(tokens / tile) * (steps * e["step_cycles"] + sum(e["conditional_cycles"]))
                found.append((cycles, {"pass": one, **e["blocks"]}))
        cycles, size = min(found, key=lambda x: x[0])
        total += 1e3 * _SCENE.heads * cycles / CHIPS[chip].cores / CHIPS[chip].clock
        blocks.append(size)
    return total, blocks


def _compile(chip: str, way: Pass, folder: pathlib.Path, timeout: float) -> str:
    """The program's text; listings of its kernels go to the folder."""
    file = folder / "program.txt"
    compiler.run("benchmarks.tpu.whole", [chip, _PARTS[way], str(file)], f"{way} for {chip}", timeout, folder)
    return file.read_text()


def run(argv: Sequence[str]) -> None:
    """The command line."""
    jax.config.update("jax_platforms", "cpu")  # the TPU runtime would look for one
    args = tyro.cli(Arguments, args=list(argv), description=__doc__)
    main(args, shlex.join(["python", "-m", "benchmarks.tpu_estimate", *argv]))


if __name__ == "__main__":
    run(sys.argv[1:])
