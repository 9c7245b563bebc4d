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
    copy_keys,
    launch,
    mask_columns,
    multiplied,
    multiply,
    result,
    ring_rows,
    split_roles,
    tile_by_tile,
    tile_rows,
    with_accumulators,
    with_scores,
)
from moc_jax.attention.pallas_gpu.tiles import ROWS, TILE, Job, Ref, walk
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
    backend: Hopper,
    *,
    sorted_rows: bool,
) -> Float[Array, "B _ R D"]:
    """dq of each tile's rows, R = tiles * 128; rows of unused tiles are not written.

    Args:
        q, d_out: In memory order [B, Q, H, D], or sorted by chunk [B, heads, S, D] (`sorted_rows`): some of the heads,
            from `first_head` on.
        lse: Base-2 log-sum-exp over all keys of each query [B, heads, rows of q].
        delta: rowsum(d_out * out), likewise.
        k, v, tiles: As for `flash.forward`.
    """
    job = Job.of(q, k, tiles, backend, backend.tiles.query_gradients, over_keys=True, sorted_rows=sorted_rows)
    row = plgpu.SMEM((job.tiling.slots, TILE), jnp.float32)
    return launch(
        "moc_query_gradients",
        functools.partial(_kernel, compute=functools.partial(tile_by_tile, _query_tile), copy=_copy_for_queries),
        job,
        (q, k, v, d_out, lse, delta, tiles.table, first_head),
        jax.ShapeDtypeStruct((job.batch, job.heads, tiles.count * TILE, job.dim), q.dtype),
        tile=(tile_rows(job, q), tile_rows(job, q), row, row),
        ring=(ring_rows(job, k), ring_rows(job, k)),
        tile_barriers=(4, COMPUTE),
        ring_barriers=(1, COMPUTE, 1, COMPUTE),
    )


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
    backend: Hopper,
    *,
    sorted_rows: bool,
) -> tuple[Float[Array, "B _ R D"], Float[Array, "B _ R D"]]:
    """dk and dv of each tile's rows, R = tiles * 128; rows of unused tiles are not written.

    Args:
        tiles: Which rows of k each tile takes, and which runs of q read them. Blocks are of queries here.
        q, k, v, d_out, lse, delta, first_head, sorted_rows: As for `query_gradients`.
    """
    job = Job.of(q, k, tiles, backend, backend.tiles.key_gradients, over_keys=False, sorted_rows=sorted_rows)
    row = plgpu.SMEM((job.tiling.stages, job.tiling.block), jnp.float32)
    gradient = jax.ShapeDtypeStruct((job.batch, job.heads, tiles.count * TILE, job.dim), k.dtype)
    return launch(
        "moc_key_gradients",
        functools.partial(_kernel, compute=functools.partial(tile_by_tile, _key_tile), copy=_copy_for_keys),
        job,
        (q, k, v, d_out, lse, delta, tiles.table, first_head),
        (gradient, gradient),
        tile=(tile_rows(job, k), tile_rows(job, k)),
        ring=(ring_rows(job, q), ring_rows(job, q), row, row),
        tile_barriers=(2, COMPUTE),
        ring_barriers=(2, 2, COMPUTE),
    )


class _Refs(NamedTuple):
    q_gmem_ref: Ref
    k_gmem_ref: Ref
    v_gmem_ref: Ref
    d_out_gmem_ref: Ref
    lse_gmem_ref: Ref
    delta_gmem_ref: Ref
    table_gmem_ref: Ref
    first_head_gmem_ref: Ref
    gradient_gmem_refs: tuple[Ref, ...]  # of queries; or of keys and values
    tile_smem_refs: tuple[Ref, ...]  # queries, output gradients, log-sum-exp, delta; or keys, values
    ring_smem_refs: tuple[Ref, ...]  # the other way round
    tile_barrier_refs: tuple[Ref, ...]  # full, free
    # Full and free of keys, then of values; or full of queries and log-sum-exp, of output gradients and delta, free.
    ring_barrier_refs: tuple[Ref, ...]


def _kernel(*refs: Ref, job: Job, compute, copy):
    names = _Refs._fields
    inputs, scratch = dict(zip(names[:8], refs[:8], strict=True)), dict(zip(names[-4:], refs[-4:], strict=True))
    split_roles(_Refs(**inputs, gradient_gmem_refs=refs[8:-4], **scratch), job, compute, copy)


