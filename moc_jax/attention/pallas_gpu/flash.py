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


class _State(NamedTuple):
    """What a warpgroup takes from tile to tile: the last block's weights wait for the next tile's first product."""

    steps: Array  # so far
    item: tuple[Array, Array, Array]  # of the tile before
    acc: Array
    p: Array  # of its last block
    largest: Array
    total: Array  # [rows, 8]: each thread adds up its own columns


def _attend(refs: _Refs, job: Job, warpgroup):
    """One warpgroup's halves of its tiles."""
    wide = functools.partial(plgpu.layout_cast, new_layout=plgpu.Layout.WGMMA)
    start = _State(
        jnp.int32(0),
        (jnp.int32(0),) * 3,
        wide(jnp.zeros((ROWS, job.dim), jnp.float32)),
        wide(jnp.zeros((ROWS, job.tuning.block), refs.v.dtype)),
        *_nothing(),
    )
    used, state = each_tile(refs.table, job, functools.partial(_tile, refs, job, warpgroup), start)
    pl.when(used > 0)(functools.partial(_finish, refs, job, warpgroup, used, state))


def _nothing() -> tuple[Array, Array]:
    """Maximum and sums before the first block."""
    largest = plgpu.layout_cast(jnp.full((ROWS,), -jnp.inf, jnp.float32), plgpu.Layout.WGMMA.reduce(1))
    return largest, plgpu.layout_cast(jnp.zeros((ROWS, 8), jnp.float32), plgpu.Layout.WGMMA)


def _tile(refs: _Refs, job: Job, warpgroup, item, _, line, used, state: _State):
    """A tile's blocks up to the softmax of the last; its first product runs with the last one of the tile before."""
    (q_full, _), (k_full, _, _, v_free) = refs.tile_barriers, refs.ring_barriers
    q_tile, steps, way = _queries(refs, job, warpgroup, used), state.steps, Way(line, job)
    release = functools.partial(_release, refs, job, used - 1)

    plgpu.barrier_wait(q_full.at[lax.rem(used, job.tuning.slots)])
    plgpu.barrier_wait(k_full.at[_ring(job, steps)])
    carry, span = (state.acc, state.p, *_nothing()), way.at(jnp.int32(0))[1:]
    acc, p, _, *softmax = _overlap(refs, job, q_tile, carry, steps, span, before=steps > 0, more=way.count > 1)
    pl.when(steps > 0)(functools.partial(plgpu.barrier_arrive, v_free.at[_ring(job, steps - 1)]))
    pl.when(used > 0)(functools.partial(_write, refs, job, warpgroup, acc, state, used - 1))

    def step(s, carry):
        # The copy of the output has had time until the second block's products are under way.
        started = functools.partial(pl.when((s == 1) & (used > 0)), release)
        acc, p, shrink, *softmax = _overlap(
            refs, job, q_tile, carry, steps + s, way.at(s)[1:], more=s + 1 < way.count, started=started
        )
        plgpu.barrier_arrive(v_free.at[_ring(job, steps + s - 1)])
        return acc * lax.broadcast_in_dim(shrink, acc.shape, [0]), p, *softmax

    zeros = plgpu.layout_cast(jnp.zeros((ROWS, job.dim), jnp.float32), plgpu.Layout.WGMMA)
    carry = lax.fori_loop(1, way.count, step, (zeros, p, *softmax))
    pl.when((way.count == 1) & (used > 0))(release)
    return _State(steps + way.count, item, *carry)


def _finish(refs: _Refs, job: Job, warpgroup, used, state: _State):
    """The last product of a thread block's last tile."""
    _, _, v_full, v_free = refs.ring_barriers
    last = _ring(job, state.steps - 1)
    plgpu.barrier_wait(v_full.at[last])
    acc = accumulate(state.acc, state.p, refs.ring_smem[1].at[last], job.interpreted)
    plgpu.barrier_arrive(v_free.at[last])
    _write(refs, job, warpgroup, acc, state, used - 1)


def _ring(job: Job, step):
    """Where a step's keys and values lie; step >= -1."""
    return lax.rem(step + job.tuning.stages, job.tuning.stages)


def _queries(refs: _Refs, job: Job, warpgroup, used):
    return refs.tile_smem[0].at[lax.rem(used, job.tuning.slots), pl.ds(warpgroup * ROWS, ROWS)]


