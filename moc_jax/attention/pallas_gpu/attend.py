"""Mixture of Contexts on Hopper: anchors and picks by the same kernels, merged by their log-sum-exp.

(a) Anchors. Tiles of queries in memory order walk at most three runs of keys. No copies of q, k or v.
(b) Picks. (query, chunk) pairs are sorted by chunk; their queries are gathered, so that a tile reads one chunk.
(c) Merge. A query gathers its picks' outputs and its anchors' and weighs them by 2^(lse - max).

Backward, with the merged output o and log-sum-exp L, every part's gradients follow from o and L alone
(flash_backward.py); a query sums its pairs' gradients by the same gather. Nothing is scattered, no sum depends on
timing: the same bits on every run.

Padding of q, k and v may hold anything finite: blocks that reach into it are masked. Backward, its values and output
gradients become 0 on their way in, which takes a pass over each.

Bytes: pairs' queries and outputs take 2 * N * K * D * 2 bytes for each head, so heads go in groups that keep a buffer
within 1 GiB. FLOPs: 4 * D per attended pair forward, 14 * D backward.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moc_jax.attention import routing
from moc_jax.attention.heads import Heads, head_groups
from moc_jax.attention.layout import Queries
from moc_jax.attention.pallas_gpu import device, flash, flash_backward, router
from moc_jax.attention.pallas_gpu.device import Hopper
from moc_jax.attention.pallas_gpu.plan import Plan, pick_tiles, plan, reader_tiles
from moc_jax.attention.pallas_gpu.tiles import ALIGN, TILE, Tuning
from moc_jax.attention.schedule import Schedule, group_by_chunk, tile_capacity
from moc_jax.config import MoCConfig
from moc_jax.scene import ChunkTable
from moc_jax.shapes import Array, Float, Int, typed

_BUFFER = 2**30  # bytes of one buffer of sorted rows

FORWARD = Tuning(block=128, stages=2, slots=2)
QUERY_GRADIENTS = Tuning(block=64, stages=3, slots=1)
KEY_GRADIENTS = Tuning(block=64, stages=2, slots=1, compute_registers=240, copy_registers=24)


class _Static(NamedTuple):
    groups: int  # of heads
    blocks: int  # persistent thread blocks
    interpret: object


def select(
    q: Float[Array, "B Q H D"],
    k: Float[Array, "B N H D"],
    queries: Queries,
    table: ChunkTable,
    cfg: MoCConfig,
    backend: Hopper,
) -> Int[Array, "B H Q K"]:
    """The best candidates of every query, best first.

    Raises:
        NotImplementedError: the device, the type, D or `top_k` is none that the kernels can do.
    """
    device.check(q, k, k)
    return router.select(q, routing.descriptors(k, table), table, cfg, interpret=device.interpreter())


def anchor_part(q, k, v, queries: Queries, table: ChunkTable, cfg: MoCConfig, backend: Hopper):
    """Output and natural log-sum-exp of the anchors alone."""
    raise NotImplementedError("parts by these kernels")


def pick_part(q, k, v, routes, queries: Queries, table: ChunkTable, cfg: MoCConfig, backend: Hopper):
    """Output and natural log-sum-exp of the picks alone."""
    raise NotImplementedError("parts by these kernels")


def anchor_gradients(q, k, v, d_out, lse, delta, queries: Queries, table: ChunkTable, cfg: MoCConfig, backend: Hopper):
    """Gradients of the anchors' part."""
    raise NotImplementedError("parts by these kernels")


def pick_gradients(
    q, k, v, routes, d_out, lse, delta, queries: Queries, table: ChunkTable, cfg: MoCConfig, backend: Hopper
):
    """Gradients of the picks' part."""
    raise NotImplementedError("parts by these kernels")


