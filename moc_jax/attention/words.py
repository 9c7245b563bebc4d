"""Arrays of several types as one, so that they travel together: unsigned words, which no compiler takes for numbers."""

import jax.numpy as jnp
from jax import lax

from moc_jax.shapes import Array


def _word_type(dtype) -> jnp.dtype:
    """What numbers travel as: nothing that moves bits may take them for numbers."""
    return jnp.dtype(jnp.uint32 if jnp.dtype(dtype).itemsize == 4 else jnp.uint16)


def packed(arrays: list[Array], dtype) -> Array:
    """Arrays of one shape but for the last axis, as words of `dtype`'s size side by side; integers are below 2^15."""
    word, found = _word_type(dtype), []
    for x in arrays:
        if jnp.issubdtype(x.dtype, jnp.integer):
            found.append((x + 1).astype(word))
            continue
        bits = lax.bitcast_convert_type(x, word)
        found.append(bits.reshape(*x.shape[:-1], -1) if bits.ndim > x.ndim else bits)
    return jnp.concatenate(found, axis=-1)


def unpacked(words: Array, like: list[Array]) -> list[Array]:
    """The inverse."""
    found, begin = [], 0
    for x in like:
        integer = jnp.issubdtype(x.dtype, jnp.integer)
        size = x.shape[-1] * (1 if integer else x.dtype.itemsize // words.dtype.itemsize)
        bits = words[..., begin : begin + size]
        begin += size
        if integer:
            found.append(bits.astype(x.dtype) - 1)
        elif x.dtype.itemsize == words.dtype.itemsize:
            found.append(lax.bitcast_convert_type(bits, x.dtype))
        else:
            found.append(lax.bitcast_convert_type(bits.reshape(*bits.shape[:-1], x.shape[-1], -1), x.dtype))
    return found
