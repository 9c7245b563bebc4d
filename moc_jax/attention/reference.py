"""The oracle: a dense boolean mask and one float32 softmax. Obviously right, never fast.

out_i = softmax_j( q_i . k_j / sqrt(D)  where j in context(i) ) v_j            (MoC, equation 4)
"""

import math

import jax.numpy as jnp

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
    """Attention under the mask; queries with an empty context give 0."""
    mask = context_mask(routes, table, cfg)
    q, k, v32 = (x.astype(jnp.float32) for x in (q, k, v))
    scores = jnp.einsum("bnhd,bmhd->bhnm", q, k, precision="highest") / math.sqrt(q.shape[-1])
    scores = jnp.where(mask, scores, -jnp.inf)
    largest = jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), jnp.finfo(jnp.float32).min)
    weights = jnp.where(mask, jnp.exp(scores - largest), 0.0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights / jnp.where(total > 0, total, 1.0)
    return jnp.einsum("bhnm,bmhd->bnhd", weights, v32, precision="highest").astype(v.dtype)
