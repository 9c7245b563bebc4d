"""How plain XLA walks one scene: the steps (a) to (c) of xla.py, for q [H, Q, D], k and v [H, N + padding, D].

A step folds one block of keys into what a tile's queries own, and adds to the sums of all tiles. rows: [H, T, ...].
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moc_jax.attention.schedule import Schedule, group_by_chunk
from moc_jax.shapes import Array

_MASKED = -1e30  # a score that is none


class Block(NamedTuple):
    """S keys in a row, [H, S, D]; zero where the run has ended. A is 1 where all heads read the same, else H."""

    k: Array
    v: Array
    low: Array  # [A]: the first key
    seen: Array  # [A, S]: inside the run


def sums_of_rows(rows, dim):
    """A forward walk's own: total and values."""
    return jnp.zeros(rows), jnp.zeros((*rows, dim))


def forward_step(rows, block, own, sums):
    """A block's weights into total and values."""
    q, shift = rows
    total, values = own
    p = _weights(q, block.k, shift, largest_exponent(q.dtype))
    # Without the barrier XLA sums p as it was before rounding, for which it has to keep a float32 p.
    seen = jnp.where(block.seen[:, None], lax.optimization_barrier(p), 0)
    total = total + jnp.sum(seen, axis=-1, dtype=jnp.float32)
    return (total, values + _dot("hts,hsd->htd", p, block.v)), sums


def d_q_of_rows(rows, dim):
    """A backward walk's own."""
    return (jnp.zeros((*rows, dim)),)


def backward_step(rows, block, own, sums):
    """A block's weights into dq / scale, which a tile's queries own, and the sums dk / scale and dv."""
    q, lse, delta, d_out = rows
    d_k, d_v = sums
    p = _weights(q, block.k, lse, 0.0)  # final weights are at most 1
    # Rounded before the product with p, not after: so the product can be made before anything is written.
    g = (_dot("htd,hsd->hts", d_out, block.v) - delta[..., None]).astype(p.dtype) * p
    d_q = own[0] + _dot("hts,hsd->htd", g, block.k)
    d_k = _add(d_k, block, _dot("hts,htd->hsd", g, q))
    d_v = _add(d_v, block, _dot("hts,htd->hsd", p, d_out))
    return (d_q,), (d_k, d_v)


def _weights(q, k, shift, most):
    """exp(scores - shift) in q's type [H, T, S]; at most exp(most), also for keys that are not seen."""
    scores = _dot("htd,hsd->hts", q, k) / math.sqrt(q.shape[-1])
    return jnp.exp(jnp.minimum(scores - shift[..., None], most)).astype(q.dtype)


def _dot(spec, a, b):
    precision = "highest" if a.dtype == jnp.float32 else None
    return jnp.einsum(spec, a, b, precision=precision, preferred_element_type=jnp.float32)


def _add(x, block, rows):
    """Adds rows [H, S, D] to x [H, N + padding, D] where the block lies, but for keys that are not seen."""
    rows = jnp.where(block.seen[..., None], rows, 0.0) + _take(x, block.low, rows.shape[1])
    if block.low.shape[0] == 1:
        return lax.dynamic_update_slice_in_dim(x, rows, block.low[0], axis=1)
    return jax.vmap(lambda x, rows, i: lax.dynamic_update_slice_in_dim(x, rows, i, axis=0))(x, rows, block.low)


def _take(x, low, size):
    """`size` rows of each head from its own row `low`."""
    if low.shape[0] == 1:
        return lax.dynamic_slice_in_dim(x, low[0], size, axis=1)
    return jax.vmap(lambda rows, i: lax.dynamic_slice_in_dim(rows, i, size))(x, low)


# ---------------------------------------------------------------------------------------------------- (a) shift


def largest_exponent(dtype):
    """x such that exp(x) and exp(-x) are normal numbers of this type, and sums of exp(x) are of float32."""
    return 9.0 if dtype == jnp.float16 else 60.0


