"""Where a batch of scenes lies as it is sampled: scenes and their frames over the devices of the mesh in context."""

import contextlib
import functools

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from moc_jax.shapes import Array
from moc_jax.sharding import RULES, divided, scene_mesh


def over_scenes(count: int) -> contextlib.AbstractContextManager[object]:
    """All devices of the mesh in context, for so many scenes."""
    mesh = jax.sharding.get_mesh()
    return contextlib.nullcontext() if mesh.empty else jax.set_mesh(scene_mesh(mesh, count))


def on_mesh[T](tree: T) -> T:
    """Puts numpy leaves on the mesh in context, the batch split over it where its size allows."""
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return tree

    def put(leaf):
        leaf = np.asarray(leaf)
        sharding = jax.NamedSharding(mesh, _spec(leaf.shape, mesh))
        return jax.make_array_from_callback(leaf.shape, sharding, functools.partial(np.ndarray.__getitem__, leaf))

    return jax.tree.map(put, tree)


def split[T](tree: T) -> T:
    """Keeps the batch split over the mesh in context, where its size allows."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return tree
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, _spec(x.shape, mesh)), tree)


def _spec(shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> jax.P:
    """Of latents frames are split too, where they divide."""
    latents = len(shape) == 5 and shape[1] % mesh.shape["context"] == 0
    return divided(RULES.spec("batch", *(("frames",) if latents else ())), shape[0], mesh) if shape else jax.P()


def everywhere(x: Array) -> Array:
    """Every device holds the whole result, so that each process can read it."""
    return x if jax.sharding.get_abstract_mesh().empty else jax.lax.with_sharding_constraint(x, jax.P())
