"""Anchors as runs of memory. Text and video chunks lie in scene order, so what anchors cover of each is one run:

queries' side    which keys the queries of a chunk always read      at most three runs: two of text, one of video
keys' side       which queries always read the keys of a chunk      at most two runs: one of text, one of video
"""

from typing import NamedTuple

import jax.numpy as jnp

from moc_jax.attention.routing import anchor_chunks
from moc_jax.config import MoCConfig
from moc_jax.scene import GLOBAL, TEXT, VIDEO, ChunkTable
from moc_jax.shapes import Array, Bool, Int


class Runs(NamedTuple):
    """A runs of tokens [begin, end) for each of C chunks (or, taken per query, Q queries); begin >= end: none."""

    begin: Int[Array, "B A C"]
    end: Int[Array, "B A C"]


def anchor_runs(table: ChunkTable, cfg: MoCConfig) -> Runs:
    """The keys that each chunk's queries always read."""
    text, is_global = table.kind == TEXT, table.shot == GLOBAL
    # Where the captions in between are not seen.
    split_text = cfg.visibility == "own" or (cfg.mode == "moc" and cfg.text_anchor == "own+global")
    groups = [text & is_global, text & ~is_global] if split_text else [text]
    return _cover(anchor_chunks(table, cfg), [*groups, table.kind == VIDEO], table.start, table.length)


def reader_runs(table: ChunkTable, cfg: MoCConfig, start: Int[Array, "B C"], length: Int[Array, "B C"]) -> Runs:
    """The queries that always read each chunk's keys; each chunk's queries are `length` rows from `start` on."""
    readers = jnp.swapaxes(anchor_chunks(table, cfg), 1, 2)
    return _cover(readers, [table.kind == TEXT, table.kind == VIDEO], start, length)


def _cover(seen: Bool[Array, "B C C"], groups: list[Array], start: Array, length: Array) -> Runs:
    far = jnp.iinfo(jnp.int32).max
    begin, end = [], []
    for group in groups:
        there = seen & (group & (length > 0))[:, None, :]
        end.append(jnp.max(jnp.where(there, (start + length)[:, None], 0), axis=-1))
        begin.append(jnp.minimum(jnp.min(jnp.where(there, start[:, None], far), axis=-1), end[-1]))
    return Runs(jnp.stack(begin, axis=1), jnp.stack(end, axis=1))
