"""Forward attention on Hopper: tiles of queries against runs of keys, one kernel for anchors and for picked chunks.

A *tile* is 128 rows of q that read the same keys; its keys are a few *runs* of consecutive rows, walked one after the
other in blocks with one online softmax. What differs between the two uses is only the table of tiles:

    anchors    q in memory order, at most three runs (two of text, one of video), the same for all heads
    picks      q gathered by chunk, one run (the chunk), each head its own tiles

Structure: persistent thread blocks of three warpgroups. One only copies: it prefetches the next tile's queries and
keeps a ring of key and value blocks full. Two compute, 64 rows each: the softmax of a block runs while the tensor
cores multiply the weights of the block before with its values (FlashAttention-3, section 3.2), from one tile to the
next as within one, and the two warpgroups drift apart, so that one fills the gaps of the other. A block starts at a
multiple of 8 rows, which is what the copy engine needs, so the first and the last block of a run hold rows that are
masked.

FLOPs: 4 * D per (query, key), padded to tiles and blocks. Bytes: k and v once per tile, mostly from the cache.
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
    mask,
    multiplied,
    multiply,
    result,
    ring_rows,
    tile_rows,
    with_accumulators,
    with_scores,
)
from moc_jax.attention.pallas_gpu.tiles import ROWS, TILE, Job, Way, each_tile
from moc_jax.shapes import Array, Float, Float32, Int, typed

NAME = "moc_forward"


@typed
def forward(
    q: Float[Array, "B _ _ D"],
    k: Float[Array, "B N H D"],
    v: Float[Array, "B N H D"],
    tiles: Tiles,
    first_head: Int[Array, "1"],
    backend: Hopper,
    *,
    sorted_rows: bool,
) -> tuple[Float[Array, "B _ R D"], Float32[Array, "B _ R"]]:
    """Output and base-2 log-sum-exp of each tile's rows, R = tiles * 128; rows of unused tiles are not written.

    Args:
        q: Queries in memory order [B, Q, H, D], or sorted by chunk [B, heads, S, D] (`sorted_rows`): some of the
            heads, from `first_head` on.
        k, v: Keys and values in memory order; N and Q are multiples of 8 and at least a tile.
        tiles: Which rows of q and which runs of keys each tile takes.
    """
    tiling = backend.tiles.forward
    job = Job.of(q, k, tiles, backend, tiling, over_keys=True, sorted_rows=sorted_rows)
    rows = tiles.count * TILE
    return launch(
        NAME,
        _attend,
        _copy,
        job,
        (q, k, v),
        tiles,
        first_head,
        (
            jax.ShapeDtypeStruct((job.batch, job.heads, rows, job.dim), v.dtype),
            jax.ShapeDtypeStruct((job.batch, job.heads, rows), jnp.float32),
        ),
        tile=(tile_rows(job, q), plgpu.SMEM((TILE,), jnp.float32)),  # queries, log-sum-exp
        ring=(ring_rows(job, k), ring_rows(job, v)),
        # Of a tile, full and free; of a block, full and free of keys, then of values.
        arrivals=((1, COMPUTE), (1, COMPUTE, 1, COMPUTE)),
    )


class _State(NamedTuple):
    """What a warpgroup takes from tile to tile: the last block's weights wait for the next tile's first product."""

    steps: Array  # so far
    item: tuple[Array, Array, Array]  # of the tile before
    acc: Array
    p: Array  # of its last block
    largest: Array
    total: Array  # [rows, 8]: each thread adds up its own columns


def _attend(refs: Refs, job: Job, warpgroup):
    """One warpgroup's halves of its tiles."""
    wide = functools.partial(plgpu.layout_cast, new_layout=plgpu.Layout.WGMMA)
    start = _State(
        jnp.int32(0),
        (jnp.int32(0),) * 3,
        wide(jnp.zeros((ROWS, job.dim), jnp.float32)),
        wide(jnp.zeros((ROWS, job.tiling.block), refs.input_gmem_refs[2].dtype)),
        *_nothing(),
    )
    tile = functools.partial(_tile, refs, job, warpgroup)
    used, state = each_tile(refs.table_gmem_ref, job, tile, start, refs.first_head_gmem_ref)
    pl.when(used > 0)(functools.partial(_finish, refs, job, warpgroup, used, state))


