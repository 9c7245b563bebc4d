"""Gradients of attention on Hopper, from the output's log-sum-exp: two kernels, no atomics, the same bits on every run.

With the final log-sum-exp L of a query, over all its keys, every part of its attention knows the final weights:

    p = exp(s - L)     dv = p^T do     ds = p (do v^T - delta)     dq = ds k / sqrt(D)     dk = ds^T q / sqrt(D)

with delta = rowsum(do o). So anchors and picks add up, and no gradient passes through the merge. `query_gradients`
keeps a tile of queries and walks runs of keys; `key_gradients` keeps a tile of keys and walks runs of queries. Both
form the scores again: 7 matrix products instead of 5, and in return no sum crosses thread blocks.

FLOPs: 6 * D and 8 * D per (query, key), padded to tiles and blocks.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moc_jax.attention.layout import LOG2E, Tiles
from moc_jax.attention.pallas_gpu.device import COMPUTE, Hopper
from moc_jax.attention.pallas_gpu.multiprocessor import (
    Refs,
    copy_keys,
    copy_tile,
    launch,
    mask_columns,
    multiplied,
    multiply,
    result,
    ring_rows,
    tile_by_tile,
    tile_rows,
    with_accumulators,
    with_scores,
)
from moc_jax.attention.pallas_gpu.tiles import ROWS, TILE, Job, walk
from moc_jax.shapes import Array, Float, Float32, Int


class Inputs(NamedTuple):
    """What gradients follow from. Rows of queries are in memory order, or sorted by chunk (`sorted_rows`)."""

    q: Float[Array, "B _ _ D"]  # [B, Q, H, D]; or [B, heads, J, D], some of the heads, from `first_head` on
    k: Float[Array, "B N H D"]
    v: Float[Array, "B N H D"]
    d_out: Float[Array, "B _ _ D"]  # as q
    lse: Float32[Array, "B _ _"]  # base-2 log-sum-exp over all keys of each query [B, heads, rows of q]
    delta: Float32[Array, "B _ _"]  # rowsum(d_out * out), likewise
    first_head: Int[Array, "1"]
    sorted_rows: bool


def query_gradients(inputs: Inputs, tiles: Tiles, backend: Hopper) -> Float[Array, "B _ R D"]:
    """dq of each tile's rows, R = tiles * 128; rows of unused tiles are not written.

    `tiles`: which rows of q each tile takes, and which runs of keys they read.
    """
    q, k = inputs.q, inputs.k
    tiling = backend.tiles.query_gradients
    job = Job.of(q, k, tiles, backend, tiling, over_keys=True, sorted_rows=inputs.sorted_rows)
    row = plgpu.SMEM((tiling.buffers, TILE), jnp.float32)
    return launch(
        "moc_query_gradients",
        tile_by_tile(_query_tile),
        _copy_for_queries,
        job,
        inputs[:6],
        tiles,
        inputs.first_head,
        jax.ShapeDtypeStruct((job.batch, job.heads, tiles.count * TILE, job.dim), q.dtype),
        tile=(tile_rows(job, q), tile_rows(job, q), row, row),  # queries, output gradients, log-sum-exp, delta
        ring=(ring_rows(job, k), ring_rows(job, k)),  # keys, values
        # Of a tile, full and free; of a block, full and free of keys, then of values.
        arrivals=((4, COMPUTE), (1, COMPUTE, 1, COMPUTE)),
    )


def key_gradients(
    inputs: Inputs, tiles: Tiles, backend: Hopper
) -> tuple[Float[Array, "B _ R D"], Float[Array, "B _ R D"]]:
    """dk and dv of each tile's rows, R = tiles * 128; rows of unused tiles are not written.

    `tiles`: which rows of k each tile takes, and which runs of q read them. Blocks are of queries here.
    """
    q, k = inputs.q, inputs.k
    tiling = backend.tiles.key_gradients
    job = Job.of(q, k, tiles, backend, tiling, over_keys=False, sorted_rows=inputs.sorted_rows)
    row = plgpu.SMEM((tiling.stages, tiling.block), jnp.float32)
    gradient = jax.ShapeDtypeStruct((job.batch, job.heads, tiles.count * TILE, job.dim), k.dtype)
    return launch(
        "moc_key_gradients",
        tile_by_tile(_key_tile),
        _copy_for_keys,
        job,
        inputs[:6],
        tiles,
        inputs.first_head,
        (gradient, gradient),
        tile=(tile_rows(job, k), tile_rows(job, k)),  # keys, values
        ring=(ring_rows(job, q), ring_rows(job, q), row, row),  # queries, output gradients, log-sum-exp, delta
        # Of a tile, full and free; of a block, full of queries and log-sum-exp, of output gradients and delta, free.
        arrivals=((2, COMPUTE), (2, 2, COMPUTE)),
    )


def _query_tile(refs: Refs, job: Job, warpgroup, item, _, line, used, first):
    """One warpgroup's half of a tile of queries: while one block's weights are found, the gradients of the block before
    are multiplied with its keys."""
    k_smem_ref, _ = refs.ring_smem_refs
    (tile_full, _), (k_full, k_free, v_full, v_free) = refs.tile_barrier_refs, refs.ring_barrier_refs
    buffer, mine = lax.rem(used, job.tiling.buffers), pl.ds(warpgroup * ROWS, ROWS)
    q_smem_ref, d_out_smem_ref, lse_smem_ref, delta_smem_ref = (ref.at[buffer, mine] for ref in refs.tile_smem_refs)
    plgpu.barrier_wait(tile_full.at[buffer])
    lse, delta = (plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(1)) for ref in (lse_smem_ref, delta_smem_ref))

    def step(carry, steps, _, *span):
        d_q, d_s = carry
        # Before the first block there is none: its own keys are multiplied with zeros.
        now, before = (lax.rem(s, job.tiling.stages) for s in (steps, jnp.maximum(steps - 1, first)))
        plgpu.barrier_wait(k_full.at[now])
        plgpu.barrier_wait(v_full.at[now])
        keys, values = (ref.at[now].transpose((1, 0)) for ref in refs.ring_smem_refs)

        def products(d_q_ref, scores_ref, d_p_ref):
            multiply(scores_ref, q_smem_ref, keys)
            multiply(d_p_ref, d_out_smem_ref, values)
            multiply(d_q_ref, d_s, k_smem_ref.at[before])
            p = _weights(result(scores_ref, pending=2), lse, span, job, axis=0)
            return _score_gradients(p, result(d_p_ref, pending=1), delta, axis=0).astype(d_s.dtype)

        def block(d_q_ref, d_s_ref):
            d_s_ref[...] = with_scores(functools.partial(products, d_q_ref), job, 2)

        carry = with_accumulators(block, job, [d_q], [d_s])
        plgpu.barrier_arrive(v_free.at[now])
        pl.when(steps > first)(functools.partial(plgpu.barrier_arrive, k_free.at[before]))
        return carry

    d_q = plgpu.layout_cast(jnp.zeros((ROWS, job.dim), jnp.float32), plgpu.Layout.WGMMA)
    d_s = plgpu.layout_cast(jnp.zeros((ROWS, job.tiling.block), k_smem_ref.dtype), plgpu.Layout.WGMMA)
    (d_q, d_s), steps = walk(line, job, step, (d_q, d_s), first)
    last = lax.rem(steps - 1, job.tiling.stages)
    d_q = multiplied(d_q, d_s, k_smem_ref.at[last], job)
    plgpu.barrier_arrive(k_free.at[last])
    _write(refs, warpgroup, item, buffer, d_q * (1 / math.sqrt(job.dim)))
    return steps


def _key_tile(refs: Refs, job: Job, warpgroup, item, _, line, used, steps):
    """One warpgroup's half of a tile of keys. Keys are the rows of all matrices here, so scores come transposed."""
    (tile_full, _), (q_full, d_out_full, free) = refs.tile_barrier_refs, refs.ring_barrier_refs
    buffer, mine = lax.rem(used, job.tiling.buffers), pl.ds(warpgroup * ROWS, ROWS)
    k_smem_ref, v_smem_ref = (ref.at[buffer, mine] for ref in refs.tile_smem_refs)
    plgpu.barrier_wait(tile_full.at[buffer])

    def step(carry, steps, _, *span):
        ring = lax.rem(steps, job.tiling.stages)
        plgpu.barrier_wait(q_full.at[ring])
        plgpu.barrier_wait(d_out_full.at[ring])
        q_smem_ref, d_out_smem_ref, lse_smem_ref, delta_smem_ref = (ref.at[ring] for ref in refs.ring_smem_refs)
        load = functools.partial(plgpu.load, layout=plgpu.Layout.WGMMA.reduce(0))

        def products(d_k_ref, d_v_ref, scores_ref, d_p_ref):
            multiply(scores_ref, k_smem_ref, q_smem_ref.transpose((1, 0)))
            multiply(d_p_ref, v_smem_ref, d_out_smem_ref.transpose((1, 0)))
            p = _weights(result(scores_ref, pending=1), load(lse_smem_ref), span, job, axis=1)
            d_s = _score_gradients(p, result(d_p_ref, pending=0), load(delta_smem_ref), axis=1)
            multiply(d_v_ref, p.astype(q_smem_ref.dtype), d_out_smem_ref)
            multiply(d_k_ref, d_s.astype(q_smem_ref.dtype), q_smem_ref)

        def block(*refs):
            with_scores(functools.partial(products, *refs), job, 2)

        carry = with_accumulators(block, job, carry)
        plgpu.barrier_arrive(free.at[ring])
        return carry

    zeros = plgpu.layout_cast(jnp.zeros((ROWS, job.dim), jnp.float32), plgpu.Layout.WGMMA)
    (d_k, d_v), steps = walk(line, job, step, (zeros, zeros), steps)
    _write(refs, warpgroup, item, buffer, d_k * (1 / math.sqrt(job.dim)), d_v)
    return steps


