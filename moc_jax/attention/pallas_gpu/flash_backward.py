"""Gradients of attention on Hopper, from the output's log-sum-exp: two kernels, no atomics, the same bits on every run.

With the final log-sum-exp L of a query, over all its keys, every part of its attention knows the final weights:

    p = exp(s - L)     dv = p^T do     ds = p (do v^T - delta)     dq = ds k / sqrt(D)     dk = ds^T q / sqrt(D)

with delta = rowsum(do o). So anchors and picks add up, and no gradient passes through the merge. `query_gradients`
keeps a tile of queries and walks runs of keys; `key_gradients` keeps a tile of keys and walks runs of queries. Both
form the scores anew: 7 matrix products instead of 5, and in return no sum crosses thread blocks.

FLOPs: 6 * D and 8 * D per (query, key), padded to tiles and blocks.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moc_jax.attention.pallas_gpu.flash import (
    LOG2E,
    SWIZZLED,
    Tuning,
    accumulate,
    barriers,
    launch,
    mask_columns,
    product,
)
from moc_jax.attention.pallas_gpu.tiles import COMPUTE, ROWS, TILE, Tiles, each_tile, walk
from moc_jax.shapes import Array, Float, Float32, Int, typed


@typed
def query_gradients(
    q: Float[Array, "B _ _ D"],
    k: Float[Array, "B N H D"],
    v: Float[Array, "B N H D"],
    d_out: Float[Array, "B _ _ D"],
    lse: Float32[Array, "B _ _"],
    delta: Float32[Array, "B _ _"],
    tiles: Tiles,
    first_head: Int[Array, "1"],
    *,
    sorted_rows: bool,
    tuning: Tuning,
    blocks: int,
    interpret=None,
) -> Float[Array, "B _ R D"]:
    """dq of each tile's rows, R = tiles * 128; rows of unused tiles are not written.

    Args:
        q, d_out: In memory order [B, N, H, D], or sorted by chunk [B, heads, S, D] (`sorted_rows`): some of the heads,
            from `first_head` on.
        lse: Base-2 log-sum-exp over all keys of each query [B, heads, rows of q].
        delta: rowsum(d_out * out), likewise.
        k, v, tiles, blocks: As for `flash.forward`.
    """
    batch, tokens, heads, dim = k.shape
    heads = q.shape[1] if sorted_rows else heads
    kernel = functools.partial(
        _query_kernel,
        sorted_rows=sorted_rows,
        tuning=tuning,
        tiles=tiles.static,
        blocks=blocks,
        sizes=(batch, heads, tokens, dim),
        interpreted=interpret is not None,
    )
    tile = plgpu.SMEM((tuning.slots, TILE, dim), q.dtype, transforms=SWIZZLED)
    row = plgpu.SMEM((tuning.slots, TILE), jnp.float32)
    ring = plgpu.SMEM((tuning.stages, tuning.block, dim), k.dtype, transforms=SWIZZLED)
    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((batch, heads, tiles.count * TILE, dim), q.dtype),
        scratch_types=[
            (tile, tile, row, row),
            (ring, ring),
            barriers(tuning.slots, 4, COMPUTE),
            barriers(tuning.stages, 1, COMPUTE, 1, COMPUTE),
        ],
        interpret=interpret,
        **launch(blocks),
    )(q, k, v, d_out, lse, delta, tiles.table, first_head)


def _query_kernel(
    q_ref,
    k_ref,
    v_ref,
    d_out_ref,
    lse_ref,
    delta_ref,
    table_ref,
    first_head_ref,
    d_q_ref,
    tile_smem,
    ring_smem,
    tile_barriers,
    ring_barriers,
    *,
    sorted_rows,
    tuning,
    tiles,
    blocks,
    sizes,
    interpreted,
):
    q_smem, d_out_smem, lse_smem, delta_smem = tile_smem
    k_smem, v_smem = ring_smem
    tile_full, tile_free = tile_barriers
    k_full, k_free, v_full, v_free = ring_barriers
    batch, heads, tokens, dim = sizes
    block, stages, slots = tuning.block, tuning.stages, tuning.slots
    warpgroup = lax.axis_index("warpgroup")
    each = functools.partial(each_tile, table_ref, tiles=tiles, blocks=blocks, batch=batch, heads=heads)

    @pl.when(warpgroup < COMPUTE)
    def _compute():
        plgpu.set_max_registers(tuning.compute_registers, action="increase")
        mine = pl.ds(warpgroup * ROWS, ROWS)

        def one_tile(item, _, line, used, first_step):
            slot = lax.rem(used, slots)
            q_tile, d_out_tile = q_smem.at[slot, mine], d_out_smem.at[slot, mine]
            plgpu.barrier_wait(tile_full.at[slot])
            row_layout = plgpu.Layout.WGMMA.reduce(1)
            lse = plgpu.load(lse_smem.at[slot, mine], layout=row_layout)
            delta = plgpu.load(delta_smem.at[slot, mine], layout=row_layout)

            def weights(scores, span):
                p = jnp.exp2(scores * (LOG2E / math.sqrt(dim)) - lax.broadcast_in_dim(lse, scores.shape, [0]))
                return mask_columns(p, *span, 0.0)

            def score_gradients(p, d_p):
                return (p * (d_p - lax.broadcast_in_dim(delta, d_p.shape, [0]))).astype(k_smem.dtype)

            def overlap(d_q, d_s, now, before, span):
                """The score gradients of one block, while those of the block before are multiplied with its keys."""
                keys, values = k_smem.at[now].transpose((1, 0)), v_smem.at[now].transpose((1, 0))
                if interpreted:
                    p = weights(product(q_tile, keys, True), span)
                    d_p = product(d_out_tile, values, True)
                    return accumulate(d_q, d_s, k_smem.at[before], True), score_gradients(p, d_p)

                def products(d_q_ref, scores_ref, d_p_ref):
                    plgpu.wgmma(scores_ref, q_tile, keys)
                    plgpu.wgmma(d_p_ref, d_out_tile, values)
                    plgpu.wgmma(d_q_ref, d_s, k_smem.at[before])
                    p = weights(plgpu.wgmma_accumulator_load(scores_ref, wait_n=2), span)
                    return score_gradients(p, plgpu.wgmma_accumulator_load(d_p_ref, wait_n=1))

                def body(refs):
                    d_q_ref, d_s_ref = refs
                    accumulator = plgpu.ACC((ROWS, block), jnp.float32)
                    d_s_ref[...] = pl.run_scoped(functools.partial(products, d_q_ref), accumulator, accumulator)

                return pl.run_state(body)((plgpu.ACC.init(d_q), d_s))

            def step(carry, steps, _, *span):
                # Before the first block there is none: its own keys are multiplied with zeros.
                now, before = lax.rem(steps, stages), lax.rem(jnp.maximum(steps - 1, first_step), stages)
                plgpu.barrier_wait(k_full.at[now])
                plgpu.barrier_wait(v_full.at[now])
                carry = overlap(*carry, now, before, span)
                plgpu.barrier_arrive(v_free.at[now])
                pl.when(steps > first_step)(functools.partial(plgpu.barrier_arrive, k_free.at[before]))
                return carry

            d_q = plgpu.layout_cast(jnp.zeros((ROWS, dim), jnp.float32), plgpu.Layout.WGMMA)
            d_s = plgpu.layout_cast(jnp.zeros((ROWS, block), k_smem.dtype), plgpu.Layout.WGMMA)
            (d_q, d_s), steps = walk(line, tiles.runs, block, tokens, step, (d_q, d_s), first_step)
            last = lax.rem(steps - 1, stages)
            d_q = accumulate(d_q, d_s, k_smem.at[last], interpreted)
            plgpu.barrier_arrive(k_free.at[last])

            # The queries are spent: their place holds the gradient on its way out.
            q_tile[...] = (d_q * (1 / math.sqrt(dim))).astype(d_q_ref.dtype)
            plgpu.commit_smem()
            batch_index, head, tile = item
            rows = pl.ds(tile * TILE + warpgroup * ROWS, ROWS)
            plgpu.copy_smem_to_gmem(q_tile, d_q_ref.at[batch_index, head, rows])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.barrier_arrive(tile_free.at[slot])
            return steps

        each(body=one_tile)
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == COMPUTE)
    def _copy():
        plgpu.set_max_registers(tuning.copy_registers, action="decrease")
        first_head = first_head_ref[0]

        def one_tile(item, start, line, used, steps):
            batch_index, head, _ = item
            slot = lax.rem(used, slots)
            pl.when(used >= slots)(functools.partial(plgpu.barrier_wait, tile_free.at[slot]))
            rows, full = pl.ds(start, TILE), tile_full.at[slot]
            wide = (batch_index, head, rows) if sorted_rows else (batch_index, rows, head)
            plgpu.copy_gmem_to_smem(q_ref.at[wide], q_smem.at[slot], full)
            plgpu.copy_gmem_to_smem(d_out_ref.at[wide], d_out_smem.at[slot], full)
            plgpu.copy_gmem_to_smem(lse_ref.at[batch_index, head, rows], lse_smem.at[slot], full)
            plgpu.copy_gmem_to_smem(delta_ref.at[batch_index, head, rows], delta_smem.at[slot], full)

            def step(_, steps, row, *__):
                ring = lax.rem(steps, stages)
                keys = (batch_index, pl.ds(row, block), first_head + head)
                for source, target, is_full, is_free in (
                    (k_ref, k_smem, k_full, k_free),
                    (v_ref, v_smem, v_full, v_free),
                ):
                    pl.when(steps >= stages)(functools.partial(plgpu.barrier_wait, is_free.at[ring]))
                    plgpu.copy_gmem_to_smem(source.at[keys], target.at[ring], is_full.at[ring])

            return walk(line, tiles.runs, block, tokens, step, None, steps)[1]

        each(body=one_tile)


@typed
def key_gradients(
    q: Float[Array, "B _ _ D"],
    k: Float[Array, "B N H D"],
    v: Float[Array, "B N H D"],
    d_out: Float[Array, "B _ _ D"],
    lse: Float32[Array, "B _ _"],
    delta: Float32[Array, "B _ _"],
    tiles: Tiles,
    first_head: Int[Array, "1"],
    *,
    sorted_rows: bool,
    tuning: Tuning,
    blocks: int,
    interpret=None,
) -> tuple[Float[Array, "B _ R D"], Float[Array, "B _ R D"]]:
    """dk and dv of each tile's rows, R = tiles * 128; rows of unused tiles are not written.

    Args:
        tiles: Which rows of k each tile takes, and which runs of q read them.
        tuning: `block` counts queries here.
        q, k, v, d_out, lse, delta, first_head, sorted_rows, blocks: As for `query_gradients`.
    """
    batch, queries, heads, dim = k.shape
    heads, queries = (q.shape[1], q.shape[2]) if sorted_rows else (heads, queries)
    kernel = functools.partial(
        _key_kernel,
        sorted_rows=sorted_rows,
        tuning=tuning,
        tiles=tiles.static,
        blocks=blocks,
        sizes=(batch, heads, queries, dim),
        interpreted=interpret is not None,
    )
    tile = plgpu.SMEM((tuning.slots, TILE, dim), k.dtype, transforms=SWIZZLED)
    ring = plgpu.SMEM((tuning.stages, tuning.block, dim), q.dtype, transforms=SWIZZLED)
    row = plgpu.SMEM((tuning.stages, tuning.block), jnp.float32)
    gradient = jax.ShapeDtypeStruct((batch, heads, tiles.count * TILE, dim), k.dtype)
    return plgpu.kernel(
        kernel,
        out_type=(gradient, gradient),
        scratch_types=[
            (tile, tile),
            (ring, ring, row, row),
            barriers(tuning.slots, 2, COMPUTE),
            barriers(tuning.stages, 2, 2, COMPUTE),
        ],
        interpret=interpret,
        **launch(blocks),
    )(q, k, v, d_out, lse, delta, tiles.table, first_head)


def _key_kernel(
    q_ref,
    k_ref,
    v_ref,
    d_out_ref,
    lse_ref,
    delta_ref,
    table_ref,
    first_head_ref,
    d_k_ref,
    d_v_ref,
    tile_smem,
    ring_smem,
    tile_barriers,
    ring_barriers,
    *,
    sorted_rows,
    tuning,
    tiles,
    blocks,
    sizes,
    interpreted,
):
    k_smem, v_smem = tile_smem
    q_smem, d_out_smem, lse_smem, delta_smem = ring_smem
    tile_full, tile_free = tile_barriers
    q_full, d_out_full, free = ring_barriers
    batch, heads, queries, dim = sizes
    block, stages, slots = tuning.block, tuning.stages, tuning.slots
    warpgroup = lax.axis_index("warpgroup")
    each = functools.partial(each_tile, table_ref, tiles=tiles, blocks=blocks, batch=batch, heads=heads)

    @pl.when(warpgroup < COMPUTE)
    def _compute():
        plgpu.set_max_registers(tuning.compute_registers, action="increase")
        mine = pl.ds(warpgroup * ROWS, ROWS)
        column_layout = plgpu.Layout.WGMMA.reduce(0)

        def one_tile(item, _, line, used, steps):
            slot = lax.rem(used, slots)
            k_tile, v_tile = k_smem.at[slot, mine], v_smem.at[slot, mine]
            plgpu.barrier_wait(tile_full.at[slot])

            def weights(scores, ring, span):
                lse = plgpu.load(lse_smem.at[ring], layout=column_layout)
                p = jnp.exp2(scores * (LOG2E / math.sqrt(dim)) - lax.broadcast_in_dim(lse, scores.shape, [1]))
                return mask_columns(p, *span, 0.0)

            def score_gradients(p, d_p, ring):
                delta = plgpu.load(delta_smem.at[ring], layout=column_layout)
                return (p * (d_p - lax.broadcast_in_dim(delta, d_p.shape, [1]))).astype(q_smem.dtype)

            def update(d_k, d_v, ring, span):
                """Adds a block of queries. Keys are the rows of all its matrices, so scores come transposed."""
                rows, gradients = q_smem.at[ring], d_out_smem.at[ring]
                if interpreted:
                    p = weights(product(k_tile, rows.transpose((1, 0)), True), ring, span)
                    d_s = score_gradients(p, product(v_tile, gradients.transpose((1, 0)), True), ring)
                    return accumulate(d_k, d_s, rows, True), accumulate(d_v, p.astype(d_s.dtype), gradients, True)

                def products(d_k_ref, d_v_ref, scores_ref, d_p_ref):
                    plgpu.wgmma(scores_ref, k_tile, rows.transpose((1, 0)))
                    plgpu.wgmma(d_p_ref, v_tile, gradients.transpose((1, 0)))
                    p = weights(plgpu.wgmma_accumulator_load(scores_ref, wait_n=1), ring, span)
                    d_s = score_gradients(p, plgpu.wgmma_accumulator_load(d_p_ref, wait_n=0), ring)
                    plgpu.wgmma(d_v_ref, p.astype(d_s.dtype), gradients)
                    plgpu.wgmma(d_k_ref, d_s, rows)

                def body(refs):
                    accumulator = plgpu.ACC((ROWS, block), jnp.float32)
                    pl.run_scoped(functools.partial(products, *refs), accumulator, accumulator)

                return pl.run_state(body)((plgpu.ACC.init(d_k), plgpu.ACC.init(d_v)))

            def step(carry, steps, _, *span):
                ring = lax.rem(steps, stages)
                plgpu.barrier_wait(q_full.at[ring])
                plgpu.barrier_wait(d_out_full.at[ring])
                carry = update(*carry, ring, span)
                plgpu.barrier_arrive(free.at[ring])
                return carry

            zeros = plgpu.layout_cast(jnp.zeros((ROWS, dim), jnp.float32), plgpu.Layout.WGMMA)
            (d_k, d_v), steps = walk(line, tiles.runs, block, queries, step, (zeros, zeros), steps)

            # Keys and values are spent: their places hold the gradients on their way out.
            k_tile[...] = (d_k * (1 / math.sqrt(dim))).astype(d_k_ref.dtype)
            v_tile[...] = d_v.astype(d_v_ref.dtype)
            plgpu.commit_smem()
            batch_index, head, tile = item
            rows = (batch_index, head, pl.ds(tile * TILE + warpgroup * ROWS, ROWS))
            plgpu.copy_smem_to_gmem(k_tile, d_k_ref.at[rows])
            plgpu.copy_smem_to_gmem(v_tile, d_v_ref.at[rows])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.barrier_arrive(tile_free.at[slot])
            return steps

        each(body=one_tile)
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == COMPUTE)
    def _copy():
        plgpu.set_max_registers(tuning.copy_registers, action="decrease")
        first_head = first_head_ref[0]

        def one_tile(item, start, line, used, steps):
            batch_index, head, _ = item
            slot = lax.rem(used, slots)
            pl.when(used >= slots)(functools.partial(plgpu.barrier_wait, tile_free.at[slot]))
            keys = (batch_index, pl.ds(start, TILE), first_head + head)
            plgpu.copy_gmem_to_smem(k_ref.at[keys], k_smem.at[slot], tile_full.at[slot])
            plgpu.copy_gmem_to_smem(v_ref.at[keys], v_smem.at[slot], tile_full.at[slot])

            def step(_, steps, row, *__):
                ring = lax.rem(steps, stages)
                pl.when(steps >= stages)(functools.partial(plgpu.barrier_wait, free.at[ring]))
                narrow = (batch_index, head, pl.ds(row, block))
                wide = narrow if sorted_rows else (batch_index, pl.ds(row, block), head)
                for source, target, vector, vectors, full in (
                    (q_ref, q_smem, lse_ref, lse_smem, q_full),
                    (d_out_ref, d_out_smem, delta_ref, delta_smem, d_out_full),
                ):
                    plgpu.copy_gmem_to_smem(source.at[wide], target.at[ring], full.at[ring])
                    plgpu.copy_gmem_to_smem(vector.at[narrow], vectors.at[ring], full.at[ring])

            return walk(line, tiles.runs, block, queries, step, None, steps)[1]

        each(body=one_tile)
