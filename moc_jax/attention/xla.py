"""Mixture of Contexts in plain XLA: any device, memory linear in tokens, work proportional to the attended pairs.

With s_ij = q_i . k_j / sqrt(D) and any number c_i near the largest score of query i,

    p_ij = exp(s_ij - c_i)      total_i = sum_j p_ij      values_i = sum_j p_ij v_j      out_i = values_i / total_i

so that what a query attends to may be summed up in parts that know nothing of each other.

(a) Shift. Where the norms of queries and keys already bound every score, c = 0: exp can't overflow. Otherwise a walk
    over all scores finds each query's largest.
(b) Anchors. In memory each query's anchors are at most three runs of tokens: text (two runs if it sees only its own
    and the global caption) and one run of video. A tile of neighbouring queries with the same runs walks them.
(c) Routed. (query, chunk) pairs are sorted by chunk (schedule.py), so that a tile of queries reads one chunk. The
    same walk gives each pair its own total and values, which its query then gathers and adds up.

Backward, with the log-sum-exp L in place of c, p_ij is the final weight: each walk adds its own  dv = p^T do,
g = p (do v^T - rowsum(do o)),  dq = g k,  dk = g^T q. Nothing is scattered row by row, and the order of sums is fixed.

What takes the time on a GPU is the scores' way through memory. All keys of a tile's walk are seen by all of its
queries but for the walk's ends, so masks go on blocks of keys and values, not on scores; a step then is matrix
products whose results XLA exponentiates and rounds before they leave the chip.

Bytes, beyond q, k, v and o: forward three passes over p in the inputs' type per attended pair and head, backward eight;
`values` and `total` of every token in float32, N * H * (D + 1) * 4, and of every routed pair (bfloat16 values for
bfloat16 inputs). FLOPs: 4 * D per attended pair forward and 10 * D backward, rounded up to tiles.
"""

import dataclasses
import functools
import math
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moc_jax.attention import routing
from moc_jax.attention.columns import columns
from moc_jax.attention.layout import Queries
from moc_jax.attention.residuals import named_outputs
from moc_jax.attention.runs import Runs, anchor_runs
from moc_jax.attention.statistics import row_dot
from moc_jax.attention.xla_walk import (
    Walk,
    backward_step,
    d_q_of_rows,
    forward_step,
    shift_of,
    sums_of_rows,
)
from moc_jax.config import MoCConfig
from moc_jax.scene import ChunkTable
from moc_jax.shapes import Array, Float, Float32, Int, typed

_LARGE = 8192  # tokens from which a scene is large
_LEAST = 64  # tokens of a chunk whose equal parts make no steps that are too small
_ROUTE_BLOCK = 2048  # queries scored at a time


@dataclasses.dataclass(frozen=True)
class XlaTiling:
    """Sizes of a walk's steps. Small chunks want small blocks: what a block holds beyond its chunk is wasted."""

    anchor_tile: int = 128  # queries that walk their anchors together
    anchor_block: int = 128  # keys per step along an anchor run
    routed_tile: int = 128  # queries that walk a picked chunk together
    routed_block: int = 128  # keys per step along it

    def __post_init__(self):
        if min(dataclasses.astuple(self)) < 1:
            raise ValueError(f"{self}: tiles and blocks must be at least 1")

    @property
    def padding(self) -> int:
        """Zeros behind the keys, so that no block is clamped back into them."""
        return max(self.anchor_block, self.routed_block)


