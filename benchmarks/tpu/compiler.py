"""Compiles a kernel for a TPU on a machine that has none, and reads its schedule.

libtpu holds the whole compiler, and `jax.experimental.topologies` makes it compile for chips that aren't there. It
takes its flags from the environment when it is loaded, hence a process for each compilation.
"""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Sequence

from jax.experimental.pallas import tpu as pltpu

from benchmarks.tpu import listing
from benchmarks.tpu.kernels import Blocks, Pass
from benchmarks.tpu.listing import Schedule
from moc_jax.attention.pallas_tpu import device
from moc_jax.planning import compiled
from moc_jax.planning.compiled import CompilationError

PROGRAM = "-TLP-hlo.txt"
_ROOT = pathlib.Path(__file__).parents[2]
_STAGES = (listing.BUNDLES, listing.SLOTS)


@dataclasses.dataclass(frozen=True)
class Chip:
    """What programs are compiled for, of a kind of TPU, and how its listings are read."""

    topology: str
    """The smallest that libtpu knows."""
    granule: int = 32
    """Bytes in which listings count copies."""
    rows_per_cycle: int = 1
    """That each matrix unit multiplies at the peak."""

    @property
    def kind(self) -> str:
        """The chip's name in CHIPS."""
        return self.topology.split(":")[0]

    @property
    def cores(self) -> int:
        """That share a program as one device."""
        return device.Chip(self.kind).cores

    @property
    def info(self) -> pltpu.TpuInfo:
        """What Pallas knows of one core."""
        return device.Chip(self.kind).info

    @property
    def clock(self) -> float:
        """Hertz: the peak in bfloat16 divided by what the matrix units do in a cycle."""
        per_row = 2 * self.info.num_mxus * self.info.mxu_column_size**2
        return self.info.bf16_ops_per_second / (per_row * self.rows_per_cycle)


CHIPS = {
    "v4": Chip("v4:1x1x1", granule=512),
    "v5e": Chip("v5e:1x1"),
    "v5p": Chip("v5p:1x1x1"),
    "v6e": Chip("v6e:1x1", rows_per_cycle=2),
    "tpu7x": Chip("tpu7x:1x1x1", rows_per_cycle=2),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """What the compiler made of a kernel."""

    schedule: Schedule
    memory: dict[str, int]
    """Bytes on the chip of the whole program: arguments, outputs, temporary."""


def compile_for(
    chip: str, kernel: str, way: Pass, blocks: Blocks, head_dim: int = 128, timeout: float = 300
) -> Compiled:
    """Compiles one pass of one kernel of kernels.py for a chip; `timeout` in seconds.

    Raises:
        RuntimeError: libtpu is missing.
        CompilationError: the kernel doesn't compile, most often because its blocks don't fit into VMEM, or takes longer
            than the timeout.
    """
    with tempfile.TemporaryDirectory(prefix="tpu_schedule_") as temporary:  # hundreds of files per compilation
        listings = pathlib.Path(temporary) / "listings"
        listings.mkdir()
        file = pathlib.Path(temporary) / "compiled.json"
        what = [chip, kernel, way, json.dumps(dataclasses.asdict(blocks)), str(head_dim), str(file)]
        run("benchmarks.tpu.worker", what, f"{kernel} {way} {blocks} for {chip}", timeout, listings)
        found = json.loads(file.read_text())
        bundles, slots = (path.read_text() for path in listing.find(listings, found["kernel"]))
        return Compiled(schedule=listing.read(bundles, slots, CHIPS[chip].granule), memory=found["memory"])


def run(
    module: str,
    arguments: Sequence[str],
    name: str,
    timeout: float,
    listings: pathlib.Path | None = None,
    stages: Sequence[str] = _STAGES,
) -> None:
    """Runs a module that compiles in a process of its own; `name` says what, for errors; `timeout` in seconds.

    Raises:
        RuntimeError: libtpu is missing.
        CompilationError: the process fails, with the compiler's reason, or takes longer than the timeout.
    """
    if not compiled.installed():
        raise RuntimeError("the TPU compiler is missing: pip install -e '.[tpu]'")
    try:
        done = subprocess.run(
            [sys.executable, "-m", module, *arguments],
            cwd=_ROOT,
            env=environment(listings, stages),
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
        )
    except subprocess.TimeoutExpired as error:
        raise CompilationError(f"{name}: not compiled in {timeout:g} s") from error
    if done.returncode != 0:
        raise CompilationError(f"{name}: {compiled.reason(done.stderr)}")


def environment(listings: pathlib.Path | None = None, stages: Sequence[str] = _STAGES) -> dict[str, str]:
    """What a process that compiles must find when it starts; with a folder, the compiler's listings go there.

    Those of some stages alone, of all parts of a program, as all would be hundreds of megabytes; and the program's text
    before code is generated, whose name ends in PROGRAM.
    """
    labels = f".*({'|'.join(stages) or 'none'}).*"
    flags = f"--xla_jf_dump_to={listings} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex={labels}"
    given = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {flags if listings else ''}".strip()
    return compiled.environment() | {"LIBTPU_INIT_ARGS": given}