def _query_tile(refs: _Refs, job: Job, warpgroup, item, _, line, used, first):
    """One warpgroup's half of a tile of queries."""
    q_smem_ref, d_out_smem_ref, lse_smem_ref, delta_smem_ref = refs.tile_smem_refs
    k_smem_ref, _ = refs.ring_smem_refs
    (tile_full, tile_free), (k_full, k_free, v_full, v_free) = refs.tile_barrier_refs, refs.ring_barrier_refs
    slot, mine = lax.rem(used, job.tiling.slots), pl.ds(warpgroup * ROWS, ROWS)
    q_tile_smem_ref, d_out_tile_smem_ref = q_smem_ref.at[slot, mine], d_out_smem_ref.at[slot, mine]
    plgpu.barrier_wait(tile_full.at[slot])
    row_layout = plgpu.Layout.WGMMA.reduce(1)
    lse = plgpu.load(lse_smem_ref.at[slot, mine], layout=row_layout)
    delta = plgpu.load(delta_smem_ref.at[slot, mine], layout=row_layout)

    def weights(scores, span):
        p = jnp.exp2(scores * (LOG2E / math.sqrt(job.dim)) - lax.broadcast_in_dim(lse, scores.shape, [0]))
        return mask_columns(p, span, 0.0)

    def score_gradients(p, d_p):
        return (p * (d_p - lax.broadcast_in_dim(delta, d_p.shape, [0]))).astype(k_smem_ref.dtype)

    def step(carry, steps, _, *span):
        # Before the first block there is none: its own keys are multiplied with zeros.
        now, before = (lax.rem(s, job.tiling.stages) for s in (steps, jnp.maximum(steps - 1, first)))
        plgpu.barrier_wait(k_full.at[now])
        plgpu.barrier_wait(v_full.at[now])
        carry = _overlap(
            refs, job, q_tile_smem_ref, d_out_tile_smem_ref, carry, now, before, span, weights, score_gradients
        )
        plgpu.barrier_arrive(v_free.at[now])
        pl.when(steps > first)(functools.partial(plgpu.barrier_arrive, k_free.at[before]))
        return carry

    d_q = plgpu.layout_cast(jnp.zeros((ROWS, job.dim), jnp.float32), plgpu.Layout.WGMMA)
    d_s = plgpu.layout_cast(jnp.zeros((ROWS, job.tiling.block), k_smem_ref.dtype), plgpu.Layout.WGMMA)
    (d_q, d_s), steps = walk(line, job, step, (d_q, d_s), first)
    last = lax.rem(steps - 1, job.tiling.stages)
    d_q = multiplied(d_q, d_s, k_smem_ref.at[last], job)
    plgpu.barrier_arrive(k_free.at[last])

    (d_q_gmem_ref,) = refs.gradient_gmem_refs
    # The queries are spent: their place holds the gradient on its way out.
    q_tile_smem_ref[...] = (d_q * (1 / math.sqrt(job.dim))).astype(d_q_gmem_ref.dtype)
    plgpu.commit_smem()
    scene, head, tile = item
    plgpu.copy_smem_to_gmem(q_tile_smem_ref, d_q_gmem_ref.at[scene, head, pl.ds(tile * TILE + warpgroup * ROWS, ROWS)])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    plgpu.barrier_arrive(tile_free.at[slot])
    return steps


def _overlap(
    refs: _Refs, job: Job, q_tile_smem_ref, d_out_tile_smem_ref, carry, now, before, span, weights, score_gradients
):
    """The score gradients of one block, while those of the block before are multiplied with its keys."""
    d_q, d_s = carry
    k_smem_ref, v_smem_ref = refs.ring_smem_refs
    keys, values = k_smem_ref.at[now].transpose((1, 0)), v_smem_ref.at[now].transpose((1, 0))

    def products(d_q_ref, scores_ref, d_p_ref):
        multiply(scores_ref, q_tile_smem_ref, keys)
        multiply(d_p_ref, d_out_tile_smem_ref, values)
        multiply(d_q_ref, d_s, k_smem_ref.at[before])
        p = weights(result(scores_ref, pending=2), span)
        return score_gradients(p, result(d_p_ref, pending=1))

    def block(d_q_ref, d_s_ref):
        d_s_ref[...] = with_scores(functools.partial(products, d_q_ref), job, 2)

    return with_accumulators(block, job, [d_q], [d_s])


def _copy_for_queries(refs: _Refs, job: Job, first_head, item, start, line, used, steps):
    """Brings a tile's queries and what belongs to them, then keys and values block after block."""
    tile_full, tile_free = refs.tile_barrier_refs
    scene, head, _ = item
    slot, rows = lax.rem(used, job.tiling.slots), pl.ds(start, TILE)
    pl.when(used >= job.tiling.slots)(functools.partial(plgpu.barrier_wait, tile_free.at[slot]))
    wide, narrow = job.query_rows(scene, head, rows), (scene, head, rows)
    sources = (
        refs.q_gmem_ref.at[wide],
        refs.d_out_gmem_ref.at[wide],
        refs.lse_gmem_ref.at[narrow],
        refs.delta_gmem_ref.at[narrow],
    )
    for source, target in zip(sources, refs.tile_smem_refs, strict=True):
        plgpu.copy_gmem_to_smem(source, target.at[slot], tile_full.at[slot])

    return copy_keys(refs, job, scene, first_head + head, line, steps)


