"""Mixture of Contexts on TPU: anchors and picks by the same kernels, merged by their log-sum-exp.

(a) Order. Queries, which need not be keys, are laid out segment after segment, each from a whole tile on; keys and
    values go head-major.
(b) Anchors. Tiles of queries walk at most three runs of keys.
(c) Picks. Queries are spread to slots sorted by the chunk that they pick, so that a tile of slots reads one chunk.
(d) Merge. A query weighs its pairs' outputs and its anchors' by 2^(lse - max).

Backward, with the merged output o and log-sum-exp L, every part's gradients follow from o and L alone
(flash_backward.py); a query adds up its pairs' gradients on the same way back. No sum depends on timing: the same bits
on every run.

Bytes: a pair's query and output take 6 * D bytes of bfloat16 in memory, so heads go in groups. FLOPs: 4 * D per
attended pair forward, 10 * D backward.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moc_jax.attention.columns import columns
from moc_jax.attention.layout import LOG2E, Heads, Queries, by_group, head_groups, sum_other_shares
from moc_jax.attention.pallas_tpu import device, flash, flash_backward, moves, packing, pairs, pool, router, tuning
from moc_jax.attention.pallas_tpu.batching import more_scenes
from moc_jax.attention.pallas_tpu.device import LANES, ROWS, Chip, Tpu
from moc_jax.attention.pallas_tpu.placement import Placement, place, span_size, step_rows
from moc_jax.attention.pallas_tpu.plan import (
    Moves,
    Order,
    OrderedTiles,
    cut_chunks,
    key_moves,
    key_rows,
    ordered_tiles,
    pick_tiles,
    reader_tiles,
)
from moc_jax.attention.pallas_tpu.tuning import Blocks
from moc_jax.attention.residuals import named_outputs, named_routes
from moc_jax.config import MoCConfig
from moc_jax.scene import ChunkTable
from moc_jax.shapes import Array, Float, Float32, Int

_BUFFER = 5 * 2**29  # bytes of a buffer of pairs' outputs, and not more than
_SHARE = 24  # this part of the chip's memory


class _Static(NamedTuple):
    chip: Chip
    blocks: Blocks
    anchor_keys: int  # of a query, about

    @classmethod
    def of(cls, q, k, v, table: ChunkTable, cfg: MoCConfig, backend: Tpu) -> "_Static":
        """Raises NotImplementedError where the kernels can't run, or do these types or sizes."""
        chip = device.target(backend.chip)
        device.check(q, k, v)
        blocks = backend.blocks or tuning.blocks(cfg, table, q.shape[-1], q.dtype, chip)
        return cls(chip, blocks, tuning.anchor_keys(cfg, table))


# Shapes are those of `backends.Implementation`, checked before.


def means(k, table: ChunkTable, cfg: MoCConfig, backend: Tpu) -> Float32[Array, "B H _ D"]:
    """See backends.py.

    Raises:
        NotImplementedError: as `attend`.
    """
    chip = device.target(backend.chip)
    device.check(k, k, k)
    with jax.named_scope("moc_route"):
        return columns(k, table, cfg, functools.partial(pool.descriptors, chip=chip))


def select(q, phi, queries: Queries, table: ChunkTable, cfg: MoCConfig, backend: Tpu) -> Int[Array, "B H Q K"]:
    """The best candidates of every query, best first; -1 fills room that holds none.

    Raises:
        NotImplementedError: as `attend`.
    """
    chip = device.target(backend.chip)
    device.check(q, q, q)
    with jax.named_scope("moc_route"):
        return router.select(q, phi, queries, table, cfg, chip=chip)


def attend(
    q, k, v, routes, queries: Queries, table: ChunkTable, cfg: MoCConfig, backend: Tpu
) -> Float[Array, "B Q H D"]:
    """Attention over the anchors of `cfg` and the chunks in `routes`; queries with neither give 0.

    Raises:
        NotImplementedError: the device, the type or D is none that the kernels can do.
    """
    static = _Static.of(q, k, v, table, cfg, backend)
    with jax.named_scope("moc_attention"):
        tiles, placement = _layout(routes, queries, table, cfg, static, q)
        if placement is None and not tiles.anchors:
            return jnp.zeros(q.shape, v.dtype)
        return _attend(q, k, v, tiles, placement, table, static)


