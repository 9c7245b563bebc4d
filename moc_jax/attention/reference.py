"""The oracle: a dense boolean mask and one float32 softmax for each query. Obviously right, never fast.

out_i = softmax_j( q_i . k_j / sqrt(D)  where j in context(i) ) v_j            (MoC, equation 4)
"""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from moc_jax.attention import routing
from moc_jax.attention.columns import columns
from moc_jax.attention.layout import Queries
from moc_jax.attention.routing import anchor_chunks
from moc_jax.config import MoCConfig
from moc_jax.scene import ChunkTable
from moc_jax.shapes import Array, Bool, Float, Float32, Int, typed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reference:
    """The dense-mask float32 oracle."""

    name: ClassVar[str] = "reference"


def means(k: Float[Array, "B N H D"], table: ChunkTable, cfg: MoCConfig, backend: Reference):
    """See backends.py."""
    return columns(k, table, cfg)


def select(
    q: Float[Array, "B Q H D"],
    phi: Float32[Array, "B H _ D"],
    queries: Queries,
    table: ChunkTable,
    cfg: MoCConfig,
    backend: Reference,
) -> Int[Array, "B H Q K"]:
    """The best candidates of every query."""
    return routing.select(q, phi, queries, table, cfg)


@typed
def anchor_mask(queries: Queries, table: ChunkTable, cfg: MoCConfig) -> Bool[Array, "B Q N"]:
    """True where the key's chunk is an anchor of the query's chunk."""
    of = jnp.maximum(queries.chunk_of, 0)
    anchors = jnp.take_along_axis(anchor_chunks(table, cfg), of[:, :, None], axis=1)  # [B, Q, C]
    seen = jnp.take_along_axis(anchors, jnp.maximum(table.chunk_of, 0)[:, None, :], axis=2)
    return seen & queries.valid[:, :, None] & table.valid[:, None, :]


@typed
def pick_mask(routes: Int[Array, "B H Q K"], queries: Queries, table: ChunkTable) -> Bool[Array, "B H Q N"]:
    """True where the query picked the key's chunk."""
    picked = jnp.any(routes[..., None] == jnp.arange(table.kind.shape[1])[None, None, None, None], axis=3)
    seen = jnp.take_along_axis(picked, jnp.maximum(table.chunk_of, 0)[:, None, None, :], axis=3)
    return seen & queries.valid[:, None, :, None] & table.valid[:, None, None, :]


@typed
def attend(
    q: Float[Array, "B Q H D"],
    k: Float[Array, "B N H D"],
    v: Float[Array, "B N H D"],
    routes: Int[Array, "B H Q K"],
    queries: Queries,
    table: ChunkTable,
    cfg: MoCConfig,
    backend: Reference,
) -> Float[Array, "B Q H D"]:
    """Attention under the mask; queries with an empty context give 0."""
    mask = anchor_mask(queries, table, cfg)[:, None] | pick_mask(routes, queries, table)
    return _part(q, k, v, mask, queries)[0]


def part(q, k, v, routes, queries: Queries, table: ChunkTable, cfg: MoCConfig, backend: Reference):
    """See backends.py."""
    return _part(q, k, v, _mask_of_part(q, routes, queries, table, cfg), queries)


def part_gradients(
    q, k, v, routes, d_out, lse, delta, queries: Queries, table: ChunkTable, cfg: MoCConfig, backend: Reference
):
    """See backends.py."""
    return _gradients(q, k, v, d_out, lse, delta, _mask_of_part(q, routes, queries, table, cfg), queries)


def _mask_of_part(q, routes, queries: Queries, table: ChunkTable, cfg: MoCConfig) -> Bool[Array, "B H Q N"]:
    if routes is not None:
        return pick_mask(routes, queries, table)
    mask = anchor_mask(queries, table, cfg)
    return jnp.broadcast_to(mask[:, None], (mask.shape[0], q.shape[2], *mask.shape[1:]))


