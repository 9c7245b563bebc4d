"""The mesh, and the one table that says which mesh axis splits which dimension of which array.

Weights name their dimensions (`nnx.Param(..., logical=("embed", "mlp"))`); optimizer moments and averages follow
the weight that they belong to. Batches are split over `data` and `fsdp` together, so fully sharded training is data
parallelism whose weights are gathered when used. Axis types are Auto: the compiler propagates, we state the ends.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moc_jax.config import ConfigError, MeshConfig
from moc_jax.mesh import AXES, device_array, mesh_sizes

_SMALL = 32  # devices; among more, no weight is split over all of them (see `weight_sharding`)
_TILE = 8  # rows of float32 numbers in a TPU's memory
_ENOUGH = 32  # parts of a weight are better than more whose sizes are not multiples of a tile

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
        ("stream", ("context", "tensor")),  # tokens where nothing is done by heads or by parts of the MLP
        ("table", ()),  # tokens of the chunk table
        ("picks", ()),
        ("frames", ("context",)),
        ("rows", ()),
        ("columns", ()),
        ("channels", ()),
        ("shots", ()),
        # weights
        ("layers", ()),
        ("embed", ("fsdp", "context")),
        ("embed_in", ()),  # the first, where the second is split
        ("embed_out", ()),  # the second embed of a matrix from embed to embed
        ("mlp", ("tensor",)),
        ("qkv", ()),  # query, key and value of one head lie together
        ("heads", ("tensor",)),
        ("head_dim", ()),
        ("modulation", ()),
        ("frequency", ()),
        ("text", ()),
        ("patch", ()),
        ("rank", ()),  # of adapters
    )
)


# ------------------------------------------------------------------------------------------------ mesh


def make_mesh(cfg: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh (data, fsdp, context, tensor) over all devices, or over those given; see `device_array`.

    Raises:
        ConfigError: the sizes' product is not the number of devices, or these lie where no mesh can be.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = mesh_sizes(tuple(getattr(cfg, axis) for axis in AXES), len(devices))
    return Mesh(device_array(sizes, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


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


def scene_mesh(mesh: Mesh, scenes: int) -> Mesh:
    """The same devices for so many scenes: those that would compute copies of one share it, along the context axis."""
    shards = batch_shards(mesh)
    rows = math.gcd(scenes, shards)
    if rows == shards:
        return mesh
    sizes = rows, 1, shards // rows * mesh.shape["context"], mesh.shape["tensor"]
    return Mesh(mesh.devices.reshape(sizes), AXES, axis_types=mesh.axis_types)


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """The same value on every device."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first dimension is split, whatever follows."""
    return NamedSharding(mesh, RULES.spec("batch"))


def own_rows(batch_size: int, mesh: Mesh, process: int | None = None) -> tuple[int, ...]:
    """The rows of a global batch, rising, that lie on devices of `process` (None: this one).

    A mesh may hold the devices of several processes in any order, as on TPUs; then these are not one run of rows.
    """
    process = jax.process_index() if process is None else process
    rows = np.arange(batch_size)
    places = batch_sharding(mesh).devices_indices_map((batch_size,))
    mine = [rows[index] for device, index in places.items() if device.process_index == process]
    return tuple(np.unique(np.concatenate(mine)).tolist()) if mine else ()