@typed
def attend(
    q: Float[Array, "B N H D"],
    k: Float[Array, "B N H D"],
    v: Float[Array, "B N H D"],
    routes: Int[Array, "B H N K"],
    queries: Queries,
    table: ChunkTable,
    cfg: MoCConfig,
    backend: Hopper,
) -> Float[Array, "B N H D"]:
    """Attention over the anchors of `cfg` and the chunks in `routes`; queries with neither give 0.

    Raises:
        NotImplementedError: the device, the type or D is none that the kernels can do.
    """
    device.check(q, k, v)
    tokens, heads, dim = q.shape[1:]
    # Blocks of keys start at multiples of 8, and text is cut into whole tiles; what is added belongs to no chunk.
    rows = max(tokens + -tokens % ALIGN, table.text_tokens + -table.text_tokens % TILE, TILE)
    more = (0, rows - tokens)
    q, k, v = (jnp.pad(x, ((0, 0), more, (0, 0), (0, 0))) for x in (q, k, v))
    routes = jnp.pad(routes, ((0, 0), (0, 0), more, (0, 0)), constant_values=-1)
    table = dataclasses.replace(table, chunk_of=jnp.pad(table.chunk_of, ((0, 0), more), constant_values=-1))
    with jax.named_scope("moc_attention"):
        slots = tile_capacity(rows * routes.shape[-1], table.kind.shape[1], TILE) * TILE
        groups = head_groups(heads, q.shape[0] * slots * dim * q.dtype.itemsize, _BUFFER)
        static = _Static(groups, device.multiprocessors(), device.interpreter())
        tiles, schedule = plan(table, cfg), sort_picks(routes, table)
        if schedule is None and not tiles.anchors:
            return jnp.zeros(q[:, :tokens].shape, v.dtype)
        out = _attend(q, k, v, tiles, schedule, table, static)
    return out[:, :tokens]