def _key_tile(refs: _Refs, job: Job, warpgroup, item, _, line, used, steps):
    """One warpgroup's half of a tile of keys."""
    k_smem_ref, v_smem_ref = refs.tile_smem_refs
    (tile_full, tile_free), (q_full, d_out_full, free) = refs.tile_barrier_refs, refs.ring_barrier_refs
    slot, mine = lax.rem(used, job.tiling.slots), pl.ds(warpgroup * ROWS, ROWS)
    k_tile_smem_ref, v_tile_smem_ref = k_smem_ref.at[slot, mine], v_smem_ref.at[slot, mine]
    plgpu.barrier_wait(tile_full.at[slot])

    def step(carry, steps, _, *span):
        ring = lax.rem(steps, job.tiling.stages)
        plgpu.barrier_wait(q_full.at[ring])
        plgpu.barrier_wait(d_out_full.at[ring])
        carry = _add_queries(refs, job, k_tile_smem_ref, v_tile_smem_ref, carry, ring, span)
        plgpu.barrier_arrive(free.at[ring])
        return carry

    zeros = plgpu.layout_cast(jnp.zeros((ROWS, job.dim), jnp.float32), plgpu.Layout.WGMMA)
    (d_k, d_v), steps = walk(line, job, step, (zeros, zeros), steps)

    d_k_gmem_ref, d_v_gmem_ref = refs.gradient_gmem_refs
    # Keys and values are spent: their places hold the gradients on their way out.
    k_tile_smem_ref[...] = (d_k * (1 / math.sqrt(job.dim))).astype(d_k_gmem_ref.dtype)
    v_tile_smem_ref[...] = d_v.astype(d_v_gmem_ref.dtype)
    plgpu.commit_smem()
    scene, head, tile = item
    rows = (scene, head, pl.ds(tile * TILE + warpgroup * ROWS, ROWS))
    plgpu.copy_smem_to_gmem(k_tile_smem_ref, d_k_gmem_ref.at[rows])
    plgpu.copy_smem_to_gmem(v_tile_smem_ref, d_v_gmem_ref.at[rows])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    plgpu.barrier_arrive(tile_free.at[slot])
    return steps


def _add_queries(refs: _Refs, job: Job, k_tile_smem_ref, v_tile_smem_ref, carry, ring, span):
    """dk and dv with a block of queries. Keys are the rows of all matrices here, so scores come transposed."""
    d_k, d_v = carry
    q_smem_ref, d_out_smem_ref, lse_smem_ref, delta_smem_ref = refs.ring_smem_refs
    rows, gradients = q_smem_ref.at[ring], d_out_smem_ref.at[ring]
    column_layout = plgpu.Layout.WGMMA.reduce(0)

    def weights(scores):
        lse = plgpu.load(lse_smem_ref.at[ring], layout=column_layout)
        p = jnp.exp2(scores * (LOG2E / math.sqrt(job.dim)) - lax.broadcast_in_dim(lse, scores.shape, [1]))
        return mask_columns(p, span, 0.0)

    def score_gradients(p, d_p):
        delta = plgpu.load(delta_smem_ref.at[ring], layout=column_layout)
        return (p * (d_p - lax.broadcast_in_dim(delta, d_p.shape, [1]))).astype(q_smem_ref.dtype)

    def products(d_k_ref, d_v_ref, scores_ref, d_p_ref):
        multiply(scores_ref, k_tile_smem_ref, rows.transpose((1, 0)))
        multiply(d_p_ref, v_tile_smem_ref, gradients.transpose((1, 0)))
        p = weights(result(scores_ref, pending=1))
        d_s = score_gradients(p, result(d_p_ref, pending=0))
        multiply(d_v_ref, p.astype(d_s.dtype), gradients)
        multiply(d_k_ref, d_s, rows)

    def block(*accumulator_refs):
        with_scores(functools.partial(products, *accumulator_refs), job, 2)

    return with_accumulators(block, job, [d_k, d_v])


def _copy_for_keys(refs: _Refs, job: Job, first_head, item, start, line, used, steps):
    """Brings a tile's keys and values, then queries and what belongs to them block after block."""
    (tile_full, tile_free), (q_full, d_out_full, free) = refs.tile_barrier_refs, refs.ring_barrier_refs
    scene, head, _ = item
    slot = lax.rem(used, job.tiling.slots)
    pl.when(used >= job.tiling.slots)(functools.partial(plgpu.barrier_wait, tile_free.at[slot]))
    keys = (scene, pl.ds(start, TILE), first_head + head)
    for source, target in zip((refs.k_gmem_ref, refs.v_gmem_ref), refs.tile_smem_refs, strict=True):
        plgpu.copy_gmem_to_smem(source.at[keys], target.at[slot], tile_full.at[slot])

    def step(_, steps, row, *__):
        ring, rows = lax.rem(steps, job.tiling.stages), pl.ds(row, job.tiling.block)
        pl.when(steps >= job.tiling.stages)(functools.partial(plgpu.barrier_wait, free.at[ring]))
        wide, narrow = job.query_rows(scene, head, rows), (scene, head, rows)
        sources = (
            refs.q_gmem_ref.at[wide],
            refs.d_out_gmem_ref.at[wide],
            refs.lse_gmem_ref.at[narrow],
            refs.delta_gmem_ref.at[narrow],
        )
        fulls = q_full, d_out_full, q_full, d_out_full
        for source, target, full in zip(sources, refs.ring_smem_refs, fulls, strict=True):
            plgpu.copy_gmem_to_smem(source, target.at[ring], full.at[ring])

    return walk(line, job, step, None, steps)[1]
