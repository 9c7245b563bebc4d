"""The mesh, and the one table that says which mesh axis splits which dimension of which array.

Weights name their dimensions (`nnx.Param(..., logical=("embed", "mlp"))`); optimizer moments and averages follow
the weight that they belong to. Batches are split over `data` and `fsdp` together, so fully sharded training is data
parallelism whose weights are gathered when used. Axis types are Auto: the compiler propagates, we state the ends.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moc_jax.config import ConfigError, MeshConfig

AXES = ("data", "fsdp", "context", "tensor")

Path = tuple[str, ...]
type Params = dict[str, jax.Array | Params]
"""Weights as a checkpoint and the training state hold them: nested by name, float32."""
LogicalAxes = Mapping[Path, tuple[str, ...]]  # parameter's path -> names of its dimensions


@dataclasses.dataclass(frozen=True)
class Rules:
    """Logical dimension -> mesh axes that split it. A name that is not in the table is an error, never replicated."""

    table: tuple[tuple[str, tuple[str, ...]], ...]

    def axes(self, name: str) -> tuple[str, ...]:
        """Mesh axes of one logical dimension."""
        known = dict(self.table)
        if name not in known:
            raise ValueError(
                f"no sharding rule for the dimension {name!r}; known are {', '.join(known)} (moc_jax/sharding.py)"
            )
        return known[name]

    def spec(self, *names: str) -> P:
        """The PartitionSpec of an array whose dimensions have these names.

        Raises:
            ValueError: an unknown name, or one mesh axis would split two dimensions.
        """
        entries = [self.axes(name) for name in names]
        used = [axis for entry in entries for axis in entry]
        twice = sorted({axis for axis in used if used.count(axis) > 1})
        if twice:
            raise ValueError(
                f"dimensions {names} would both be split over the mesh axis {', '.join(twice)}; rename one of them"
            )
        return P(*[None if not entry else entry[0] if len(entry) == 1 else entry for entry in entries])


RULES = Rules(
    (
        # activations
        ("batch", ("data", "fsdp")),
        ("tokens", ("context",)),
        ("frames", ()),
        ("rows", ()),
        ("columns", ()),
        ("channels", ()),
        ("shots", ()),
        # weights
        ("layers", ()),
        ("embed", ("fsdp",)),
        ("embed_out", ()),  # the second embed of a matrix from embed to embed
        ("mlp", ("tensor",)),
        ("qkv", ()),  # query, key and value of one head lie together
        ("heads", ("tensor",)),
        ("head_dim", ()),
        ("modulation", ()),
        ("frequency", ()),
        ("text", ()),
        ("patch", ()),
    )
)


# ------------------------------------------------------------------------------------------------ mesh


def make_mesh(cfg: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh (data, fsdp, context, tensor) over all devices, or over those given.

    Raises:
        ConfigError: the sizes' product is not the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = [getattr(cfg, axis) for axis in AXES]
    given = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and len(devices) % given == 0:
        sizes[sizes.index(-1)] = len(devices) // given
    if math.prod(sizes) != len(devices):
        shown = " x ".join(f"{axis} {size}" for axis, size in zip(AXES, sizes))
        divisors = [n for n in range(1, len(devices) + 1) if len(devices) % n == 0]
        raise ConfigError(
            f"mesh {shown} does not match {len(devices)} devices: the product must be {len(devices)}, so each size is "
            f"one of {divisors}; set one axis to -1 to take what is left"
        )
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def batch_shards(mesh: Mesh | AbstractMesh) -> int:
    """Parts that a batch is split into."""
    return math.prod(mesh.shape[axis] for axis in RULES.axes("batch"))


def check_batch(batch_size: int, mesh: Mesh) -> None:
    """Raises ConfigError unless every device gets the same number of scenes."""
    shards = batch_shards(mesh)
    if batch_size % shards:
        low = batch_size // shards * shards
        nearest = f"{low} and {low + shards}" if low else f"{shards}"
        raise ConfigError(
            f"train.batch_size = {batch_size} does not divide over mesh data {mesh.shape['data']} x fsdp "
            f"{mesh.shape['fsdp']} = {shards} devices; the nearest that do: {nearest}"
        )


def replicated(mesh: Mesh) -> NamedSharding:
    """The same value on every device."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first dimension is split, whatever follows."""
    return NamedSharding(mesh, RULES.spec("batch"))


