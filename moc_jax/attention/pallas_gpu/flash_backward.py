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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moc_jax.attention.pallas_gpu.flash import (
    LOG2E,
    SWIZZLED,
    accumulate,
    barriers,
    copy_keys,
    launch,
    mask_columns,
    product,
    split_roles,
    tile_by_tile,
)
from moc_jax.attention.pallas_gpu.tiles import COMPUTE, ROWS, TILE, Job, Tiles, Tuning, walk
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
    job = Job.of(
        q, k, tiles, over_keys=True, sorted_rows=sorted_rows, tuning=tuning, blocks=blocks, interpret=interpret
    )
    tile = plgpu.SMEM((tuning.slots, TILE, job.dim), q.dtype, transforms=SWIZZLED)
    row = plgpu.SMEM((tuning.slots, TILE), jnp.float32)
    ring = plgpu.SMEM((tuning.stages, tuning.block, job.dim), k.dtype, transforms=SWIZZLED)
    return plgpu.kernel(
        functools.partial(_query_kernel, job=job),
        out_type=jax.ShapeDtypeStruct((job.batch, job.heads, tiles.count * TILE, job.dim), q.dtype),
        scratch_types=[
            (tile, tile, row, row),
            (ring, ring),
            barriers(tuning.slots, 4, COMPUTE),
            barriers(tuning.stages, 1, COMPUTE, 1, COMPUTE),
        ],
        interpret=interpret,
        **launch("moc_query_gradients", blocks),
    )(q, k, v, d_out, lse, delta, tiles.table, first_head)


class _QueryRefs(NamedTuple):
    q: Any
    k: Any
    v: Any
    d_out: Any
    lse: Any
    delta: Any
    table: Any
    first_head: Any
    d_q: Any
    tile_smem: Any  # queries, output gradients, log-sum-exp, delta
    ring_smem: Any  # keys, values
    tile_barriers: Any  # full, free
    ring_barriers: Any  # full and free of keys, then of values


def _query_kernel(*refs, job: Job):
    refs = _QueryRefs(*refs)
    split_roles(refs, job, functools.partial(tile_by_tile, _query_tile), _copy_for_queries)


def _query_tile(refs: _QueryRefs, job: Job, warpgroup, item, _, line, used, first):
    """One warpgroup's half of a tile of queries."""
    q_smem, d_out_smem, lse_smem, delta_smem = refs.tile_smem
    k_smem, _ = refs.ring_smem
    (tile_full, tile_free), (k_full, k_free, v_full, v_free) = refs.tile_barriers, refs.ring_barriers
    slot, mine = lax.rem(used, job.tuning.slots), pl.ds(warpgroup * ROWS, ROWS)
    q_tile, d_out_tile = q_smem.at[slot, mine], d_out_smem.at[slot, mine]
    plgpu.barrier_wait(tile_full.at[slot])
    row_layout = plgpu.Layout.WGMMA.reduce(1)
    lse = plgpu.load(lse_smem.at[slot, mine], layout=row_layout)
    delta = plgpu.load(delta_smem.at[slot, mine], layout=row_layout)

    def weights(scores, span):
        p = jnp.exp2(scores * (LOG2E / math.sqrt(job.dim)) - lax.broadcast_in_dim(lse, scores.shape, [0]))
        return mask_columns(p, span, 0.0)

    def score_gradients(p, d_p):
        return (p * (d_p - lax.broadcast_in_dim(delta, d_p.shape, [0]))).astype(k_smem.dtype)

    def step(carry, steps, _, *span):
        # Before the first block there is none: its own keys are multiplied with zeros.
        now, before = (lax.rem(s, job.tuning.stages) for s in (steps, jnp.maximum(steps - 1, first)))
        plgpu.barrier_wait(k_full.at[now])
        plgpu.barrier_wait(v_full.at[now])
        carry = _overlap(refs, job, q_tile, d_out_tile, carry, now, before, span, weights, score_gradients)
        plgpu.barrier_arrive(v_free.at[now])
        pl.when(steps > first)(functools.partial(plgpu.barrier_arrive, k_free.at[before]))
        return carry

    d_q = plgpu.layout_cast(jnp.zeros((ROWS, job.dim), jnp.float32), plgpu.Layout.WGMMA)
    d_s = plgpu.layout_cast(jnp.zeros((ROWS, job.tuning.block), k_smem.dtype), plgpu.Layout.WGMMA)
    (d_q, d_s), steps = walk(line, job, step, (d_q, d_s), first)
    last = lax.rem(steps - 1, job.tuning.stages)
    d_q = accumulate(d_q, d_s, k_smem.at[last], job.interpreted)
    plgpu.barrier_arrive(k_free.at[last])

    # The queries are spent: their place holds the gradient on its way out.
    q_tile[...] = (d_q * (1 / math.sqrt(job.dim))).astype(refs.d_q.dtype)
    plgpu.commit_smem()
    scene, head, tile = item
    plgpu.copy_smem_to_gmem(q_tile, refs.d_q.at[scene, head, pl.ds(tile * TILE + warpgroup * ROWS, ROWS)])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    plgpu.barrier_arrive(tile_free.at[slot])
    return steps


