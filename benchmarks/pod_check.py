"""What only a real pod can tell, in minutes: run on every host, and send back the file that process 0 writes.

    python -m benchmarks.pod_check --workdir gs://my-bucket/check    # on each host of a pod
    python -m benchmarks.pod_check                                   # one host

In one JSON, and in short on the screen: versions and devices; where they lie in the mesh; how fast collectives are
along each axis; attention's kernels against the float32 oracle at a small size; a training step of a preset; the rates
of a save to `workdir` and a restore from it. A part that fails leaves its error there, and the next one begins.
"""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks import results
from benchmarks.inputs import make_inputs
from benchmarks.measure import begun, both_ways
from moc_jax.attention.api import moc_attention, route
from moc_jax.checkpoint import Checkpoints
from moc_jax.chips import chip_of
from moc_jax.compilation import mesh_options
from moc_jax.config import ChunkConfig, Config, HashConfig, MeshConfig, MoCConfig, TrainConfig
from moc_jax.config.presets import PRESETS
from moc_jax.files import write_text
from moc_jax.models import matrix_flops
from moc_jax.processes import join
from moc_jax.scene import Scene, SceneLengths, SceneShape, chunk_table
from moc_jax.sharding import AXES, batch_sharding, batch_shards, make_mesh
from moc_jax.training.state import make_blueprint
from moc_jax.training.step import make_train_step

