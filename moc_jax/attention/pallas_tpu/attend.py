"""Mixture of Contexts on TPU: anchors and picks by the same kernels, merged by their log-sum-exp.

(a) Order. Queries are laid out segment after segment, each from a whole tile on; keys and values go head-major.
(b) Anchors. Tiles of queries walk at most three runs of keys.
(c) Picks. Queries are spread to slots sorted by the chunk that they pick, so that a tile of slots reads one chunk.
(d) Merge. A query weighs its pairs' outputs and its anchors' by 2^(lse - max).

Backward, with the merged output o and log-sum-exp L, every part's gradients follow from o and L alone
(flash_backward.py); a query adds up its pairs' gradients on the same way back. No sum depends on timing: the same bits
on every run.

Bytes: a pair's query and output take 6 * D bytes of bfloat16 in memory, so heads go in groups. FLOPs: 4 * D per
attended pair forward, 10 * D backward.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moc_jax.attention.pallas_tpu import device, flash, flash_backward, pairs, tuning
from moc_jax.attention.pallas_tpu.batching import more_scenes
from moc_jax.attention.pallas_tpu.pairs import Placement
from moc_jax.attention.pallas_tpu.plan import Order, Plan, cut_chunks, pick_tiles, plan, reader_tiles
from moc_jax.attention.pallas_tpu.tuning import Blocks
from moc_jax.config import MoCConfig
from moc_jax.scene import ChunkTable
from moc_jax.shapes import Array, Float, Int, typed

_BUFFER = 5 * 2**29  # bytes of a buffer of pairs' outputs
_STATISTICS = device.LANES  # columns of a query's log-sum-exp and delta: what a row of memory has at least


class _Static(NamedTuple):
    blocks: Blocks
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
    blocks = tuning.blocks(cfg, table, q.shape[-1], q.dtype)
    static = _Static(blocks, table.max_chunk, device.interpreter())

    def layout(routes, table):
        plan_ = plan(table, cfg, blocks)
        return plan_, _place(routes, plan_.order, table, static, q.shape[-1])

    with jax.named_scope("moc_attention"):
        plan_, placement = more_scenes(layout)(routes, table)
        if placement is None and not plan_.anchors:
            return jnp.zeros(q.shape, v.dtype)
        return _attend(q, k, v, plan_, placement, table, static)


def _head_groups(heads: int, placement: Placement | None, dim: int, dtype) -> int:
    """The fewest equal groups of heads whose pairs' outputs fit the buffer; one head each if none do."""
    rows = 0 if placement is None else placement.tile_chunk.shape[0] * placement.slots
    per_head = rows * pairs.packed_width(dim, dtype) * 4
    return next((g for g in range(1, heads) if heads % g == 0 and heads // g * per_head <= _BUFFER), heads)


def _place(routes, order: Order, table: ChunkTable, static: _Static, dim: int) -> Placement | None:
    """Slots for the picks of the ordered queries; None if there are none whatever the lengths."""
    picks, chunks, blocks = routes.shape[-1], table.kind.shape[1], static.blocks
    if picks == 0:
        return None
    routes = _to_order(jnp.swapaxes(routes, 1, 2), order, -1)
    window = blocks.window or pairs.window_rows(order.rows, picks, dim, chunks)
    step = blocks.window_step or pairs.step_rows(order.rows)
    most = table.chunk_of.shape[1] * picks
    return pairs.place(routes, table.length, blocks.picks.queries, most, window=window, step=step)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attend(q, k, v, plan: Plan, placement: Placement | None, table, static):
    return _forward(q, k, v, plan, placement, table, static)[0]


def _forward(q, k, v, plan, placement, table, static):
    return more_scenes(functools.partial(_outputs, static=static))(q, k, v, plan, placement, table)


def _outputs(q, k, v, plan: Plan, placement, table, static: _Static):
    """Arrays [B, N, H, D] -> output, and what the gradients need of it in the queries' order: output, log-sum-exp."""
    queries, keys, values = _to_order(q, plan.order, 0), _head_major(k, static), _head_major(v, static)
    anchors: Any = _anchors(queries, keys, values, plan, static) if plan.anchors else None
    if placement is None:
        out, lse = anchors
        out = jnp.where(plan.anchored[:, None, :, None], out, jnp.zeros((), out.dtype))
        return _from_order(out, plan.order, table), out, lse

    def one_group(heads):
        here = heads.of(placement)
        outputs = flash.forward(
            pairs.spread(heads.of(queries), here, interpret=static.interpret),
            keys,
            values,
            pick_tiles(here, table),
            heads.operand,
            longest_run=static.longest_chunk,
            packed=True,
            tiling=static.blocks.picks,
            name="moc_forward_picks",
            interpret=static.interpret,
        )
        return pairs.merge(
            outputs,
            here,
            None if anchors is None else heads.of(anchors),
            dim=q.shape[3],
            dtype=v.dtype,
            interpret=static.interpret,
        )

    like = jax.ShapeDtypeStruct(queries.shape, v.dtype), jax.ShapeDtypeStruct(queries.shape[:3], jnp.float32)
    heads, dim = q.shape[2:]
    out, lse = _by_group(one_group, like, (1, 1), heads, _head_groups(heads, placement, dim, v.dtype))
    return _from_order(out, plan.order, table), out, lse


def _anchors(queries, keys, values, plan: Plan, static: _Static):
    """Output and log-sum-exp of the anchors [B, H, R, D] and [B, H, R]; anything and -inf for rows without."""
    blocks = static.blocks
    run = functools.partial(flash.forward, queries, keys, values, interpret=static.interpret)
    first_head = jnp.zeros(1, jnp.int32)
    first_tile = plan.order.text_rows // blocks.queries
    found = [run(plan.video, first_head, first_tile=first_tile, tiling=blocks.anchors, name="moc_forward_anchors")]
    if plan.order.text_rows:
        found.insert(0, run(plan.text, first_head, tiling=blocks.text, name="moc_forward_text"))
    out, lse = (jnp.concatenate(x, axis=2) for x in zip(*found, strict=True))
    return out, jnp.where(plan.anchored[:, None], lse, -jnp.inf)


def _attend_forward(q, k, v, plan, placement, table, static):
    result, out, lse = _forward(q, k, v, plan, placement, table, static)
    return result, (q, k, v, plan, placement, table, out, lse)


def _attend_backward(static, residuals, d_result):
    return (*more_scenes(functools.partial(_gradients, static=static))(*residuals, d_result), None, None, None)


def _gradients(q, k, v, plan: Plan, placement, table, out, lse, d_result, static: _Static):
    queries, keys, values = _to_order(q, plan.order, 0), _head_major(k, static), _head_major(v, static)
    d_out = _to_order(d_result.astype(q.dtype), plan.order, 0)
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)  # [B, H, R]
    lse = jnp.where(jnp.isneginf(lse), jnp.inf, lse)  # rows with nothing to attend to, and without a token
    inputs = _Inputs(queries, keys, values, d_out, lse, delta)
    anchors = _anchor_gradients(inputs, plan, static) if plan.anchors else None

    def one_group(heads):
        d_q: Any = None
        d_k, d_v = [], []
        if anchors is not None:
            d_q, of_keys, of_values = heads.of(anchors)
            for parts, rows in ((d_k, of_keys), (d_v, of_values)):
                parts.append(_key_rows(rows, plan.key_row, table))
                parts += _other_text_parts(rows, plan, table, static.blocks)
        if placement is not None:
            here, cut = heads.of(placement), cut_chunks(table, static.blocks.pick_gradient_keys)
            of_pairs, of_keys, of_values = _pick_gradients(inputs, here, cut, table, heads, static)
            d_q = pairs.add(of_pairs, here, d_q, dtype=q.dtype, interpret=static.interpret)
            for parts, rows in ((d_k, of_keys), (d_v, of_values)):
                parts.append(_key_rows(rows, cut.row_of_token, table))
        return d_q.astype(q.dtype), *(functools.reduce(jnp.add, x).astype(q.dtype) for x in (d_k, d_v))

    like = tuple(jax.ShapeDtypeStruct(x.shape, q.dtype) for x in (queries, k, v))
    heads, dim = q.shape[2:]
    d_q, d_k, d_v = _by_group(one_group, like, (1, 2, 2), heads, _head_groups(heads, placement, dim, q.dtype))
    return _from_order(d_q, plan.order, table), d_k, d_v


class _Inputs(NamedTuple):
    """What gradients follow from; queries in their order."""

    queries: Array  # [B, H, R, D]
    keys: Array  # [B, H, N, D]
    values: Array
    d_out: Array  # [B, H, R, D]
    lse: Array  # [B, H, R], +inf for rows that attend to nothing
    delta: Array


def _anchor_gradients(inputs: _Inputs, plan: Plan, static: _Static):
    blocks = static.blocks
    return flash_backward.gradients(
        *inputs,
        plan.keys,
        jnp.zeros(1, jnp.int32),
        rows=blocks.gradient_keys,
        tiling=blocks.anchor_gradients,
        accumulate=True,
        name="moc_gradients_anchors",
        interpret=static.interpret,
    )


def _pick_gradients(inputs: _Inputs, placement: Placement, cut, table: ChunkTable, heads: "Heads", static: _Static):
    """Of pairs [B, G, S, D] and of the keys of all chunks' tiles, for a group of heads."""
    blocks = static.blocks
    spread = functools.partial(pairs.spread, placement=placement, interpret=static.interpret)
    statistics = jnp.stack([heads.of(inputs.lse), heads.of(inputs.delta)], axis=-1)
    statistics = jnp.pad(statistics, ((0, 0),) * 3 + ((0, _STATISTICS - 2),))
    statistics = spread(statistics, fill_first_lane=math.inf)
    return flash_backward.gradients(
        spread(heads.of(inputs.queries)),
        inputs.keys,
        inputs.values,
        spread(heads.of(inputs.d_out)),
        statistics[..., 0],
        statistics[..., 1],
        reader_tiles(placement, cut),
        heads.operand,
        rows=blocks.pick_gradient_keys,
        tiling=blocks.pick_gradients,
        accumulate=blocks.pick_gradient_keys < static.longest_chunk + device.ROWS - 1,
        d_q_type=jnp.float32,
        pairs=placement.slots * min(blocks.pick_gradient_keys, static.longest_chunk),
        name="moc_gradients_picks",
        interpret=static.interpret,
    )


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

    def of(self, x):
        """The group's part of arrays [B, H, ...]."""
        return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, self.first, self.count, axis=1), x)


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

    return lax.fori_loop(0, groups, one, tuple(jnp.empty(x.shape, x.dtype) for x in like))


# --------------------------------------------------------------------------------------------- order and sums


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