def part(q, k, v, routes, queries: Queries, table: ChunkTable, cfg: MoCConfig, backend: Tpu):
    """Output and natural log-sum-exp of the picks alone or, without routes, of the anchors alone; 0 and -inf for none.

    Raises:
        NotImplementedError: as `attend`.
    """
    static = _Static.of(q, k, v, table, cfg, backend)
    tiles, placement = _part_layout(routes, queries, table, cfg, static, q)
    batch, tokens, heads, _ = q.shape
    if placement is None and not tiles.anchors:
        return jnp.zeros(q.shape, v.dtype), jnp.full((batch, heads, tokens), -jnp.inf)

    def run(q, k, v, tiles, placement, table):
        out, lse = _outputs(q, k, v, tiles, placement, table, static)
        back = tiles.order.back
        return _to_tokens(out, back, tokens, static), moves.move_lanes(lse, *back, tokens, 0, chip=static.chip)

    out, lse = more_scenes(run)(q, k, v, tiles, placement, table)
    return out, jnp.where(queries.valid[:, None], lse / LOG2E, -jnp.inf)


def part_gradients(
    q, k, v, routes, d_out, lse, delta, queries: Queries, table: ChunkTable, cfg: MoCConfig, backend: Tpu
):
    """(dq, dk, dv) of that part, from the final natural log-sum-exp and delta = rowsum(d_out * out).

    Raises:
        NotImplementedError: as `attend`.
    """
    static = _Static.of(q, k, v, table, cfg, backend)
    tiles, placement = _part_layout(routes, queries, table, cfg, static, q)
    if placement is None and not tiles.anchors:
        return jnp.zeros_like(q), jnp.zeros_like(k), jnp.zeros_like(v)

    def run(q, k, v, tiles, placement, table, d_out, statistics):
        order = tiles.order
        lse, delta = (moves.move_lanes(x, *order.moves, order.rows, 0, chip=static.chip) for x in statistics)
        lse = jnp.where((order.chunk_of_row < 0)[:, None], -jnp.inf, lse)
        return _gradients(q, k, v, tiles, placement, table, d_out, lse, lambda _: delta, static)

    statistics = lse * LOG2E, jnp.where(jnp.isneginf(lse), 0.0, delta)
    return more_scenes(run)(q, k, v, tiles, placement, table, d_out, statistics)


def _part_layout(routes, queries: Queries, table: ChunkTable, cfg: MoCConfig, static: _Static, q):
    tiles, placement = _layout(routes, queries, table, cfg, static, q)
    return dataclasses.replace(tiles, anchors=tiles.anchors and routes is None), placement


def _layout(routes, queries: Queries, table: ChunkTable, cfg: MoCConfig, static: _Static, q):
    """The anchors' tiles, and where pairs lie; None for the latter if there are none whatever the lengths."""

    def of_scenes(routes, queries, table):
        tiles = ordered_tiles(queries, table, cfg, static.blocks)
        if routes is None or routes.shape[3] == 0:
            return tiles, None
        return tiles, _place(routes, tiles.order, table, static, q.shape[-1], q.dtype)

    return more_scenes(of_scenes)(routes, queries, table)


