"""Mixture of Contexts on Hopper: anchors and picks by the same kernels, merged by their log-sum-exp.

(a) Anchors. Tiles of queries in memory order walk at most three runs of keys. No copies of q, k or v.
(b) Picks. (query, chunk) pairs are sorted by chunk; their queries are gathered, so that a tile reads one chunk.
(c) Merge. A query gathers its picks' outputs and its anchors' and weighs them by 2^(lse - max).

Backward, with the merged output o and log-sum-exp L, every part's gradients follow from o and L alone
(flash_backward.py); a query sums its pairs' gradients by the same gather. Nothing is scattered, no sum depends on
timing: the same bits on every run. `_forward` and `_gradients` take anchors, picks or both: parts by themselves are
the same code with the other left out.

A query's output and dq are the same bits whatever other queries there are (plan.py). dk and dv are sums over the
queries that are given.

Padding of q, k and v may hold anything finite: blocks that reach into it are masked. Backward, its values and output
gradients become 0 on their way in, which takes a pass over each.

Bytes: pairs' queries and outputs take 2 * Q * K * D * 2 bytes for each head, so heads go in groups that keep a buffer
within 1 GiB. FLOPs: 4 * D per attended pair forward, 10 * D backward.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moc_jax.attention.columns import columns
from moc_jax.attention.layout import ALIGN, LOG2E, Heads, Queries, by_group, head_groups, round_up, sum_other_shares
from moc_jax.attention.pallas_gpu import device, flash, flash_backward, router
from moc_jax.attention.pallas_gpu.device import Hopper
from moc_jax.attention.pallas_gpu.plan import AnchorTiles, PickTiles, anchor_tiles, pick_tiles
from moc_jax.attention.pallas_gpu.tiles import TILE
from moc_jax.attention.residuals import named_outputs, named_routes
from moc_jax.attention.statistics import row_dot
from moc_jax.config import MoCConfig
from moc_jax.scene import ChunkTable
from moc_jax.shapes import Array, Bool, Float, Float32, Int, typed

_PartOf = tuple[Float[Array, "B Q H D"], Float32[Array, "B H Q"]]
_GradientsOf = tuple[Float[Array, "B Q H D"], Float[Array, "B N H D"], Float[Array, "B N H D"]]


# The functions of `backends.Implementation`, which says their shapes. All raise NotImplementedError where the device, a
# type or D is none that the kernels can do.


def means(k, table: ChunkTable, cfg: MoCConfig, backend: Hopper) -> Float32[Array, "B H _ D"]:
    """See backends.py."""
    with jax.named_scope("moc_route"):
        return columns(k, table, cfg)


def select(q, phi, queries: Queries, table: ChunkTable, cfg: MoCConfig, backend: Hopper) -> Int[Array, "B H Q K"]:
    """The best candidates of every query, best first."""
    device.check(backend, q)
    with jax.named_scope("moc_route"):
        return router.select(q, phi, queries, table, cfg, interpret=backend.interpret)


def attend(
    q, k, v, routes, queries: Queries, table: ChunkTable, cfg: MoCConfig, backend: Hopper
) -> Float[Array, "B Q H D"]:
    """Attention over anchors and picks, with its gradients; queries with neither give 0."""
    with jax.named_scope("moc_attention"):
        out = _attend(*_prepared(q, k, v, routes, queries, table, cfg, backend), backend)
    return out[:, : q.shape[1]]


def part(q, k, v, routes, queries: Queries, table: ChunkTable, cfg: MoCConfig, backend: Hopper) -> _PartOf:
    """Output and natural log-sum-exp of the picks alone or, without routes, of the anchors alone."""
    rows = q.shape[1]
    q, k, v, work = _prepared(q, k, v, routes, queries, table, cfg, backend, anchors=routes is None)
    out, lse = _forward(q, k, v, work, backend)
    return out[:, :rows], lse[:, :, :rows] / LOG2E


def part_gradients(
    q, k, v, routes, d_out, lse, delta, queries: Queries, table: ChunkTable, cfg: MoCConfig, backend: Hopper
) -> _GradientsOf:
    """dq, dk and dv of that part, given the final natural log-sum-exp and delta."""
    rows, tokens = q.shape[1], k.shape[1]
    q, k, v, work = _prepared(q, k, v, routes, queries, table, cfg, backend, anchors=routes is None)
    valid, more = work.query_valid, (0, q.shape[1] - rows)
    d_out = jnp.where(valid[..., None, None], jnp.pad(d_out, ((0, 0), more, (0, 0), (0, 0))), 0).astype(q.dtype)
    lse, delta = (
        jnp.where(valid[:, None], jnp.pad(x, ((0, 0), (0, 0), more)), nothing)
        for x, nothing in ((lse * LOG2E, -jnp.inf), (delta, 0.0))
    )
    d_q, d_k, d_v = _gradients(q, k, v, work, d_out, _without_weights(lse), delta, backend)
    return d_q[:, :rows], d_k[:, :tokens], d_v[:, :tokens]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Work:
    """What the kernels walk: anchors, picks or both. Padding is where `valid` is False."""

    anchors: AnchorTiles | None
    picks: PickTiles | None
    query_valid: Bool[Array, "B Q"]
    key_valid: Bool[Array, "B N"]

    def groups(self, heads: int, row_bytes: int, most: int) -> int:
        """Groups of heads whose buffers of sorted rows take at most `most` bytes."""
        if self.picks is None:
            return 1
        batch, _, slots = self.picks.query_of_slot.shape
        return head_groups(heads, batch * slots * row_bytes, most)


def _prepared(q, k, v, routes, queries: Queries, table: ChunkTable, cfg: MoCConfig, backend: Hopper, anchors=True):
    """q, k and v as kernels take them, and what is walked: picks if there are `routes`, and anchors."""
    device.check(backend, q, k, v)
    device.check_order(queries, table)
    # Blocks start at multiples of 8, and text is cut into whole tiles; what is added belongs to no chunk.
    rows = max(round_up(q.shape[1], ALIGN), TILE)
    tokens = max(round_up(k.shape[1], ALIGN), round_up(table.text_tokens, TILE), TILE)

    def more(x, axis, count, value=0):
        return jnp.pad(x, [(0, count - n if i == axis else 0) for i, n in enumerate(x.shape)], constant_values=value)

    queries = dataclasses.replace(queries, chunk_of=more(queries.chunk_of, 1, rows, -1))
    table = dataclasses.replace(table, chunk_of=more(table.chunk_of, 1, tokens, -1))
    with jax.named_scope("moc_plan"):
        work = _Work(
            anchor_tiles(queries, table, cfg, q.shape[2], backend) if anchors else None,
            None if routes is None else pick_tiles(more(routes, 2, rows, -1), table),
            queries.valid,
            table.valid,
        )
    return more(q, 1, rows), more(k, 1, tokens), more(v, 1, tokens), work


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q, k, v, work: _Work, backend: Hopper):
    return _forward(q, k, v, work, backend)[0]


def _attend_forward(q, k, v, work: _Work, backend: Hopper):
    out, lse = named_outputs(*_forward(q, k, v, work, backend))
    return out, (q, k, v, named_routes(work), out, _without_weights(lse))


def _without_weights(lse: Array) -> Array:
    """+inf where there is nothing to attend to: padding may lie among the queries of a run."""
    return jnp.where(jnp.isneginf(lse), jnp.inf, lse)


def _attend_backward(backend: Hopper, residuals, d_out):
    q, k, v, work, out, lse = residuals
    d_out = jnp.where(work.query_valid[..., None, None], d_out, 0).astype(q.dtype)
    delta = jnp.swapaxes(row_dot(d_out, out), 1, 2)  # [B, H, Q]
    # Their sums end here, in q's type: else XLA writes them in float32, where what follows reads them more than once.
    return *lax.optimization_barrier(_gradients(q, k, v, work, d_out, lse, delta, backend)), None


_attend.defvjp(_attend_forward, _attend_backward)


def _forward(q, k, v, work: _Work, backend: Hopper):
    """[B, Q, H, D] -> output, and base-2 log-sum-exp [B, H, Q]."""
    batch, rows, heads, dim = q.shape
    anchors, picks = work.anchors, work.picks
    if anchors is None and picks is None:
        return jnp.zeros(q.shape, v.dtype), jnp.full((batch, heads, rows), -jnp.inf)
    if anchors is not None:
        with jax.named_scope("moc_anchors"):
            of_anchors = flash.forward(q, k, v, anchors.queries, Heads(0, heads).operand, backend, sorted_rows=False)

    def one_group(heads: Heads, whole):
        parts = []
        if anchors is not None:
            out, lse = of_anchors
            parts.append(Part(out, anchors.query_row[..., None], anchors.anchored[..., None], heads.first, lse))
        if picks is not None:
            pairs = take_rows(q, heads.of(picks.query_of_slot), heads)
            tiles = heads.of(picks.queries)
            with jax.named_scope("moc_picks"):
                out, lse = flash.forward(pairs, k, v, tiles, heads.operand, backend, sorted_rows=True)
            parts += [Part(out, slot, slot >= 0, 0, lse) for slot in slots_of_pairs(picks, heads)]
        return tuple(heads.put(*x) for x in zip(whole, merge(parts, heads.count, v.dtype), (2, 1), strict=True))

    start = jnp.empty(q.shape, v.dtype), jnp.empty((batch, heads, rows), jnp.float32)
    return by_group(one_group, start, heads, work.groups(heads, dim * q.dtype.itemsize, backend.tiles.group_bytes))


def _gradients(q, k, v, work: _Work, d_out, lse, delta, backend: Hopper):
    """dq, dk and dv from the final output's gradient, base-2 log-sum-exp and delta.

    For queries without keys and padding the first and last are 0, and the log-sum-exp is +inf.
    """
    heads, dim = q.shape[2:]
    anchors, picks = work.anchors, work.picks
    if anchors is None and picks is None:
        return tuple(jnp.zeros(x.shape, q.dtype) for x in (q, k, v))
    # Blocks of a run may hold padding. Its weights are 0, but what they are multiplied with may be NaN, or v d_out
    # overflow.
    v = jnp.where(work.key_valid[..., None, None], v, 0)
    key_valid = work.key_valid[..., None]
    earlier = jnp.zeros((len(q), 1, 1), jnp.int32) if anchors is None else anchors.earlier
    inputs = flash_backward.Inputs(q, k, v, d_out, lse, delta, earlier, Heads(0, heads).operand, sorted_rows=False)
    inputs = flash_backward.whole_blocks(inputs, backend)
    if anchors is not None:
        with jax.named_scope("moc_anchors"):
            of_anchors = flash_backward.gradients(inputs, anchors.keys, backend)

    def one_group(heads: Heads, whole):
        parts: tuple[list[Part], ...] = [], [], []  # of dq, dk and dv
        if anchors is not None:
            rows = anchors.d_q_row, anchors.key_row, anchors.key_row
            there = anchors.anchored[..., None], key_valid, key_valid
            for found, x, row, mask in zip(parts, of_anchors, rows, there, strict=True):
                found.append(Part(x, row[..., None], mask, heads.first))
        if picks is not None:
            rows = heads.of(picks.query_of_slot)
            of_pairs = inputs._replace(
                q=take_rows(inputs.q, rows, heads),
                d_out=take_rows(inputs.d_out, rows, heads),
                lse=_of_rows(inputs.lse, rows, heads),
                delta=_of_rows(inputs.delta, rows, heads),
                first_head=heads.operand,
                sorted_rows=True,
            )
            with jax.named_scope("moc_picks"):
                d_q, *of_keys = flash_backward.gradients(of_pairs, heads.of(picks.keys), backend)
            parts[0].extend(Part(d_q, slot, slot >= 0, 0) for slot in slots_of_pairs(picks, heads))
            for found, x in zip(parts[1:], of_keys, strict=True):
                found.append(Part(x, picks.key_row[..., None], key_valid, 0))
        d_q, *of_keys = (_sum(found, heads.count) for found in parts)
        d_q *= 1 / math.sqrt(dim)
        if anchors is not None:
            of_keys = [_add_text_shares(x, found[0], anchors, heads) for x, found in zip(of_keys, parts[1:])]
        return tuple(heads.put(x, part.astype(q.dtype), 2) for x, part in zip(whole, (d_q, *of_keys), strict=True))

    start = tuple(jnp.empty(x.shape, q.dtype) for x in (q, k, v))
    return by_group(one_group, start, heads, work.groups(heads, dim * 4, backend.tiles.group_bytes))


# ------------------------------------------------------------------------------------------- gathers and sums


def slots_of_pairs(picks: PickTiles, heads: Heads) -> list[Int[Array, "B Q H"]]:
    """Where the pairs of each query lie; -1: nowhere."""
    slots = lax.dynamic_slice_in_dim(picks.slot_of_pair, heads.first, heads.count, axis=3)
    return [slots[:, i] for i in range(slots.shape[1])]


class Part(NamedTuple):
    """Rows that a kernel wrote, and which of them belongs to each query (or key) of a group of heads."""

    rows: Float[Array, "B _ R D"]
    row: Int[Array, "B N _"]  # may be anything where `there` is False; of all heads, or each its own
    there: Array  # [B, N, 1 or H]
    first_head: Array | int  # of the group, among the heads of `rows`
    lse: Array | None = None  # [B, _, R]

    def places(self, heads: int) -> Int[Array, " N"]:
        """Which of all `rows`, of all scenes and heads, is each query's (or key's) [B * N * H]; -1: none.

        Flat, since XLA gives what has axes an order that suits one of its readers, and the others transpositions.
        """
        batch, held, length = self.rows.shape[:3]
        head = jnp.arange(batch)[:, None, None] * held + self.first_head + jnp.arange(heads)[None, None]
        return jnp.where(self.there, head * length + self.row, -1).reshape(-1)

    def picked(self, places: Int[Array, " N"]) -> Float32[Array, "N D"]:
        """The rows in such places; for -1, anything."""
        return _rows(self.rows, places).astype(jnp.float32)


def _rows(x, index) -> Array:
    """Rows of x [B, H, R, ...], of all scenes and heads, by an index; for -1, the first."""
    return x.reshape(-1, *x.shape[3:]).at[jnp.maximum(index, 0)].get(mode="promise_in_bounds")


@jax.named_scope("moc_gather")
@typed
def take_rows(x: Float[Array, "B Q _ D"], rows: Int[Array, "B H J"], heads: Heads) -> Float[Array, "B H J D"]:
    """Rows [B, H, J] of x [B, N, H, D], each head its own."""
    batch, tokens, held, dim = x.shape
    head = heads.first + jnp.arange(heads.count)[None, :, None]
    index = (jnp.arange(batch)[:, None, None] * tokens + rows) * held + head
    # As pairs of numbers: the same bytes in half as many reads and writes, which XLA's gather does one by one.
    words = lax.bitcast_convert_type(x.reshape(batch * tokens * held, dim // 2, 2), jnp.uint32)
    taken = words.at[index].get(mode="promise_in_bounds")
    return lax.bitcast_convert_type(taken, x.dtype).reshape(*index.shape, dim)


@jax.named_scope("moc_gather")
def _of_rows(x: Float32[Array, "B _ Q"], rows: Int[Array, "B H J"], heads: Heads) -> Float32[Array, "B H J"]:
    """x of the queries `rows`, each head its own."""
    batch, held, queries = x.shape
    head = jnp.arange(batch)[:, None, None] * held + heads.first + jnp.arange(heads.count)[None, :, None]
    return _rows(x, (head * queries + rows).reshape(-1)).reshape(rows.shape)


@jax.named_scope("moc_merge")
def merge(parts: list[Part], heads: int, dtype):
    """One softmax over all parts: output [B, N, heads, D], base-2 log-sum-exp [B, heads, N]; 0 and -inf for none."""
    places = [part.places(heads) for part in parts]
    lses = [jnp.where(i < 0, -jnp.inf, _rows(part.lse, i)) for part, i in zip(parts, places, strict=True)]
    largest = functools.reduce(jnp.maximum, lses)
    base = jnp.where(jnp.isfinite(largest), largest, 0.0)
    weights = [jnp.exp2(lse - base) for lse in lses]
    total = functools.reduce(jnp.add, weights)
    share = 1 / jnp.where(total == 0, 1.0, total)  # a NaN stays one
    shares = []
    for part, place, weight in zip(parts, places, weights, strict=True):
        w = (weight * share)[..., None]
        # Rows of nobody may hold anything, so they are left out and not multiplied by 0.
        shares.append(jnp.where(w != 0, part.picked(place) * w, 0.0))
    lse = base + jnp.log2(total)  # -inf for none
    out, shape = functools.reduce(jnp.add, shares).astype(dtype), (len(parts[0].rows), -1, heads)
    return out.reshape(*shape, out.shape[-1]), lse.reshape(shape).swapaxes(1, 2)


@jax.named_scope("moc_merge")
def _sum(parts: list[Part], heads: int) -> Float[Array, "B N H D"]:
    """The float32 sum of all parts; 0 where there are none."""
    places = [part.places(heads) for part in parts]
    rows = [jnp.where(i[..., None] < 0, 0.0, part.picked(i)) for part, i in zip(parts, places, strict=True)]
    return functools.reduce(jnp.add, rows).reshape(len(parts[0].rows), -1, heads, rows[0].shape[-1])


@jax.named_scope("moc_merge")
def _add_text_shares(total, part: Part, anchors: AnchorTiles, heads: Heads):
    """Adds what the first part of the text's tiles lacks: its other readers."""
    if anchors.text_shares < 2:
        return total
    rows = sum_other_shares(heads.of(part.rows), anchors.text_shares, anchors.text_tiles * TILE).swapaxes(1, 2)
    text = slice(0, anchors.text_tokens)  # what else lies in the last tile is video
    return total.at[:, text].add(jnp.where(part.there[:, text, :, None], rows[:, text], 0.0))