def _nothing() -> tuple[Array, Array]:
    """Maximum and sums before the first block."""
    largest = plgpu.layout_cast(jnp.full((ROWS,), -jnp.inf, jnp.float32), plgpu.Layout.WGMMA.reduce(1))
    return largest, plgpu.layout_cast(jnp.zeros((ROWS, 8), jnp.float32), plgpu.Layout.WGMMA)


def _tile(refs: Refs, job: Job, warpgroup, item, _, line, used, state: _State):
    """A tile's blocks up to the softmax of the last; its first product runs with the last one of the tile before."""
    (q_full, _), (k_full, _, _, v_free) = refs.tile_barrier_refs, refs.ring_barrier_refs
    q_tile_smem_ref, steps, way = _queries(refs, job, warpgroup, used), state.steps, Way(line, job)
    release = functools.partial(_release, refs, job, used - 1)

    plgpu.barrier_wait(q_full.at[lax.rem(used, job.tiling.buffers)])
    plgpu.barrier_wait(k_full.at[_ring(job, steps)])
    carry, span = (state.acc, state.p, *_nothing()), way.at(jnp.int32(0))[1:]
    acc, p, _, *softmax = _overlap(refs, job, q_tile_smem_ref, carry, steps, span, before=steps > 0, more=way.count > 1)
    pl.when(steps > 0)(functools.partial(plgpu.barrier_arrive, v_free.at[_ring(job, steps - 1)]))
    pl.when(used > 0)(functools.partial(_write, refs, job, warpgroup, acc, state, used - 1))

    def step(s, carry):
        # The copy of the output has had time until the second block's products are under way.
        started = functools.partial(pl.when((s == 1) & (used > 0)), release)
        acc, p, shrink, *softmax = _overlap(
            refs, job, q_tile_smem_ref, carry, steps + s, way.at(s)[1:], more=s + 1 < way.count, started=started
        )
        plgpu.barrier_arrive(v_free.at[_ring(job, steps + s - 1)])
        return acc * lax.broadcast_in_dim(shrink, acc.shape, [0]), p, *softmax

    zeros = plgpu.layout_cast(jnp.zeros((ROWS, job.dim), jnp.float32), plgpu.Layout.WGMMA)
    carry = lax.fori_loop(1, way.count, step, (zeros, p, *softmax))
    pl.when((way.count == 1) & (used > 0))(release)
    return _State(steps + way.count, item, *carry)


def _finish(refs: Refs, job: Job, warpgroup, used, state: _State):
    """The last product of a thread block's last tile."""
    _, _, v_full, v_free = refs.ring_barrier_refs
    last = _ring(job, state.steps - 1)
    plgpu.barrier_wait(v_full.at[last])
    acc = multiplied(state.acc, state.p, refs.ring_smem_refs[1].at[last], job)
    plgpu.barrier_arrive(v_free.at[last])
    _write(refs, job, warpgroup, acc, state, used - 1)


def _ring(job: Job, step):
    """Where a step's keys and values lie; step >= -1."""
    return lax.rem(step + job.tiling.stages, job.tiling.stages)


def _queries(refs: Refs, job: Job, warpgroup, used):
    return refs.tile_smem_refs[0].at[lax.rem(used, job.tiling.buffers), pl.ds(warpgroup * ROWS, ROWS)]


