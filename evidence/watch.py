"""What queries read, beside what they pick: how much of a softmax lies in earlier shots, and in the right one."""

import jax
import jax.numpy as jnp

from evidence.arms import Arm
from evidence.masked import context
from moc_jax.attention.api import SceneAttention
from moc_jax.scene import ChunkTable
from moc_jax.shapes import Array, Float, Int

READ = "earlier", "reveal", "entropy"
"""Of a query's softmax: the share in earlier shots; the share in the shot that showed its character; and the entropy of
how the former spreads over these shots' tokens, in nats."""
GRADIENT = "to_earlier", "to_right"
"""Of the squared gradient of an error in a character's box: the share in the inputs of earlier shots; and of that in
the shots that showed some character, the share of the one that showed this."""
MOST = 2048
"""Tokens of a scene beyond which weights are not looked at: all pairs are held at once."""


def watched(arm: Arm, reveals: Int[Array, "B S"]) -> SceneAttention:
    """As the arm attends; behind its routes stand the bits of `READ`, since routes are all that a model hands on."""

    def attend(q, k, v, table, cfg, *, key=None):
        out, routes = arm.attention(q, k, v, table, cfg, key=key)
        seen = context(routes, table, cfg, every_chunk=arm.every_chunk, captions_apart=arm.captions_apart)
        read = _read(q, k, seen, table, reveals)
        return out, jnp.concatenate([routes, jax.lax.bitcast_convert_type(read, jnp.int32)], axis=-1)

    return attend


def apart(routes: Int[Array, "depth B H V K"]) -> tuple[Int[Array, "depth B H V _"], Float[Array, "depth B H V 3"]]:
    """Routes, and what of `watched` stands behind them."""
    picks = routes.shape[-1] - len(READ)
    return routes[..., :picks], jax.lax.bitcast_convert_type(routes[..., picks:], jnp.float32)


def _read(q: Array, k: Array, seen: Array, table: ChunkTable, reveals: Array) -> Float[Array, "B H N 3"]:
    scores = jnp.einsum("bqhd,bnhd->bhqn", q, k, preferred_element_type=jnp.float32) / jnp.sqrt(q.shape[-1])
    weights = jax.nn.softmax(jnp.where(seen, scores, -1e30), axis=-1)
    shot, video = table.token_shot, (jnp.arange(q.shape[1]) >= table.text_tokens)[None, None]
    earlier = video & (shot[:, None] < shot[..., None])
    right = jnp.take_along_axis(reveals, jnp.maximum(shot, 0), axis=1)
    reveal = video & (shot[:, None] == right[..., None])
    share, of_right = (jnp.where(where[:, None], weights, 0).sum(axis=-1) for where in (earlier, reveal))
    spread = jnp.where(earlier[:, None], weights, 0) / jnp.maximum(share, 1e-9)[..., None]
    entropy = -(spread * jnp.log(jnp.maximum(spread, 1e-30))).sum(axis=-1)
    return jnp.stack([share, of_right, entropy], axis=-1)
