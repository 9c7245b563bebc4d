"""Dense attention of the video, beside its captions: exact, and by the kernels that other arms run with.

A query of a shot's video reads all video, its own caption and the global one. The two are parts (moc_jax/attention/
parts.py): all video by the kernels, whatever its length, and the few captions by plain products under a mask.
"""

import functools
import math

import jax
import jax.numpy as jnp

from moc_jax.attention.api import SceneAttention
from moc_jax.attention.backends import Backend
from moc_jax.attention.parts import Part, anchor_gradients, anchor_part, delta_of, merge
from moc_jax.config import MoCConfig
from moc_jax.scene import GLOBAL, VIDEO, ChunkTable
from moc_jax.shapes import Array, Bool, Float

_DENSE = MoCConfig(mode="dense")


def dense_attention(backend: str | Backend) -> SceneAttention:
    """Of scenes whose video has no padding; captions' outputs are 0."""

    def attend(q, k, v, table, cfg, *, key=None):
        text = table.text_tokens
        shot, caption = table.token_shot[:, text:, None], table.token_shot[:, None, :text]
        out = _read(q[:, text:], k, v, (shot == caption) | (caption == GLOBAL), backend)
        none = jnp.zeros((q.shape[0], q.shape[2], q.shape[1], 0), jnp.int32)
        return jnp.pad(out, ((0, 0), (text, 0), (0, 0), (0, 0))), none

    return attend


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _read(
    q: Float[Array, "B V H D"],
    k: Float[Array, "B N H D"],
    v: Float[Array, "B N H D"],
    seen: Bool[Array, "B V L"],
    backend: str | Backend,
) -> Float[Array, "B V H D"]:
    """Video queries read all video and the captions `seen`."""
    return _forward(q, k, v, seen, backend)[0]


def _forward(q, k, v, seen, backend) -> Part:
    text = seen.shape[2]
    scores = _scores(q, k[:, :text], seen)
    lse = jax.nn.logsumexp(scores, axis=-1)
    weights = jnp.exp(scores - lse[..., None]).astype(v.dtype)
    captions = jnp.einsum("bhqn,bnhd->bqhd", weights, v[:, :text]), lse
    return merge(anchor_part(q, k[:, text:], v[:, text:], _one_chunk(q), _DENSE, backend=backend), captions)


def _scores(q, k, seen):
    scores = jnp.einsum("bqhd,bnhd->bhqn", q, k, preferred_element_type=jnp.float32) / math.sqrt(q.shape[-1])
    return jnp.where(seen[:, None], scores, -jnp.inf)


def _one_chunk(q) -> ChunkTable:
    """All of the video as one."""
    batch, tokens = q.shape[:2]
    zero = jnp.zeros((batch, 1), jnp.int32)
    return ChunkTable(
        kind=zero + VIDEO,
        shot=zero,
        start=zero,
        length=zero + tokens,
        chunk_of=jnp.zeros((batch, tokens), jnp.int32),
        text_tokens=0,
        max_chunk=tokens,
    )


def _read_forward(q, k, v, seen, backend):
    out, lse = _forward(q, k, v, seen, backend)
    return out, (q, k, v, seen, out, lse)


def _read_backward(backend, saved, d_out):
    q, k, v, seen, out, lse = saved
    text, delta = seen.shape[2], delta_of(out, d_out)
    d_q, d_k, d_v = anchor_gradients(
        q, k[:, text:], v[:, text:], d_out, lse, delta, _one_chunk(q), _DENSE, backend=backend
    )
    weights = jnp.exp(_scores(q, k[:, :text], seen) - lse[..., None])  # p = exp(s - lse), as parts.py says
    d_weights = jnp.einsum("bqhd,bnhd->bhqn", d_out, v[:, :text], preferred_element_type=jnp.float32)
    d_scores = (weights * (d_weights - delta[..., None]) / math.sqrt(q.shape[-1])).astype(q.dtype)
    d_q = d_q + jnp.einsum("bhqn,bnhd->bqhd", d_scores, k[:, :text])
    of_captions = (
        jnp.einsum("bhqn,bqhd->bnhd", d_scores, q),
        jnp.einsum("bhqn,bqhd->bnhd", weights.astype(d_out.dtype), d_out),
    )
    d_k, d_v = (jnp.concatenate(pair, axis=1) for pair in zip(of_captions, (d_k, d_v)))
    return d_q, d_k, d_v, None


_read.defvjp(_read_forward, _read_backward)
