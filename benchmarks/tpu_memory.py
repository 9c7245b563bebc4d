"""What does attention need in a TPU's memory? No TPU is needed to ask its compiler.

    python -m benchmarks.tpu_memory                                        # all chips, both long scenes
    python -m benchmarks.tpu_memory --chips v5p --programs minutes/forward

Needs libtpu: pip install -e '.[tpu]'. Attention with its routing, alone or with its gradients, is compiled as one
program (benchmarks/tpu/real_sizes.py). Stored are the bytes of its arguments, outputs and temporary arrays beside what
the chip has, or why it doesn't compile. Minutes per program.
"""

import concurrent.futures
import dataclasses
import itertools
import json
import pathlib
import shlex
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import tyro

from benchmarks import results
from benchmarks.tpu import compiler
from benchmarks.tpu.compiler import CHIPS
from benchmarks.tpu.real_sizes import PARTS, SCENES
from moc_jax.attention.pallas_tpu import device


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Which programs are compiled, and for which chips."""

    chips: tuple[str, ...] = tuple(CHIPS)
    programs: tuple[str, ...] = tuple(f"{scene}/{part}" for scene in ("multi_shot", "minutes") for part in PARTS)
    """SCENE/PART."""
    jobs: int = 2
    """Compilations at once."""
    timeout: float = 1800.0
    """Seconds for one compilation."""
    out: pathlib.Path = results.FOLDER

    def __post_init__(self):
        all_programs = [f"{scene}/{part}" for scene in SCENES for part in PARTS]
        for name, asked, known in (("chips", self.chips, CHIPS), ("programs", self.programs, all_programs)):
            unknown = [each for each in asked if each not in known]
            if unknown:
                raise ValueError(f"--{name} {' '.join(unknown)}: known are {', '.join(known)}")


def main(args: Arguments, command: str) -> None:
    """Compiles, prints and stores."""
    work = list(itertools.product(args.chips, args.programs))
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        for (chip, name), found in zip(
            work, pool.map(lambda one: ask(one[0], one[1], args.timeout), work), strict=True
        ):
            results.store(args.out, "tpu_memory", name, command, entry(chip, name, found), chip=f"TPU {chip}")
            gib = {what: round(size / 2**30, 2) for what, size in found.get("memory", {}).items()}
            print(f"{chip} ({device.Chip(chip).memory / 2**30:.0f} GiB) {name}: {gib or found['error']}", flush=True)


def entry(chip: str, name: str, found: dict[str, Any]) -> dict[str, Any]:
    """What is stored."""
    scene, part = name.split("/")
    of = SCENES[scene]
    sizes = {"tokens": of.setting.shape.tokens, "heads": of.heads, "head_dim": of.dim}
    return {"scene": scene, "part": part, **sizes, "hbm": device.Chip(chip).memory, **found}


def ask(chip: str, name: str, timeout: float) -> dict[str, Any]:
    """The kernels of a program and the bytes that it needs, or an error.

    Raises:
        RuntimeError: libtpu is missing.
        CompilationError: the process died or took longer than the timeout.
    """
    with tempfile.TemporaryDirectory(prefix="tpu_memory_") as temporary:
        file = pathlib.Path(temporary) / "found.json"
        compiler.run("benchmarks.tpu.real_sizes", [chip, str(file), name], f"{name} for {chip}", timeout)
        return json.loads(file.read_text())[name]


def run(argv: Sequence[str]) -> None:
    """The command line."""
    args = tyro.cli(Arguments, args=list(argv), description=__doc__)
    main(args, shlex.join(["python", "-m", "benchmarks.tpu_memory", *argv]))


if __name__ == "__main__":
    run(sys.argv[1:])
