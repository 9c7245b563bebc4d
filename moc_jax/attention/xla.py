"""Mixture of Contexts in plain XLA: any device, memory linear in tokens, work proportional to the attended pairs.

(a) Anchors. In memory each query's anchors are at most three runs of tokens: text (two runs if it sees only its own
    and the global caption) and one run of video. Queries go in tiles; a tile walks the blocks of keys that its runs
    cover and folds them into one online softmax.
(b) Routed. (query, chunk) pairs are sorted by chunk (schedule.py), so that a tile of queries reads one chunk. The
    same walk gives each pair its own output and log-sum-exp.
(c) Merge. A query gathers its pairs and its anchor part and weighs them by exp(lse - max): one softmax over all.

Backward, with the merged output o and log-sum-exp L, needs neither the parts nor the merge: p_ij = exp(s_ij - L_i) is
already the final weight, so each walk adds its own  dv = p^T do,  ds = p (do v^T - rowsum(do o)),  dq = ds k,
dk = ds^T q. Nothing is scattered row by row: pairs return to their query by a gather, in a fixed order.

Bytes, beyond q, k, v and o: one float32 output per routed pair, N * K * H * D * 4. FLOPs: 4 * D per attended pair
forward and 10 * D backward, rounded up to tiles.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moc_jax.attention.runs import Runs, anchor_runs
from moc_jax.attention.schedule import group_by_chunk
from moc_jax.config import MoCConfig
from moc_jax.scene import ChunkTable
from moc_jax.shapes import Array, Float, Int, typed

_LARGE = 8192  # tokens from which a scene is large
_MASKED = -1e30  # finite, so that a row with nothing to see yields zeros and not NaN


@dataclasses.dataclass(frozen=True)
class Tiling:
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


def default_tiling(tokens: int, max_chunk: int, slots: int) -> Tiling:
    """Small steps for small scenes, large ones for large scenes: on an accelerator a step costs some kernel launches,
    whatever its size. A chunk is walked in equal blocks, and a routed tile is at most half of the slots * max_chunk
    queries that pick a chunk on average, since each chunk's last tile is half empty."""
    size = 128 if tokens < _LARGE else 1024
    steps = -(-max_chunk // size)
    return Tiling(
        anchor_tile=size,
        anchor_block=size,
        routed_tile=max([128, *(t for t in (256, 512, 1024) if t <= min(size, slots * max_chunk // 2))]),
        routed_block=-(-max_chunk // (16 * steps)) * 16,
    )


class _Static(NamedTuple):
    text_tokens: int
    tiling: Tiling


@typed
def attend(
    q: Float[Array, "B N H D"],
    k: Float[Array, "B N H D"],
    v: Float[Array, "B N H D"],
    routes: Int[Array, "B H N K"],
    table: ChunkTable,
    cfg: MoCConfig,
) -> Float[Array, "B N H D"]:
    """Attention over the anchors of `cfg` and the chunks in `routes`; queries with neither give 0."""
    runs = _runs_of_tokens(table, cfg)
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    with jax.named_scope("moc_attention"):
        static = _Static(table.text_tokens, default_tiling(q.shape[2], table.max_chunk, routes.shape[-1]))
        out = _attend(q, k, v, runs, routes, table.start, table.length, static)
    return jnp.swapaxes(out, 1, 2)


def _runs_of_tokens(table: ChunkTable, cfg: MoCConfig) -> Runs:
    far, of = table.chunk_of.shape[1], jnp.maximum(table.chunk_of, 0)[:, None]
    runs = anchor_runs(table, cfg)
    begin, end = (jnp.take_along_axis(x, jnp.broadcast_to(of, (*x.shape[:2], far)), axis=2) for x in runs)
    return Runs(jnp.where(table.valid[:, None], begin, far), jnp.where(table.valid[:, None], end, 0))


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
def _attend(q, k, v, runs, routes, chunk_start, chunk_length, static):
    return _forward(q, k, v, runs, routes, chunk_start, chunk_length, static)[0]


def _forward(q, k, v, runs, routes, chunk_start, chunk_length, static):
    """[B, H, N, D] -> output, log-sum-exp [B, H, N]; one scene at a time, so that walks are as long as its own."""
    text, tiling = static

    def one(args):
        q, k, v, runs, routes, start, length = args
        k, v = _padded(k, tiling), _padded(v, tiling)
        out, lse = _anchors_forward(q, k, v, runs, tiling)
        if routes.shape[-1]:
            schedule = group_by_chunk(routes[:, text:], start.shape[0], tiling.routed_tile)
            parts = _routed_forward(q, k, v, schedule, start, length, static)
            out, lse = _merge(out, lse, *parts, schedule, text)
        return out.astype(v.dtype), lse

    return lax.map(one, (q, k, v, runs, routes, chunk_start, chunk_length))


def _attend_forward(q, k, v, runs, routes, chunk_start, chunk_length, static):
    out, lse = _forward(q, k, v, runs, routes, chunk_start, chunk_length, static)
    return out, (q, k, v, runs, routes, chunk_start, chunk_length, out, lse)


def _attend_backward(static, residuals, d_out):
    text, tiling = static

    def one(args):
        q, k, v, runs, routes, start, length, out, lse, d_out = args
        tokens = q.shape[1]
        delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)  # [H, N]
        rows = q, lse, delta, d_out
        k_padded, v_padded = _padded(k, tiling), _padded(v, tiling)
        sums = _Gradients(jnp.zeros(k_padded.shape, jnp.float32), jnp.zeros(v_padded.shape, jnp.float32))
        d_q, sums = _anchors_backward(rows, k_padded, v_padded, runs, sums, tiling)
        if routes.shape[-1]:
            schedule = group_by_chunk(routes[:, text:], start.shape[0], tiling.routed_tile)
            d_pairs, sums = _routed_backward(rows, k_padded, v_padded, schedule, start, length, sums, static)
            d_q = d_q.at[:, text:].add(_sum_pairs(d_pairs, schedule))
        return d_q.astype(q.dtype), sums.d_k[:, :tokens].astype(k.dtype), sums.d_v[:, :tokens].astype(v.dtype)

    d_q, d_k, d_v = lax.map(one, (*residuals, d_out))
    return d_q, d_k, d_v, None, None, None, None


_attend.defvjp(_attend_forward, _attend_backward)


# ---------------------------------------------------------------------------------------------------- the walk
# From here on one scene: q [H, N, D], k and v [H, N + padding, D]. A walk's runs are [H, T], or [1, T] where all heads
# share them.


class _Gradients(NamedTuple):
    d_k: Array  # [H, N + padding, D] float32
    d_v: Array


def _padded(x, tiling):
    return jnp.pad(x, ((0, 0), (0, tiling.padding), (0, 0)))


def _dot(spec, a, b):
    precision = "highest" if a.dtype == jnp.float32 else None
    return jnp.einsum(spec, a, b, precision=precision, preferred_element_type=jnp.float32)


def _reach(begin, end, tokens, block):
    """Where the rows' runs begin, and over how many blocks they reach (the most of all heads)."""
    some = begin < end
    low = jnp.min(jnp.where(some, begin, tokens), axis=-1)
    high = jnp.max(jnp.where(some, end, 0), axis=-1)
    return low, jnp.max(jnp.maximum(high - low + block - 1, 0) // block)


def _take(x, low, block):
    """`block` rows of each head from its own row `low`."""
    if low.shape[0] == 1:
        return lax.dynamic_slice_in_dim(x, low[0], block, axis=1)
    return jax.vmap(lambda rows, i: lax.dynamic_slice_in_dim(rows, i, block))(x, low)


def _add(x, low, rows):
    """The inverse of `_take`: adds rows [H, block, D] in place."""
    rows = rows + _take(x, low, rows.shape[1])
    if low.shape[0] == 1:
        return lax.dynamic_update_slice_in_dim(x, rows, low[0], axis=1)
    return jax.vmap(lambda x, rows, i: lax.dynamic_update_slice_in_dim(x, rows, i, axis=0))(x, rows, low)


def _scores(q, k_block, begin, end, low):
    """Scaled scores of a tile against one block of keys, and where the rows' runs allow them."""
    column = low[:, None, None] + jnp.arange(k_block.shape[1])[None, None]
    seen = (column >= begin[..., None]) & (column < end[..., None])
    scores = _dot("htd,hsd->hts", q, k_block) / math.sqrt(q.shape[-1])
    return scores, jnp.broadcast_to(seen, scores.shape)


def _walk_forward(q, k, v, begin, end, carry, tokens, block):
    """Folds the keys of each row's run [begin, end) into the carry: (maximum, sum, weighted values)."""
    first, steps = _reach(begin, end, tokens, block)

    def step(i, carry):
        largest, total, values = carry
        low = jnp.minimum(first + i * block, tokens)
        s, seen = _scores(q, _take(k, low, block), begin, end, low)
        s = jnp.where(seen, s, _MASKED)
        new = jnp.maximum(largest, jnp.max(s, axis=-1))
        # The mask goes on p too: a row that sees nothing yet has new = _MASKED, and exp(0) would count.
        p = jnp.where(seen, jnp.exp(s - new[..., None]), 0.0)
        shrink = jnp.exp(largest - new)
        total = total * shrink + jnp.sum(p, axis=-1)
        values = values * shrink[..., None] + _dot("hts,hsd->htd", p.astype(v.dtype), _take(v, low, block))
        return new, total, values

    return lax.fori_loop(0, steps, step, carry)


def _start(q):
    rows = q.shape[:2]
    return jnp.full(rows, _MASKED), jnp.zeros(rows), jnp.zeros(q.shape, jnp.float32)


def _finish(carry):
    largest, total, values = carry
    empty = total == 0
    out = values / jnp.where(empty, 1.0, total)[..., None]
    return out, jnp.where(empty, -jnp.inf, largest + jnp.log(jnp.where(empty, 1.0, total)))


def _walk_backward(rows, k, v, begin, end, d_q, sums, tokens, block):
    """Adds one walk's share to d_q [H, T, D] and to the keys' and values' gradients."""
    q, lse, delta, d_out = rows
    first, steps = _reach(begin, end, tokens, block)
    scale = 1 / math.sqrt(q.shape[-1])
    lse = jnp.where(jnp.isfinite(lse), lse, 0.0)

    def step(i, carry):
        d_q, sums = carry
        low = jnp.minimum(first + i * block, tokens)
        k_block, v_block = _take(k, low, block), _take(v, low, block)
        s, seen = _scores(q, k_block, begin, end, low)
        p = jnp.where(seen, jnp.exp(jnp.where(seen, s, 0.0) - lse[..., None]), 0.0)
        d_p = _dot("htd,hsd->hts", d_out, v_block)
        d_s = (p * (d_p - delta[..., None]) * scale).astype(q.dtype)
        d_q = d_q + _dot("hts,hsd->htd", d_s, k_block)
        d_k = _add(sums.d_k, low, _dot("hts,htd->hsd", d_s, q))
        d_v = _add(sums.d_v, low, _dot("hts,htd->hsd", p.astype(d_out.dtype), d_out))
        return d_q, _Gradients(d_k, d_v)

    return lax.fori_loop(0, steps, step, (d_q, sums))


# ---------------------------------------------------------------------------------------------------- (a) anchors


def _tiles(x, tile):
    """[A, N, ...] -> [G, A, T, ...]: cuts the second axis into tiles and brings them to the front."""
    x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % tile)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(x.shape[0], -1, tile, *x.shape[2:]), 1, 0)


def _untile(x, tokens):
    """[G, H, T, ...] -> [H, N, ...]"""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :tokens]


def _anchors_forward(q, k, v, runs, tiling):
    tokens = q.shape[1]

    def tile(args):
        q, begin, end = args
        carry = _start(q)
        for r in range(begin.shape[0]):
            carry = _walk_forward(q, k, v, begin[r][None], end[r][None], carry, tokens, tiling.anchor_block)
        return _finish(carry)

    out, lse = lax.map(tile, tuple(_tiles(x, tiling.anchor_tile) for x in (q, *runs)))
    return _untile(out, tokens), _untile(lse, tokens)


def _anchors_backward(rows, k, v, runs, sums, tiling):
    tokens = rows[0].shape[1]

    def tile(sums, args):
        begin, end, *rows = args
        d_q = jnp.zeros(rows[0].shape, jnp.float32)
        for r in range(begin.shape[0]):
            run = begin[r][None], end[r][None]
            d_q, sums = _walk_backward(rows, k, v, *run, d_q, sums, tokens, tiling.anchor_block)
        return sums, d_q

    sums, d_q = lax.scan(tile, sums, tuple(_tiles(x, tiling.anchor_tile) for x in (*runs, *rows)))
    return _untile(d_q, tokens), sums


# ---------------------------------------------------------------------------------------------------- (b) routed


def _pair_rows(schedule, start, length, tokens, text_tokens):
    """For each slot: its query's token, and the run of keys it reads (empty for unused slots)."""
    used = schedule.pair_of_slot >= 0
    query = text_tokens + jnp.maximum(schedule.pair_of_slot, 0) // schedule.slot_of_pair.shape[-1]
    begin = jnp.where(used, start[schedule.tile_chunk][..., None], tokens)
    end = jnp.where(used, (start + length)[schedule.tile_chunk][..., None], 0)
    return tuple(jnp.moveaxis(x, 1, 0) for x in (query, begin, end))  # each [G, H, T]


def _rows(x, index):
    """x [H, N, ...] at each head's own rows [H, T]."""
    return jax.vmap(lambda x, i: x[i])(x, index)


def _routed_forward(q, k, v, schedule, start, length, static):
    tokens, block = q.shape[1], static.tiling.routed_block

    def tile(args):
        query, begin, end = args
        rows = _rows(q, query)
        return _finish(_walk_forward(rows, k, v, begin, end, _start(rows), tokens, block))

    out, lse = lax.map(tile, _pair_rows(schedule, start, length, tokens, static.text_tokens))
    return _flat(out), _flat(lse)


def _routed_backward(rows, k, v, schedule, start, length, sums, static):
    tokens, block = rows[0].shape[1], static.tiling.routed_block

    def tile(sums, args):
        query, begin, end = args
        of_pair = [_rows(x, query) for x in rows]
        d_q = jnp.zeros(of_pair[0].shape, jnp.float32)
        d_q, sums = _walk_backward(of_pair, k, v, begin, end, d_q, sums, tokens, block)
        return sums, d_q

    sums, d_q = lax.scan(tile, sums, _pair_rows(schedule, start, length, tokens, static.text_tokens))
    return _flat(d_q), sums


def _flat(x):
    """[G, H, T, ...] -> [H, G * T, ...]: by slot."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


# ---------------------------------------------------------------------------------------------------- (c) merge


def _merge(out, lse, pair_out, pair_lse, schedule, text_tokens):
    """Weighs the anchor part and the pairs of each video query by their share of the one softmax."""
    slots = schedule.slot_of_pair  # [H, V, K]
    used = slots >= 0
    pair_lse = jnp.where(used, _rows(pair_lse, jnp.maximum(slots, 0)), -jnp.inf)
    video_lse = lse[:, text_tokens:]
    largest = jnp.maximum(video_lse, jnp.max(pair_lse, axis=-1))
    base = jnp.where(jnp.isfinite(largest), largest, 0.0)
    anchor_weight = jnp.exp(video_lse - base)
    weights = jnp.exp(pair_lse - base[..., None])
    total = anchor_weight + jnp.sum(weights, axis=-1)
    share = 1 / jnp.where(total > 0, total, 1.0)
    merged = out[:, text_tokens:] * (anchor_weight * share)[..., None]
    for i in range(slots.shape[-1]):
        part = _rows(pair_out, jnp.maximum(slots[..., i], 0))
        merged = merged + part * (weights[..., i] * share)[..., None]
    merged_lse = jnp.where(total > 0, base + jnp.log(jnp.where(total > 0, total, 1.0)), -jnp.inf)
    return (
        jnp.concatenate([out[:, :text_tokens], merged], axis=1),
        jnp.concatenate([lse[:, :text_tokens], merged_lse], axis=1),
    )


def _sum_pairs(d_q, schedule):
    """Each query's sum over its pairs, in the order of its slots."""
    slots = schedule.slot_of_pair
    total = jnp.zeros((*slots.shape[:2], d_q.shape[-1]), jnp.float32)
    for i in range(slots.shape[-1]):
        part = _rows(d_q, jnp.maximum(slots[..., i], 0))
        total = total + jnp.where((slots[..., i] >= 0)[..., None], part, 0.0)
    return total
