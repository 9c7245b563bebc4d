"""Mixture of Contexts on TPU: anchors and picks by the same kernels, merged by their log-sum-exp.

(a) Order. Queries are laid out segment after segment, each from a whole tile on; keys and values go head-major.
(b) Anchors. Tiles of queries walk at most three runs of keys.
(c) Picks. (query, chunk) pairs are sorted by chunk; their queries are gathered, so that a tile reads one chunk.
(d) Merge. A query gathers its picks' outputs and weighs them and its anchors' by 2^(lse - max).

Backward, with the merged output o and log-sum-exp L, every part's gradients follow from o and L alone
(flash_backward.py); a query sums its pairs' gradients by the same gather. Nothing is scattered, no sum depends on
timing: the same bits on every run.

Bytes: pairs' queries and outputs take 2 * N * K * D * 2 bytes for each head, so heads go in groups that keep a buffer
within 1 GiB. FLOPs: 4 * D per attended pair forward, 10 * D backward.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moc_jax.attention.pallas_tpu import device, flash, flash_backward, tuning
from moc_jax.attention.pallas_tpu.plan import Order, Plan, cut_chunks, pick_tiles, plan, reader_tiles
from moc_jax.attention.pallas_tpu.tuning import Blocks
from moc_jax.attention.schedule import Schedule, group_by_chunk, tile_capacity
from moc_jax.config import MoCConfig
from moc_jax.scene import ChunkTable
from moc_jax.shapes import Array, Float, Int, typed

_BUFFER = 2**30  # bytes of one buffer of sorted rows


class _Static(NamedTuple):
    blocks: Blocks
    groups: int  # of heads
    longest_chunk: int
    interpret: Any


@typed
def attend(
    q: Float[Array, "B N H D"],
    k: Float[Array, "B N H D"],
    v: Float[Array, "B N H D"],
    routes: Int[Array, "B H N K"],
    table: ChunkTable,
    cfg: MoCConfig,
) -> Float[Array, "B N H D"]:
    """Attention over the anchors of `cfg` and the chunks in `routes`; queries with neither give 0.

    Raises:
        NotImplementedError: the device, the type or D is none that the kernels can do.
    """
    device.check(q, k, v)
    batch, _, heads, dim = q.shape
    blocks = tuning.blocks(cfg, table, dim, q.dtype)
    with jax.named_scope("moc_attention"):
        plan_ = plan(table, cfg, blocks)
        schedule = _sort_picks(routes, plan_.order, table, blocks)
        if schedule is None and not plan_.anchors:
            return jnp.zeros(q.shape, v.dtype)
        slots = 0 if schedule is None else schedule.pair_of_slot.shape[2] * blocks.picks.queries
        groups = _head_groups(heads, batch * slots * dim * q.dtype.itemsize)
        static = _Static(blocks, groups, table.max_chunk, device.interpreter())
        return _attend(q, k, v, plan_, schedule, table, static)


def _head_groups(heads: int, bytes_per_head: int) -> int:
    """The fewest equal groups of heads whose sorted rows fit the buffer; one head each if none do."""
    return next((g for g in range(1, heads) if heads % g == 0 and heads // g * bytes_per_head <= _BUFFER), heads)


def _sort_picks(routes, order: Order, table: ChunkTable, blocks: Blocks) -> Schedule | None:
    """The picks' pairs of each scene sorted by chunk (arrays [B, H, ...]), queries in their order; None if there are
    no slots."""
    if routes.shape[-1] == 0:
        return None
    # An empty chunk is as good as none: its tile would have no keys.
    length = jnp.take_along_axis(table.length[:, None, None], jnp.maximum(routes, 0), axis=3)
    routes = _to_order(jnp.swapaxes(jnp.where(length > 0, routes, -1), 1, 2), order, -1)
    pairs = table.chunk_of.shape[1] * routes.shape[-1]
    sort = functools.partial(
        group_by_chunk, chunks=table.kind.shape[1], tile=blocks.picks.queries, most_pairs=pairs
    )
    if routes.shape[0] == 1:
        return jax.tree.map(lambda x: x[None], sort(routes[0]))
    return jax.vmap(sort)(routes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attend(q, k, v, plan: Plan, schedule: Schedule | None, table, static):
    return _forward(q, k, v, plan, schedule, table, static)[0]


def _forward(q, k, v, plan: Plan, schedule, table, static: _Static):
    """Arrays [B, N, H, D] -> output, and what the gradients need of it in the queries' order: output, log-sum-exp."""
    queries, keys, values = _to_order(q, plan.order, 0), _head_major(k, static), _head_major(v, static)
    anchors = _anchors(queries, keys, values, plan, static) if plan.anchors else None

    def one_group(heads):
        parts = []
        if anchors is not None:
            rows, lse = (_of(heads, x) for x in anchors)
            parts.append((rows, None, jnp.where(plan.anchored[:, None], lse, -jnp.inf)))
        if schedule is not None:
            out, lse = flash.forward(
                take_rows(queries, rows_of_slots(schedule, heads), heads),
                keys,
                values,
                _of(heads, pick_tiles(schedule, table)),
                heads.operand,
                longest_run=static.longest_chunk,
                tiling=static.blocks.picks,
                interpret=static.interpret,
            )
            for slot in slots_of_pairs(schedule, heads):
                slot_lse = jnp.where(slot >= 0, take_at(lse, slot), -jnp.inf)
                parts.append((out, slot, slot_lse))
        return merge(parts, v.dtype)

    shape = queries.shape
    like = jax.ShapeDtypeStruct(shape, v.dtype), jax.ShapeDtypeStruct(shape[:3], jnp.float32)
    out, lse = _by_group(one_group, like, (1, 1), q.shape[2], static.groups)
    return _from_order(out, plan.order, table), out, lse


