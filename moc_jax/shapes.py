"""The glossary of dimension letters and of words, jaxtyping's aliases and the decorator that checks shapes.

| letter | dimension |
|---|---|
| B | scenes in a batch |
| N | tokens of a scene, which keys and values have: the text block, then the video block |
| Q | query tokens of a scene: the same, or any of them |
| L | text tokens (the first L of N) |
| V | video tokens (the last V of N) |
| H | attention heads |
| D | size of a head |
| M | width of the model |
| C | chunks in the chunk table |
| K | slots for the picks of a query (top_k, in training those of drop-in, then sinks) |
| S | shots |
| P | captions: the global one, then one per shot (S + 1) |
| F | frames of a scene, all shots one after another (latent frames unless said otherwise) |
| Y, X | rows and columns of a frame |
| Z | channels of a latent |
| E | width of a text embedding |
| A | runs of anchors: at most three of keys, at most two of queries |
| G | tiles |
| T | rows of a tile |
| R | rows that kernels walk, those of padding included |
| J | slots |

| word | what it means, in attention/ |
|---|---|
| anchor | a chunk that a query always attends to |
| candidate | a chunk that it may pick |
| pick | a chunk that it picked |
| sink | a pick that all queries of later shots have: one of the first `sink_chunks` of a shot |
| column | a descriptor of a chunk, as routers know it: `descriptors` for each chunk |
| pair | a query and one of its picks |
| run | rows [begin, end) that lie one after another in memory |
| segment | the run of queries that share their anchors: a caption, a shot or a chunk |
| tile | rows that are computed together and keep their sums on the chip: queries, or keys that gradients are for |
| block | rows of the other side, which tiles meet one block after the other |
| slot | the place of a pair among all pairs, which are sorted by chunk and cut into tiles |
| part | attention over some of a query's keys (anchors, picks, a shard of the keys): its output and log-sum-exp |
| share | of the readers of text, which everybody reads: those that one of several equal tiles meets |
| span | queries whose pairs a TPU spreads and merges at a time |
| group | heads that are computed at a time, where their pairs would take too much memory |
| tiling | sizes of tiles and blocks |
| window | chunks on either side of the own one, the anchors of `self_anchor = window` |
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
