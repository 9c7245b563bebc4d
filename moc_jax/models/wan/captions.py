"""Cross-attention: the video of each shot reads two captions, the scene's and its own.

As in Wan, a caption is padded to `text_rows` with rows of zeros, which are read as any other row. Their keys and values
are all the same, k_0 and v_0, so n of them count as one whose score is log n higher:

    out = (1 - w) out_text + w v_0        w = sigmoid(q . k_0 / sqrt(D) + log n - lse_text)        (1)

and no padding is multiplied. Where both captions say the same, twice as many equal keys give what Wan's one caption
gives. A caption of no rows is not there, and adds no padding either.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from moc_jax.attention.api import RoutedAttention, SceneAttention
from moc_jax.attention.backends import Backend
from moc_jax.attention.deal import Deal
from moc_jax.attention.parts import anchor_gradients, anchor_part, delta_of
from moc_jax.attention.residuals import named_outputs
from moc_jax.config import MoCConfig
from moc_jax.scene import GLOBAL, TEXT, VIDEO, ChunkTable, SceneLengths, SceneShape, chunks_of_tokens, frame_shot
from moc_jax.shapes import Array, Float, Int, typed
from moc_jax.sharding import RULES, divided

Read = Callable[[Array, Array, Array], Float[Array, "B V H D"]]  # captions, by q of video and k and v of text
_NEVER = -1e30  # a log-sum-exp of no keys; -inf would make NaN of a query with neither text nor padding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Captions:
    """Who reads which of the text's rows."""

    table: ChunkTable  # its keys are rows of text; its video chunks have none, and say which shot a query is of
    query_chunk: Int[Array, "B V"]  # of each video token; -1 for padding
    padding: Int[Array, "B V"]  # rows of zeros that it reads

    def dealt(self, deal: Deal) -> "Captions":
        """Of the tokens as devices have them; what is added is padding."""
        chunk = deal.dealt(self.query_chunk + 1) - 1
        return dataclasses.replace(self, query_chunk=chunk, padding=deal.dealt(self.padding))


@typed
def captions_of(lengths: SceneLengths, shape: SceneShape, rows: int, padded_to: int) -> Captions:
    """Captions one after another in `rows` rows, the last of which belongs to none.

    Args:
        lengths, shape: of the scene, in tokens.
        padded_to: rows that each caption is padded to.
    """
    text, batch = lengths.text_lengths, lengths.shot_frames.shape[0]
    shots = jnp.arange(shape.shots)
    kind = jnp.concatenate([jnp.full(1 + shape.shots, TEXT), jnp.full(shape.shots, VIDEO)])
    shot = jnp.concatenate([jnp.full(1, GLOBAL), shots, shots])
    start = jnp.pad(jnp.cumsum(text, axis=1) - text, ((0, 0), (0, shape.shots)), constant_values=rows)
    length = jnp.pad(text, ((0, 0), (0, shape.shots)))
    table = ChunkTable(
        kind=jnp.broadcast_to(kind[None], (batch, kind.size)),
        shot=jnp.broadcast_to(shot[None], (batch, shot.size)),
        start=start,
        length=length,
        chunk_of=chunks_of_tokens(start, length, rows),
        text_tokens=rows,
        max_chunk=1,
        max_shots=shape.shots,
    )
    of_frame = frame_shot(lengths.shot_frames, shape.frames)  # [B, F]
    missing = jnp.where(text > 0, jnp.maximum(padded_to - text, 0), 0)
    of_shot = missing[:, :1] + missing[:, 1:]
    padding = jnp.where(of_frame >= 0, jnp.take_along_axis(of_shot, jnp.maximum(of_frame, 0), axis=1), 0)
    chunk = jnp.where(of_frame >= 0, 1 + shape.shots + of_frame, -1)
    chunk, padding = (jnp.repeat(x, shape.rows * shape.columns, axis=1) for x in (chunk, padding))
    return Captions(table, chunk, padding)


@typed
def read_captions(
    q: Float[Array, "B V H D"],
    k: Float[Array, "B rows H D"],
    v: Float[Array, "B rows H D"],
    captions: Captions,
    attention: SceneAttention,
) -> Float[Array, "B V H D"]:
    """Equation (1), by the backend of `attention`; 0 where nothing is read. The last row of k and v is of zeros."""
    shots = captions.table.max_shots
    # Of a single shot all captions are its own and the global one; kernels then share its readers out.
    cfg = MoCConfig(top_k=0, self_anchor="none", text_anchor="all" if shots == 1 else "own+global")
    backend = attention.backend if isinstance(attention, RoutedAttention) else "auto"
    out, lse = _text_part(q, k, v, captions.table, captions.query_chunk, cfg, backend)
    score = jnp.einsum("bqhd,bhd->bqh", q, k[:, -1], preferred_element_type=jnp.float32) / math.sqrt(q.shape[-1])
    count = captions.padding[..., None]
    score += jnp.log(jnp.maximum(count, 1).astype(jnp.float32))
    lse = jnp.maximum(jnp.swapaxes(lse, 1, 2), _NEVER)
    share = jnp.where(count > 0, jax.nn.sigmoid(score - lse), 0)[..., None]
    out = out.astype(jnp.float32)
    return (out + share * (v[:, None, -1].astype(jnp.float32) - out)).astype(v.dtype)


def captions_over_mesh(captions: Captions, attention: SceneAttention) -> Read:
    """`read_captions` by each device for its own tokens and heads."""
    mesh = jax.sharding.get_abstract_mesh()

    def read(q, k, v):
        if mesh.empty or mesh.size == 1:
            return read_captions(q, k, v, captions, attention)
        of_tokens, of_rows, of_scenes = (
            divided(RULES.spec("batch", *names), q.shape[0], mesh)
            for names in (("tokens", "heads", "head_dim"), ("table", "heads", "head_dim"), ())
        )
        of_queries = divided(RULES.spec("batch", "tokens"), q.shape[0], mesh)
        over_mesh = jax.shard_map(
            lambda q, k, v, *of: read_captions(q, k, v, Captions(*of), attention),
            in_specs=(of_tokens, of_rows, of_rows, of_scenes, of_queries, of_queries),
            out_specs=of_tokens,
            check_vma=False,
        )
        return over_mesh(q, k, v, captions.table, captions.query_chunk, captions.padding)

    return read


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _text_part(q, k, v, table: ChunkTable, query_chunk, cfg: MoCConfig, backend: str | Backend):
    """(out [B, V, H, D], lse [B, H, V]) over the captions' rows; 0 and -inf where there are none."""
    return anchor_part(q, k, v, table, cfg, query_chunk=query_chunk, backend=backend)


def _text_part_forward(q, k, v, table, query_chunk, cfg, backend):
    out, lse = named_outputs(*_text_part(q, k, v, table, query_chunk, cfg, backend))
    return (out, lse), (q, k, v, table, query_chunk, out, lse)


def _text_part_backward(cfg, backend, saved, gradients):
    q, k, v, table, query_chunk, out, lse = saved
    d_out, d_lse = gradients
    # The score s_ij has the weight p_ij, and d s_ij = p_ij (d_out . v_j - d_out . out + d_lse).
    delta = delta_of(out, d_out) - d_lse
    d_q, d_k, d_v = anchor_gradients(q, k, v, d_out, lse, delta, table, cfg, query_chunk=query_chunk, backend=backend)
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), None, None


_text_part.defvjp(_text_part_forward, _text_part_backward)
