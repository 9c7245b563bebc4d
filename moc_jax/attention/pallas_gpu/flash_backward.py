"""Gradients of attention on Hopper, from the output's log-sum-exp: one kernel, the same bits on every run.

With the final log-sum-exp L of a query, over all its keys, every part of its attention knows the final weights:

    p = exp(s - L)     dv = p^T do     ds = p (do v^T - delta)     dq = ds k / sqrt(D)     dk = ds^T q / sqrt(D)

with delta = rowsum(do o). So anchors and picks add up, and no gradient passes through the merge. A thread block keeps a
tile of keys, with dk and dv in registers, and walks runs of queries. Each block of 64 queries gets a share of its dq,
which goes to memory as it is: a query's dq is the sum over the tiles of keys that it reads, and those take turns.

Turns: a tile adds its share to a block of queries when all earlier tiles that read these have done so. The first one
writes. So the order of the sum is that of the keys, whichever thread block is faster and whatever other queries there
are. Tiles that start together soon follow each other through the queries at a distance, and then no longer wait.

FLOPs: 10 * D per (query, key), padded to tiles and blocks. Bytes: 4 D per query and tile of keys, mostly to the cache.
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
    copy_tile,
    launch,
    mask,
    multiply,
    result,
    ring_rows,
    swizzled,
    tile_rows,
    with_accumulators,
    with_scores,
)
from moc_jax.attention.pallas_gpu.tiles import ROWS, TILE, Job, each_tile, walk
from moc_jax.shapes import Array, Float, Float32, Int

NAME = "moc_gradients"


class Inputs(NamedTuple):
    """What gradients follow from. Rows of queries are in memory order, or sorted by chunk (`sorted_rows`)."""

    q: Float[Array, "B _ _ D"]  # [B, Q, H, D]; or [B, heads, J, D], some of the heads, from `first_head` on
    k: Float[Array, "B N H D"]
    v: Float[Array, "B N H D"]
    d_out: Float[Array, "B _ _ D"]  # as q
    lse: Float32[Array, "B _ _"]  # base-2 log-sum-exp over all keys of each query [B, heads, rows of q]
    delta: Float32[Array, "B _ _"]  # rowsum(d_out * out), likewise
    earlier: Int[Array, "B _ _"]  # tiles of the groups before each that read each block of dq
    first_head: Int[Array, "1"]
    sorted_rows: bool


def gradients(
    inputs: Inputs, tiles: Tiles, backend: Hopper
) -> tuple[Float32[Array, "B _ M D"], Float[Array, "B _ R D"], Float[Array, "B _ R D"]]:
    """sqrt(D) dq by the rows of q, those that second runs read 64 rows further on; and each tile's rows of dk and dv.

    R = tiles * 128. Rows of unused tiles are not written, nor queries that no tile reads.

    `tiles`: which rows of k each tile takes, and which runs of q read them.
    """
    tiling = backend.tiles.gradients
    inputs = whole_blocks(inputs, backend)
    q, k = inputs.q, inputs.k
    job = Job.of(q, k, tiles, backend, tiling, over_keys=False, sorted_rows=inputs.sorted_rows)
    columns = job.dim // COMPUTE  # of dq, for each warpgroup
    row = plgpu.SMEM((tiling.stages, tiling.block), jnp.float32)
    gradient = jax.ShapeDtypeStruct((job.batch, job.heads, tiles.count * TILE, job.dim), k.dtype)
    rows = job.rows + (job.runs - 1) * tiling.block
    d_scores = plgpu.SMEM((2, TILE, tiling.block), k.dtype, transforms=swizzled(columns))
    shares = (plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128))
    shares = plgpu.SMEM((2, COMPUTE, tiling.block, columns), jnp.float32, transforms=shares)
    return launch(
        NAME,
        _compute,
        _copy,
        job,
        inputs[:7],
        tiles,
        inputs.first_head,
        (jax.ShapeDtypeStruct((job.batch, job.heads, rows, job.dim), jnp.float32), gradient, gradient),
        tile=(tile_rows(job, k, columns), tile_rows(job, k, columns)),  # keys, values
        # Queries, output gradients, log-sum-exp, delta.
        ring=(ring_rows(job, q, columns), ring_rows(job, q, columns), row, row),
        # Of a tile, full and free; of a block, full of queries and log-sum-exp, of output gradients and delta, free.
        arrivals=((2, COMPUTE), (2, 2, COMPUTE)),
        # Score gradients and dq's shares; full of the first, full and free of the second; that keys are spent.
        more=(
            d_scores,
            shares,
            *(plgpu.Barrier(num_barriers=n, num_arrivals=a) for n, a in ((2, 2), (2, 2), (2, 1), (1, 2))),
        ),
        turns=(_write_shares, (job.batch, job.heads, rows // tiling.block)),
    )


def whole_blocks(inputs: Inputs, backend: Hopper) -> Inputs:
    """With padding behind the queries, up to a multiple of a block; sorted ones come in tiles."""
    if inputs.sorted_rows:
        return inputs
    more = (0, -inputs.q.shape[1] % backend.tiles.gradients.block)
    q, d_out = (jnp.pad(x, ((0, 0), more, (0, 0), (0, 0))) for x in (inputs.q, inputs.d_out))
    lse, delta = (jnp.pad(x, ((0, 0), (0, 0), more)) for x in (inputs.lse, inputs.delta))
    return inputs._replace(q=q, d_out=d_out, lse=lse, delta=delta)


def _compute(refs: Refs, job: Job, warpgroup):
    each_tile(refs.table_gmem_ref, job, functools.partial(_tile, refs, job, warpgroup), jnp.int32(0))


def _tile(refs: Refs, job: Job, warpgroup, item, start, line, used, steps):
    """One warpgroup's half of a tile of keys. Keys are the rows of all matrices here, so scores come transposed, but
    for dq: of that it takes half of the columns, for all keys."""
    (tile_full, tile_free), (q_full, d_out_full, free) = refs.tile_barrier_refs, refs.ring_barrier_refs
    d_s_smem_ref, d_q_smem_ref, d_s_full, d_q_full, d_q_free, spent = refs.more_refs
    buffer, mine = lax.rem(used, job.tiling.buffers), pl.ds(warpgroup * ROWS, ROWS)
    columns = pl.ds(warpgroup * (job.dim // COMPUTE), job.dim // COMPUTE)
    scene, head, tile = item
    scale = LOG2E / math.sqrt(job.dim)
    # Other rows' gradients are nobody's, but dq may not have them.
    keys = [line[2 * job.runs + i] - start - warpgroup * ROWS for i in (3, 4)]
    plgpu.barrier_wait(tile_full.at[buffer])

    def keys_at(steps):
        # As far as the compiler can see, the address depends on the step. Else it finds those of all parts of the
        # operands before the loop, and then reads them from memory at each step: there are no registers for them.
        place = buffer + lax.shift_right_logical(steps, 30)
        k_smem_ref, v_smem_ref = refs.tile_smem_refs
        return k_smem_ref.at[place, mine], v_smem_ref.at[place, mine], k_smem_ref.at[place, :, columns]

    def step(carry, steps, run, row, *span):
        ring, now = lax.rem(steps, job.tiling.stages), lax.rem(steps, 2)
        plgpu.barrier_wait(q_full.at[ring])
        plgpu.barrier_wait(d_out_full.at[ring])
        q_smem_ref, d_out_smem_ref, lse_smem_ref, delta_smem_ref = (ref.at[ring] for ref in refs.ring_smem_refs)
        k_smem_ref, v_smem_ref, k_columns_smem_ref = keys_at(steps)

        def less(smem_ref, scale):
            row = plgpu.load(smem_ref, layout=plgpu.Layout.WGMMA.reduce(0))
            return lax.broadcast_in_dim(row * scale, (ROWS, job.tiling.block), [1])

        def products(d_k_ref, d_v_ref, scores_ref, d_p_ref):
            multiply(scores_ref, k_smem_ref, q_smem_ref.transpose((1, 0)))
            multiply(d_p_ref, v_smem_ref, d_out_smem_ref.transpose((1, 0)))
            p = jnp.exp2(result(scores_ref, pending=1) * scale)
            p = mask(p, (0, *keys), (1, *span), value=0.0)
            d_s = (p * result(d_p_ref, pending=0)).astype(d_s_smem_ref.dtype)
            multiply(d_v_ref, p.astype(d_s.dtype), d_out_smem_ref)
            d_s_smem_ref[now, mine] = d_s
            plgpu.commit_smem()
            plgpu.barrier_arrive(d_s_full.at[now])
            multiply(d_k_ref, d_s, q_smem_ref)

        def product(d_q_ref):
            multiply(d_q_ref, d_s_smem_ref.at[now].transpose((1, 0)), k_columns_smem_ref)
            return result(d_q_ref, pending=0)

        def block(*sums):
            # Sums that start with what is to be subtracted: no register holds it while they grow.
            scores = less(lse_smem_ref, -1 / scale), less(delta_smem_ref, -1.0)
            with_accumulators(functools.partial(products, *sums), job, scores)
            plgpu.barrier_wait(d_s_full.at[now])  # the other's half, too; it has left the block before this one
            d_q = with_scores(product, job, 1, (job.tiling.block, job.dim // COMPUTE))
            plgpu.barrier_arrive(free.at[ring])
            if job.interpret is not None:
                add_in_turn(d_q, run, row)
                return
            pl.when(steps >= 2)(functools.partial(plgpu.barrier_wait, d_q_free.at[now]))
            d_q_smem_ref[now, warpgroup] = d_q
            plgpu.commit_smem()
            plgpu.barrier_arrive(d_q_full.at[now])

        return with_accumulators(block, job, carry)

    def add_in_turn(d_q, run, row):
        block, earlier = _turn(refs, job, scene, line, run, row)
        rows = refs.output_gmem_refs[0].at[scene, head, pl.ds(block * job.tiling.block, job.tiling.block), columns]
        rows[...] = jnp.where(earlier == 0, 0.0, rows[...]) + d_q

    zeros = plgpu.layout_cast(jnp.zeros((ROWS, job.dim), jnp.float32), plgpu.Layout.WGMMA)
    (d_k, d_v), steps = walk(line, job, step, (zeros, zeros), steps)
    plgpu.barrier_arrive(spent)
    plgpu.barrier_wait(spent)  # the other's last part of dq reads this one's keys
    # Gradients leave through the places of what they are of.
    (k_smem_ref, v_smem_ref, _), rows = keys_at(steps), pl.ds(tile * TILE + warpgroup * ROWS, ROWS)
    k_smem_ref[...] = (d_k * (1 / math.sqrt(job.dim))).astype(k_smem_ref.dtype)
    v_smem_ref[...] = d_v.astype(v_smem_ref.dtype)
    plgpu.commit_smem()
    for smem_ref, gmem_ref in zip((k_smem_ref, v_smem_ref), refs.output_gmem_refs[1:], strict=True):
        plgpu.copy_smem_to_gmem(smem_ref, gmem_ref.at[scene, head, rows])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    plgpu.barrier_arrive(tile_free.at[buffer])
    return steps


def _turn(refs: Refs, job: Job, scene, line, run, row):
    """The block of dq that a step adds to, and how many tiles do so before it."""
    group, place = line[2 * job.runs + 1], line[2 * job.runs + 2]
    block = lax.div(row, job.tiling.block) + run
    # Sorted rows are read by the tiles of one chunk alone.
    return block, place if job.sorted_rows else place + refs.input_gmem_refs[6][scene, group, block]


def _write_shares(refs: Refs, job: Job, item, _, line, __, first):
    """Adds a tile's shares to dq, each when it is its turn: the first is written, the others are added in memory."""
    _, d_q_smem_ref, _, d_q_full, d_q_free, _ = refs.more_refs
    d_q_gmem_ref, width = refs.output_gmem_refs[0], job.dim // COMPUTE
    scene, head, _ = item

    def copy(now, block, **how):
        rows = pl.ds(block * job.tiling.block, job.tiling.block)
        for i in range(COMPUTE):
            target = d_q_gmem_ref.at[scene, head, rows, pl.ds(i * width, width)]
            plgpu.copy_smem_to_gmem(d_q_smem_ref.at[now, i], target, **how)

    def tell(steps, block):
        """That the share of the step before is there, and its place free."""
        plgpu.wait_smem_to_gmem(0)
        plgpu.barrier_arrive(d_q_free.at[lax.rem(steps + 1, 2)])
        plgpu.semaphore_signal(refs.turn_gmem_ref.at[scene, head, block], memory_scope="gpu")

    def step(before, steps, run, row, *_):
        now, (block, earlier) = lax.rem(steps, 2), _turn(refs, job, scene, line, run, row)
        plgpu.barrier_wait(d_q_full.at[now])
        # Told before the own turn is waited for, as by now it is there.
        pl.when(steps > first)(functools.partial(tell, steps, before))
        plgpu.semaphore_wait(refs.turn_gmem_ref.at[scene, head, block], earlier, decrement=False, memory_scope="gpu")
        pl.when(earlier == 0)(functools.partial(copy, now, block))
        pl.when(earlier > 0)(functools.partial(copy, now, block, reduction_op="add"))
        return block

    before, steps = walk(line, job, step, jnp.int32(0), first)
    pl.when(steps > first)(functools.partial(tell, steps, before))
    return steps