def _anchors(queries, keys, values, plan: Plan, static: _Static):
    """Output and log-sum-exp of the anchors [B, H, R, D] and [B, H, R]; rows without anchors hold anything."""
    blocks = static.blocks
    run = functools.partial(flash.forward, queries, keys, values, interpret=static.interpret)
    first_head = jnp.zeros(1, jnp.int32)
    video = run(plan.video, first_head, first_tile=plan.order.text_rows // blocks.queries, tiling=blocks.anchors)
    if plan.order.text_rows == 0:
        return video
    text = run(plan.text, first_head, tiling=blocks.text)
    return tuple(jnp.concatenate(pair, axis=2) for pair in zip(text, video, strict=True))


def _attend_forward(q, k, v, plan, schedule, table, static):
    result, out, lse = _forward(q, k, v, plan, schedule, table, static)
    return result, (q, k, v, plan, schedule, table, out, lse)


def _attend_backward(static: _Static, residuals, d_result):
    q, k, v, plan, schedule, table, out, lse = residuals
    blocks = static.blocks
    queries, keys, values = _to_order(q, plan.order, 0), _head_major(k, static), _head_major(v, static)
    d_out = _to_order(d_result.astype(q.dtype), plan.order, 0)
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)  # [B, H, R]
    lse = jnp.where(jnp.isneginf(lse), jnp.inf, lse)  # rows with nothing to attend to, and without a token
    inputs = queries, keys, values, d_out, lse, delta
    gradients = functools.partial(flash_backward.gradients, interpret=static.interpret)
    if plan.anchors:
        anchors = gradients(
            *inputs,
            plan.keys,
            jnp.zeros(1, jnp.int32),
            rows=blocks.gradient_keys,
            tiling=blocks.anchor_gradients,
            accumulate=True,
        )

    def one_group(heads):
        d_q, d_k, d_v = [], [], []
        if plan.anchors:
            of_queries, of_keys, of_values = (_of(heads, x) for x in anchors)
            d_q.append(of_queries.astype(jnp.float32))
            for parts, rows in ((d_k, of_keys), (d_v, of_values)):
                parts.append(_key_rows(rows, plan.key_row, table))
                parts += _other_text_parts(rows, plan, table, blocks)
        if schedule is not None:
            rows = rows_of_slots(schedule, heads)
            empty = _of(heads, schedule.pair_of_slot).reshape(rows.shape) < 0
            cut = cut_chunks(table, blocks.pick_gradient_keys)
            of_pairs, of_keys, of_values = gradients(
                take_rows(queries, rows, heads),
                keys,
                values,
                take_rows(d_out, rows, heads),
                jnp.where(empty, jnp.inf, take_at(_of(heads, lse), rows)),
                take_at(_of(heads, delta), rows),
                reader_tiles(_of(heads, schedule), cut),
                heads.operand,
                rows=blocks.pick_gradient_keys,
                tiling=blocks.pick_gradients,
                accumulate=blocks.pick_gradient_keys < static.longest_chunk + device.ROWS - 1,
            )
            for slot in slots_of_pairs(schedule, heads):
                d_q.append(jnp.where((slot >= 0)[..., None], take_at(of_pairs, slot).astype(jnp.float32), 0.0))
            for parts, rows in ((d_k, of_keys), (d_v, of_values)):
                parts.append(_key_rows(rows, cut.row_of_token, table))
        d_q = functools.reduce(jnp.add, d_q).astype(q.dtype)
        return d_q, *(functools.reduce(jnp.add, x).astype(q.dtype) for x in (d_k, d_v))

    like = tuple(jax.ShapeDtypeStruct(x.shape, q.dtype) for x in (queries, k, v))
    d_q, d_k, d_v = _by_group(one_group, like, (1, 2, 2), q.shape[2], static.groups)
    return _from_order(d_q, plan.order, table), d_k, d_v, None, None, None