def _write(refs: Refs, job: Job, warpgroup, acc, state: _State, used):
    """Starts to write a tile's output and log-sum-exp."""
    q_tile_smem_ref, lse_smem_ref = (
        _queries(refs, job, warpgroup, used),
        refs.tile_smem_refs[1].at[pl.ds(warpgroup * ROWS, ROWS)],
    )
    total = state.total.sum(axis=1)
    out_gmem_ref, lse_gmem_ref = refs.output_gmem_refs
    # The queries are spent: their place holds the output on its way out.
    q_tile_smem_ref[...] = (acc * lax.broadcast_in_dim(1 / total, acc.shape, [0])).astype(out_gmem_ref.dtype)
    lse_smem_ref[...] = state.largest + jnp.log(total) * LOG2E
    plgpu.commit_smem()
    scene, head, tile = state.item
    rows = pl.ds(tile * TILE + warpgroup * ROWS, ROWS)
    plgpu.copy_smem_to_gmem(q_tile_smem_ref, out_gmem_ref.at[scene, head, rows])
    plgpu.copy_smem_to_gmem(lse_smem_ref, lse_gmem_ref.at[scene, head, rows])


def _release(refs: Refs, job: Job, used):
    """Gives a written tile's place to the queries of the next but one."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    plgpu.barrier_arrive(refs.tile_barrier_refs[1].at[lax.rem(used, job.tiling.buffers)])


def _overlap(refs: Refs, job: Job, q_tile_smem_ref, carry, step, span, *, more, before=True, started=lambda: None):
    """q @ k of one block, p @ v of the block before, and meanwhile the softmax of the first.

    Args:
        more: Whether the tile has another block; its keys are there afterwards.
        before: Whether there was a block before. If not, the product is of zeros and whatever lies there: not a number
            maybe, and nobody's.
        started: Called when both products are under way.
    """
    acc, p, largest, total = carry
    k_smem_ref, v_smem_ref = refs.ring_smem_refs
    k_full, k_free, v_full, _ = refs.ring_barrier_refs
    now, previous = _ring(job, step), _ring(job, step - 1)
    keys, values = k_smem_ref.at[now].transpose((1, 0)), v_smem_ref.at[previous]

    def await_values():
        pl.when(before)(functools.partial(plgpu.barrier_wait, v_full.at[previous]))

    def await_next():
        # Also keeps the products in flight during all of the softmax: the compiler moves the end of a product up to
        # the last branch before it.
        pl.when(more)(functools.partial(plgpu.barrier_wait, k_full.at[_ring(job, step + 1)]))

    def products(acc_ref, scores_ref):
        multiply(scores_ref, q_tile_smem_ref, keys)
        await_values()
        multiply(acc_ref, p, values, there=before)
        started()
        return result(scores_ref, pending=1)

    def block(acc_ref, *others):
        scores = with_scores(functools.partial(products, acc_ref), job, 1)
        plgpu.barrier_arrive(k_free.at[now])
        for ref, x in zip(others, _softmax(scores, span, largest, total, job, p.dtype), strict=True):
            ref[...] = x
        await_next()

    return with_accumulators(block, job, [acc], (p, largest, largest, total))


def _softmax(scores, span, largest, total, job: Job, dtype):
    """A block's weights, what its maximum makes of the sums before it, and the new maximum and sums."""
    scale = LOG2E / math.sqrt(job.dim)
    scores = mask(scores, (1, *span), value=-math.inf)
    new = jnp.maximum(largest, scores.max(axis=1) * scale)
    shrink = jnp.exp2(largest - new)
    p = jnp.exp2(scores * scale - lax.broadcast_in_dim(new, scores.shape, [0]))
    total = total * lax.broadcast_in_dim(shrink, total.shape, [0]) + _fold(p, total.shape[1])
    return p.astype(dtype), shrink, new, total


def _fold(x: Array, width: int) -> Array:
    """x [rows, columns] added up to `width` columns, pairwise: every thread adds what it holds."""
    parts = [x[:, i : i + width] for i in range(0, x.shape[1], width)]
    while len(parts) > 1:
        odd = parts[len(parts) // 2 * 2 :]
        parts = [a + b for a, b in zip(parts[::2], parts[1::2], strict=False)] + odd
    return parts[0]


def _copy(refs: Refs, job: Job, first_head, item, start, line, used, steps):
    """Brings a tile's queries, then its keys and values block after block."""
    scene, head, _ = item
    copy_tile(refs, job, [refs.input_gmem_refs[0].at[job.query_rows(scene, head, pl.ds(start, TILE))]], used)
    return copy_keys(refs, job, scene, first_head + head, line, steps)
