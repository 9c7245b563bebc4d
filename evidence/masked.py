"""Attention of small scenes: every pair of tokens is scored, and a mask leaves what an arm reads.

In a scene of some hundred tokens, sorting pairs by chunk takes longer than the pairs themselves. All arms are attended
to in this one way there, by cuDNN's kernels where they can, so that an update of each takes nearly as long.
"""

import functools
import logging
from typing import Literal

import jax
import jax.numpy as jnp

from moc_jax.attention.api import SceneAttention, route
from moc_jax.attention.routing import anchor_chunks
from moc_jax.config import MoCConfig
from moc_jax.scene import GLOBAL, TEXT, VIDEO, ChunkTable
from moc_jax.shapes import Array, Bool, Float, Int

MOST = 1024
"""Tokens of a scene up to which this is the way, unless another is named."""
_log = logging.getLogger(__name__)


def masked_attention(*, every_chunk: bool = False, captions_apart: bool = False) -> SceneAttention:
    """By the routes that the library gives, or as if every chunk was picked, later ones too; where captions are apart,
    they read themselves and the global one alone."""

    def attend(q, k, v, table, cfg, *, key=None):
        if every_chunk:
            routes = jnp.zeros((q.shape[0], q.shape[2], q.shape[1], 0), jnp.int32)
        else:
            routes = route(q, k, table, cfg, key=key)
        seen = context(routes, table, cfg, every_chunk=every_chunk, captions_apart=captions_apart)
        # Padding reads all: under a mask of nothing, cuDNN's softmax is one of -inf, and NaN.
        out = _attended(q, k, v, seen | ~table.valid[:, None, :, None])
        return jnp.where(table.valid[..., None, None], out, 0), routes

    return attend


def context(
    routes: Int[Array, "B H N K"], table: ChunkTable, cfg: MoCConfig, *, every_chunk: bool, captions_apart: bool
) -> Bool[Array, "B _ N N"]:
    """Which keys each query reads; of one head if all read the same."""
    read = anchor_chunks(table, cfg)
    video, text = table.kind == VIDEO, table.kind == TEXT
    if every_chunk:
        read |= video[:, :, None] & video[:, None]
    if captions_apart:
        own = table.shot[:, :, None] == table.shot[:, None]
        read &= ~text[:, :, None] | (text[:, None] & (own | (table.shot == GLOBAL)[:, None]))
    # By products: a gather of so many takes longer. Picks are compared instead, which is one pass with what follows.
    chunk = jnp.arange(table.kind.shape[1])
    member = (table.chunk_of[..., None] == chunk[None, None]).astype(jnp.bfloat16)  # [B, N, C]
    of_queries = jnp.einsum("bqc,bcd->bqd", member, read.astype(jnp.bfloat16))
    seen = (jnp.einsum("bqc,bnc->bqn", of_queries, member) > 0)[:, None]
    of_keys = jnp.where(table.valid, table.chunk_of, chunk.size)[:, None, None]  # padding is of no chunk
    for pick in range(routes.shape[-1]):
        seen |= routes[..., pick, None] == of_keys
    return seen


def _attended(q: Float[Array, "B N H D"], k: Array, v: Array, seen: Bool[Array, "B _ N N"]) -> Float[Array, "B N H D"]:
    way, unit = _way(q.shape[1:], seen.shape[1], q.dtype)
    more = -q.shape[1] % unit
    q, k, v = (jnp.pad(x, ((0, 0), (0, more), (0, 0), (0, 0))) for x in (q, k, v))
    seen = jnp.pad(seen, ((0, 0), (0, 0), (0, 0), (0, more)))
    seen = jnp.pad(seen, ((0, 0), (0, 0), (0, more), (0, 0)), constant_values=True)
    out = jax.nn.dot_product_attention(q, k, v, mask=seen, implementation=way)
    return out[:, : out.shape[1] - more]


@functools.cache
def _way(shape: tuple[int, int, int], of_heads: int, dtype: jnp.dtype) -> tuple[Literal["cudnn", "xla"], int]:
    """What computes, and what it wants the number of tokens to be a multiple of."""
    if jax.default_backend() != "gpu" or dtype not in (jnp.bfloat16, jnp.float16):
        return "xla", 1

    def gradients(q, k, v, seen):
        return jax.grad(lambda *qkv: attend(*qkv, mask=seen).astype(jnp.float32).sum(), argnums=(0, 1, 2))(q, k, v)

    attend = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
    for unit in (8, 64):
        tokens = -(-shape[0] // unit) * unit
        x = jax.ShapeDtypeStruct((2, tokens, *shape[1:]), dtype)
        try:
            jax.jit(gradients).lower(x, x, x, jax.ShapeDtypeStruct((2, of_heads, tokens, tokens), bool)).compile()
        except Exception as error:  # whatever it is that cuDNN cannot do: XLA can
            _log.warning("cuDNN does not attend to %d tokens under a mask: %s", tokens, str(error)[:300])
        else:
            return "cudnn", unit
    return "xla", 1
