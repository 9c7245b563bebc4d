"""Forward attention on Hopper: tiles of queries against runs of keys, one kernel for anchors and for picked chunks.

A *tile* is 128 rows of q that read the same keys; its keys are a few *runs* of consecutive rows, walked one after the
other in blocks with one online softmax. What differs between the two uses is only the table of tiles:

    anchors    q in memory order, at most three runs (two of text, one of video), the same for all heads
    picks      q gathered by chunk, one run (the chunk), each head its own tiles

Structure: persistent blocks of three warpgroups. One only copies: it prefetches the next tile's queries and keeps a
ring of key and value blocks full. Two compute, 64 rows each, drifting apart so that one's softmax hides behind the
other's matrix products (FlashAttention-3, section 3.1). A block of keys starts at a multiple of 8 rows, which is what
the copy engine needs, so the first and the last block of a run hold rows that are masked.

FLOPs: 4 * D per (query, key), padded to tiles and blocks. Bytes: q, k, v once per tile from the level-2 cache.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moc_jax.attention.pallas_gpu.tiles import Tiles, each_tile, walk
from moc_jax.shapes import Array, Float, Float32, typed

LOG2E = math.log2(math.e)
ROWS = 64  # of one warpgroup: the smallest height of a Hopper matrix product
COMPUTE = 2  # warpgroups that compute
TILE = ROWS * COMPUTE
SWIZZLED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))


@dataclasses.dataclass(frozen=True)
class Tuning:
    """How a kernel uses its shared memory."""

    block: int = 128  # rows per step of a walk
    stages: int = 2  # steps in flight
    slots: int = 2  # tiles in flight: with 2, the next tile is there when one ends


@typed
def forward(
    q: Float[Array, "B _ _ D"],
    k: Float[Array, "B N H D"],
    v: Float[Array, "B N H D"],
    tiles: Tiles,
    *,
    sorted_rows: bool,
    tuning: Tuning,
    blocks: int,
    interpret=None,
) -> tuple[Float[Array, "B H R D"], Float32[Array, "B H R"]]:
    """Output and base-2 log-sum-exp of each tile's rows, R = tiles * 128; rows of unused tiles are not written.

    Args:
        q: Queries, in memory order, or sorted by chunk and head-major (`sorted_rows`).
        k, v: Keys and values in memory order; N a multiple of 8 and at least a block.
        tiles: Which rows of q and which runs of keys each tile takes.
        blocks: Persistent thread blocks, one per multiprocessor.
    """
    batch, tokens, heads, dim = k.shape
    rows = tiles.count * TILE
    kernel = functools.partial(
        _kernel,
        sorted_rows=sorted_rows,
        tuning=tuning,
        tiles=tiles.static,
        blocks=blocks,
        sizes=(batch, heads, tokens, dim),
        interpreted=interpret is not None,
    )
    ring = plgpu.SMEM((tuning.stages, tuning.block, dim), k.dtype, transforms=SWIZZLED)
    full = plgpu.Barrier(num_barriers=tuning.stages)
    free = plgpu.Barrier(num_barriers=tuning.stages, num_arrivals=COMPUTE)
    return plgpu.kernel(
        kernel,
        out_type=(
            jax.ShapeDtypeStruct((batch, heads, rows, dim), v.dtype),
            jax.ShapeDtypeStruct((batch, heads, rows), jnp.float32),
        ),
        scratch_types=[
            plgpu.SMEM((tuning.slots, TILE, dim), q.dtype, transforms=SWIZZLED),
            ring,
            ring,
            plgpu.SMEM((COMPUTE, ROWS), jnp.float32),
            plgpu.Barrier(num_barriers=tuning.slots),
            plgpu.Barrier(num_barriers=tuning.slots, num_arrivals=COMPUTE),
            full,
            free,
            full,
            free,
        ],
        grid=(blocks,),
        grid_names=("block",),
        num_threads=COMPUTE + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )(q, k, v, tiles.table)


def _kernel(
    q_ref,
    k_ref,
    v_ref,
    table_ref,
    out_ref,
    lse_ref,
    q_smem,
    k_smem,
    v_smem,
    lse_smem,
    q_full,
    q_free,
    k_full,
    k_free,
    v_full,
    v_free,
    *,
    sorted_rows,
    tuning,
    tiles,
    blocks,
    sizes,
    interpreted,
):
    batch, heads, tokens, dim = sizes
    block, stages, slots = tuning.block, tuning.stages, tuning.slots
    warpgroup = lax.axis_index("warpgroup")
    each = functools.partial(each_tile, table_ref, tiles=tiles, blocks=blocks, batch=batch, heads=heads)

    @pl.when(warpgroup < COMPUTE)
    def _compute():
        plgpu.set_max_registers(232, action="increase")

        def one_tile(item, _, line, used, steps):
            slot = lax.rem(used, slots)
            q_tile = q_smem.at[slot, pl.ds(warpgroup * ROWS, ROWS)]
            plgpu.barrier_wait(q_full.at[slot])

            def step(carry, steps, _, low, high):
                acc, largest, total = carry
                ring = lax.rem(steps, stages)
                plgpu.barrier_wait(k_full.at[ring])
                qk = product(q_tile, k_smem.at[ring].transpose((1, 0)), interpreted)
                plgpu.barrier_arrive(k_free.at[ring])
                qk = mask_columns(qk, low, high, -jnp.inf)
                scale = LOG2E / math.sqrt(dim)
                new = jnp.maximum(largest, qk.max(axis=1) * scale)
                shrink = jnp.exp2(largest - new)
                p = jnp.exp2(qk * scale - lax.broadcast_in_dim(new, qk.shape, [0]))
                acc *= lax.broadcast_in_dim(shrink, acc.shape, [0])
                total = total * shrink + p.sum(axis=1)
                p = p.astype(v_smem.dtype)
                plgpu.barrier_wait(v_full.at[ring])
                acc = accumulate(acc, p, v_smem.at[ring], interpreted)
                plgpu.barrier_arrive(v_free.at[ring])
                return acc, new, total

            row_layout = plgpu.Layout.WGMMA.reduce(1)
            carry = (
                plgpu.layout_cast(jnp.zeros((ROWS, dim), jnp.float32), plgpu.Layout.WGMMA),
                plgpu.layout_cast(jnp.full((ROWS,), -jnp.inf, jnp.float32), row_layout),
                plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), row_layout),
            )
            carry, steps = walk(line, tiles.runs, block, tokens, step, carry, steps)
            acc, largest, total = carry
            some = jnp.where(total > 0, total, 1.0)  # a tile without keys yields 0
            lse = jnp.where(total > 0, largest + jnp.log(some) * LOG2E, -jnp.inf)
            # The queries are spent: their place holds the output on its way out.
            q_tile[...] = (acc * lax.broadcast_in_dim(1 / some, acc.shape, [0])).astype(out_ref.dtype)
            lse_smem[warpgroup] = lse
            plgpu.commit_smem()
            batch_index, head, tile = item
            rows = pl.ds(tile * TILE + warpgroup * ROWS, ROWS)
            plgpu.copy_smem_to_gmem(q_tile, out_ref.at[batch_index, head, rows])
            plgpu.copy_smem_to_gmem(lse_smem.at[warpgroup], lse_ref.at[batch_index, head, rows])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.barrier_arrive(q_free.at[slot])
            return steps

        each(body=one_tile)
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == COMPUTE)
    def _copy():
        plgpu.set_max_registers(40, action="decrease")

        def one_tile(item, start, line, used, steps):
            batch_index, head, _ = item
            slot = lax.rem(used, slots)
            pl.when(used >= slots)(functools.partial(plgpu.barrier_wait, q_free.at[slot]))
            rows = pl.ds(start, TILE)
            source = q_ref.at[batch_index, head, rows] if sorted_rows else q_ref.at[batch_index, rows, head]
            plgpu.copy_gmem_to_smem(source, q_smem.at[slot], q_full.at[slot])

            def step(_, steps, row, *__):
                ring = lax.rem(steps, stages)
                keys = (batch_index, pl.ds(row, block), head)
                for source, target, full, free in (
                    (k_ref, k_smem, k_full, k_free),
                    (v_ref, v_smem, v_full, v_free),
                ):
                    pl.when(steps >= stages)(functools.partial(plgpu.barrier_wait, free.at[ring]))
                    plgpu.copy_gmem_to_smem(source.at[keys], target.at[ring], full.at[ring])

            _, steps = walk(line, tiles.runs, block, tokens, step, None, steps)
            return steps

        each(body=one_tile)


def mask_columns(x, low, high, value):
    """x [rows, columns] with columns outside [low, high) set to `value`; costs nothing where there are none."""

    def masked(x):
        column = plgpu.broadcasted_iota(jnp.int32, x.shape, 1, layout=plgpu.Layout.WGMMA)
        return jnp.where((column >= low) & (column < high), x, jnp.full(x.shape, value, x.dtype))

    return lax.cond((low > 0) | (high < x.shape[1]), masked, lambda x: x, x)


def product(a, b, interpreted: bool = False):
    """a @ b in float32 on the tensor cores; a from shared memory or registers, b from shared memory."""
    if interpreted:  # the interpreter knows tensor cores without registers as operands
        out = jnp.dot(a[...].astype(jnp.float32), b[...].astype(jnp.float32))
        plgpu.commit_smem()  # plain reads, unlike the tensor cores', are not ordered before the next copy
        return out

    def scope(ref):
        plgpu.wgmma(ref, a, b)
        return ref[...]

    return pl.run_scoped(scope, plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32))


def accumulate(acc, a, b, interpreted: bool = False):
    """acc + a @ b in place."""
    if interpreted:
        return acc + product(a, b, interpreted)
    return pl.run_state(lambda ref: plgpu.wgmma(ref, a, b))(plgpu.ACC.init(acc))
