"""What is compared: equal weights, data, text and updates; only what a query may read differs.

In all arms a shot's video reads no caption but its own and the global one, and captions read no video. So nothing but
video of earlier shots can tell how a character looks.
"""

import dataclasses

import jax
import jax.numpy as jnp

from moc_jax.attention.api import RoutedAttention, SceneAttention
from moc_jax.attention.routing import anchor_chunks, candidate_chunks
from moc_jax.config import ChunkConfig, MoCConfig
from moc_jax.scene import GLOBAL


def text_apart(attention: SceneAttention) -> SceneAttention:
    """As `attention`, but captions read themselves and the global caption alone.

    With the library's own, which read their shot's video and each other, looks would pass from shot to shot through
    text: by three layers even where no video is picked.
    """

    def attend(q, k, v, table, cfg, *, key=None):
        out, routes = attention(q, k, v, table, cfg, key=key)
        shot = table.token_shot[:, : table.text_tokens]
        mask = (shot[:, :, None] == shot[:, None, :]) | (shot == GLOBAL)[:, None, :]
        text = jax.nn.dot_product_attention(*(x[:, : table.text_tokens] for x in (q, k, v)), mask=mask[:, None])
        return out.at[:, : table.text_tokens].set(text), routes

    return attend


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to attend."""

    moc: MoCConfig
    attention: SceneAttention = text_apart(RoutedAttention())


def _moc(size: int, top_k: int, **changed) -> MoCConfig:
    chunk = ChunkConfig(unit="tokens", size=size)
    return MoCConfig(chunk=chunk, top_k=top_k, text_anchor="own+global", **changed)


def every_chunk(q, k, v, table, cfg, *, key=None):
    """As if all candidates were picked, later ones too: dense attention over the video, and the arms' own text."""
    every = dataclasses.replace(cfg, causal_routing=False)
    seen = anchor_chunks(table, every) | candidate_chunks(table, every)  # [B, C, C]
    of = jnp.maximum(table.chunk_of, 0)
    mask = jax.vmap(lambda seen, of: seen[of][:, of])(seen, of) & table.valid[:, None, :]
    out = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None])
    return out, jnp.zeros((q.shape[0], q.shape[2], q.shape[1], 0), jnp.int32)


ARMS: dict[str, Arm] = {
    "dense": Arm(moc=_moc(8, 0), attention=text_apart(every_chunk)),
    "own shot": Arm(moc=_moc(8, 0)),
    "moc 8x6": Arm(moc=_moc(8, 6)),
    "moc 16x3": Arm(moc=_moc(16, 3)),
    "random 8x6": Arm(moc=_moc(8, 6, routing="random")),
    "recent 8x6": Arm(moc=_moc(8, 6, routing="recent")),
    "moc 8x6, no drop-off or drop-in": Arm(moc=_moc(8, 6, drop_off_max=0.0, max_drop_in=0)),
    "moc 8x12, no self anchor": Arm(moc=_moc(8, 12, self_anchor="none", causal_routing=False)),
}
"""By name: chunk in tokens x picks, where there are picks."""
