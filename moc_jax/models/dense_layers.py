"""Attention that is dense in some of a model's layers, and routed in the others, with one program for all of them."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from moc_jax.attention.continued import Seen
from moc_jax.attention.sharded import QKV
from moc_jax.models.after import Over
from moc_jax.shapes import Array, Int, Key

OfLayer = Callable[[QKV, QKV, Key[Array, ""] | None, Int[Array, ""]], tuple[tuple[Array, Array], Seen]]
"""As `Over`."""


def dense_in_some(over: Over) -> OfLayer:
    """`over`, but dense in the layers of `moc.dense_layers`, which pick nothing."""
    moc = over.moc
    if not moc.dense_layers or moc.mode == "dense":
        return over
    routed = over.wanted == "routes"
    dense = over._replace(moc=dataclasses.replace(moc, mode="dense"), wanted="velocity" if routed else over.wanted)

    def attend(text, video, key, index):
        def unrouted():
            outputs, seen = dense(text, video, None, index)
            if not routed:
                return outputs, seen
            like = jax.eval_shape(over, text, video, key, index)[1].routes
            return outputs, seen._replace(routes=jnp.full(like.shape, -1, like.dtype))

        is_dense = jnp.isin(index, jnp.array(moc.dense_layers, jnp.int32))
        return lax.cond(is_dense, unrouted, lambda: over(text, video, key, index))

    return attend
