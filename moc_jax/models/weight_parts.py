"""How layers read weights that devices have parts of, and how their gradients are summed into these parts."""

import dataclasses
import math
from collections.abc import Sequence

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moc_jax.chips import chip_of
from moc_jax.sharding import RULES, batch_shards, weight_sharding


def whole(weight: jax.Array, names: Sequence[str]) -> jax.Array:
    """What a layer reads of a weight: all but what the tensor axis splits, by the mesh in context.

    Said here, so that it is gathered once, as it is: of what a product makes of it the compiler would gather several.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return weight
    spec = weight_sharding(tuple(names)[-weight.ndim :], weight.shape, mesh).spec  # one layer's has no name for layers
    kept = ("tensor" if axes is not None and "tensor" in axes else None for axes in spec)  # it, or a tuple with it
    return jax.lax.with_sharding_constraint(weight, P(*kept))


def parted(gradient: jax.Array, names: Sequence[str]) -> jax.Array:
    """A weight's gradient lies as the weight does, so that devices sum into parts."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return gradient
    sharding = weight_sharding(tuple(names)[-gradient.ndim :], gradient.shape, mesh)
    return jax.lax.with_sharding_constraint(gradient, sharding)


def copies(names: Sequence[str], shape: Sequence[int], scenes: int) -> tuple[int, NamedSharding | None]:
    """Groups of devices that have all parts of a weight each, and where a gradient of each [groups, *shape] lies.

    One group, but on TPU7x: left to itself, its compiler would sum all of a gradient on all devices, and the others'
    compilers sum into parts within a group, then parts over groups.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or scenes % batch_shards(mesh) or not _is_tpu7x(mesh):
        return 1, None
    weight, rest = _with_copies(names, shape, mesh)
    return _size(weight.mesh, rest), NamedSharding(weight.mesh, P(rest, *weight.spec))


def _is_tpu7x(mesh: AbstractMesh) -> bool:
    chip = chip_of(mesh.abstract_device.device_kind) if mesh.abstract_device else None
    return chip is not None and chip.name == "tpu7x"


def _with_copies(
    names: Sequence[str], shape: Sequence[int], mesh: AbstractMesh
) -> tuple[NamedSharding, tuple[str, ...]]:
    """Where a weight lies, and the axes of its mesh that split scenes but not the weight."""
    weight = weight_sharding(tuple(names)[-len(shape) :], shape, mesh)
    used = {axis for entry in weight.spec for axis in ((entry,) if isinstance(entry, str) else entry or ())}
    batch = RULES.axes("batch")
    return weight, tuple(axis for axis in weight.mesh.axis_names if axis.startswith(batch) and axis not in used)


@dataclasses.dataclass(frozen=True)
class Staying:
    """Where vectors must be for a weight that stays where it is, split by its last dimension."""

    parts: tuple[int, int] = 1, 1
    """Of that dimension: over groups of devices, and among the devices of a scene."""
    vectors: NamedSharding | None = None
    """[scenes, ...]: on all devices that have other parts."""
    parts_of_results: NamedSharding | None = None
    """[layers, *parts, scenes, ...]: as each device computes them."""
    results: NamedSharding | None = None
    """The same, each scene's where the scene is."""


def staying(names: Sequence[str], shape: Sequence[int], scenes: int) -> Staying:
    """For a weight with these names and dimensions, and vectors of so many scenes, by the mesh in context."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return Staying()
    weight, rest = _with_copies(names, shape, mesh)
    batch, axes = RULES.axes("batch"), weight.spec[-1] or ()
    axes = (axes,) if isinstance(axes, str) else axes
    over = tuple(axis for axis in axes if axis.startswith(batch)), tuple(x for x in axes if not x.startswith(batch))
    rest, batch = (rest, batch) if scenes % batch_shards(mesh) == 0 else ((), ())
    return Staying(
        (_size(weight.mesh, over[0]), _size(weight.mesh, over[1])),
        NamedSharding(weight.mesh, P(rest)),
        NamedSharding(weight.mesh, P(None, *over, rest)),
        NamedSharding(mesh, P(None, None, None, batch)),
    )


def _size(mesh: Mesh | AbstractMesh, axes: Sequence[str]) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)


def placed(x: jax.Array, sharding: NamedSharding | None) -> jax.Array:
    """x lies so from here on, and its gradient; None: where it was."""
    return x if sharding is None else jax.lax.with_sharding_constraint(x, sharding)