def _write(refs: _Refs, job: Job, warpgroup, acc, state: _State, used):
    """Starts to write a tile's output and log-sum-exp."""
    q_tile, lse_smem = _queries(refs, job, warpgroup, used), refs.tile_smem[1].at[pl.ds(warpgroup * ROWS, ROWS)]
    total = state.total.sum(axis=1)
    # The queries are spent: their place holds the output on its way out.
    q_tile[...] = (acc * lax.broadcast_in_dim(1 / total, acc.shape, [0])).astype(refs.out.dtype)
    lse_smem[...] = state.largest + jnp.log(total) * LOG2E
    plgpu.commit_smem()
    scene, head, tile = state.item
    rows = pl.ds(tile * TILE + warpgroup * ROWS, ROWS)
    plgpu.copy_smem_to_gmem(q_tile, refs.out.at[scene, head, rows])
    plgpu.copy_smem_to_gmem(lse_smem, refs.lse.at[scene, head, rows])


def _release(refs: _Refs, job: Job, used):
    """Gives a written tile's place to the queries of the next but one."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    plgpu.barrier_arrive(refs.tile_barriers[1].at[lax.rem(used, job.tuning.slots)])


def _overlap(refs: _Refs, job: Job, q_tile, carry, step, span, *, more, before=True, started=lambda: None):
    """q @ k of one block, p @ v of the block before, and meanwhile the softmax of the first.

    Args:
        more: Whether the tile has another block; its keys are there afterwards.
        before: Whether there was a block before. If not, the product is of zeros and whatever lies there: not a number
            maybe, and nobody's.
        started: Called when both products are under way.
    """
    acc, p, largest, total = carry
    k_smem, v_smem = refs.ring_smem
    k_full, k_free, v_full, _ = refs.ring_barriers
    now, previous = _ring(job, step), _ring(job, step - 1)
    keys, values = k_smem.at[now].transpose((1, 0)), v_smem.at[previous]

    def await_values():
        pl.when(before)(functools.partial(plgpu.barrier_wait, v_full.at[previous]))

    def await_next():
        # Also keeps the products in flight during all of the softmax: the compiler moves the end of a product up to
        # the last branch before it.
        pl.when(more)(functools.partial(plgpu.barrier_wait, k_full.at[_ring(job, step + 1)]))

    if job.interpreted:
        await_values()
        acc = lax.cond(before, lambda: accumulate(acc, p, values, True), lambda: acc)
        scores = product(q_tile, keys, True)
        started()
        plgpu.barrier_arrive(k_free.at[now])
        softmax = _softmax(scores, span, largest, total, job, p.dtype)
        await_next()
        return acc, *softmax

    def products(acc_ref, scores_ref):
        plgpu.wgmma(scores_ref, q_tile, keys)
        await_values()
        plgpu.wgmma(acc_ref, p, values)
        started()
        return plgpu.wgmma_accumulator_load(scores_ref, wait_n=1)

    def body(refs):
        acc_ref, *rest = refs
        accumulator = plgpu.ACC((ROWS, job.tuning.block), jnp.float32)
        scores = pl.run_scoped(functools.partial(products, acc_ref), accumulator)
        plgpu.barrier_arrive(k_free.at[now])
        for ref, x in zip(rest, _softmax(scores, span, largest, total, job, p.dtype), strict=True):
            ref[...] = x
        await_next()

    state: Any = (plgpu.ACC.init(acc), p, largest, largest, total)
    return pl.run_state(body)(state)


def _softmax(scores, span, largest, total, job: Job, dtype):
    """A block's weights, what its maximum makes of the sums before it, and the new maximum and sums."""
    scale = LOG2E / math.sqrt(job.dim)
    scores = mask_columns(scores, span, -math.inf)
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


def _copy(refs: _Refs, job: Job, first_head, item, start, line, used, steps):
    """Brings a tile's queries, then its keys and values block after block."""
    q_full, q_free = refs.tile_barriers
    scene, head, _ = item
    slot = lax.rem(used, job.tuning.slots)
    pl.when(used >= job.tuning.slots)(functools.partial(plgpu.barrier_wait, q_free.at[slot]))
    source = refs.q.at[job.query_rows(scene, head, pl.ds(start, TILE))]
    plgpu.copy_gmem_to_smem(source, refs.tile_smem[0].at[slot], q_full.at[slot])

    return copy_keys(refs, job, scene, first_head + head, line, steps)


def tile_by_tile(tile, refs: Any, job: Job, warpgroup) -> None:
    """Calls tile(refs, job, warpgroup, ...) as `each_tile` does, for `split_roles`."""
    each_tile(refs.table, job, functools.partial(tile, refs, job, warpgroup), jnp.int32(0))


def split_roles(refs: Any, job: Job, compute, copy) -> None:
    """Two warpgroups call compute(refs, job, warpgroup); for each tile, the third copy(refs, job, first head, ...)."""
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup < COMPUTE)
    def _():
        plgpu.set_max_registers(job.tuning.compute_registers, action="increase")
        compute(refs, job, warpgroup)
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == COMPUTE)
    def _():
        plgpu.set_max_registers(job.tuning.copy_registers, action="decrease")
        each_tile(refs.table, job, functools.partial(copy, refs, job, refs.first_head[0]), jnp.int32(0))


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