_STEPS, _TIMES = 5, 10
_LEFT_OUT = "PASSWORD", "TOKEN", "SECRET", "KEY", "CREDENTIAL", "HOST", "ADDR", "NODELIST"  # of variables' names


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Sizes suit a pod; all of them can be small."""

    workdir: str = "out/pod_check"
    """Folder that all hosts share, or a bucket; what is saved there is removed again."""
    out: pathlib.Path = pathlib.Path("out/pod_check.json")
    preset: str = "base"
    """Model of the training step, whose state is saved."""
    depth: int = 0
    """Its layers; 0: all."""
    shots: int = 8
    frames: int = 8
    """Latent frames per shot."""
    rows: int = 24
    columns: int = 40
    """Of a latent frame; the defaults make 15 432 tokens a scene."""
    mib: tuple[int, ...] = (1, 64)
    """Sizes of the arrays that collectives move, per device."""
    meshes: tuple[str, ...] = ()
    """As data:fsdp:context:tensor, 1:-1:1:1 for instance; none: fsdp over all, and over the devices of a host."""

    def __post_init__(self):
        if self.preset not in PRESETS:
            raise ValueError(f"--preset {self.preset}: known are {', '.join(PRESETS)}")


def main(args: Arguments, command: str) -> dict[str, Any]:
    """Measures, writes and prints; returns what was written."""
    join(MeshConfig())
    meshes = [make_mesh(one) for one in _meshes(args)]
    command = command.replace(args.workdir, "...").replace(str(args.out), "...")  # places are the user's own
    found: dict[str, Any] = {"command": command, "versions": results.versions()}
    parts: dict[str, Callable[[], object]] = {
        "devices": lambda: devices(meshes),
        "collectives": lambda: [collectives(mesh, args.mib) for mesh in meshes],
        "attention": attention,
        "training": lambda: training(args, meshes[0], found),
    }
    for name, part in parts.items():
        begin = time.perf_counter()
        found[name] = _tried(part)
        found.setdefault("seconds", {})[name] = round(time.perf_counter() - begin, 1)
    if jax.process_index() == 0:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_text(epath.Path(args.out), json.dumps(found, indent=1) + "\n")
        print("\n".join(summary(found)), f"all of it: {args.out}", sep="\n", flush=True)
    return found


def _tried(part: Callable[[], object]) -> object:
    """What it returns, or its error: what else works is worth knowing."""
    try:
        return part()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def _meshes(args: Arguments) -> list[MeshConfig]:
    if args.meshes:
        sizes = [[int(size) for size in mesh.split(":")] for mesh in args.meshes]
        return [MeshConfig(data=d, fsdp=f, context=c, tensor=t) for d, f, c, t in sizes]
    hosts = jax.process_count()
    return [MeshConfig(data=1, fsdp=-1), *([MeshConfig(data=hosts, fsdp=-1)] if hosts > 1 else [])]


# ------------------------------------------------------------------------------------------------ devices


def devices(meshes: Sequence[Mesh]) -> dict[str, Any]:
    """Each device's place, and how far neighbours in a mesh lie apart: hops over links, or other processes."""
    every = jax.devices()
    environment = {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith(("TPU_", "LIBTPU", "XLA_", "NCCL_", "SLURM_N")) and not any(x in name for x in _LEFT_OUT)
    }
    return {
        "kind": every[0].device_kind,
        "count": len(every),
        "processes": jax.process_count(),
        "memory": (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit"),
        "environment": environment,
        "places": [[device.id, device.process_index, *_place(device)] for device in every],
        "meshes": [_placement(mesh) for mesh in meshes],
    }


def _place(device: jax.Device) -> tuple[int, ...]:
    return tuple(getattr(device, "coords", ()) or ())


def _placement(mesh: Mesh) -> dict[str, Any]:
    found: dict[str, Any] = {"shape": dict(mesh.shape), "ids": [int(d.id) for d in mesh.devices.flat]}
    for axis, name in enumerate(AXES):
        if mesh.shape[name] == 1:
            continue
        pairs = list(zip(mesh.devices.take(range(mesh.shape[name] - 1), axis).flat, _shifted(mesh, axis), strict=True))
        hops = [sum(abs(a - b) for a, b in zip(_place(one), _place(other))) for one, other in pairs]
        apart = [one.process_index != other.process_index for one, other in pairs]
        found[name] = {"mean_hops": float(np.mean(hops)), "other_process": float(np.mean(apart))}
    return found


def _shifted(mesh: Mesh, axis: int) -> list[jax.Device]:
    return list(mesh.devices.take(range(1, mesh.devices.shape[axis]), axis).flat)


# ------------------------------------------------------------------------------------------------ collectives


def collectives(mesh: Mesh, sizes: Sequence[int]) -> dict[str, Any]:
    """GB per second that each device receives, by axis, kind and MiB per device."""
    found: dict[str, Any] = {}
    for axis in [name for name in AXES if mesh.shape[name] > 1]:
        for mib in sizes:
            for kind, rate in _rates(mesh, axis, mib).items():
                found.setdefault(axis, {}).setdefault(kind, {})[f"{mib} MiB"] = round(rate, 2)
    return {"mesh": dict(mesh.shape), "gb_per_second": found}


def _rates(mesh: Mesh, axis: str, mib: int) -> dict[str, float]:
    count, width = mesh.shape[axis], 512
    rows = max(mib * 2**20 // (2 * width) // count * count, count)  # of bfloat16, on each device
    sent = rows * width * 2
    programs = {  # and the bytes that a device receives of others
        "all-gather": (lambda x: jax.lax.all_gather(x, axis, tiled=True), sent * (count - 1)),
        "reduce-scatter": (lambda x: jax.lax.psum_scatter(x, axis, tiled=True), sent * (count - 1) / count),
        "all-reduce": (lambda x: jax.lax.psum(x, axis), 2 * sent * (count - 1) / count),
        "all-to-all": (lambda x: jax.lax.all_to_all(x, axis, 0, 0, tiled=True), sent * (count - 1) / count),
    }
    place = NamedSharding(mesh, P(AXES))
    x = jax.jit(lambda: jnp.ones((mesh.size * rows, width), jnp.bfloat16), out_shardings=place)()
    rates = {}
    for kind, (function, received) in programs.items():
        shard = jax.shard_map(function, mesh=mesh, in_specs=P(AXES), out_specs=P(AXES), check_vma=False)
        program = jax.jit(shard)
        out = jax.block_until_ready(program(x))
        begin = time.perf_counter()
        for _ in range(_TIMES):  # on all processes alike, whatever one of them measures
            out = program(x)
        jax.block_until_ready(out)
        rates[kind] = received * _TIMES / (time.perf_counter() - begin) / 1e9
    return rates


# ------------------------------------------------------------------------------------------------ attention


def attention() -> dict[str, Any]:
    """Of this process's first device: largest differences from the oracle over the oracle's largest value."""
    cfg = MoCConfig(chunk=ChunkConfig(size=128), top_k=3)
    shape = SceneShape(shots=3, frames=12, rows=8, columns=8, text_tokens=50)  # no padding
    lengths = SceneLengths(jnp.array([[5, 4, 3]]), jnp.array([[13, 17, 11, 9]]))
    with jax.default_device(jax.local_devices()[0]):
        table = chunk_table(lengths, shape, cfg.chunk)
        q, k, v, d_out = make_inputs("random", shape.tokens, 2, 128)
        routes = jax.jit(lambda q, k: route(q, k, table, cfg, backend="reference"))(q, k)

        def run(backend: str):
            one = functools.partial(moc_attention, table=table, cfg=cfg, routes=routes, backend=backend)
            return jax.jit(both_ways(lambda q, k, v: one(q, k, v)))(d_out, q, k, v)

        ours = run("auto")
        exact = run("reference")
    errors = {
        name: float(jnp.abs(a.astype(jnp.float32) - b.astype(jnp.float32)).max() / jnp.abs(b).max())
        for name, a, b in zip(("out", "dq", "dk", "dv"), ours, exact, strict=True)
    }
    again = jax.tree.map(lambda a, b: bool((a == b).all()), list(ours), list(run("auto")))
    return {"errors": errors, "same_bits_twice": all(again), "tokens": shape.tokens}


# ------------------------------------------------------------------------------------------------ a step, and its state


def training(args: Arguments, mesh: Mesh, found: dict[str, Any]) -> dict[str, Any]:
    """Seconds to compile, milliseconds per step, tokens per second and MFU; `found` gets the save beside it."""
    model = dataclasses.replace(PRESETS[args.preset], text_dim=256, remat="full")
    model = dataclasses.replace(model, depth=args.depth or model.depth)
    moc = MoCConfig(chunk=ChunkConfig(unit="frames", size=2), top_k=3)
    config = Config(workdir="check", model=model, moc=moc, text=HashConfig(dim=256), train=TrainConfig(steps=100))
    scenes = batch_shards(mesh)
    with jax.set_mesh(mesh):
        blueprint = make_blueprint(config.model, config.optimizer, config.train, mesh)
        step = make_train_step(config.train, config.optimizer, config.diffusion, blueprint, mesh)
        state, scene = begun(blueprint), _scene(args, scenes, model.latent_channels, mesh)
        begin = time.perf_counter()
        program = step.lower(state, scene, moc).compile(compiler_options=mesh_options(mesh))
        compiled = time.perf_counter() - begin
        state, metrics = program(state, scene)
        losses = [float(metrics.loss)]
        begin = time.perf_counter()
        for _ in range(_STEPS):
            state, metrics = program(state, scene)
        losses.append(float(metrics.loss))
        seconds = (time.perf_counter() - begin) / _STEPS
    text, video = 8 * (args.shots + 1), args.shots * args.frames * args.rows * args.columns // model.patch_size
    rate = 3 * scenes * matrix_flops(model, text, video) / seconds
    chip = chip_of(jax.devices()[0].device_kind)
    memory = program.memory_analysis()
    found["save"] = _tried(lambda: saving(args.workdir, blueprint, state, config))
    return {
        "preset": args.preset,
        "scenes": scenes,
        "tokens": scenes * (text + video),
        "compile_seconds": round(compiled, 1),
        "step_ms": round(1e3 * seconds, 2),
        "tokens_per_second": round(scenes * (text + video) / seconds),
        "matrix_utilisation": None if chip is None else rate / (chip.flops * mesh.size),  # attention left out
        "bytes": memory and memory.argument_size_in_bytes + memory.temp_size_in_bytes,
        "losses": losses,
    }


def _scene(args: Arguments, scenes: int, channels: int, mesh: Mesh) -> Scene:
    frames, captions = args.shots * args.frames, args.shots + 1

    def make() -> Scene:
        noise = jax.random.normal(jax.random.key(0), (scenes, frames, args.rows, args.columns, channels))
        lengths = SceneLengths(jnp.full((scenes, args.shots), args.frames), jnp.full((scenes, captions), 8))
        return Scene(noise, jax.random.normal(jax.random.key(1), (scenes, 8 * captions, 256)), lengths)

    return jax.jit(make, out_shardings=batch_sharding(mesh))()


def saving(workdir: str, blueprint: Any, state: Any, config: Config) -> dict[str, Any]:
    """GB per second of a save, until all is written, and of a restore, digests included; over all hosts and each."""
    folder = epath.Path(workdir) / "pod_check"
    size = sum(x.nbytes for x in jax.tree.leaves(state.items()))
    seconds = {}
    with contextlib.closing(Checkpoints(str(folder), config.train)) as checkpoints:
        begin = time.perf_counter()
        checkpoints.save(1, state.items(), config=config, codec_state={}, data_state={})
        seconds["blocked"] = time.perf_counter() - begin
        checkpoints.wait()
        seconds["save"] = time.perf_counter() - begin
    with contextlib.closing(Checkpoints(str(folder), config.train)) as checkpoints:
        begin = time.perf_counter()
        restored = checkpoints.restore(blueprint.abstract.items(), lambda config: None)
        jax.block_until_ready(restored and restored.state)
        seconds["restore"] = time.perf_counter() - begin
    equal = restored is not None and bool(_equal(restored.state, state.items()))
    multihost_utils.sync_global_devices("saved")
    if jax.process_index() == 0:
        folder.rmtree() if "://" in workdir else shutil.rmtree(folder)
    rates = {name: size / seconds[name] / 1e9 for name in ("save", "restore")}
    return {
        "workdir": workdir.partition("://")[0] if "://" in workdir else "a folder",
        "bytes": size,
        "seconds": {name: round(each, 2) for name, each in seconds.items()},
        "gb_per_second": rates,
        "gb_per_second_and_host": {name: rate / jax.process_count() for name, rate in rates.items()},
        "equal": equal,
    }


@jax.jit
def _equal(a: Any, b: Any) -> jax.Array:
    """Whether two states have the same numbers."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return jnp.array([(x == y).all() for x, y in pairs]).all()


# ------------------------------------------------------------------------------------------------ in short


def summary(found: dict[str, Any]) -> list[str]:
    """A few lines."""
    lines = [", ".join(f"{name} {version}" for name, version in found["versions"].items())]
    for name in ("devices", "collectives", "attention", "training", "save"):
        part = found.get(name, {})
        if isinstance(part, dict) and "error" in part:
            lines.append(f"{name} FAILED: {part['error']}")
    if "kind" in found["devices"]:
        of = found["devices"]
        lines.append(f"{of['count']} x {of['kind']} in {of['processes']} process(es)")
        for mesh in of["meshes"]:
            apart = {axis: mesh[axis] for axis in AXES if axis in mesh}
            lines.append(f"  mesh {mesh['shape']}: {apart}")
    if isinstance(found["collectives"], list):
        for each in found["collectives"]:
            for axis, kinds in each["gb_per_second"].items():
                shown = "; ".join(f"{kind} {rates}" for kind, rates in kinds.items())
                lines.append(f"GB/s received over {axis} of {each['mesh'][axis]}: {shown}")
    if "errors" in found["attention"]:
        shown = ", ".join(f"{name} {error:.1e}" for name, error in found["attention"]["errors"].items())
        lines.append(f"attention beside the oracle: {shown}; same bits twice: {found['attention']['same_bits_twice']}")
    if "step_ms" in found["training"]:
        of = found["training"]
        lines.append(
            f"{of['preset']}: {of['step_ms']} ms a step, {of['tokens_per_second']:,} tokens/s, losses {of['losses']}"
        )
    if "gb_per_second" in found.get("save", {}):
        of = found["save"]
        lines.append(
            f"{of['bytes'] / 1e9:.2f} GB: save {of['seconds']['save']} s, restore {of['seconds']['restore']} s"
        )
    return lines


def run(argv: Sequence[str]) -> None:
    """The command line."""
    main(tyro.cli(Arguments, args=list(argv), description=__doc__), " ".join(["python -m benchmarks.pod_check", *argv]))


if __name__ == "__main__":
    run(sys.argv[1:])