_attend.defvjp(_attend_forward, _attend_backward)


# ---------------------------------------------------------------------------------------------- groups of heads


class Heads(NamedTuple):
    """A group of heads; `first` is data, so that one program serves all groups."""

    first: Array | int
    count: int

    @property
    def operand(self) -> Int[Array, "1"]:
        """What kernels are told."""
        return jnp.full(1, self.first, jnp.int32)


def _by_group(function, like, axes, heads: int, groups: int):
    """function(group of heads) -> arrays with the group's heads along `axes`, put together for all heads."""
    count = heads // groups
    if groups == 1:
        return function(Heads(0, heads))

    def one(i, whole):
        parts = function(Heads(i * count, count))
        return tuple(
            lax.dynamic_update_slice_in_dim(x, part, i * count, axis)
            for x, part, axis in zip(whole, parts, axes, strict=True)
        )

    return lax.fori_loop(0, groups, one, tuple(jnp.zeros(x.shape, x.dtype) for x in like))


def _of(heads: Heads, x):
    """The group's part of arrays [B, H, ...]."""
    return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, heads.first, heads.count, axis=1), x)


def rows_of_slots(schedule: Schedule, heads: Heads) -> Int[Array, "B H S"]:
    """The ordered query of each slot; 0 for empty slots."""
    pair = _of(heads, schedule.pair_of_slot)
    return jnp.maximum(pair, 0).reshape(*pair.shape[:2], -1) // schedule.slot_of_pair.shape[-1]


def slots_of_pairs(schedule: Schedule, heads: Heads) -> list[Int[Array, "B H R"]]:
    """Where the pairs of each query lie; -1: nowhere."""
    slots = _of(heads, schedule.slot_of_pair)
    return [slots[..., i] for i in range(slots.shape[-1])]


# --------------------------------------------------------------------------------------------- order, gathers, sums


def _to_order(x: Array, order: Order, fill) -> Array:
    """x [B, N, H, ...] in the queries' order, head-major [B, H, R, ...]; `fill` in rows without a token."""
    token = order.token_of_row
    rows = jax.vmap(lambda x, i: x.at[i].get(mode="promise_in_bounds"))(x, jnp.maximum(token, 0))
    there = jnp.expand_dims(token >= 0, range(2, x.ndim))
    return jnp.swapaxes(jnp.where(there, rows, jnp.asarray(fill, x.dtype)), 1, 2)


def _from_order(x: Array, order: Order, table: ChunkTable) -> Array:
    """x [B, H, R, D] back to tokens [B, N, H, D]; 0 for padding."""
    return _take_tokens(x, order.row_of_token, table)


