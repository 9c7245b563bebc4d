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
    COMPUTE,
    LOG2E,
    ROWS,
    SWIZZLED,
    TILE,
    Tuning,
    accumulate,
    mask_columns,
    product,
)
from moc_jax.attention.pallas_gpu.tiles import Tiles, each_tile, walk
from moc_jax.shapes import Array, Float, Float32, typed


@typed
def query_gradients(
    q: Float[Array, "B _ _ D"],
    k: Float[Array, "B N H D"],
    v: Float[Array, "B N H D"],
    d_out: Float[Array, "B _ _ D"],
    lse: Float32[Array, "B H Q"],
    delta: Float32[Array, "B H Q"],
    tiles: Tiles,
    *,
    sorted_rows: bool,
    tuning: Tuning,
    blocks: int,
    interpret=None,
) -> Float[Array, "B H R D"]:
    """dq of each tile's rows, R = tiles * 128; rows of unused tiles are not written.

    Args:
        q, d_out: In memory order, or sorted by chunk and head-major (`sorted_rows`).
        lse: Base-2 log-sum-exp over all keys of each query, in the order of q.
        delta: rowsum(d_out * out), in the order of q.
        k, v, tiles, blocks: As for `flash.forward`.
    """
    batch, tokens, heads, dim = k.shape
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
            (
                plgpu.Barrier(num_barriers=tuning.slots, num_arrivals=4),
                plgpu.Barrier(num_barriers=tuning.slots, num_arrivals=COMPUTE),
            ),
            tuple(
                plgpu.Barrier(num_barriers=tuning.stages, num_arrivals=arrivals)
                for arrivals in (1, COMPUTE, 1, COMPUTE)
            ),
        ],
        grid=(blocks,),
        grid_names=("block",),
        num_threads=COMPUTE + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )(q, k, v, d_out, lse, delta, tiles.table)


def _query_kernel(
    q_ref,
    k_ref,
    v_ref,
    d_out_ref,
    lse_ref,
    delta_ref,
    table_ref,
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
    batch, heads, walked, dim = sizes
    q_smem, d_out_smem, lse_smem, delta_smem = tile_smem
    k_smem, v_smem = ring_smem
    tile_full, tile_free = tile_barriers
    k_full, k_free, v_full, v_free = ring_barriers
    block, stages, slots = tuning.block, tuning.stages, tuning.slots
    warpgroup = lax.axis_index("warpgroup")
    each = functools.partial(each_tile, table_ref, tiles=tiles, blocks=blocks, batch=batch, heads=heads)

    @pl.when(warpgroup < COMPUTE)
    def _compute():
        plgpu.set_max_registers(232, action="increase")

        def one_tile(item, _, line, used, steps):
            slot = lax.rem(used, slots)
            mine = pl.ds(warpgroup * ROWS, ROWS)
            q_tile, d_out_tile = q_smem.at[slot, mine], d_out_smem.at[slot, mine]
            plgpu.barrier_wait(tile_full.at[slot])
            row_layout = plgpu.Layout.WGMMA.reduce(1)
            lse = plgpu.load(lse_smem.at[slot, mine], layout=row_layout)
            delta = plgpu.load(delta_smem.at[slot, mine], layout=row_layout)

            def step(d_q, steps, _, low, high):
                ring = lax.rem(steps, stages)
                plgpu.barrier_wait(k_full.at[ring])
                scores = product(q_tile, k_smem.at[ring].transpose((1, 0)), interpreted)
                p = jnp.exp2(scores * (LOG2E / math.sqrt(dim)) - lax.broadcast_in_dim(lse, scores.shape, [0]))
                p = mask_columns(p, low, high, 0.0)
                plgpu.barrier_wait(v_full.at[ring])
                d_p = product(d_out_tile, v_smem.at[ring].transpose((1, 0)), interpreted)
                plgpu.barrier_arrive(v_free.at[ring])
                d_s = (p * (d_p - lax.broadcast_in_dim(delta, d_p.shape, [0]))).astype(k_smem.dtype)
                d_q = accumulate(d_q, d_s, k_smem.at[ring], interpreted)
                plgpu.barrier_arrive(k_free.at[ring])
                return d_q

            zeros = plgpu.layout_cast(jnp.zeros((ROWS, dim), jnp.float32), plgpu.Layout.WGMMA)
            d_q, steps = walk(line, tiles.runs, block, walked, step, zeros, steps)
            # The queries are spent: their place holds the gradient on its way out.
            q_tile[...] = (d_q * (1 / math.sqrt(dim))).astype(d_q_ref.dtype)
            plgpu.commit_smem()
            batch_index, head, tile = item
            plgpu.copy_smem_to_gmem(q_tile, d_q_ref.at[batch_index, head, pl.ds(tile * TILE + warpgroup * ROWS, ROWS)])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.barrier_arrive(tile_free.at[slot])
            return steps

        each(body=one_tile)
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == COMPUTE)
    def _copy():
        plgpu.set_max_registers(40, action="decrease")

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
                keys = (batch_index, pl.ds(row, block), head)
                for source, target, is_full, is_free in (
                    (k_ref, k_smem, k_full, k_free),
                    (v_ref, v_smem, v_full, v_free),
                ):
                    pl.when(steps >= stages)(functools.partial(plgpu.barrier_wait, is_free.at[ring]))
                    plgpu.copy_gmem_to_smem(source.at[keys], target.at[ring], is_full.at[ring])

            _, steps = walk(line, tiles.runs, block, walked, step, None, steps)
            return steps

        each(body=one_tile)