def _overlap(refs: _QueryRefs, job: Job, q_tile, d_out_tile, carry, now, before, span, weights, score_gradients):
    """The score gradients of one block, while those of the block before are multiplied with its keys."""
    d_q, d_s = carry
    k_smem, v_smem = refs.ring_smem
    keys, values = k_smem.at[now].transpose((1, 0)), v_smem.at[now].transpose((1, 0))
    if job.interpreted:
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
        accumulator = plgpu.ACC((ROWS, job.tuning.block), jnp.float32)
        d_s_ref[...] = pl.run_scoped(functools.partial(products, d_q_ref), accumulator, accumulator)

    return pl.run_state(body)((plgpu.ACC.init(d_q), d_s))


def _copy_for_queries(refs: _QueryRefs, job: Job, first_head, item, start, line, used, steps):
    """Brings a tile's queries and what belongs to them, then keys and values block after block."""
    tile_full, tile_free = refs.tile_barriers
    scene, head, _ = item
    slot, rows = lax.rem(used, job.tuning.slots), pl.ds(start, TILE)
    pl.when(used >= job.tuning.slots)(functools.partial(plgpu.barrier_wait, tile_free.at[slot]))
    wide, narrow = job.query_rows(scene, head, rows), (scene, head, rows)
    sources = refs.q.at[wide], refs.d_out.at[wide], refs.lse.at[narrow], refs.delta.at[narrow]
    for source, target in zip(sources, refs.tile_smem, strict=True):
        plgpu.copy_gmem_to_smem(source, target.at[slot], tile_full.at[slot])

    return copy_keys(refs, job, scene, first_head + head, line, steps)


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
    job = Job.of(
        q, k, tiles, over_keys=False, sorted_rows=sorted_rows, tuning=tuning, blocks=blocks, interpret=interpret
    )
    tile = plgpu.SMEM((tuning.slots, TILE, job.dim), k.dtype, transforms=SWIZZLED)
    ring = plgpu.SMEM((tuning.stages, tuning.block, job.dim), q.dtype, transforms=SWIZZLED)
    row = plgpu.SMEM((tuning.stages, tuning.block), jnp.float32)
    gradient = jax.ShapeDtypeStruct((job.batch, job.heads, tiles.count * TILE, job.dim), k.dtype)
    return plgpu.kernel(
        functools.partial(_key_kernel, job=job),
        out_type=(gradient, gradient),
        scratch_types=[
            (tile, tile),
            (ring, ring, row, row),
            barriers(tuning.slots, 2, COMPUTE),
            barriers(tuning.stages, 2, 2, COMPUTE),
        ],
        interpret=interpret,
        **launch("moc_key_gradients", blocks),
    )(q, k, v, d_out, lse, delta, tiles.table, first_head)


class _KeyRefs(NamedTuple):
    q: Any
    k: Any
    v: Any
    d_out: Any
    lse: Any
    delta: Any
    table: Any
    first_head: Any
    d_k: Any
    d_v: Any
    tile_smem: Any  # keys, values
    ring_smem: Any  # queries, output gradients, log-sum-exp, delta
    tile_barriers: Any  # full, free
    ring_barriers: Any  # full of queries and log-sum-exp, full of output gradients and delta, free of all


def _key_kernel(*refs, job: Job):
    refs = _KeyRefs(*refs)
    split_roles(refs, job, functools.partial(tile_by_tile, _key_tile), _copy_for_keys)


