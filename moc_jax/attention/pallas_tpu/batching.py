"""vmap of functions over scenes: one call with more scenes.

Pallas would batch each kernel by itself, those with tables in scalar memory or a grid of data by a loop that copies
their arrays' parts, one after the other.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def more_scenes[R](function: Callable[..., R]) -> Callable[..., R]:
    """A function of trees of arrays [B, ...] to such trees; under vmap it is called with [V * B, ...].

    What it does must not depend on B but for the sizes of the first axes.
    """
    mapped = jax.custom_batching.custom_vmap(function)

    @mapped.def_vmap
    def _(size, is_mapped, *args):
        def together(x, is_mapped):
            x = x if is_mapped else jnp.broadcast_to(x, (size, *x.shape))
            return x.reshape(size * x.shape[1], *x.shape[2:])

        found = more_scenes(function)(*jax.tree.map(together, args, tuple(is_mapped)))
        apart = jax.tree.map(lambda x: x.reshape(size, x.shape[0] // size, *x.shape[1:]), found)
        return apart, jax.tree.map(lambda _: True, apart)

    return mapped
