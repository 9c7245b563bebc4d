"""Forward attention on Hopper: tiles of queries against runs of keys, one kernel for anchors and for picked chunks.

A *tile* is 128 rows of q that read the same keys; its keys are a few *runs* of consecutive rows, walked one after the
other in blocks with one online softmax. What differs between the two uses is only the table of tiles:

    anchors    q in memory order, at most three runs (two of text, one of video), the same for all heads
    picks      q gathered by chunk, one run (the chunk), each head its own tiles

Structure: persistent thread blocks of three warpgroups. One only copies: it prefetches the next tile's queries and
keeps a ring of key and value blocks full. Two compute, 64 rows each: the softmax of a block runs while the tensor
cores multiply the weights of the block before with its values (FlashAttention-3, section 3.2), and the two warpgroups
drift apart, so that one fills the gaps of the other. A block starts at a multiple of 8 rows, which is what the copy
engine needs, so the first and the last block of a run hold rows that are masked.

FLOPs: 4 * D per (query, key), padded to tiles and blocks. Bytes: k and v once per tile, mostly from the cache.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moc_jax.attention.pallas_gpu.tiles import COMPUTE, ROWS, TILE, Job, Tiles, Tuning, Way, each_tile, walk
from moc_jax.shapes import Array, Float, Float32, Int, typed

LOG2E = math.log2(math.e)
SWIZZLED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))


@typed
def forward(
    q: Float[Array, "B _ _ D"],
    k: Float[Array, "B N H D"],
    v: Float[Array, "B N H D"],
    tiles: Tiles,
    first_head: Int[Array, "1"],
    *,
    sorted_rows: bool,
    tuning: Tuning,
    blocks: int,
    interpret=None,
) -> tuple[Float[Array, "B _ R D"], Float32[Array, "B _ R"]]:
    """Output and base-2 log-sum-exp of each tile's rows, R = tiles * 128; rows of unused tiles are not written.

    Args:
        q: Queries in memory order [B, N, H, D], or sorted by chunk [B, heads, S, D] (`sorted_rows`): some of the
            heads, from `first_head` on.
        k, v: Keys and values in memory order; N a multiple of 8 and at least a block.
        tiles: Which rows of q and which runs of keys each tile takes.
        blocks: Persistent thread blocks, one per multiprocessor.
    """
    job = Job.of(
        q, k, tiles, over_keys=True, sorted_rows=sorted_rows, tuning=tuning, blocks=blocks, interpret=interpret
    )
    rows = tiles.count * TILE
    tile = plgpu.SMEM((tuning.slots, TILE, job.dim), q.dtype, transforms=SWIZZLED)
    ring = plgpu.SMEM((tuning.stages, tuning.block, job.dim), k.dtype, transforms=SWIZZLED)
    return plgpu.kernel(
        functools.partial(_kernel, job=job),
        out_type=(
            jax.ShapeDtypeStruct((job.batch, job.heads, rows, job.dim), v.dtype),
            jax.ShapeDtypeStruct((job.batch, job.heads, rows), jnp.float32),
        ),
        scratch_types=[
            (tile, plgpu.SMEM((TILE,), jnp.float32)),
            (ring, ring),
            barriers(tuning.slots, 1, COMPUTE),
            barriers(tuning.stages, 1, COMPUTE, 1, COMPUTE),
        ],
        interpret=interpret,
        **launch("moc_forward", blocks),
    )(q, k, v, tiles.table, first_head)


def barriers(count: int, *arrivals: int):
    """`count` barriers for each number of arrivals."""
    return tuple(plgpu.Barrier(num_barriers=count, num_arrivals=a) for a in arrivals)


def launch(name: str, blocks: int) -> dict:
    """What all kernels share: one persistent thread block per multiprocessor, two warpgroups compute, one copies."""
    return dict(
        kernel_name=name,
        grid=(blocks,),
        grid_names=("block",),
        num_threads=COMPUTE + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )


class _Refs(NamedTuple):
    q: Any
    k: Any
    v: Any
    table: Any
    first_head: Any
    out: Any
    lse: Any
    tile_smem: Any  # queries, log-sum-exp
    ring_smem: Any  # keys, values
    tile_barriers: Any  # full, free
    ring_barriers: Any  # full and free of keys, then of values


def _kernel(*refs, job: Job):
    refs = _Refs(*refs)
    split_roles(refs, job, _attend, _copy)


def _attend(refs: _Refs, job: Job, warpgroup, item, _, line, used, steps):
    """One warpgroup's half of a tile."""
    (q_smem, lse_smem), (k_smem, v_smem) = refs.tile_smem, refs.ring_smem
    (q_full, q_free), (k_full, k_free, v_full, v_free) = refs.tile_barriers, refs.ring_barriers
    slot, mine = lax.rem(used, job.tuning.slots), pl.ds(warpgroup * ROWS, ROWS)
    q_tile = q_smem.at[slot, mine]
    way = Way(line, job)

    def ring(s):
        return lax.rem(steps + s, job.tuning.stages)

    def step(s, carry) -> tuple[Array, ...]:
        now, before = ring(s), ring(s - 1)
        plgpu.barrier_wait(k_full.at[now])
        acc, p, shrink, largest, total = _overlap(refs, job, q_tile, carry, now, before, way.at(s)[1:])
        plgpu.barrier_arrive(v_free.at[before])
        return acc * lax.broadcast_in_dim(shrink, acc.shape, [0]), p, largest, total

    row_layout = plgpu.Layout.WGMMA.reduce(1)
    acc = plgpu.layout_cast(jnp.zeros((ROWS, job.dim), jnp.float32), plgpu.Layout.WGMMA)
    largest = plgpu.layout_cast(jnp.full((ROWS,), -jnp.inf, jnp.float32), row_layout)
    total = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), row_layout)

    plgpu.barrier_wait(q_full.at[slot])
    first = ring(0)
    plgpu.barrier_wait(k_full.at[first])
    scores = product(q_tile, k_smem.at[first].transpose((1, 0)), job.interpreted)
    plgpu.barrier_arrive(k_free.at[first])
    p, _, largest, total = _softmax(scores, way.at(jnp.int32(0))[1:], largest, total, job, v_smem.dtype)
    acc, p, largest, total = lax.fori_loop(1, way.count, step, (acc, p, largest, total))
    last = ring(way.count - 1)
    plgpu.barrier_wait(v_full.at[last])
    acc = accumulate(acc, p, v_smem.at[last], job.interpreted)
    plgpu.barrier_arrive(v_free.at[last])

    # The queries are spent: their place holds the output on its way out.
    q_tile[...] = (acc * lax.broadcast_in_dim(1 / total, acc.shape, [0])).astype(refs.out.dtype)
    lse_smem[mine] = largest + jnp.log(total) * LOG2E
    plgpu.commit_smem()
    scene, head, tile = item
    rows = pl.ds(tile * TILE + warpgroup * ROWS, ROWS)
    plgpu.copy_smem_to_gmem(q_tile, refs.out.at[scene, head, rows])
    plgpu.copy_smem_to_gmem(lse_smem.at[mine], refs.lse.at[scene, head, rows])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    plgpu.barrier_arrive(q_free.at[slot])
    return steps + way.count