def buffer_limit(chip: Chip) -> int:
    """Bytes that the pairs' outputs of a group of heads may take."""
    return min(_BUFFER, chip.memory // _SHARE)


def _groups(q, placement: Placement, chip: Chip) -> int:
    """Groups of heads whose pairs' outputs fit the buffer."""
    per_head = placement.tile_chunk.shape[0] * placement.slots * packing.packed_width(q.shape[3], q.dtype) * 4
    return head_groups(q.shape[2], per_head, buffer_limit(chip))


def _place(routes, order: Order, table: ChunkTable, static: _Static, dim: int, dtype) -> Placement:
    """Slots for the picks of the ordered queries."""
    batch, heads, tokens, picks = routes.shape
    chunks, blocks = table.kind.shape[1], static.blocks
    if blocks.span:
        span, buffers = blocks.span, 2
    else:
        span, buffers = span_size(order.rows, picks, packing.packed_width(dim, dtype), chunks, static.chip)
    step = blocks.span_step or step_rows(order.rows, span)
    lines = jnp.swapaxes(routes.astype(jnp.int32), 2, 3).reshape(batch, heads * picks, tokens)
    lines = moves.move_lanes(lines, *order.moves, order.rows, -1, chip=static.chip)
    ordered, most = lines.reshape(batch, heads, picks, order.rows), tokens * picks
    return place(ordered, table.length, blocks.picks.queries, most, span=span, buffers=buffers, step=step)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attend(q, k, v, tiles: OrderedTiles, placement: Placement | None, table, static):
    return _attend_forward(q, k, v, tiles, placement, table, static)[0]


def _attend_forward(q, k, v, tiles, placement, table, static):
    tiles, placement = named_routes((tiles, placement))
    outputs = more_scenes(functools.partial(_outputs, static=static))(q, k, v, tiles, placement, table)
    out, lse = named_outputs(*outputs)
    result = more_scenes(functools.partial(_to_tokens, tokens=q.shape[1], static=static))(out, tiles.order.back)
    return result, (q, k, v, tiles, placement, table, out, lse)


def _outputs(q, k, v, tiles: OrderedTiles, placement, table, static: _Static):
    """Arrays [B, Q, H, D] -> output and log-sum-exp in the queries' order."""
    queries = _to_order(q, tiles.order, static)
    keys, values = (_head_major(x, table, static) for x in (k, v))
    anchors: Any = _anchors(queries, keys, values, tiles, static) if tiles.anchors else None
    heads, dim, chip = q.shape[2], q.shape[3], static.chip
    if placement is None:
        out, lse = anchors
        return jnp.where(tiles.anchored[:, None, :, None], out, jnp.zeros((), out.dtype)), lse

    def one_group(heads, merged):
        (outputs,) = flash.forward(
            pairs.spread(queries, placement, heads, chip=chip),
            keys,
            values,
            pick_tiles(heads.of(placement), table),
            first_head=heads.first,
            longest_run=table.max_chunk,
            packed=True,
            tiling=static.blocks.picks,
            chip=chip,
            name="moc_forward_picks",
        )
        known = dict(into=merged) if anchors is None else dict(anchors=merged)
        return pairs.merge(outputs, placement, heads, dim=dim, dtype=v.dtype, chip=chip, **known)

    start = anchors or (jnp.empty(queries.shape, v.dtype), jnp.empty(queries.shape[:3], jnp.float32))
    return by_group(one_group, start, heads, _groups(q, placement, chip))


def _anchors(queries, keys, values, tiles: OrderedTiles, static: _Static):
    """Output and log-sum-exp of the anchors [B, H, R, D] and [B, H, R]; anything and -inf for rows without."""
    blocks, order = static.blocks, tiles.order
    run = functools.partial(flash.forward, queries, keys, values, mean_keys=static.anchor_keys, chip=static.chip)
    found: Any = None
    if order.rows > order.text_rows:
        first_tile = order.text_rows // blocks.anchors.queries
        tiling = blocks.anchors
        found = run(tiles.video, first_tile=first_tile, tiling=tiling, name="moc_forward_anchors")
    if order.text_rows:
        found = run(tiles.text, tiling=blocks.text, name="moc_forward_text", into=found)
    out, lse = found
    return out, jnp.where(tiles.anchored[:, None], lse, -jnp.inf)


def _attend_backward(static, residuals, d_result):
    def run(q, k, v, tiles, placement, table, out, lse, d_out):
        def delta(d_out):
            # Not `statistics.row_dot`: the compiler writes its halves to memory one by one, at 180 504 tokens 3.4 GiB
            # and, on a v5p, 31 ms more. By its listings, its own sum treats each row the same, however many there are.
            return jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)

        return _gradients(q, k, v, tiles, placement, table, d_out, lse, delta, static)

    return (*more_scenes(run)(*residuals, d_result), None, None, None)


def _gradients(q, k, v, tiles: OrderedTiles, placement, table, d_out, lse, delta_of, static: _Static):
    """Of tokens; `lse` [B, H, R] is the queries' in their order, and delta_of(d_out in their order) too."""
    queries, d_out = (_to_order(x, tiles.order, static) for x in (q, d_out.astype(q.dtype)))
    keys, values = (_head_major(x, table, static) for x in (k, v))
    lse = jnp.where(jnp.isneginf(lse), jnp.inf, lse)  # rows with nothing to attend to, and without a token
    inputs = _Inputs(queries, keys, values, d_out, lse, delta_of(d_out))
    d_q: Any = None
    parts: tuple[list[Array], list[Array]] = [], []  # of keys, of values
    if tiles.anchors:
        d_q, *of_tiles = _anchor_gradients(inputs, tiles, static)
        for found, rows in zip(parts, of_tiles, strict=True):
            found.append(_to_tokens(rows, tiles.key_moves, k.shape[1], static))
            found += _other_shares(rows, tiles, table, static.blocks)
    if placement is not None:
        d_q, *of_tokens = _all_pick_gradients(inputs, d_q, placement, table, q, static)
        for found, x in zip(parts, of_tokens, strict=True):
            found.append(x)
    d_k, d_v = (functools.reduce(jnp.add, [x.astype(jnp.float32) for x in found]).astype(q.dtype) for found in parts)
    return _to_tokens(d_q.astype(q.dtype), tiles.order.back, q.shape[1], static), d_k, d_v