def _part(q, k, v, mask: Bool[Array, "B H Q N"], queries: Queries):
    """Output and log-sum-exp under a mask.

    Query by query, each with zeros for the keys and values that it does not see: whatever these hold, NaN too, reaches
    neither its output nor, through it, any gradient.
    """
    k32, v32 = k.astype(jnp.float32), v.astype(jnp.float32)

    @jax.checkpoint
    def one_query(inputs):
        q, mask = inputs  # [B, H, D], [B, H, N]
        scores, values = _seen(q, k32, v32, mask)
        scores = jnp.where(mask, scores, -jnp.inf)
        largest = lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
        base = jnp.where(jnp.isneginf(largest), 0.0, largest)
        weights = jnp.where(mask, jnp.exp(scores - base), 0.0)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        lse = lax.stop_gradient(base + jnp.log(total))[..., 0]
        weights = weights / jnp.where(total == 0, 1.0, total)
        return jnp.einsum("bhm,bmhd->bhd", weights, values, precision="highest"), lse

    q = jnp.where(queries.valid[..., None, None], q, 0).astype(jnp.float32)
    out, lse = lax.map(one_query, (jnp.moveaxis(q, 1, 0), jnp.moveaxis(mask, 2, 0)))
    out = jnp.where(queries.valid[..., None, None], jnp.moveaxis(out, 0, 1), 0.0)  # the same for its gradient
    return out.astype(v.dtype), jnp.moveaxis(lse, 0, 2)


def _seen(q, k, v, mask):
    """One query's scores [B, H, N] and the values [B, N, H, D]; of unseen keys, those of zeros."""
    seen = jnp.swapaxes(mask, 1, 2)[..., None]  # [B, N, H, 1]
    keys, values = jnp.where(seen, k, 0.0), jnp.where(seen, v, 0.0)
    return jnp.einsum("bhd,bmhd->bhm", q, keys, precision="highest") / math.sqrt(q.shape[-1]), values


def _gradients(q, k, v, d_out, lse, delta, mask: Bool[Array, "B H Q N"], queries: Queries):
    """p = exp(s - lse):  dv = p^T d_out,  ds = p (d_out v^T - delta),  dq = ds k,  dk = ds^T q."""
    k32, v32 = k.astype(jnp.float32), v.astype(jnp.float32)
    scale = 1 / math.sqrt(q.shape[-1])

    def one_query(sums, inputs):
        q, d_out, lse, delta, mask = inputs  # [B, H, D] twice, [B, H] twice, [B, H, N]
        scores, values = _seen(q, k32, v32, mask)
        p = jnp.where(mask, jnp.exp(scores - lse[..., None]), 0.0)
        d_p = jnp.einsum("bhd,bmhd->bhm", d_out, values, precision="highest")
        d_s = jnp.where(mask, p * (d_p - delta[..., None]) * scale, 0.0)
        keys = jnp.where(jnp.swapaxes(mask, 1, 2)[..., None], k32, 0.0)
        d_q = jnp.einsum("bhm,bmhd->bhd", d_s, keys, precision="highest")
        d_k = sums[0] + jnp.einsum("bhm,bhd->bmhd", d_s, q, precision="highest")
        d_v = sums[1] + jnp.einsum("bhm,bhd->bmhd", p, d_out, precision="highest")
        return (d_k, d_v), d_q

    valid = queries.valid[..., None, None]
    q32, d_out = (jnp.where(valid, x, 0).astype(jnp.float32) for x in (q, d_out))
    rows = (jnp.moveaxis(x, axis, 0) for x, axis in ((q32, 1), (d_out, 1), (lse, 2), (delta, 2), (mask, 2)))
    sums = jnp.zeros_like(k32), jnp.zeros_like(v32)
    (d_k, d_v), d_q = lax.scan(one_query, sums, tuple(rows))
    d_q = jnp.where(valid, jnp.moveaxis(d_q, 0, 1), 0.0)
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype)