@typed
def key_gradients(
    q: Float[Array, "B _ _ D"],
    k: Float[Array, "B N H D"],
    v: Float[Array, "B N H D"],
    d_out: Float[Array, "B _ _ D"],
    lse: Float32[Array, "B H Q"],
    delta: Float32[Array, "B H Q"],
    tiles: Tiles,
    *,
    sorted_rows: bool,
    tuning: Tuning,
    blocks: int,
    interpret=None,
) -> tuple[Float[Array, "B H R D"], Float[Array, "B H R D"]]:
    """dk and dv of each tile's rows, R = tiles * 128; rows of unused tiles are not written.

    Args:
        tiles: Which rows of k each tile takes, and which runs of q read them.
        tuning: `block` counts queries here.
        q, k, v, d_out, lse, delta, sorted_rows, blocks: As for `query_gradients`.
    """
    batch, _, heads, dim = k.shape
    queries = q.shape[2 if sorted_rows else 1]
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
            (
                plgpu.Barrier(num_barriers=tuning.slots, num_arrivals=2),
                plgpu.Barrier(num_barriers=tuning.slots, num_arrivals=COMPUTE),
            ),
            tuple(
                plgpu.Barrier(num_barriers=tuning.stages, num_arrivals=arrivals)
                for arrivals in (2, COMPUTE, 2, COMPUTE)
            ),
        ],
        grid=(blocks,),
        grid_names=("block",),
        num_threads=COMPUTE + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )(q, k, v, d_out, lse, delta, tiles.table)