def _copy(refs: Refs, job: Job, first_head, item, start, line, used, steps):
    """Brings a tile's keys and values, then queries and what belongs to them block after block."""
    q_full, d_out_full, free = refs.ring_barrier_refs
    q_gmem_ref, k_gmem_ref, v_gmem_ref, d_out_gmem_ref, lse_gmem_ref, delta_gmem_ref, _ = refs.input_gmem_refs
    scene, head, _ = item
    keys = scene, pl.ds(start, TILE), first_head + head
    copy_tile(refs, job, [k_gmem_ref.at[keys], v_gmem_ref.at[keys]], used)

    def step(_, steps, __, row, *___):
        ring, rows = lax.rem(steps, job.tiling.stages), pl.ds(row, job.tiling.block)
        pl.when(steps >= job.tiling.stages)(functools.partial(plgpu.barrier_wait, free.at[ring]))
        wide, narrow = job.query_rows(scene, head, rows), (scene, head, rows)
        sources = q_gmem_ref.at[wide], d_out_gmem_ref.at[wide], lse_gmem_ref.at[narrow], delta_gmem_ref.at[narrow]
        fulls = q_full, d_out_full, q_full, d_out_full
        for source, target, full in zip(sources, refs.ring_smem_refs, fulls, strict=True):
            plgpu.copy_gmem_to_smem(source, target.at[ring], full.at[ring])

    return walk(line, job, step, None, steps)[1]
