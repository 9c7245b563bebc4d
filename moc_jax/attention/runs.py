"""Anchors as runs of memory. Text and video chunks lie in scene order, so what anchors cover of each is one run:

queries' side    which keys the queries of a chunk always read      at most three runs: two of text, one of video
keys' side       which queries always read the keys of a chunk      at most two runs: one of text, one of video
"""

import jax.numpy as jnp

from moc_jax.attention.layout import Queries, Runs, queries_of
from moc_jax.attention.routing import anchor_chunks
from moc_jax.config import MoCConfig
from moc_jax.scene import GLOBAL, TEXT, VIDEO, ChunkTable
from moc_jax.shapes import Array, Bool


def anchor_runs(table: ChunkTable, cfg: MoCConfig) -> Runs:
    """The keys that each chunk's queries always read."""
    text, is_global = table.kind == TEXT, table.shot == GLOBAL
    split_text = cfg.mode == "moc" and cfg.text_anchor == "own+global"  # the captions in between are not seen
    groups = [text & is_global, text & ~is_global] if split_text else [text]
    return _cover(anchor_chunks(table, cfg), [*groups, table.kind == VIDEO], queries_of(table))


def reader_runs(queries: Queries, table: ChunkTable, cfg: MoCConfig) -> Runs:
    """The rows of queries that always read each chunk's keys."""
    readers = jnp.swapaxes(anchor_chunks(table, cfg), 1, 2)
    return _cover(readers, [table.kind == TEXT, table.kind == VIDEO], queries)


def _cover(seen: Bool[Array, "B C C"], groups: list[Array], rows: Queries) -> Runs:
    far = rows.chunk_of.shape[1]
    begin, end = [], []
    for group in groups:
        there = seen & (group & (rows.length > 0))[:, None, :]
        begin.append(jnp.min(jnp.where(there, rows.start[:, None], far), axis=-1))
        end.append(jnp.max(jnp.where(there, (rows.start + rows.length)[:, None], 0), axis=-1))
    return Runs(jnp.stack(begin, axis=1), jnp.stack(end, axis=1))
