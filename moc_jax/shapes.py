"""The glossary of dimension letters, jaxtyping's aliases and the one decorator that checks shapes at trace time.

| letter | dimension |
|---|---|
| B | scenes in a batch |
| N | tokens of a scene: the text block, then the video block |
| L | text tokens (the first L of N) |
| V | video tokens (the last V of N) |
| H | attention heads |
| D | size of a head |
| M | width of the model |
| C | chunks in the chunk table |
| K | slots for picked chunks (top_k, and drop-in slots in training) |
| S | shots |
| P | captions: the global one, then one per shot (S + 1) |
| F | frames of a scene, all shots one after another (latent frames unless said otherwise) |
| Y, X | rows and columns of a frame |
| Z | channels of a latent |
| E | width of a text embedding |
"""

import jax
import jax.numpy as jnp
import numpy as np
from beartype import beartype
from jaxtyping import Array, Bool, Float, Float32, Int, Int32, Key, Shaped, UInt8, jaxtyped

__all__ = [
    "Array",
    "Bool",
    "Float",
    "Float32",
    "Int",
    "Int32",
    "Key",
    "Shaped",
    "UInt8",
    "as_array",
    "concrete",
    "typed",
]


def typed(function):
    """Checks the array shapes and types in `function`'s signature whenever it is called or traced."""
    return jaxtyped(typechecker=beartype)(function)


def as_array(name: str, x: object, *, integers: bool = False) -> Array:
    """x, if it is an array of JAX's or numpy's; integers as int32. For what users call, which `typed` answers badly.

    Raises:
        TypeError: it is none, or holds no integers where they are asked for.
    """
    if not isinstance(x, jax.Array | np.ndarray):
        raise TypeError(f"{name} is a {type(x).__name__}; give an array: jnp.asarray({name})")
    if integers and not jnp.issubdtype(x.dtype, jnp.integer):
        raise TypeError(f"{name} is an array of {x.dtype}; it must hold integers")
    return jnp.asarray(x, jnp.int32 if integers else None)


def concrete(x: object) -> np.ndarray | None:
    """The values of an array; None where they aren't known here: while tracing, or on other processes' devices."""
    try:
        return None if isinstance(x, jax.Array) and not x.is_fully_addressable else np.asarray(x)
    except (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError):
        return None
