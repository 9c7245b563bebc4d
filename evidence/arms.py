"""What is compared: equal weights, data, text and updates; only what a query may read differs.

In all arms a shot's video reads no caption but its own and the global one, and captions read no video. So nothing but
video of earlier shots can tell how a character looks.
"""

import dataclasses
import re
from typing import Literal

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
    attention: SceneAttention


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


_PICKING = re.compile(r"(moc|random|recent) (\d+)x(\d+)(?:, (.+))?")
_ROUTING: dict[str, Literal["keys", "random", "recent"]] = {"moc": "keys", "random": "random", "recent": "recent"}
_CHANGED = {
    None: {},
    "no drop-off or drop-in": {"drop_off_max": 0.0, "max_drop_in": 0},
    "no self anchor": {"self_anchor": "none", "causal_routing": False},
}


def arm_of(name: str, backend: str = "auto") -> Arm:
    """The arm of a name: "dense", "own shot", or what picks, chunk in tokens x picks, and what is changed: "moc 8x6",
    "random 8x6", "moc 8x12, no self anchor".

    Raises:
        ValueError: there is no such arm.
    """
    if name == "dense":
        return Arm(moc=_moc(8, 0), attention=text_apart(every_chunk))
    attention = text_apart(RoutedAttention(backend=backend))
    if name == "own shot":
        return Arm(moc=_moc(8, 0), attention=attention)
    found = _PICKING.fullmatch(name)
    if found is None or found[4] not in _CHANGED:
        raise ValueError(
            f"no arm is named {name!r}; there are dense, own shot, and moc, random or recent with a chunk's tokens "
            f"and picks, as in 'moc 8x6', and after it{' or'.join(f' ", {how}"' for how in _CHANGED if how)}"
        )
    picks = _moc(int(found[2]), int(found[3]), routing=_ROUTING[found[1]], **_CHANGED[found[4]])
    return Arm(moc=picks, attention=attention)


ARMS = (
    "dense",
    "own shot",
    "moc 8x6",
    "moc 16x3",
    "moc 8x3",
    "moc 4x6",
    "random 8x6",
    "random 8x3",
    "recent 8x6",
    "moc 8x6, no drop-off or drop-in",
    "moc 8x12, no self anchor",
)
"""Those of the evidence."""