def shift_of(q, walk):
    """c [H, Q] of each query: 0 where no score can be out of exp's reach, else the largest score.

    A query's own bound decides, so that its bits don't depend on which others there are.
    """
    norms, longest = (jnp.sum(jnp.square(x.astype(jnp.float32)), axis=-1) for x in (q, walk.k))
    bound = jnp.sqrt(norms * jnp.max(longest, axis=1, keepdims=True) / q.shape[-1])
    within = bound <= largest_exponent(q.dtype)
    largest = lax.cond(jnp.all(within), lambda: jnp.zeros(q.shape[:2]), lambda: _largest_scores(q, walk))
    return jnp.where(within, 0.0, largest)


def _largest_scores(q, walk):
    """The largest score of each query [H, Q]; 0 for queries that see nothing."""
    (largest,), _ = walk(_largest_step, _largest_of_rows, (q,), (), combine=jnp.maximum)
    return jnp.where(largest > _MASKED, largest, 0.0)


def _largest_of_rows(rows, dim):
    return (jnp.full(rows, _MASKED),)


def _largest_step(rows, block, own, sums):
    scores = _dot("htd,hsd->hts", rows[0], block.k) / math.sqrt(block.k.shape[-1])
    scores = jnp.where(block.seen[:, None], scores, _MASKED)
    return (jnp.maximum(own[0], jnp.max(scores, axis=-1)),), sums


# ---------------------------------------------------------------------------------------------------- walks