def shard_batch[T](batch: T, mesh: Mesh) -> T:
    """Numpy leaves with this process's part of the batch -> global arrays, split over the mesh."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(sharding, np.asarray(leaf)), batch)


def batch_sharded[T](function: Callable[..., T]) -> Callable[..., T]:
    """Runs `function` on each device's own scenes, by the mesh in context; every array in and out starts with B.

    For attention, whose loops over one scene's chunks the compiler could not split by itself. A batch that does not
    divide over the mesh (one preview on many devices) is computed whole on every device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    shards = 1 if mesh.empty else batch_shards(mesh)

    def call(*arguments):
        if shards == 1:
            return function(*arguments)
        divides = jax.tree.leaves(arguments)[0].shape[0] % shards == 0
        spec = RULES.spec("batch") if divides else P()
        return jax.shard_map(function, in_specs=spec, out_specs=spec, check_vma=False)(*arguments)

    return call


# ------------------------------------------------------------------------------------------------ weights


def logical_axes(params: nnx.State) -> LogicalAxes:
    """The names of every parameter's dimensions, as the model gave them.

    Raises:
        ValueError: a parameter without names, or with more or fewer than it has dimensions.
    """
    found = {}
    for path, variable in nnx.to_flat_state(params):
        names = variable.get_metadata().get("logical")
        shape = np.shape(variable.get_value())
        if names is None or len(names) != len(shape):
            raise ValueError(
                f"parameter {'/'.join(map(str, path))} of shape {shape} has logical = {names}; name each dimension"
            )
        found[tuple(str(key) for key in path)] = tuple(names)
    return found


def weight_spec(names: Sequence[str], shape: Sequence[int], mesh: Mesh) -> P:
    """How a weight is split: by the table where its size divides, else along its first other dimension that does.

    A stack of layers is never split along the stack. What nothing divides is replicated; `replicated_weights` lists it.
    """
    entries = [tuple(a for a in RULES.axes(name) if mesh.shape[a] > 1) for name in names]
    RULES.spec(*names)  # collisions
    fits = [shape[d] % math.prod(mesh.shape[a] for a in entry) == 0 for d, entry in enumerate(entries)]
    homeless = [axis for entry, ok in zip(entries, fits) if not ok for axis in entry]
    entries = [entry if ok else () for entry, ok in zip(entries, fits)]
    for axis in homeless:
        for d, name in enumerate(names):
            if not entries[d] and name != "layers" and shape[d] % mesh.shape[axis] == 0:
                entries[d] = (axis,)
                break
    return P(*[None if not entry else entry[0] if len(entry) == 1 else entry for entry in entries])


def tree_shardings[T](tree: T, logical: LogicalAxes, mesh: Mesh) -> T:
    """A sharding for every leaf of training state: moments and averages lie like the weight whose path ends theirs.

    Args:
        tree: arrays or ShapeDtypeStructs; weights are nested dicts, under whatever the optimizer wraps around them.

    Raises:
        ValueError: a leaf that is neither a scalar nor belongs to a weight.
    """

    def sharding(path, leaf):
        keys = key_path(path)
        for first in range(len(keys)):
            if keys[first:] in logical:
                return NamedSharding(mesh, weight_spec(logical[keys[first:]], leaf.shape, mesh))
        if leaf.ndim:
            raise ValueError(
                f"{'/'.join(keys)} of shape {leaf.shape} belongs to no weight; no rule says how to split it"
            )
        return replicated(mesh)

    return jax.tree.map_with_path(sharding, tree)


def key_path(path: Sequence[object]) -> Path:
    """A pytree path as plain names."""
    return tuple(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def replicated_weights(params: Params, logical: LogicalAxes, mesh: Mesh) -> list[str]:
    """Weights that the table would split over fsdp but whose sizes do not divide; for the start-up summary."""
    found = []
    for path, leaf in jax.tree.leaves_with_path(params):
        names = logical[key_path(path)]
        meant = mesh.shape["fsdp"] > 1 and any("fsdp" in RULES.axes(name) for name in names)
        if meant and "fsdp" not in weight_spec(names, leaf.shape, mesh):
            found.append(f"{'/'.join(key_path(path))} {tuple(leaf.shape)}")
    return found
