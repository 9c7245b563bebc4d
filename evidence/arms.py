"""What is compared: equal weights, data, text and updates; only what a query may read differs.

All arms read their own shot, their own caption and the global one. So nothing but video of earlier shots can tell how a
character looks: captions are read by their own shot's queries alone.
"""

import dataclasses

import jax
import jax.numpy as jnp

from moc_jax.attention.api import RoutedAttention, SceneAttention
from moc_jax.attention.routing import anchor_chunks, candidate_chunks
from moc_jax.config import ChunkConfig, MoCConfig
from moc_jax.scene import PAD
from moc_jax.shapes import Array, Bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to attend."""

    moc: MoCConfig
    attention: SceneAttention = RoutedAttention()


def _moc(size: int, top_k: int, **changed) -> MoCConfig:
    chunk = ChunkConfig(unit="tokens", size=size)
    return MoCConfig(chunk=chunk, top_k=top_k, text_anchor="own+global", **changed)


def every_chunk(q, k, v, table, cfg, *, key=None):
    """As if all candidates were picked, later ones too: dense attention over the video, and the arms' own text."""
    every = dataclasses.replace(cfg, causal_routing=False)
    seen = anchor_chunks(table, every) | candidate_chunks(table, every)  # [B, C, C]
    of = jnp.maximum(table.chunk_of, 0)
    mask = jax.vmap(lambda seen, of: seen[of][:, of])(seen, of) & _real(table)
    out = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None])
    return out, jnp.zeros((q.shape[0], q.shape[2], q.shape[1], 0), jnp.int32)


def _real(table) -> Bool[Array, "B N N"]:
    """Pairs without padding; padding sees itself, so that no row of the softmax is empty."""
    real = table.token_kind != PAD
    return (real[:, :, None] & real[:, None, :]) | jnp.eye(real.shape[1], dtype=bool)[None]


ARMS: dict[str, Arm] = {
    "dense": Arm(moc=_moc(8, 0), attention=every_chunk),
    "own shot": Arm(moc=_moc(8, 0)),
    "moc 8x6": Arm(moc=_moc(8, 6)),
    "moc 16x3": Arm(moc=_moc(16, 3)),
    "random 8x6": Arm(moc=_moc(8, 6, routing="random")),
    "recent 8x6": Arm(moc=_moc(8, 6, routing="recent")),
    "moc 8x6, no drop-off or drop-in": Arm(moc=_moc(8, 6, drop_off_max=0.0, max_drop_in=0)),
    "moc 8x12, no self anchor": Arm(moc=_moc(8, 12, self_anchor="none", causal_routing=False)),
}
"""By name: chunk in tokens x picks, where there are picks."""