class Walk:
    """All that the queries of a scene attend to."""

    def __init__(self, scene, static):
        k, v, self._runs, routes, self._chunk_start, self._chunk_length = scene
        padding = ((0, 0), (0, static.tiling.padding), (0, 0))
        self.k, self.v = jnp.pad(k, padding), jnp.pad(v, padding)
        self._static = static
        self._schedule: Schedule | None = None
        if routes.shape[-1]:
            routes = routes[:, static.first_video :]
            self._schedule = group_by_chunk(routes, self._chunk_start.shape[0], static.tiling.routed_tile)

    def __call__(self, step, start, rows, sums, *, combine=jnp.add):
        """What each query owns in the end, and the sums.

        Args:
            step: See above.
            start: What rows of a shape, for head dimension D, own at first.
            rows: Arrays [H, Q, ...] that `step` reads.
            sums: What all steps add to.
            combine: How a query's anchors and pairs make one.
        """
        if self._static.anchors:
            own, sums = self._over_anchors(step, start, rows, sums)
        else:
            own = start(rows[0].shape[:2], self.k.shape[-1])
        schedule = self._schedule
        if schedule is not None:
            pairs, sums = self._over_pairs(schedule, step, start, rows, sums)
            nothing = start((1, 1), 1)
            own = tuple(_combined(*x, schedule, combine) for x in zip(own, pairs, nothing, strict=True))
        return own, sums

    def _along(self, step, rows, own, sums, begin, end, size):
        """Folds the run [begin, end) of each head into what a tile owns."""

        def one(i, carry):
            low = jnp.minimum(begin + i * size, end)
            seen = low[:, None] + jnp.arange(size)[None] < end[:, None]
            k, v = (jnp.where(seen[..., None], _take(x, low, size), 0) for x in (self.k, self.v))
            return step(rows, Block(k, v, low, seen), *carry)

        steps = jnp.max(jnp.maximum(end - begin + size - 1, 0) // size)
        return lax.fori_loop(0, steps, one, (own, sums))

    # ------------------------------------------------------------------------------------------------ (b) anchors

    def _over_anchors(self, step, start, rows, sums):
        """Tile by tile: as many queries from the first on that none has walked, as share its runs.

        A tile that is not full writes beyond its queries; what it writes there, later tiles overwrite.
        """
        heads, tokens, dim = self.k.shape[0], rows[0].shape[1], self.k.shape[-1]
        text, tiling = self._static.text_tokens, self._static.tiling
        size = tiling.anchor_tile
        rows = [jnp.pad(x, [(0, 0), (0, size)] + [(0, 0)] * (x.ndim - 2)) for x in rows]
        stops = _stops(self._runs)

        def tile(carry):
            first, out, sums = carry
            stop = jnp.minimum(first + size, stops[first])
            mine = jnp.broadcast_to(first + jnp.arange(size)[None] < stop, (heads, size))
            of_tile = [_only(mine, lax.dynamic_slice_in_dim(x, first, size, axis=1)) for x in rows]
            own = start((heads, size), dim)
            runs = self._runs.begin.shape[0]
            for r in range(runs):
                begin, end = self._runs.begin[r, first][None], self._runs.end[r, first][None]
                block = tiling.anchor_block if r == runs - 1 else min(tiling.anchor_block, max(1, text))
                own, sums = self._along(step, of_tile, own, sums, begin, end, block)
            update = functools.partial(lax.dynamic_update_slice_in_dim, start_index=first, axis=1)
            return stop, jax.tree.map(update, out, own), sums

        carry = jnp.int32(0), start((heads, tokens + size), dim), sums
        _, out, sums = lax.while_loop(lambda carry: carry[0] < tokens, tile, carry)
        return tuple(x[:, :tokens] for x in out), sums

    # ------------------------------------------------------------------------------------------------ (c) routed

    def _over_pairs(self, schedule, step, start, rows, sums):
        """Tile by tile of the schedule. What pairs own comes back as [G, H, T, ...]."""
        first, tiling = self._static.first_video, self._static.tiling
        picks, dim = schedule.slot_of_pair.shape[-1], self.k.shape[-1]
        # Values of pairs are rounded like outputs, if that type reaches as far as float32.
        partial = rows[0].dtype if rows[0].dtype == jnp.bfloat16 else jnp.float32

        def tile(sums, args):
            pair, chunk = args  # [H, T], [H]
            query = first + jnp.maximum(pair, 0) // picks
            of_pair = [_only(pair >= 0, _rows(x, query)) for x in rows]
            begin = self._chunk_start[chunk]
            end = begin + jnp.where(jnp.any(pair >= 0, axis=1), self._chunk_length[chunk], 0)
            own = start(pair.shape, dim)
            own, sums = self._along(step, of_pair, own, sums, begin, end, tiling.routed_block)
            return sums, tuple(x.astype(partial) if x.ndim == 3 else x for x in own)

        tiles = (jnp.moveaxis(schedule.pair_of_slot, 1, 0), jnp.moveaxis(schedule.tile_chunk, 1, 0))
        sums, pairs = lax.scan(tile, sums, tiles)
        return pairs, sums


def _combined(own, pairs, nothing, schedule, combine):
    """own [H, N, ...] and each video query's pairs [G, H, T, ...], in the order of its picks."""
    slots = schedule.slot_of_pair  # [H, V, K]
    tiles, heads, size = pairs.shape[:3]
    slot, head = jnp.maximum(slots, 0), jnp.arange(heads)[:, None, None]
    place = (slot // size * heads + head) * size + slot % size
    pairs = pairs.reshape(tiles * heads * size, *pairs.shape[3:])
    text = own.shape[1] - slots.shape[1]
    video = own[:, text:]
    for i in range(slots.shape[-1]):
        part = pairs[place[..., i]].astype(own.dtype)
        used = (slots[..., i] >= 0).reshape(*slots.shape[:2], *[1] * (part.ndim - 2))
        video = combine(video, jnp.where(used, part, nothing.reshape(())))
    return jnp.concatenate([own[:, :text], video], axis=1)


def _stops(runs):
    """For each token, the next one whose runs are others [N]."""
    tokens = runs.begin.shape[1]
    both = jnp.concatenate([runs.begin, runs.end])
    change = jnp.any(both[:, 1:] != both[:, :-1], axis=0)
    after = jnp.where(change, jnp.arange(1, tokens, dtype=jnp.int32), tokens)
    return lax.cummin(jnp.pad(after, (0, 1), constant_values=tokens), reverse=True)


def _only(mine, x):
    """x [H, T, ...], zero where not mine [H, T]: such rows add nothing to the sums."""
    return jnp.where(mine.reshape(*mine.shape, *[1] * (x.ndim - 2)), x, 0)


def _rows(x, index):
    """x [H, N, ...] at each head's own rows [H, T]."""
    return jax.vmap(lambda x, i: x[i])(x, index)