def _all_pick_gradients(inputs: "_Inputs", of_anchors, placement: Placement, table, q, static: _Static):
    """Of queries in their order, `of_anchors` added, and of keys and values as tokens [B, N, H, D]."""
    cut = cut_chunks(table, static.blocks)
    to_tokens = key_moves(cut, static.blocks.pick_gradient_keys)
    batch, _, heads, dim = q.shape
    tokens, chip = table.chunk_of.shape[1], static.chip

    def one_group(heads, whole):
        of_queries, *of_tokens = whole
        of_pairs, *of_tiles = _pick_gradients(inputs, placement, cut, heads, table.max_chunk, static)
        known = dict(anchors=of_anchors, into=of_queries)
        of_queries = pairs.add(of_pairs, placement, heads, dtype=q.dtype, chip=chip, **known)
        parts = [_to_tokens(rows, to_tokens, tokens, static) for rows in of_tiles]
        return of_queries, *(heads.put(x, part, axis=2) for x, part in zip(of_tokens, parts, strict=True))

    start = tuple(jnp.empty(x, q.dtype) for x in (inputs.queries.shape, *[(batch, tokens, heads, dim)] * 2))
    return by_group(one_group, start, heads, _groups(q, placement, chip))


class _Inputs(NamedTuple):
    """What gradients follow from; queries in their order."""

    queries: Array  # [B, H, R, D]
    keys: Array  # [B, H, N, D]
    values: Array
    d_out: Array  # [B, H, R, D]
    lse: Array  # [B, H, R], +inf for rows that attend to nothing
    delta: Array


def _anchor_gradients(inputs: _Inputs, tiles: OrderedTiles, static: _Static):
    blocks = static.blocks
    return flash_backward.gradients(
        *inputs,
        tiles.keys,
        rows=blocks.gradient_keys,
        tiling=blocks.anchor_gradients,
        chip=static.chip,
        accumulate=True,
        pairs=inputs.queries.shape[2] * static.anchor_keys,
        name="moc_gradients_anchors",
    )


def _pick_gradients(inputs: _Inputs, placement: Placement, cut, heads: Heads, longest_chunk: int, static: _Static):
    """Of pairs [B, heads, J, D] and of the keys of all chunks' tiles, for a group of heads."""
    blocks = static.blocks
    spread = functools.partial(pairs.spread, placement=placement, heads=heads, chip=static.chip)
    statistics = jnp.stack([heads.of(inputs.lse), heads.of(inputs.delta)], axis=-1)
    statistics = jnp.pad(statistics, ((0, 0),) * 3 + ((0, LANES - 2),))  # what a row of memory has at least
    lse, delta = packing.columns(spread(statistics, fill_first_lane=math.inf), 2)
    return flash_backward.gradients(
        spread(inputs.queries),
        inputs.keys,
        inputs.values,
        spread(inputs.d_out),
        lse,
        delta,
        reader_tiles(heads.of(placement), cut),
        first_head=heads.first,
        rows=blocks.pick_gradient_keys,
        tiling=blocks.pick_gradients,
        chip=static.chip,
        accumulate=blocks.pick_gradient_keys < longest_chunk + ROWS - 1,
        d_q_type=jnp.float32,
        pairs=placement.slots * min(blocks.pick_gradient_keys, longest_chunk),
        name="moc_gradients_picks",
    )


_attend.defvjp(_attend_forward, _attend_backward)


# --------------------------------------------------------------------------------------------- order and sums


def _to_order(x: Float[Array, "B Q H D"], order: Order, static: _Static) -> Float[Array, "B H R D"]:
    """x in the queries' order, head-major; 0 in rows without a token."""
    return moves.move(jnp.swapaxes(x, 1, 2), *order.moves, order.rows, chip=static.chip)


def _to_tokens(x: Float[Array, "B H R D"], where: Moves, tokens: int, static: _Static) -> Float[Array, "B N H D"]:
    """Rows back to tokens; 0 for those that have none."""
    return jnp.swapaxes(moves.move(x, *where, tokens, chip=static.chip), 1, 2)


def _head_major(x: Array, table: ChunkTable, static: _Static) -> Float[Array, "B H N D"]:
    """Keys or values [B, N, H, D] as kernels read them: at least a block, in whole tiles of memory; 0 for padding.

    Weights of padding are 0, but the matrix unit takes the largest float32 numbers for infinite.
    """
    more = key_rows(x.shape[1], table.text_tokens, static.blocks) - x.shape[1]
    x = jnp.swapaxes(jnp.where(table.valid[..., None, None], x, 0), 1, 2)
    return jnp.pad(x, ((0, 0), (0, 0), (0, more), (0, 0))) if more else x


def _other_shares(rows: Array, tiles: OrderedTiles, table: ChunkTable, blocks: Blocks) -> list[Array]:
    """What the first of text's tiles lack, the other shares of their readers, as tokens [B, N, H, D]."""
    if tiles.text_shares < 2:
        return []
    text = table.text_tokens
    rows = sum_other_shares(rows, tiles.text_shares, tiles.text_tiles * blocks.gradient_keys)
    rows = jnp.where(table.valid[:, :text, None, None], jnp.swapaxes(rows[:, :, :text], 1, 2), 0.0)
    return [jnp.pad(rows, ((0, 0), (0, table.chunk_of.shape[1] - text), (0, 0), (0, 0)))]