@typed
def sort_picks(routes: Int[Array, "B H N K"], table: ChunkTable) -> Schedule | None:
    """The picks' pairs of each scene sorted by chunk (arrays [B, H, ...]); None if there are no slots."""
    if routes.shape[-1] == 0:
        return None
    # An empty chunk is as good as none: its tile would have no keys.
    length = jnp.take_along_axis(table.length[:, None, None], jnp.maximum(routes, 0), axis=3)
    routes = jnp.where(length > 0, routes, -1)
    sort = functools.partial(group_by_chunk, chunks=table.kind.shape[1], tile=TILE)
    if routes.shape[0] == 1:
        return jax.tree.map(lambda x: x[None], sort(routes[0]))
    return jax.vmap(sort)(routes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attend(q, k, v, plan: Plan, schedule: Schedule | None, table, static):
    return _forward(q, k, v, plan, schedule, table, static)[0]


def _forward(q, k, v, plan, schedule, table, static):
    """[B, N, H, D] -> output, and base-2 log-sum-exp [B, H, N]."""
    kernel = functools.partial(flash.forward, tuning=FORWARD, blocks=static.blocks, interpret=static.interpret)
    all_heads = Heads(0, q.shape[2])
    if plan.anchors:
        anchor_out, anchor_lse = kernel(q, k, v, plan.queries, all_heads.operand, sorted_rows=False)

    def one_group(heads):
        parts = []
        if plan.anchors:
            parts.append(Part(anchor_out, plan.query_row[:, None], plan.anchored[:, None], heads.first, anchor_lse))
        if schedule is not None:
            rows = queries_of_slots(schedule, heads)
            work = heads.of(pick_tiles(schedule, table))
            out, lse = kernel(take_rows(q, rows, heads), k, v, work, heads.operand, sorted_rows=True)
            parts += [Part(out, slot, slot >= 0, 0, lse) for slot in slots_of_pairs(schedule, heads)]
        return merge(parts, heads.count, v.dtype)

    batch, tokens, heads, _ = q.shape
    like = jax.ShapeDtypeStruct(q.shape, v.dtype), jax.ShapeDtypeStruct((batch, heads, tokens), jnp.float32)
    return _by_group(one_group, like, (2, 1), heads, static.groups)


def _attend_forward(q, k, v, plan, schedule, table, static):
    out, lse = _forward(q, k, v, plan, schedule, table, static)
    return out, (q, k, v, plan, schedule, table, out, lse)


def _attend_backward(static, residuals, d_out):
    q, k, v, plan, schedule, table, out, lse = residuals
    # Blocks of a run may hold padding. Its weights are 0, but what they are multiplied with may be NaN, or v d_out
    # overflow. A mask inside of dq's kernel, after the products, took it from 53 to 55 ms in the reference scene.
    d_out, v = (jnp.where(table.valid[..., None, None], x, 0).astype(q.dtype) for x in (d_out, v))
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1).swapaxes(1, 2)  # [B, H, N]
    common = dict(blocks=static.blocks, interpret=static.interpret)
    for_queries = functools.partial(flash_backward.query_gradients, tuning=QUERY_GRADIENTS, **common)
    for_keys = functools.partial(flash_backward.key_gradients, tuning=KEY_GRADIENTS, **common)
    inputs = q, k, v, d_out, lse, delta
    all_heads = Heads(0, q.shape[2])
    if plan.anchors:
        query_rows = for_queries(*inputs, plan.queries, all_heads.operand, sorted_rows=False)
        key_rows = for_keys(*inputs, plan.keys, all_heads.operand, sorted_rows=False)
    valid = table.valid[:, None]

    def one_group(heads):
        queries, keys = [], ([], [])
        if plan.anchors:
            queries.append(Part(query_rows, plan.query_row[:, None], plan.anchored[:, None], heads.first))
            for parts, rows in zip(keys, key_rows, strict=True):
                parts.append(Part(rows, plan.key_row[:, None], valid, heads.first))
        if schedule is not None:
            rows = queries_of_slots(schedule, heads)
            pairs = (
                take_rows(q, rows, heads),
                k,
                v,
                take_rows(d_out, rows, heads),
                _take_scalars(lse, rows, heads),
                _take_scalars(delta, rows, heads),
            )
            work = heads.of(pick_tiles(schedule, table))
            d_pairs = for_queries(*pairs, work, heads.operand, sorted_rows=True)
            queries += [Part(d_pairs, slot, slot >= 0, 0) for slot in slots_of_pairs(schedule, heads)]
            work = heads.of(reader_tiles(schedule, plan.chunks))
            d_chunks = for_keys(*pairs, work, heads.operand, sorted_rows=True)
            for parts, of_chunks in zip(keys, d_chunks, strict=True):
                parts.append(Part(of_chunks, plan.chunks.row_of_token[:, None], valid, 0))
        d_k, d_v = (_add_text_parts(_sum(parts, heads.count), parts[0], plan, heads) for parts in keys)
        return tuple(x.astype(q.dtype) for x in (_sum(queries, heads.count), d_k, d_v))

    like = (jax.ShapeDtypeStruct(q.shape, q.dtype),) * 3
    return *_by_group(one_group, like, (2, 2, 2), q.shape[2], static.groups), None, None, None


_attend.defvjp(_attend_forward, _attend_backward)


# ---------------------------------------------------------------------------------------------- groups of heads


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


def queries_of_slots(schedule: Schedule, heads: Heads) -> Int[Array, "B H S"]:
    """The query of each slot; 0 for empty slots."""
    pair = heads.of(schedule.pair_of_slot)
    return jnp.maximum(pair, 0).reshape(*pair.shape[:2], -1) // schedule.slot_of_pair.shape[-1]


def slots_of_pairs(schedule: Schedule, heads: Heads) -> list[Int[Array, "B H N"]]:
    """Where the pairs of each query lie; -1: nowhere."""
    slots = heads.of(schedule.slot_of_pair)
    return [slots[..., i] for i in range(slots.shape[-1])]


# ------------------------------------------------------------------------------------------- gathers and sums


class Part(NamedTuple):
    """Rows that a kernel wrote, and which of them belongs to each query (or key) of a group of heads."""

    rows: Float[Array, "B _ R D"]
    row: Int[Array, "B _ N"]  # may be anything where `there` is False
    there: Array  # [B, 1 or H, N]
    first_head: Array | int  # of the group, among the heads of `rows`
    lse: Array | None = None  # [B, _, R]