def _weights(scores, lse, span, job: Job, axis: int):
    p = jnp.exp2(scores * (LOG2E / math.sqrt(job.dim)) - lax.broadcast_in_dim(lse, scores.shape, [axis]))
    return mask_columns(p, span, 0.0)


def _score_gradients(p, d_p, delta, axis: int):
    return p * (d_p - lax.broadcast_in_dim(delta, d_p.shape, [axis]))


def _write(refs: Refs, warpgroup, item, buffer, *gradients):
    """Gradients leave through the places of what they are of, which is spent."""
    scene, head, tile = item
    mine, rows = pl.ds(warpgroup * ROWS, ROWS), pl.ds(tile * TILE + warpgroup * ROWS, ROWS)
    smem_refs = [ref.at[buffer, mine] for ref in refs.tile_smem_refs[: len(gradients)]]
    for smem_ref, gradient in zip(smem_refs, gradients, strict=True):
        smem_ref[...] = gradient.astype(smem_ref.dtype)
    plgpu.commit_smem()
    for smem_ref, gmem_ref in zip(smem_refs, refs.output_gmem_refs, strict=True):
        plgpu.copy_smem_to_gmem(smem_ref, gmem_ref.at[scene, head, rows])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    plgpu.barrier_arrive(refs.tile_barrier_refs[1].at[buffer])


