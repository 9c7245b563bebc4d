"""Compiles the training step of a whole model for TPUs: python -m benchmarks.tpu.step TOPOLOGY DEPTH SHOTS FOLDER

The model and the scene are those of benchmarks/model.py, but for how many layers and shots there are. TOPOLOGY is one
that libtpu knows, or a chip's name for one device of it. A device has one scene; weights are split over all of them
(fsdp). The process's environment must be `compiler.environment()`. FOLDER gets the program's text and, as JSON, what it
needs in HBM and how long it took to compile.
"""

import dataclasses
import json
import pathlib
import sys
import time

import jax

from benchmarks.model import Arguments, make_scene
from benchmarks.tpu.compiler import CHIPS
from benchmarks.tpu.worker import memory
from moc_jax.attention.api import RoutedAttention
from moc_jax.attention.pallas_tpu.device import Tpu
from moc_jax.config import Config, HashConfig, MeshConfig, TrainConfig
from moc_jax.planning.compiled import absent_devices
from moc_jax.sharding import make_mesh
from moc_jax.training.state import make_blueprint
from moc_jax.training.step import make_train_step


def main(topology: str, depth: str, shots: str, folder: str) -> None:
    """Compiles and writes `step.txt` and `step.json`."""
    lowered = lower(topology, int(depth), int(shots))
    begin, processor = time.perf_counter(), time.process_time()
    program = lowered.compile()
    seconds = {"wall": time.perf_counter() - begin, "processor": time.process_time() - processor}
    found = {"memory": memory(program), "seconds": {name: round(x, 1) for name, x in seconds.items()}}
    (pathlib.Path(folder) / "step.txt").write_text(program.as_text() or "")
    (pathlib.Path(folder) / "step.json").write_text(json.dumps(found))


def lower(topology: str, depth: int, shots: int) -> jax.stages.Lowered:
    """The step before it is compiled."""
    args, chip = Arguments(), CHIPS[topology.split(":")[0]]
    devices = absent_devices(topology) if ":" in topology else absent_devices(chip.topology)[:1]
    model = dataclasses.replace(args.model, depth=depth)
    config = Config(model=model, moc=args.moc, text=HashConfig(dim=model.text_dim), train=TrainConfig(ema_decay=0.0))
    attention = RoutedAttention(backend=Tpu(chip=chip.kind))
    mesh = make_mesh(MeshConfig(data=1, fsdp=-1), devices)
    with jax.set_mesh(mesh):
        blueprint = make_blueprint(config.model, config.optimizer, config.train, mesh)
        step = make_train_step(config.train, config.optimizer, config.diffusion, blueprint, mesh, attention)
        one = jax.eval_shape(lambda: make_scene(dataclasses.replace(args, shots=shots)))
        scene = jax.tree.map(lambda x: jax.ShapeDtypeStruct((len(devices), *x.shape[1:]), x.dtype), one)
        return step.trace(blueprint.abstract, scene, config.moc).lower(lowering_platforms=("tpu",))


if __name__ == "__main__":
    main(*sys.argv[1:])
