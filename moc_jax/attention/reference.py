"""The oracle: a dense boolean mask and one float32 softmax for each query. Obviously right, never fast.

out_i = softmax_j( q_i . k_j / sqrt(D)  where j in context(i) ) v_j            (MoC, equation 4)
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from moc_jax.attention.routing import anchor_chunks
from moc_jax.config import MoCConfig
from moc_jax.scene import ChunkTable
from moc_jax.shapes import Array, Bool, Float, Int, typed


@typed
def context_mask(routes: Int[Array, "B H N K"], table: ChunkTable, cfg: MoCConfig) -> Bool[Array, "B H N N"]:
    """True where a query attends to a key: the key's chunk is an anchor of the query's chunk, or was picked."""
    chunks = table.kind.shape[1]
    of = jnp.maximum(table.chunk_of, 0)
    anchors = jnp.take_along_axis(anchor_chunks(table, cfg), of[:, :, None], axis=1)  # [B, N, C]
    picked = jnp.any(routes[..., None] == jnp.arange(chunks)[None, None, None, None], axis=3)  # [B, H, N, C]
    context = anchors[:, None] | picked
    seen = jnp.take_along_axis(context, of[:, None, None, :], axis=3)
    return seen & table.valid[:, None, :, None] & table.valid[:, None, None, :]


@typed
def attend(
    q: Float[Array, "B N H D"],
    k: Float[Array, "B N H D"],
    v: Float[Array, "B N H D"],
    routes: Int[Array, "B H N K"],
    table: ChunkTable,
    cfg: MoCConfig,
) -> Float[Array, "B N H D"]:
    """Attention under the mask; queries with an empty context give 0.

    Query by query, each with zeros for the keys and values that it does not see: whatever these hold, NaN too, reaches
    neither its output nor, through it, any gradient.
    """
    k32, v32 = k.astype(jnp.float32), v.astype(jnp.float32)

    @jax.checkpoint
    def one_query(inputs):
        q, mask = inputs  # [B, H, D], [B, H, M]
        seen = jnp.swapaxes(mask, 1, 2)[..., None]  # [B, M, H, 1]
        keys, values = jnp.where(seen, k32, 0.0), jnp.where(seen, v32, 0.0)
        scores = jnp.einsum("bhd,bmhd->bhm", q, keys, precision="highest") / math.sqrt(q.shape[-1])
        scores = jnp.where(mask, scores, -jnp.inf)
        largest = lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
        weights = jnp.where(mask, jnp.exp(scores - jnp.where(jnp.isneginf(largest), 0.0, largest)), 0.0)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        weights = weights / jnp.where(total == 0, 1.0, total)
        return jnp.einsum("bhm,bmhd->bhd", weights, values, precision="highest")

    q = jnp.where(table.valid[..., None, None], q, 0).astype(jnp.float32)
    mask = context_mask(routes, table, cfg)
    out = lax.map(one_query, (jnp.moveaxis(q, 1, 0), jnp.moveaxis(mask, 2, 0)))
    out = jnp.where(table.valid[..., None, None], jnp.moveaxis(out, 0, 1), 0.0)  # the same for its gradient
    return out.astype(v.dtype)
