"""Attention in parts: what anchors and picks give by themselves, how parts make a whole, and their gradients.

A part is an output and the log-sum-exp of its scores s_ij = q_i . k_j / sqrt(D),

    out_i = sum_j exp(s_ij - lse_i) v_j        lse_i = log sum_j exp(s_ij)        over the part's keys j          (1)

so parts over disjoint keys, on one device or several, merge into one softmax over all of them,

    lse = log sum_p exp(lse_p)                 out = sum_p exp(lse_p - lse) out_p                                 (2)

and each part's gradients follow from its own q, k and v, the FINAL lse and delta_i = d_out_i . out_i alone; those of
parts add up to the gradients of the whole.
"""

import jax
import jax.numpy as jnp

from moc_jax.attention.backends import Backend, Gradients, implementation, resolve
from moc_jax.attention.checks import (
    check_query_chunk,
    check_routes,
    check_settings,
    check_statistics,
    check_table,
    check_vectors,
)
from moc_jax.attention.layout import Queries, queries_of
from moc_jax.attention.statistics import Part, merge, row_dot
from moc_jax.config import MoCConfig
from moc_jax.scene import ChunkTable
from moc_jax.shapes import Array, Float, Float32, Int

__all__ = ["Part", "anchor_gradients", "anchor_part", "delta_of", "merge", "pick_gradients", "pick_part"]


def anchor_part(
    q: Float[Array, "B Q H D"],
    k: Float[Array, "B N H D"],
    v: Float[Array, "B N H D"],
    table: ChunkTable,
    cfg: MoCConfig,
    *,
    query_chunk: Int[Array, "B Q"] | None = None,
    backend: str | Backend = "auto",
) -> Part:
    """Attention over the anchors alone: (out [B, Q, H, D], lse [B, H, Q] float32); 0 and -inf where there are none.

    No gradient flows through it: see `anchor_gradients`.

    Raises:
        TypeError, ValueError, NotImplementedError: as `moc_attention`.
    """
    (q, k, v), queries, table, value = _checked(q, k, v, table, cfg, query_chunk, backend)
    return implementation(value).part(q, k, v, None, queries, table, cfg, value)


def pick_part(
    q: Float[Array, "B Q H D"],
    k: Float[Array, "B N H D"],
    v: Float[Array, "B N H D"],
    routes: Int[Array, "B H Q K"],
    table: ChunkTable,
    cfg: MoCConfig,
    *,
    query_chunk: Int[Array, "B Q"] | None = None,
    backend: str | Backend = "auto",
) -> Part:
    """Attention over the picked chunks alone; otherwise as `anchor_part`."""
    (q, k, v), queries, table, value = _checked(q, k, v, table, cfg, query_chunk, backend)
    routes = check_routes(routes, q, queries, table, cfg)
    return implementation(value).part(q, k, v, routes, queries, table, cfg, value)


def delta_of(out: Float[Array, "B Q H D"], d_out: Float[Array, "B Q H D"]) -> Float32[Array, "B H Q"]:
    """What gradients need of the final output: d_out . out for each query."""
    return jnp.swapaxes(row_dot(out, d_out), 1, 2)


def anchor_gradients(
    q: Float[Array, "B Q H D"],
    k: Float[Array, "B N H D"],
    v: Float[Array, "B N H D"],
    d_out: Float[Array, "B Q H D"],
    lse: Float32[Array, "B H Q"],
    delta: Float32[Array, "B H Q"],
    table: ChunkTable,
    cfg: MoCConfig,
    *,
    query_chunk: Int[Array, "B Q"] | None = None,
    backend: str | Backend = "auto",
) -> Gradients:
    """(dq, dk, dv) of the anchors' part.

    Args:
        d_out: The gradient of the final output, in whose making the part had its share.
        lse: The final log-sum-exp, of all parts together.
        delta: `delta_of(out, d_out)` with the final output.

    Raises:
        TypeError, ValueError, NotImplementedError: as `moc_attention`.
    """
    (q, k, v), queries, table, value = _checked(q, k, v, table, cfg, query_chunk, backend)
    final = check_statistics(q, d_out, lse, delta)
    return implementation(value).part_gradients(q, k, v, None, *final, queries, table, cfg, value)


def pick_gradients(
    q: Float[Array, "B Q H D"],
    k: Float[Array, "B N H D"],
    v: Float[Array, "B N H D"],
    routes: Int[Array, "B H Q K"],
    d_out: Float[Array, "B Q H D"],
    lse: Float32[Array, "B H Q"],
    delta: Float32[Array, "B H Q"],
    table: ChunkTable,
    cfg: MoCConfig,
    *,
    query_chunk: Int[Array, "B Q"] | None = None,
    backend: str | Backend = "auto",
) -> Gradients:
    """(dq, dk, dv) of the picks' part; otherwise as `anchor_gradients`."""
    (q, k, v), queries, table, value = _checked(q, k, v, table, cfg, query_chunk, backend)
    routes = check_routes(routes, q, queries, table, cfg)
    final = check_statistics(q, d_out, lse, delta)
    return implementation(value).part_gradients(q, k, v, routes, *final, queries, table, cfg, value)


def _checked(
    q, k, v, table, cfg, query_chunk, backend
) -> tuple[tuple[Array, Array, Array], Queries, ChunkTable, Backend]:
    check_settings(cfg)
    q, k, v = check_vectors(q=q, k=k, v=v)
    table = check_table(table, k, cfg)
    queries = queries_of(table, check_query_chunk(query_chunk, q, table))
    q, k, v = jax.lax.stop_gradient((q, k, v))
    return (q, k, v), queries, table, resolve(backend, cfg, q, k, v, chunks=table.kind.shape[1])