def _key_tile(refs: _KeyRefs, job: Job, warpgroup, item, _, line, used, steps):
    """One warpgroup's half of a tile of keys."""
    k_smem, v_smem = refs.tile_smem
    (tile_full, tile_free), (q_full, d_out_full, free) = refs.tile_barriers, refs.ring_barriers
    slot, mine = lax.rem(used, job.tuning.slots), pl.ds(warpgroup * ROWS, ROWS)
    k_tile, v_tile = k_smem.at[slot, mine], v_smem.at[slot, mine]
    plgpu.barrier_wait(tile_full.at[slot])

    def step(carry, steps, _, *span):
        ring = lax.rem(steps, job.tuning.stages)
        plgpu.barrier_wait(q_full.at[ring])
        plgpu.barrier_wait(d_out_full.at[ring])
        carry = _add_queries(refs, job, k_tile, v_tile, carry, ring, span)
        plgpu.barrier_arrive(free.at[ring])
        return carry

    zeros = plgpu.layout_cast(jnp.zeros((ROWS, job.dim), jnp.float32), plgpu.Layout.WGMMA)
    (d_k, d_v), steps = walk(line, job, step, (zeros, zeros), steps)

    # Keys and values are spent: their places hold the gradients on their way out.
    k_tile[...] = (d_k * (1 / math.sqrt(job.dim))).astype(refs.d_k.dtype)
    v_tile[...] = d_v.astype(refs.d_v.dtype)
    plgpu.commit_smem()
    scene, head, tile = item
    rows = (scene, head, pl.ds(tile * TILE + warpgroup * ROWS, ROWS))
    plgpu.copy_smem_to_gmem(k_tile, refs.d_k.at[rows])
    plgpu.copy_smem_to_gmem(v_tile, refs.d_v.at[rows])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    plgpu.barrier_arrive(tile_free.at[slot])
    return steps


def _add_queries(refs: _KeyRefs, job: Job, k_tile, v_tile, carry, ring, span):
    """dk and dv with a block of queries. Keys are the rows of all matrices here, so scores come transposed."""
    d_k, d_v = carry
    q_smem, d_out_smem, lse_smem, delta_smem = refs.ring_smem
    rows, gradients = q_smem.at[ring], d_out_smem.at[ring]
    column_layout = plgpu.Layout.WGMMA.reduce(0)

    def weights(scores):
        lse = plgpu.load(lse_smem.at[ring], layout=column_layout)
        p = jnp.exp2(scores * (LOG2E / math.sqrt(job.dim)) - lax.broadcast_in_dim(lse, scores.shape, [1]))
        return mask_columns(p, span, 0.0)

    def score_gradients(p, d_p):
        delta = plgpu.load(delta_smem.at[ring], layout=column_layout)
        return (p * (d_p - lax.broadcast_in_dim(delta, d_p.shape, [1]))).astype(q_smem.dtype)

    if job.interpreted:
        p = weights(product(k_tile, rows.transpose((1, 0)), True))
        d_s = score_gradients(p, product(v_tile, gradients.transpose((1, 0)), True))
        return accumulate(d_k, d_s, rows, True), accumulate(d_v, p.astype(d_s.dtype), gradients, True)

    def products(d_k_ref, d_v_ref, scores_ref, d_p_ref):
        plgpu.wgmma(scores_ref, k_tile, rows.transpose((1, 0)))
        plgpu.wgmma(d_p_ref, v_tile, gradients.transpose((1, 0)))
        p = weights(plgpu.wgmma_accumulator_load(scores_ref, wait_n=1))
        d_s = score_gradients(p, plgpu.wgmma_accumulator_load(d_p_ref, wait_n=0))
        plgpu.wgmma(d_v_ref, p.astype(d_s.dtype), gradients)
        plgpu.wgmma(d_k_ref, d_s, rows)

    def body(refs):
        accumulator = plgpu.ACC((ROWS, job.tuning.block), jnp.float32)
        pl.run_scoped(functools.partial(products, *refs), accumulator, accumulator)

    return pl.run_state(body)((plgpu.ACC.init(d_k), plgpu.ACC.init(d_v)))


def _copy_for_keys(refs: _KeyRefs, job: Job, first_head, item, start, line, used, steps):
    """Brings a tile's keys and values, then queries and what belongs to them block after block."""
    (tile_full, tile_free), (q_full, d_out_full, free) = refs.tile_barriers, refs.ring_barriers
    scene, head, _ = item
    slot = lax.rem(used, job.tuning.slots)
    pl.when(used >= job.tuning.slots)(functools.partial(plgpu.barrier_wait, tile_free.at[slot]))
    keys = (scene, pl.ds(start, TILE), first_head + head)
    for source, target in zip((refs.k, refs.v), refs.tile_smem, strict=True):
        plgpu.copy_gmem_to_smem(source.at[keys], target.at[slot], tile_full.at[slot])

    def step(_, steps, row, *__):
        ring, rows = lax.rem(steps, job.tuning.stages), pl.ds(row, job.tuning.block)
        pl.when(steps >= job.tuning.stages)(functools.partial(plgpu.barrier_wait, free.at[ring]))
        wide, narrow = job.query_rows(scene, head, rows), (scene, head, rows)
        sources = refs.q.at[wide], refs.d_out.at[wide], refs.lse.at[narrow], refs.delta.at[narrow]
        fulls = q_full, d_out_full, q_full, d_out_full
        for source, target, full in zip(sources, refs.ring_smem, fulls, strict=True):
            plgpu.copy_gmem_to_smem(source, target.at[ring], full.at[ring])

    return walk(line, job, step, None, steps)[1]
