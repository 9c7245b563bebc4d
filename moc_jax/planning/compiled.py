"""A training step compiled for TPUs or GPUs that aren't there, as far as what it needs of their memory.

libtpu holds the whole compiler for TPUs, and jax's CUDA plugin that for GPUs (absent_gpus.py). A process of its own
lowers the step; once XLA has assigned its buffers, which it writes down before it generates code, the process is ended:
seconds instead of many minutes.
"""

import dataclasses
import functools
import importlib.util
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import topologies

from moc_jax.config import Config, ConfigError, MeshConfig
from moc_jax.config_json import config_from_json, config_to_json
from moc_jax.data.pack import blank_scene
from moc_jax.errors import Failure
from moc_jax.flags import set_flags
from moc_jax.planning import absent_gpus
from moc_jax.planning.collectives import by_kind, collectives
from moc_jax.planning.topology import Topology, topology
from moc_jax.planning.workload import workload

_REPORT = "*jit_of_seed*after_optimizations-memory-usage-report.txt"
_PROGRAM = "*jit_of_seed*after_optimizations.txt"
_CONFIGS = {"v4": "megacore"}  # how libtpu sets a chip up, where it is not the default: v4's two cores as one device


class CompilationError(Failure):
    """The step doesn't compile, or not in time."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """What XLA made of a step."""

    total: int
    """Bytes that a device needs, as XLA laid them out."""
    collectives: dict[str, tuple[int, int]]
    """By kind: how many arrays a step exchanges, and their bytes (`Collective`), of all layers."""
    seconds: float


@dataclasses.dataclass(frozen=True)
class Optimized:
    """What XLA writes down of a program before it generates code."""

    text: str
    bytes: int
    """That a device needs, as XLA laid them out."""


def compile_step(cfg: Config, where: Topology, sizes: dict[str, int], timeout: float = 600) -> Compiled:
    """The training step of `cfg`, with a mesh of `sizes`, in a process of its own.

    Raises:
        ConfigError: the compiler is not installed.
        CompilationError: the compiler refuses it, or takes longer than `timeout` seconds.
    """
    tpus = bool(where.chip.torus)
    if not (installed() if tpus else absent_gpus.installed()):
        package = "'moc_jax[tpu]'" if tpus else absent_gpus.PACKAGES
        raise ConfigError(f"the compiler for {where.chip.name} is missing: pip install {package}")
    begin, variables = time.monotonic(), environment() if tpus else absent_gpus.environment()
    set_flags(variables)  # as a run does
    command = ["-m", "moc_jax.planning.compiled", where.name, config_to_json(cfg), *map(str, sizes.values())]
    found = optimized(command, f"the step for {where.name}", variables, timeout)
    exchanged = by_kind(collectives(found.text), cfg.model.depth)  # the loops are those over layers
    return Compiled(total=found.bytes, collectives=exchanged, seconds=time.monotonic() - begin)


def optimized(command: Sequence[str], name: str, variables: Mapping[str, str], timeout: float = 600) -> Optimized:
    """The program `jit_of_seed`, a training step, that `python *command` compiles with these variables around it.

    The process is ended once it has written the program down. `name` says what it is, for errors.

    Raises:
        CompilationError: it ends before, or takes longer than `timeout` seconds.
    """
    until = time.monotonic() + timeout
    with tempfile.TemporaryDirectory(prefix="moc_jax-plan-") as temporary:
        folder = pathlib.Path(temporary)
        flags = f"--xla_dump_to={folder} --xla_dump_hlo_as_text --xla_dump_hlo_pass_re=none"
        dump = {"XLA_FLAGS": f"{variables.get('XLA_FLAGS', '')} {flags}"}
        with (folder / "log").open("wb") as log:
            line = [sys.executable, *command]
            process = subprocess.Popen(line, env={**variables, **dump}, stdout=log, stderr=log, start_new_session=True)
            try:
                _wait(process, folder, name, until)
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        reports = sorted(folder.glob(_REPORT))
        if not reports:
            raise CompilationError(f"{name} does not compile: {reason((folder / 'log').read_text(errors='replace'))}")
        total = re.search(r"Total bytes: (\d+)", reports[-1].read_text())
        assert total is not None
        return Optimized("".join(path.read_text() for path in folder.glob(_PROGRAM)), int(total[1]))


def _wait(process: subprocess.Popen[bytes], folder: pathlib.Path, name: str, until: float) -> None:
    """Until the program is written whole, or the process ends."""
    sizes: list[int] = []
    while process.poll() is None:
        written = [path.stat().st_size for path in [*folder.glob(_REPORT), *folder.glob(_PROGRAM)]]
        if len(written) >= 2 and written == sizes:
            return
        sizes = written
        if time.monotonic() > until:
            raise CompilationError(f"{name} was not compiled in time: give --timeout more seconds")
        time.sleep(1)


def reason(output: str) -> str:
    """Of what a process that failed has printed, the last line that names an error, or else the last."""
    lines = output.strip().splitlines() or ["no output"]
    return ([line for line in lines if "Error" in line] or lines)[-1].strip()


def installed() -> bool:
    """Whether the TPU compiler is."""
    return importlib.util.find_spec("libtpu") is not None


def environment() -> dict[str, str]:
    """What a process that compiles for TPUs must find when it starts."""
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",  # those around are for this machine
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no chip is used, so that processes needn't wait for each other
        # Don't look for a TPU host around this machine.
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5p-8",  # any will do
    }


def absent_devices(name: str) -> Sequence[jax.Device]:
    """Those of a topology of TPUs that isn't there, as `v5p:4x4x4`: to be called in the environment above."""
    config = _CONFIGS.get(name.partition(":")[0], "default")
    return topologies.get_topology_desc(name, "tpu", chip_config_name=config).devices