def _copy_for_queries(refs: Refs, job: Job, first_head, item, start, line, used, steps):
    """Brings a tile's queries and what belongs to them, then keys and values block after block."""
    scene, head, _ = item
    copy_tile(refs, job, _of_queries(refs, job, scene, head, pl.ds(start, TILE)), used)
    return copy_keys(refs, job, scene, first_head + head, line, steps)


def _copy_for_keys(refs: Refs, job: Job, first_head, item, start, line, used, steps):
    """Brings a tile's keys and values, then queries and what belongs to them block after block."""
    q_full, d_out_full, free = refs.ring_barrier_refs
    scene, head, _ = item
    copy_tile(
        refs, job, [ref.at[scene, pl.ds(start, TILE), first_head + head] for ref in refs.input_gmem_refs[1:3]], used
    )

    def step(_, steps, row, *__):
        ring, rows = lax.rem(steps, job.tiling.stages), pl.ds(row, job.tiling.block)
        pl.when(steps >= job.tiling.stages)(functools.partial(plgpu.barrier_wait, free.at[ring]))
        sources, fulls = _of_queries(refs, job, scene, head, rows), (q_full, d_out_full, q_full, d_out_full)
        for source, target, full in zip(sources, refs.ring_smem_refs, fulls, strict=True):
            plgpu.copy_gmem_to_smem(source, target.at[ring], full.at[ring])

    return walk(line, job, step, None, steps)[1]


def _of_queries(refs: Refs, job: Job, scene, head, rows):
    """Rows of queries, output gradients, log-sum-exp and delta."""
    q_gmem_ref, _, _, d_out_gmem_ref, lse_gmem_ref, delta_gmem_ref = refs.input_gmem_refs
    wide, narrow = job.query_rows(scene, head, rows), (scene, head, rows)
    return q_gmem_ref.at[wide], d_out_gmem_ref.at[wide], lse_gmem_ref.at[narrow], delta_gmem_ref.at[narrow]