def default_tiling(tokens: int, max_chunk: int, picks: int, cfg: MoCConfig) -> XlaTiling:
    """Small steps for small scenes, large ones for large scenes: on an accelerator a step costs some kernel launches,
    whatever its size. Chunks are walked in equal blocks, and by equal tiles where each has anchors of its own; so are
    shots of small scenes, which are a few whole chunks. A routed tile is at most half of the picks * max_chunk queries
    that pick a chunk on average, since each chunk's last tile is half empty."""
    small = tokens < _LARGE
    tile, block = (128, 128) if small else (2048, 2560)
    by_chunk = cfg.mode == "moc" and (cfg.self_anchor in ("chunk", "window") or (small and max_chunk >= _LEAST))
    reach = max_chunk * (2 * cfg.window + 1 if cfg.self_anchor == "window" else 1)
    return XlaTiling(
        anchor_tile=_equal(max_chunk, tile) if by_chunk else tile,
        anchor_block=_equal(reach, block) if by_chunk else block,
        routed_tile=max([128, *(t for t in (256, 512, 1024, 2048) if t <= min(tile, picks * max_chunk // 2))]),
        routed_block=_equal(max_chunk, block),
    )


def _equal(length, most):
    """The size of equal parts of at most about `most`, in steps of 16."""
    parts = -(-length // most)
    return -(-length // (16 * parts)) * 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Xla:
    """Plain XLA: any device, memory linear in tokens."""

    name: ClassVar[str] = "xla"
    tiling: XlaTiling | None = None
    """None: chosen from the shapes."""


class _Static(NamedTuple):
    text_tokens: int
    first_video: int  # no query before is video
    tiling: XlaTiling
    anchors: bool  # whether they are walked


def means(k: Float[Array, "B N H D"], table: ChunkTable, cfg: MoCConfig, backend: Xla) -> Float32[Array, "B H _ D"]:
    """See backends.py."""
    with jax.named_scope("moc_route"):
        return columns(k, table, cfg)


def select(
    q: Float[Array, "B Q H D"],
    phi: Float32[Array, "B H _ D"],
    queries: Queries,
    table: ChunkTable,
    cfg: MoCConfig,
    backend: Xla,
) -> Int[Array, "B H Q K"]:
    """The best candidates of every query."""
    with jax.named_scope("moc_route"):
        return routing.select(q, phi, queries, table, cfg, block=_ROUTE_BLOCK)


@typed
def attend(
    q: Float[Array, "B Q H D"],
    k: Float[Array, "B N H D"],
    v: Float[Array, "B N H D"],
    routes: Int[Array, "B H Q K"],
    queries: Queries,
    table: ChunkTable,
    cfg: MoCConfig,
    backend: Xla,
) -> Float[Array, "B Q H D"]:
    """Attention over the anchors of `cfg` and the chunks in `routes`; queries with neither give 0."""
    scene, static = _scene(routes, queries, table, cfg, backend)
    with jax.named_scope("moc_attention"):
        out = jnp.swapaxes(_attend((*_by_head(q, k, v, queries, table), *scene), static), 1, 2)
    return jnp.where(queries.valid[..., None, None], out, 0)  # and its gradient


def part(q, k, v, routes, queries: Queries, table: ChunkTable, cfg: MoCConfig, backend: Xla):
    """See backends.py."""
    scene, static = _scene_of_part(q, routes, queries, table, cfg, backend)
    out, lse = _forward((*_by_head(q, k, v, queries, table), *scene), static)
    return jnp.swapaxes(out, 1, 2), lse


def part_gradients(
    q, k, v, routes, d_out, lse, delta, queries: Queries, table: ChunkTable, cfg: MoCConfig, backend: Xla
):
    """See backends.py."""
    scene, static = _scene_of_part(q, routes, queries, table, cfg, backend)
    d_out = jnp.swapaxes(jnp.where(queries.valid[..., None, None], d_out.astype(q.dtype), 0), 1, 2)
    lse, delta = (jnp.where(queries.valid[:, None], x, 0.0) for x in (lse, delta))
    inputs = (*_by_head(q, k, v, queries, table), *scene)
    d_q, d_k, d_v = _backward(inputs, d_out, lse, delta, static)
    return jnp.swapaxes(d_q, 1, 2), jnp.swapaxes(d_k, 1, 2), jnp.swapaxes(d_v, 1, 2)


# ------------------------------------------------------------------------------------------- inputs of the walks


def _by_head(q, k, v, queries: Queries, table: ChunkTable) -> tuple[Array, Array, Array]:
    """[B, H, tokens, D], 0 for padding, which must not decide how large scores may be."""

    def one(x, valid):
        return jnp.swapaxes(jnp.where(valid[..., None, None], x, 0), 1, 2)

    return one(q, queries.valid), one(k, table.valid), one(v, table.valid)


def _scene(
    routes, queries: Queries, table: ChunkTable, cfg: MoCConfig, backend: Xla, *, anchors: bool = True
) -> tuple[tuple[Runs, Array, Array, Array], _Static]:
    """What is attended to, and what of it is static."""
    tokens = table.chunk_of.shape[1]
    tiling = backend.tiling or default_tiling(tokens, table.max_chunk, routes.shape[-1], cfg)
    static = _Static(table.text_tokens, queries.first_video, tiling, anchors)
    return (_runs_of_queries(queries, table, cfg), routes, table.start, table.length), static


def _scene_of_part(q, routes, queries: Queries, table: ChunkTable, cfg: MoCConfig, backend: Xla):
    """`_scene` of the picks alone or, without routes, of the anchors alone."""
    none = jnp.zeros((q.shape[0], q.shape[2], q.shape[1], 0), jnp.int32)
    return _scene(none if routes is None else routes, queries, table, cfg, backend, anchors=routes is None)


def _runs_of_queries(queries: Queries, table: ChunkTable, cfg: MoCConfig) -> Runs:
    """The anchors of each query; those of padding are empty."""
    far, of = table.chunk_of.shape[1], jnp.maximum(queries.chunk_of, 0)[:, None]
    runs = anchor_runs(table, cfg)
    begin, end = (jnp.take_along_axis(x, jnp.broadcast_to(of, (*x.shape[:2], of.shape[2])), axis=2) for x in runs)
    return Runs(jnp.where(queries.valid[:, None], begin, far), jnp.where(queries.valid[:, None], end, 0))


# ------------------------------------------------------------------------------------------- forward and backward


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _attend(inputs, static):
    return _forward(inputs, static)[0]


def _forward(inputs, static):
    """q, k, v [B, H, tokens, D] and their scenes -> output, log-sum-exp.

    One scene at a time, so that walks are as long as its own.
    """

    def one(args):
        q, *scene = args
        walk = Walk(scene, static)
        shift = shift_of(q, walk)
        (total, values), _ = walk(forward_step, sums_of_rows, (q, shift), ())
        out = values / jnp.where(total == 0, 1.0, total)[..., None]
        return out.astype(q.dtype), shift + jnp.log(total)

    return lax.map(one, inputs)


def _attend_forward(inputs, static):
    out, lse = named_outputs(*_forward(inputs, static))
    return out, (inputs, out, lse)


def _attend_backward(static, residuals, d_out):
    inputs, out, lse = residuals
    delta = row_dot(out, d_out)
    return ((*_backward(inputs, d_out, lse, delta, static), None, None, None, None),)


def _backward(inputs, d_out, lse, delta, static):
    """dq, dk, dv of what is walked, given the final log-sum-exp and delta."""
    lse = jnp.where(jnp.isneginf(lse), 0.0, lse)  # of queries that see nothing, whose rows no key meets

    def one(args):
        q, *scene, d_out, lse, delta = args
        walk, scale = Walk(scene, static), 1 / math.sqrt(q.shape[-1])
        sums = tuple(jnp.zeros(x.shape, jnp.float32) for x in (walk.k, walk.v))
        (d_q,), (d_k, d_v) = walk(backward_step, d_q_of_rows, (q, lse, delta, d_out), sums)
        d_k, d_v = (x[:, : scene[0].shape[1]] for x in (d_k, d_v))
        return (d_q * scale).astype(q.dtype), (d_k * scale).astype(walk.k.dtype), d_v.astype(walk.v.dtype)

    return lax.map(one, (*inputs, d_out, lse, delta))


_attend.defvjp(_attend_forward, _attend_backward)
