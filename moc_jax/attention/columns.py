"""Columns: what queries are scored against, `cfg.descriptors` for each chunk, and chunks again.

    phi(c, j)   = mean of the keys of run j of chunk c, one of J equal ones
    score(i, c) = max_j q_i . phi(c, j)

The best k chunks are among the best k J columns, of which each keeps its first place. So routers know columns alone.
"""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp

from moc_jax.attention.layout import running_sum
from moc_jax.attention.routing import descriptors, first_chunks, width
from moc_jax.config import MoCConfig
from moc_jax.scene import ChunkTable
from moc_jax.shapes import Array, Float, Float32, Int, typed

_NOTHING = -1  # no pick


@typed
def columns(
    k: Float[Array, "B N H D"],
    table: ChunkTable,
    cfg: MoCConfig,
    of_chunks: Callable[[Array, ChunkTable], Array] = descriptors,
) -> Float32[Array, "B H _ D"]:
    """phi: what queries are scored against, the means of the `cfg.descriptors` equal runs of each chunk.

    NaN for sinks and for runs without a token, so that nobody picks them. `of_chunks` is what computes `descriptors`.
    """
    count = cfg.descriptors
    if count == 1 and not cfg.sink_chunks:
        return of_chunks(k, table)
    edges = table.length[:, :, None] * jnp.arange(count + 1)[None, None] // count  # [B, C, count + 1]
    kind, shot, start = (jnp.repeat(x, count, axis=1) for x in (table.kind, table.shot, table.start))
    start, length = start + edges[:, :, :-1].reshape(kind.shape), jnp.diff(edges).reshape(kind.shape)
    most = -(-table.max_chunk // count)
    runs = dataclasses.replace(table, kind=kind, shot=shot, start=start, length=length, max_chunk=most)
    barred = jnp.repeat(first_chunks(table, cfg), count, axis=1) | (length == 0)
    return jnp.where(barred[:, None, :, None], jnp.nan, of_chunks(k, runs))


def by_column(cfg: MoCConfig, table: ChunkTable) -> MoCConfig:
    """What routers are asked for, so that `chunks_of` finds `top_k` chunks in it."""
    if cfg.descriptors == 1:
        return cfg
    return dataclasses.replace(cfg, top_k=min(cfg.top_k, table.kind.shape[1]) * cfg.descriptors)


@typed
def chunks_of(picks: Int[Array, "B H Q _"], table: ChunkTable, cfg: MoCConfig) -> Int[Array, "B H Q K"]:
    """The chunks of columns, each where its best one was, in `width` of `top_k`."""
    if cfg.descriptors == 1:
        return picks
    count = width(cfg.top_k, table.kind.shape[1])
    chunk = jnp.where(picks < 0, _NOTHING, picks // cfg.descriptors)
    earlier = jnp.tri(chunk.shape[-1], k=-1, dtype=bool)[None, None, None]
    first = (chunk >= 0) & ~jnp.any((chunk[..., None] == chunk[..., None, :]) & earlier, axis=-1)
    place = jnp.where(first, running_sum(first.astype(jnp.int32)) - 1, count)
    found = place[..., None, :] == jnp.arange(count)[None, None, None, :, None]
    return jnp.max(jnp.where(found, chunk[..., None, :], _NOTHING), axis=-1, initial=_NOTHING)
