"""What an arm's attention costs beside attention of all tokens to all."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from evidence.arms import Arm
from moc_jax.attention.accounting import account
from moc_jax.scene import GLOBAL, TEXT, VIDEO, ChunkTable


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one scene; FLOPs are one head's."""

    skipped: float
    """The share of all pairs that is left out, captions counted, if picks are random."""
    attention_flops: float
    """Pooling, routing and attention."""
    dense_flops: float
    """Of attention of all tokens to all."""


def cost_of(table: ChunkTable, arm: Arm, head_dim: int) -> Cost:
    """Of a table with one scene."""
    if not arm.captions_apart:
        found = account(table, arm.moc, head_dim)
        pairs, routing, tokens = found.expected_pairs, found.flops_pool + found.flops_route, found.tokens
    else:
        found = account(table, arm.moc, head_dim, query_chunk=jnp.where(table.token_kind == VIDEO, table.chunk_of, -1))
        kind, shot, length = (np.asarray(x[0]) for x in (table.kind, table.shot, table.length))
        captions, opening = length * ((kind == TEXT) & (shot != GLOBAL)), length[shot == GLOBAL].sum()
        read = (captions * (captions + opening)).sum() + opening**2
        pairs, routing, tokens = found.expected_pairs + read, found.flops_pool + found.flops_route, found.tokens
    if arm.every_chunk:
        routing = 0
    return Cost(
        skipped=float(1 - pairs / tokens**2),
        attention_flops=float(routing + 4 * pairs * head_dim),
        dense_flops=float(4 * tokens**2 * head_dim),
    )
