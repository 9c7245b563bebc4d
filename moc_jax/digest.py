"""Digests: short numbers that tell whether arrays are still, bit for bit, what they were."""

import functools
import hashlib
import json
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from moc_jax.sharding import key_path


def tree_digests(tree: object, types: object = None) -> dict[str, int]:
    """A 32-bit digest of every array, by its path; computed on the devices, and the same however they share it.

    Args:
        types: arrays, or what stands in their place: digests are those of `tree` in their types.
    """
    leaves = jax.tree.leaves_with_path(tree)
    kinds = tuple(x.dtype for x in jax.tree.leaves(tree if types is None else types))
    digests = jax.device_get(_digests([x for _, x in leaves], kinds))
    return {"/".join(key_path(path)): int(digest) for (path, _), digest in zip(leaves, digests)}


def weights_digest(digests: Mapping[str, int]) -> str:
    """SHA-256 of `tree_digests` of weights: what names them, wherever they lie."""
    return text_digest(json.dumps(digests, sort_keys=True))


# One program for all arrays: its kernels are compiled side by side, and a later start loads it at once.
@functools.partial(jax.jit, static_argnums=1)
def _digests(arrays: list[jax.Array], kinds: tuple[jnp.dtype, ...]) -> list[jax.Array]:
    return [_digest(x.astype(kind)) for x, kind in zip(arrays, kinds, strict=True)]


def _digest(x: jax.Array) -> jax.Array:
    """Sum over the elements, modulo 2^32, of a mix of each one's bits and its place (murmur3's finaliser)."""
    bits = lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)
    for axis in range(x.ndim):
        place = lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(math.prod(x.shape[axis + 1 :]) % 2**32)
        bits = bits + place * jnp.uint32(0x9E3779B1)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits = (bits ^ (bits >> shift)) * jnp.uint32(factor)
    return jnp.sum(bits ^ (bits >> 16), dtype=jnp.uint32)


def array_digest(array: np.ndarray) -> str:
    """SHA-256 of a host array's type, shape and bytes."""
    return text_digest(f"{array.dtype.str}{array.shape}".encode() + np.ascontiguousarray(array).tobytes())


def text_digest(data: str | bytes) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()