def _key_kernel(
    q_ref,
    k_ref,
    v_ref,
    d_out_ref,
    lse_ref,
    delta_ref,
    table_ref,
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
    batch, heads, walked, dim = sizes
    k_smem, v_smem = tile_smem
    q_smem, d_out_smem, lse_smem, delta_smem = ring_smem
    tile_full, tile_free = tile_barriers
    q_full, q_free, d_out_full, d_out_free = ring_barriers
    block, stages, slots = tuning.block, tuning.stages, tuning.slots
    warpgroup = lax.axis_index("warpgroup")
    each = functools.partial(each_tile, table_ref, tiles=tiles, blocks=blocks, batch=batch, heads=heads)

    @pl.when(warpgroup < COMPUTE)
    def _compute():
        plgpu.set_max_registers(232, action="increase")

        def one_tile(item, _, line, used, steps):
            slot = lax.rem(used, slots)
            mine = pl.ds(warpgroup * ROWS, ROWS)
            k_tile, v_tile = k_smem.at[slot, mine], v_smem.at[slot, mine]
            plgpu.barrier_wait(tile_full.at[slot])
            column_layout = plgpu.Layout.WGMMA.reduce(0)

            def step(carry, steps, _, low, high):
                d_k, d_v = carry
                ring = lax.rem(steps, stages)
                plgpu.barrier_wait(q_full.at[ring])
                lse = plgpu.load(lse_smem.at[ring], layout=column_layout)
                scores = product(k_tile, q_smem.at[ring].transpose((1, 0)), interpreted)
                p = jnp.exp2(scores * (LOG2E / math.sqrt(dim)) - lax.broadcast_in_dim(lse, scores.shape, [1]))
                p = mask_columns(p, low, high, 0.0)
                plgpu.barrier_wait(d_out_full.at[ring])
                delta = plgpu.load(delta_smem.at[ring], layout=column_layout)
                d_v, d_p = _values_and_weights(d_v, p.astype(q_smem.dtype), v_tile, d_out_smem.at[ring], interpreted)
                plgpu.barrier_arrive(d_out_free.at[ring])
                d_s = (p * (d_p - lax.broadcast_in_dim(delta, d_p.shape, [1]))).astype(q_smem.dtype)
                d_k = accumulate(d_k, d_s, q_smem.at[ring], interpreted)
                plgpu.barrier_arrive(q_free.at[ring])
                return d_k, d_v

            zeros = plgpu.layout_cast(jnp.zeros((ROWS, dim), jnp.float32), plgpu.Layout.WGMMA)
            (d_k, d_v), steps = walk(line, tiles.runs, block, walked, step, (zeros, zeros), steps)
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
        plgpu.set_max_registers(40, action="decrease")

        def one_tile(item, start, line, used, steps):
            batch_index, head, _ = item
            slot = lax.rem(used, slots)

            pl.when(used >= slots)(functools.partial(plgpu.barrier_wait, tile_free.at[slot]))
            keys = (batch_index, pl.ds(start, TILE), head)
            plgpu.copy_gmem_to_smem(k_ref.at[keys], k_smem.at[slot], tile_full.at[slot])
            plgpu.copy_gmem_to_smem(v_ref.at[keys], v_smem.at[slot], tile_full.at[slot])

            def step(_, steps, row, *__):
                ring = lax.rem(steps, stages)
                rows = pl.ds(row, block)
                wide = (batch_index, head, rows) if sorted_rows else (batch_index, rows, head)
                narrow = (batch_index, head, rows)
                for source, target, vector, vectors, is_full, is_free in (
                    (q_ref, q_smem, lse_ref, lse_smem, q_full, q_free),
                    (d_out_ref, d_out_smem, delta_ref, delta_smem, d_out_full, d_out_free),
                ):
                    pl.when(steps >= stages)(functools.partial(plgpu.barrier_wait, is_free.at[ring]))
                    plgpu.copy_gmem_to_smem(source.at[wide], target.at[ring], is_full.at[ring])
                    plgpu.copy_gmem_to_smem(vector.at[narrow], vectors.at[ring], is_full.at[ring])

            _, steps = walk(line, tiles.runs, block, walked, step, None, steps)
            return steps

        each(body=one_tile)


def _values_and_weights(d_v, p, v_tile, d_out, interpreted):
    """(d_v + p @ d_out, v @ d_out^T): two products in flight at once."""
    if interpreted:
        return accumulate(d_v, p, d_out, interpreted), product(v_tile, d_out.transpose((1, 0)), interpreted)

    def both(refs):
        d_v_ref, d_p_ref = refs
        plgpu.wgmma(d_v_ref, p, d_out)
        plgpu.wgmma(d_p_ref, v_tile, d_out.transpose((1, 0)))

    zeros = plgpu.layout_cast(jnp.zeros(p.shape, jnp.float32), plgpu.Layout.WGMMA)
    return pl.run_state(both)((plgpu.ACC.init(d_v), plgpu.ACC.init(zeros)))