def _flat(index, first_head, length: int, shape):
    """Row `index` of each scene and head [B, H, N] in an array whose scenes, heads and rows are one axis."""
    batch, count, heads = shape
    scene = jnp.arange(batch)[:, None, None] * heads
    return (scene + first_head + jnp.arange(count)[None, :, None]) * length + index


def _pick(x, part: Part, heads: int):
    batch, held, length = x.shape[:3]
    index = _flat(jnp.maximum(part.row, 0), part.first_head, length, (batch, heads, held))
    return x.reshape(batch * held * length, *x.shape[3:]).at[index].get(mode="promise_in_bounds")


@typed
def take_rows(x: Float[Array, "B N _ D"], rows: Int[Array, "B H S"], heads: Heads) -> Float[Array, "B H S D"]:
    """Rows [B, H, S] of x [B, N, H, D], each head its own."""
    batch, tokens, held, dim = x.shape
    head = heads.first + jnp.arange(heads.count)[None, :, None]
    index = (jnp.arange(batch)[:, None, None] * tokens + rows) * held + head
    # As pairs of numbers: the same bytes in half as many reads and writes, which XLA's gather does one by one.
    words = lax.bitcast_convert_type(x.reshape(batch * tokens * held, dim // 2, 2), jnp.uint32)
    taken = words.at[index].get(mode="promise_in_bounds")
    return lax.bitcast_convert_type(taken, x.dtype).reshape(*index.shape, dim)


def _take_scalars(x, rows, heads: Heads) -> Float[Array, "B H S"]:
    """Values [B, H, S] of x [B, H, N]."""
    batch, held, tokens = x.shape
    return x.reshape(-1).at[_flat(rows, heads.first, tokens, (batch, heads.count, held))].get(mode="promise_in_bounds")


def merge(parts: list[Part], heads: int, dtype):
    """One softmax over all parts: output [B, N, heads, D], base-2 log-sum-exp [B, heads, N]; 0 and -inf for none."""
    lses = [jnp.where(part.there, _pick(part.lse, part, heads), -jnp.inf) for part in parts]
    largest = functools.reduce(jnp.maximum, lses)
    base = jnp.where(jnp.isfinite(largest), largest, 0.0)
    weights = [jnp.exp2(lse - base) for lse in lses]
    total = functools.reduce(jnp.add, weights)
    share = 1 / jnp.where(total == 0, 1.0, total)  # a NaN stays one
    shares = [
        # Rows of nobody may hold anything, so they are left out and not multiplied by 0.
        jnp.where((w != 0)[..., None], _pick(part.rows, part, heads).astype(jnp.float32) * (w * share)[..., None], 0.0)
        for part, w in zip(parts, weights, strict=True)
    ]
    out = functools.reduce(jnp.add, shares)
    lse = base + jnp.log2(total)  # -inf for none
    return out.astype(dtype).swapaxes(1, 2), lse


def _sum(parts: list[Part], heads: int) -> Float[Array, "B N H D"]:
    """The float32 sum of all parts; 0 where there are none."""
    rows = [jnp.where(part.there[..., None], _pick(part.rows, part, heads).astype(jnp.float32), 0.0) for part in parts]
    return functools.reduce(jnp.add, rows).swapaxes(1, 2)


def _add_text_parts(total, part: Part, plan: Plan, heads: Heads):
    """Adds what the first part of the text's tiles lacks: its other readers."""
    if plan.text_parts < 2:
        return total
    batch, _, _, dim = part.rows.shape
    rows = heads.of(part.rows)[:, :, : plan.text_parts * plan.text_tiles * TILE].astype(jnp.float32)
    rows = jnp.sum(rows.reshape(batch, heads.count, plan.text_parts, -1, dim)[:, :, 1:], axis=2).swapaxes(1, 2)
    text = slice(0, plan.text_tokens)  # what else lies in the last tile is video
    return total.at[:, text].add(jnp.where(part.there[:, 0, text, None, None], rows[:, text], 0.0))