def build(cfg: Config, name: str, sizes: list[int]) -> jax.stages.Compiled:
    """The step for a topology: to be called in the environment of its compiler."""
    from moc_jax.attention.api import RoutedAttention
    from moc_jax.attention.backends import Xla
    from moc_jax.attention.pallas_gpu.device import Hopper
    from moc_jax.attention.pallas_tpu.device import Tpu
    from moc_jax.compilation import mesh_options
    from moc_jax.sharding import batch_sharding, batch_shards, make_mesh
    from moc_jax.training.state import make_blueprint
    from moc_jax.training.step import make_train_step

    where, work = topology(name), workload(cfg)
    if where.chip.torus:
        devices, backend, platform = absent_devices(name), Tpu(chip=where.chip.name), "tpu"
    else:
        die = absent_gpus.DIES[where.chip.name]
        backend = Hopper(multiprocessors=die.multiprocessors) if die.has_own_kernels else Xla()
        devices, platform = absent_gpus.absent_devices(where), "cuda"
    data, fsdp, context, tensor = sizes
    mesh = make_mesh(MeshConfig(data=data, fsdp=fsdp, context=context, tensor=tensor), devices)
    with jax.set_mesh(mesh):
        blueprint = make_blueprint(cfg.model, cfg.optimizer, cfg.train, mesh)
        attention = RoutedAttention(backend=backend)
        step = make_train_step(cfg.train, cfg.optimizer, cfg.diffusion, blueprint, mesh, attention)
        shards, sharding = batch_shards(mesh), batch_sharding(mesh)
        scenes = -(-cfg.train.batch_size // shards) * shards

        def of_batch(x: np.ndarray) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((scenes, *x.shape), x.dtype, sharding=sharding)

        given = {"clean": cfg.clean_first_frames, "condition": cfg.condition_channels}
        latents = *cfg.latent_size, cfg.codec.channels
        blank = functools.partial(blank_scene, work.bucket, latents, cfg.text.dim, **given)
        scene = jax.tree.map(of_batch, jax.eval_shape(blank))
        lowered = step.trace(blueprint.abstract, scene, work.moc).lower(lowering_platforms=(platform,))
        return lowered.compile(compiler_options=mesh_options(mesh) if where.hosts == 1 else None)


if __name__ == "__main__":
    name_, config_, *sizes_ = sys.argv[1:]
    build(config_from_json(config_), name_, list(map(int, sizes_)))
