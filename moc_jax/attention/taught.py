"""Attention of scenes that come twice, for teacher forcing: as history, and as shots that are learned.

A history is a scene as it is under `past` visibility. A shot that is learned reads its own copy, its own caption's and
the global one's with it, and the history of the shots before it:

    out = softmax over (own copy | captions before | picks in history)        visibility own | before | past

so that all shots of a scene read at once what each would read where shots are sampled one after another. The three are
parts (parts.py), and so are their gradients.
"""

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from moc_jax.attention.api import RoutedAttention, SceneAttention, fitting, route_by, within
from moc_jax.attention.backends import Backend, implementation
from moc_jax.attention.layout import Queries
from moc_jax.attention.residuals import named_outputs
from moc_jax.attention.statistics import merge, row_dot
from moc_jax.config import MoCConfig
from moc_jax.scene import ChunkTable
from moc_jax.shapes import Array

Pair = tuple[Array, Array]  # keys and values


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaughtAttention(RoutedAttention):
    """Of a batch in which scenes 0, 2, 4, ... are histories, each followed by the same shots to be learned."""

    def of_queries(
        self,
        q: Array,
        k: Array,
        v: Array,
        queries: Queries,
        table: ChunkTable,
        cfg: MoCConfig,
        *,
        key: Array | None = None,
        luck: Array | None = None,
    ) -> tuple[Array, Array]:
        """As `RoutedAttention.of_queries`."""
        row, queries = queries.row, dataclasses.replace(queries, row=None)
        queries, table = jax.tree.map(lambda x: x[::2], (queries, table))  # as of the other copies
        queries = dataclasses.replace(queries, row=row)
        history, learned = (jax.tree.map(lambda x, i=i: x[i::2], (q, k, v, key, luck)) for i in range(2))
        q, *past, key, luck = history
        out, routes = super().of_queries(q, past[0], past[1], queries, table, cfg, key=key, luck=luck)

        q, k, v, key, luck = learned
        backend = self.backend_for(q, k, v, table, cfg)

        def phi():
            return implementation(backend).means(jax.lax.stop_gradient(past[0]), table, cfg, backend)

        of_learned = route_by(q, phi, queries, table, cfg, backend, key=key, luck=luck)
        found = _attend(q, (k, v), (past[0], past[1]), fitting(of_learned, table), queries, table, cfg, backend)
        return in_pairs(out, found), in_pairs(routes, of_learned)


def taught(attention: SceneAttention) -> TaughtAttention:
    """The same attention for scenes that come twice. Over groups of tokens it gathers keys.

    Raises:
        NotImplementedError: it is not `RoutedAttention`.
    """
    if not isinstance(attention, RoutedAttention):
        raise NotImplementedError(f"teacher forcing needs RoutedAttention, not {type(attention).__name__}")
    fields = {field.name: getattr(attention, field.name) for field in dataclasses.fields(attention)}
    return TaughtAttention(**fields | {"exchange": "gather"})


def in_pairs(history: Array, learned: Array) -> Array:
    """[B, ...] of each -> [2 B, ...], a scene's two copies one after the other: both on one device."""
    return jnp.stack([history, learned], axis=1).reshape(2 * len(history), *history.shape[1:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _attend(
    q, own: Pair, past: Pair, routes, queries: Queries, table: ChunkTable, cfg: MoCConfig, backend: Backend
) -> Array:
    return _forward(q, own, past, routes, queries, table, cfg, backend)[0]


def _parts(own, past, routes, table: ChunkTable, cfg: MoCConfig) -> Iterator[tuple[int, Pair, Array | None, MoCConfig]]:
    """Whose keys and values (0: the own copy's), they, what is picked of them, and what is attended to else."""
    anchors = dataclasses.replace(cfg, top_k=0, sink_chunks=0)
    yield 0, own, None, dataclasses.replace(anchors, visibility="own")
    if cfg.mode == "dense" or table.text_tokens:
        yield 1, past, None, dataclasses.replace(anchors, visibility="before")
    if routes.shape[-1]:
        yield 1, past, routes, within(cfg, table)


def _forward(q, own: Pair, past: Pair, routes, queries, table, cfg, backend):
    run = implementation(backend)
    found = [
        run.part(q, *keys, picks, queries, table, each, backend)
        for _, keys, picks, each in _parts(own, past, routes, table, cfg)
    ]
    out, lse = named_outputs(*merge(*found))
    out = jnp.where(queries.valid[..., None, None], out, 0)
    return out, (q, own, past, routes, queries, table, out, lse)


def _backward(cfg: MoCConfig, backend: Backend, saved, d_out):
    q, own, past, routes, queries, table, out, lse = saved
    delta, run = jnp.swapaxes(row_dot(d_out, out), 1, 2), implementation(backend)
    d_q, *of_keys = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), (q, own, past))
    for which, keys, picks, each in _parts(own, past, routes, table, cfg):
        d_part, *d_keys = run.part_gradients(q, *keys, picks, d_out, lse, delta, queries, table, each, backend)
        d_q += d_part.astype(jnp.float32)
        of_keys[which] = tuple(x + d.astype(jnp.float32) for x, d in zip(of_keys[which], d_keys, strict=True))
    d_own, d_past = (tuple(d.astype(x.dtype) for d, x in zip(*both, strict=True)) for both in zip(of_keys, (own, past)))
    return d_q.astype(q.dtype), d_own, d_past, None, None, None


_attend.defvjp(_forward, _backward)