def _key_rows(x: Array, row: Array, table: ChunkTable):
    """x [B, H, rows of tiles, D] as tokens [B, N, H, D], in float32; 0 for tokens that are in no tile."""
    return _take_tokens(x, row, table).astype(jnp.float32)


def _take_tokens(x: Array, row: Array, table: ChunkTable) -> Array:
    rows = jax.vmap(lambda x, i: x.at[i].get(mode="promise_in_bounds"))(jnp.swapaxes(x, 1, 2), row)
    return jnp.where(table.valid[:, :, None, None], rows, jnp.zeros((), x.dtype))


def _head_major(x: Array, static: _Static) -> Float[Array, "B H N D"]:
    """Keys or values [B, N, H, D] as kernels read them: rows for a whole block behind the last."""
    more = (-x.shape[1]) % device.ROWS + static.blocks.most_keys
    return jnp.pad(jnp.swapaxes(x, 1, 2), ((0, 0), (0, 0), (0, more), (0, 0)))


def _flat(x: Array, index: Array) -> Array:
    """index [B, H, n] of rows of x [B, H, R, ...], in an array whose scenes, heads and rows are one axis."""
    batch, heads, rows = x.shape[:3]
    first = (jnp.arange(batch)[:, None] * heads + jnp.arange(heads)[None]) * rows
    return first[..., None] + index


def take_at(x: Array, index: Int[Array, "B H n"]) -> Array:
    """Rows [B, H, n, ...] of x [B, H, R, ...], each head its own; anything where the index is negative."""
    flat = x.reshape(-1, *x.shape[3:])
    return flat.at[_flat(x, jnp.maximum(index, 0))].get(mode="promise_in_bounds")


@typed
def take_rows(x: Float[Array, "B H R D"], rows: Int[Array, "B G S"], heads: Heads) -> Float[Array, "B G S D"]:
    """Rows of x, of a group of heads."""
    batch, held, length, dim = x.shape
    head = heads.first + jnp.arange(heads.count)[None, :, None]
    index = (jnp.arange(batch)[:, None, None] * held + head) * length + rows
    return x.reshape(-1, dim).at[index].get(mode="promise_in_bounds")


def merge(parts, dtype):
    """One softmax over all parts: output and base-2 log-sum-exp; 0 and -inf for rows with nothing.

    A part is (rows [B, H, R or more, D], which of them belongs to each query [B, H, R] or None for each its own,
    log-sum-exp [B, H, R], -inf for none). Rows of nobody may hold anything.
    """
    lses = [lse for *_, lse in parts]
    largest = functools.reduce(jnp.maximum, lses)
    base = jnp.where(jnp.isfinite(largest), largest, 0.0)
    weights = [jnp.exp2(lse - base) for lse in lses]
    total = functools.reduce(jnp.add, weights)
    share = 1 / jnp.where(total == 0, 1.0, total)  # a NaN stays one
    shares = []
    for (rows, index, _), w in zip(parts, weights, strict=True):
        own = rows if index is None else take_at(rows, index)
        shares.append(jnp.where((w != 0)[..., None], own.astype(jnp.float32) * (w * share)[..., None], 0.0))
    return functools.reduce(jnp.add, shares).astype(dtype), base + jnp.log2(total)


def _other_text_parts(rows: Array, plan: Plan, table: ChunkTable, blocks: Blocks) -> list[Array]:
    """What the first part of text's tiles lacks, its other readers' share, as tokens [B, N, H, D]."""
    if plan.text_parts < 2:
        return []
    size = plan.text_tiles * blocks.gradient_keys
    tokens = table.chunk_of.shape[1]
    text = rows[:, :, : plan.text_parts * size].astype(jnp.float32)
    text = jnp.sum(text.reshape(*rows.shape[:2], plan.text_parts, size, -1)[:, :, 1:], axis=2)
    text = jnp.swapaxes(text[:, :, : table.text_tokens], 1, 2)
    text = jnp.where(table.valid[:, : table.text_tokens, None, None], text, 0.0)
    return [jnp.pad(text, ((0, 0), (0, tokens - table.text_tokens), (0, 0), (0, 0)))]