def _overlap(refs: _Refs, job: Job, q_tile, carry, now, before, span):
    """q @ k of one block, p @ v of the block before, and meanwhile the softmax of the first."""
    acc, p, largest, total = carry
    k_smem, v_smem = refs.ring_smem
    _, k_free, v_full, _ = refs.ring_barriers
    keys, values = k_smem.at[now].transpose((1, 0)), v_smem.at[before]
    if job.interpreted:
        plgpu.barrier_wait(v_full.at[before])
        acc, scores = accumulate(acc, p, values, True), product(q_tile, keys, True)
        plgpu.barrier_arrive(k_free.at[now])
        return acc, *_softmax(scores, span, largest, total, job, p.dtype)

    def products(acc_ref, scores_ref):
        plgpu.wgmma(scores_ref, q_tile, keys)
        plgpu.barrier_wait(v_full.at[before])
        plgpu.wgmma(acc_ref, p, values)
        return plgpu.wgmma_accumulator_load(scores_ref, wait_n=1)

    def body(refs):
        acc_ref, *rest = refs
        accumulator = plgpu.ACC((ROWS, job.tuning.block), jnp.float32)
        scores = pl.run_scoped(functools.partial(products, acc_ref), accumulator)
        plgpu.barrier_arrive(k_free.at[now])
        for ref, x in zip(rest, _softmax(scores, span, largest, total, job, p.dtype), strict=True):
            ref[...] = x

    state: Any = (plgpu.ACC.init(acc), p, largest, largest, total)
    return pl.run_state(body)(state)