def shard_batch[T](batch: T, mesh: Mesh) -> T:
    """Numpy leaves with this process's `own_rows` of the batch -> global arrays, split over the mesh."""
    sharding, shards = batch_sharding(mesh), batch_shards(mesh)
    parts = own_rows(shards, mesh)

    def placed(leaf: np.ndarray) -> jax.Array:
        size = len(leaf) // len(parts)  # rows on one device

        def on_device(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None  # the sharding has a mesh
            first = parts.index((index[0].start or 0) // size) * size
            return leaf[first : first + size]

        return jax.make_array_from_callback((size * shards, *leaf.shape[1:]), sharding, on_device)

    return jax.tree.map(lambda leaf: placed(np.asarray(leaf)), batch)


def divided(spec: P, batch: int, mesh: Mesh | AbstractMesh) -> P:
    """`spec` of an array of so many scenes; where they don't divide over the mesh, each device has all of them."""
    return spec if batch % batch_shards(mesh) == 0 else P(None, *spec[1:])


def tokens_are_split() -> bool:
    """Whether a scene lies on several devices of the mesh in context."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.shape["context"] * mesh.shape["tensor"] > 1


def constrained(x: jax.Array, *names: str) -> jax.Array:
    """x, whose dimensions have these names and the rest none, lies where the table says, if scenes are split at all."""
    if not tokens_are_split():
        return x
    mesh = jax.sharding.get_abstract_mesh()
    return jax.lax.with_sharding_constraint(x, divided(RULES.spec(*names), x.shape[0], mesh))


def apart(function: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """function of tokens [B, N, M], or of groups of them, each device's by themselves: they need nothing of others.

    For what the compiler would not see to be so, such as products that look up each token's group.
    """
    if not tokens_are_split():
        return function(x)
    spec = divided(RULES.spec("batch", "stream"), x.shape[0], jax.sharding.get_abstract_mesh())
    return jax.shard_map(function, in_specs=spec, out_specs=spec, check_vma=False)(x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def moved(x: jax.Array, to: str, back: str) -> jax.Array:
    """Tokens [B, N, ...], split as `to` says from here on, and their gradients as `back` says on their way back.

    What is a gather one way is a sum of parts the other way; left to itself, the compiler gathers more than that.
    """
    return constrained(x, "batch", to)


moved.defvjp(lambda x, to, back: (moved(x, to, back), None), lambda to, back, _, d: (constrained(d, "batch", back),))


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


def weight_sharding(names: Sequence[str], shape: Sequence[int], mesh: Mesh | AbstractMesh) -> NamedSharding:
    """How a weight lies on the devices: dimensions over tensor as the table says, and one over the axes of `embed`.

    Or over the inner factors of these, on `factored(mesh)`, with copies on the rest. TPUs gather, and sum into parts,
    only by groups of less than the whole machine, and only parts that are whole tiles of their memory; otherwise all is
    summed everywhere, which takes twice the bytes. A stack of layers is never split along the stack; biases are whole
    everywhere, as is what nothing divides (`replicated_weights` lists it).
    """
    RULES.spec(*names)  # collisions
    spread, within = RULES.axes("embed"), [d for d, name in enumerate(names) if name != "layers"]
    entries: list[tuple[str, ...]] = [() for _ in names]
    for d, name in enumerate(names):
        for axis in set(RULES.axes(name)) - set(spread):
            homes = [home for home in (d, *within) if not entries[home] and shape[home] % mesh.shape[axis] == 0]
            if mesh.shape[axis] > 1 and homes:
                entries[homes[0]] = (axis,)
    parts = _factors(mesh, spread)
    left = [size // math.prod(mesh.shape[axis] for axis in entry) for size, entry in zip(shape, entries)]
    meant = sorted(within, key=lambda d: names[d] != "embed")
    first, d = _where(left, meant, [size for _, size in parts], mesh.size) if _matrix(names) else (len(parts), 0)
    if first == 0:
        over, on = tuple(axis for axis in spread if mesh.shape[axis] > 1), mesh
    else:
        over, on = tuple(name for name, _ in parts[first:]), factored(mesh) if first < len(parts) else mesh
    entries[d] += over
    return NamedSharding(on, P(*[None if not entry else entry[0] if len(entry) == 1 else entry for entry in entries]))


def _matrix(names: Sequence[str]) -> bool:
    """Biases and norms' weights are none."""
    return not {"embed", "rank"}.isdisjoint(names) and len({*names} - {"layers"}) > 1


def _where(sizes: Sequence[int], dimensions: Sequence[int], factors: Sequence[int], devices: int) -> tuple[int, int]:
    """(first, dimension): the factors from the first on split the dimension; none, if nothing divides."""
    most = devices if devices <= _SMALL else devices // 2
    counts = [(first, math.prod(factors[first:])) for first in range(len(factors))]
    possible = [(first, count) for first, count in counts if count <= most]
    enough = min(_ENOUGH, possible[0][1]) if possible else 0
    choices = [(first, count, d) for first, count in possible for d in dimensions]
    tiled = [(first, d) for first, count, d in choices if count >= enough and sizes[d] % (count * _TILE) == 0]
    divided = [(first, d) for first, count, d in choices if sizes[d] % count == 0]
    return next(iter(tiled + divided), (len(factors), 0))


def factored(mesh: Mesh | AbstractMesh) -> Mesh | AbstractMesh:
    """The same devices in the same order, the axes of `embed` as their prime factors: fsdp0, fsdp1, ..."""
    spread = RULES.axes("embed")
    axes = [_factors(mesh, (axis,)) if axis in spread else [(axis, mesh.shape[axis])] for axis in mesh.axis_names]
    names, sizes = zip(*itertools.chain(*axes))
    types = (AxisType.Auto,) * len(names)
    if isinstance(mesh, Mesh):
        return Mesh(mesh.devices.reshape(sizes), names, axis_types=types)
    return AbstractMesh(sizes, names, axis_types=types)


def _factors(mesh: Mesh | AbstractMesh, axes: Sequence[str]) -> list[tuple[str, int]]:
    """Prime factors of these axes, outermost first, with a name for each."""
    found = []
    for axis in axes:
        rest, primes = mesh.shape[axis], []
        while rest > 1:
            primes.append(next(n for n in range(2, rest + 1) if rest % n == 0))
            rest //= primes[-1]
        found += [(f"{axis}{i}", prime) for i, prime in enumerate(primes)]
    return found


def check_tensor(params: Params, logical: LogicalAxes, mesh: Mesh | AbstractMesh) -> None:
    """Raises ConfigError unless the tensor axis divides all that it is to split: heads, and the MLP's width."""
    size = mesh.shape["tensor"]
    for path, leaf in jax.tree.leaves_with_path(params):
        for name, length in zip(logical[key_path(path)], leaf.shape, strict=True):
            if "tensor" in RULES.axes(name) and length % size:
                what = {"heads": "model.heads", "mlp": "model.dim x model.mlp_ratio"}.get(name, name)
                fits = [n for n in range(1, size + 1) if length % n == 0]
                raise ConfigError(
                    f"mesh.tensor = {size} must divide {what} = {length}; up to that size these do: "
                    f"{', '.join(map(str, fits))}"
                )


def tree_shardings[T](tree: T, logical: LogicalAxes, mesh: Mesh | AbstractMesh) -> T:
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
                return weight_sharding(logical[keys[first:]], leaf.shape, mesh)
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
    """Matrices that nothing divides, so that every device holds them whole; for the start-up summary."""
    found = []
    for path, leaf in jax.tree.leaves_with_path(params):
        names, shape = logical[key_path(path)], tuple(leaf.shape)
        meant = _matrix(names) and key_path(path)[-1] != "bias" and _factors(mesh, RULES.axes("embed"))
        if meant and weight_sharding(names, shape, mesh).shard_shape(shape) == shape:
            found.append(f"{'/'.join(key_path(path))} {shape}")
    return found
