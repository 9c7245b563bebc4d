"""Where queries lie in memory: what all backends walk, derived once.

Queries need not be keys. A shard of the tokens, the shot that is being sampled, or all of them: what attention needs to
know of a query token is the chunk that it belongs to.
"""

import dataclasses

import jax
import jax.numpy as jnp

from moc_jax.scene import ChunkTable
from moc_jax.shapes import Array, Bool, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Queries:
    """The Q query tokens of each scene, by the chunks of a table that they belong to.

    The query tokens of one chunk are one run of rows, and those of a shot's video chunks follow each other in chunk
    order. A chunk may have fewer of them than it has keys, or none.
    """

    chunk_of: Int[Array, "B Q"]  # -1: padding
    start: Int[Array, "B C"]  # each chunk's first row
    length: Int[Array, "B C"]  # and how many rows it has
    text_tokens: int = dataclasses.field(metadata={"static": True})  # no more query tokens are text
    first_video: int = dataclasses.field(metadata={"static": True})  # no row before this one is video

    @property
    def valid(self) -> Bool[Array, "B Q"]:
        """False for padding."""
        return self.chunk_of >= 0


def queries_of(table: ChunkTable, query_chunk: Int[Array, "B Q"] | None = None) -> Queries:
    """The queries whose tokens belong to the chunks `query_chunk`, -1 for padding; None: the table's own tokens."""
    if query_chunk is None:
        return Queries(table.chunk_of, table.start, table.length, table.text_tokens, table.text_tokens)
    start, length = jax.vmap(_runs, in_axes=(0, None))(query_chunk, table.kind.shape[1])
    return Queries(query_chunk, start, length, min(table.text_tokens, query_chunk.shape[1]), 0)


def _runs(chunk_of: Int[Array, "Q"], chunks: int) -> tuple[Int[Array, "C"], Int[Array, "C"]]:
    """Start and length of each chunk's run of rows.

    Runs are counted along the rows and then looked up, which reads the rows a few times: nothing is rows x chunks.
    """
    rows = chunk_of.shape[0]
    most = 2 * chunks + 1  # with padding before, between and behind
    changes = jnp.concatenate([jnp.zeros(min(rows, 1), bool), chunk_of[1:] != chunk_of[:-1]])
    run_of = jnp.cumsum(changes)
    begin = jnp.searchsorted(run_of, jnp.arange(most + 1)).astype(jnp.int32)
    start, length = begin[:-1], begin[1:] - begin[:-1]
    chunk = chunk_of.at[start].get(mode="fill", fill_value=-1)
    chunk = jnp.where((length > 0) & (chunk >= 0), chunk, chunks)  # a place beyond the end is dropped
    nothing = jnp.zeros(chunks, jnp.int32)
    return nothing.at[chunk].set(start, mode="drop"), nothing.at[chunk].set(length, mode="drop")