def _softmax(scores, span, largest, total, job: Job, dtype):
    """A block's weights, what its maximum makes of the sums before it, and the new maximum and sum."""
    scale = LOG2E / math.sqrt(job.dim)
    scores = mask_columns(scores, span, -math.inf)
    new = jnp.maximum(largest, scores.max(axis=1) * scale)
    shrink = jnp.exp2(largest - new)
    p = jnp.exp2(scores * scale - lax.broadcast_in_dim(new, scores.shape, [0]))
    return p.astype(dtype), shrink, new, total * shrink + p.sum(axis=1)


def _copy(refs: _Refs, job: Job, first_head, item, start, line, used, steps):
    """Brings a tile's queries, then its keys and values block after block."""
    q_full, q_free = refs.tile_barriers
    scene, head, _ = item
    slot = lax.rem(used, job.tuning.slots)
    pl.when(used >= job.tuning.slots)(functools.partial(plgpu.barrier_wait, q_free.at[slot]))
    source = refs.q.at[job.query_rows(scene, head, pl.ds(start, TILE))]
    plgpu.copy_gmem_to_smem(source, refs.tile_smem[0].at[slot], q_full.at[slot])

    return copy_keys(refs, job, scene, first_head + head, line, steps)


def split_roles(refs: Any, job: Job, compute, copy) -> None:
    """For each tile, two warpgroups call compute(refs, job, warpgroup, ...), the third copy(refs, job, head, ...)."""
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup < COMPUTE)
    def _():
        plgpu.set_max_registers(job.tuning.compute_registers, action="increase")
        each_tile(refs.table, job, functools.partial(compute, refs, job, warpgroup))
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == COMPUTE)
    def _():
        plgpu.set_max_registers(job.tuning.copy_registers, action="decrease")
        each_tile(refs.table, job, functools.partial(copy, refs, job, refs.first_head[0]))


def copy_keys(refs: Any, job: Job, scene, head, line, steps):
    """Brings a tile's keys and values into their ring, block after block; steps after it."""
    k_full, k_free, v_full, v_free = refs.ring_barriers

    def step(_, steps, row, *__):
        ring = lax.rem(steps, job.tuning.stages)
        keys = (scene, pl.ds(row, job.tuning.block), head)
        for source, target, full, free in (
            (refs.k, refs.ring_smem[0], k_full, k_free),
            (refs.v, refs.ring_smem[1], v_full, v_free),
        ):
            pl.when(steps >= job.tuning.stages)(functools.partial(plgpu.barrier_wait, free.at[ring]))
            plgpu.copy_gmem_to_smem(source.at[keys], target.at[ring], full.at[ring])

    return walk(line, job, step, None, steps)[1]


def mask_columns(x: Array, span: tuple[Array, Array], value: float) -> Array:
    """x [rows, columns] with columns outside span = [low, high) set to `value`; next to free where there are none."""
    low, high = span

    def masked(x):
        column = plgpu.broadcasted_iota(jnp.int32, x.shape, 1, layout=plgpu.Layout.WGMMA)
        return jnp.where((column >= low) & (column < high), x, jnp.full(x.shape, value, x.dtype))

    return lax.cond((low > 0) | (high < x.shape[1]), masked, lambda x: x, x)


def product(a: Any, b: Any, interpreted: bool = False) -> Array:
    """a @ b in float32 on the tensor cores; a from shared memory or registers, b from shared memory."""
    if interpreted:  # the interpreter knows tensor cores without registers as operands
        out = jnp.dot(a[...].astype(jnp.float32), b[...].astype(jnp.float32))
        plgpu.commit_smem()  # plain reads, unlike the tensor cores', are not ordered before the next copy
        return out

    def scope(ref):
        plgpu.wgmma(ref, a, b)
        return ref[...]

    return pl.run_scoped(scope, plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32))


def accumulate(acc: Array, a: Any, b: Any, interpreted: bool = False) -> Array:
    """acc + a @ b in place."""
    if interpreted:
        return acc + product(a, b, interpreted)
    ref: Any = plgpu.ACC.init(acc)
    return pl.run_state(lambda ref: plgpu.wgmma(ref, a, b))(ref)
