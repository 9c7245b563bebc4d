"""What the kernels share of a multiprocessor: three warpgroups and their roles, the copy engine, the tensor cores.

Pallas' interpreter knows neither products with an operand in registers nor accumulators that outlive a scope; there,
accumulators are plain values and products plain products, and all else is the kernel's own code.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moc_jax.attention.layout import Tiles
from moc_jax.attention.pallas_gpu.device import COMPUTE, Hopper
from moc_jax.attention.pallas_gpu.tiles import ROWS, TILE, Job, Ref, each_tile, walk
from moc_jax.shapes import Array

SWIZZLED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))


class Refs(NamedTuple):
    """A kernel's memory."""

    input_gmem_refs: tuple[Ref, ...]  # q, k, v and what else it reads
    table_gmem_ref: Ref  # of tiles
    first_head_gmem_ref: Ref  # of k and v, the kernel's first; then how tiles are dealt
    output_gmem_refs: tuple[Ref, ...]
    tile_smem_refs: tuple[Ref, ...]  # what belongs to a tile
    ring_smem_refs: tuple[Ref, ...]  # what comes block after block
    tile_barrier_refs: tuple[Ref, ...]
    ring_barrier_refs: tuple[Ref, ...]


def tile_rows(job: Job, x: Array):
    """Shared memory for rows of x that belong to a tile."""
    return plgpu.SMEM((job.tiling.buffers, TILE, job.dim), x.dtype, transforms=SWIZZLED)


def ring_rows(job: Job, x: Array):
    """Shared memory for rows of x that come block after block."""
    return plgpu.SMEM((job.tiling.stages, job.tiling.block, job.dim), x.dtype, transforms=SWIZZLED)


def launch(name: str, compute, copy, job: Job, inputs, tiles: Tiles, first_head, outputs, *, tile, ring, arrivals):
    """Calls a kernel of one persistent thread block per multiprocessor, three warpgroups each.

    Args:
        compute: compute(refs, job, warpgroup), by two warpgroups.
        copy: copy(refs, job, first head, item, ...) for each tile, by the third.
        tile, ring: Shared memory for what belongs to a tile, and for what comes block after block.
        arrivals: That each of a tile's barriers awaits, and each of a block's.
    """

    def kernel(*refs):
        count = len(inputs)
        given, written, memory = refs[:count], refs[count + 2 : -4], refs[-4:]
        _split_roles(Refs(given, refs[count], refs[count + 1], written, *memory), job, compute, copy)

    def barriers(count, arrivals):
        return tuple(plgpu.Barrier(num_barriers=count, num_arrivals=a) for a in arrivals)

    of_tile, of_block = arrivals
    deal = tiles.deal if job.dealt else None
    return plgpu.kernel(
        kernel,
        out_type=outputs,
        scratch_types=[tile, ring, barriers(job.tiling.buffers, of_tile), barriers(job.tiling.stages, of_block)],
        kernel_name=name,
        grid=(job.thread_blocks,),
        grid_names=("block",),
        num_threads=COMPUTE + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=job.interpret,
    )(*inputs, tiles.table, first_head if deal is None else jnp.concatenate([first_head, deal]))


def _split_roles(refs: Refs, job: Job, compute, copy) -> None:
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup < COMPUTE)
    def _():
        plgpu.set_max_registers(job.tiling.compute_registers, action="increase")
        compute(refs, job, warpgroup)
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == COMPUTE)
    def _():
        plgpu.set_max_registers(job.tiling.copy_registers, action="decrease")
        first_head = refs.first_head_gmem_ref[0]
        copy_one = functools.partial(copy, refs, job, first_head)
        each_tile(refs.table_gmem_ref, job, copy_one, jnp.int32(0), refs.first_head_gmem_ref)


def tile_by_tile(tile):
    """compute(refs, job, warpgroup) that calls tile(refs, job, warpgroup, ...) as `each_tile` does."""

    def compute(refs: Refs, job: Job, warpgroup):
        tile_of = functools.partial(tile, refs, job, warpgroup)
        each_tile(refs.table_gmem_ref, job, tile_of, jnp.int32(0), refs.first_head_gmem_ref)

    return compute


def copy_tile(refs: Refs, job: Job, sources, used) -> None:
    """Brings what belongs to a tile, `used` tiles after the thread block's first."""
    full, free = refs.tile_barrier_refs
    buffer = lax.rem(used, job.tiling.buffers)
    pl.when(used >= job.tiling.buffers)(functools.partial(plgpu.barrier_wait, free.at[buffer]))
    for source, target in zip(sources, refs.tile_smem_refs, strict=False):
        plgpu.copy_gmem_to_smem(source, target.at[buffer], full.at[buffer])


def copy_keys(refs: Refs, job: Job, scene, head, line, steps):
    """Brings a tile's keys and values into their ring, block after block; steps after it."""
    k_full, k_free, v_full, v_free = refs.ring_barrier_refs
    k_gmem_ref, v_gmem_ref = refs.input_gmem_refs[1:3]

    def step(_, steps, row, *__):
        ring = lax.rem(steps, job.tiling.stages)
        keys = (scene, pl.ds(row, job.tiling.block), head)
        for source, target, full, free in (
            (k_gmem_ref, refs.ring_smem_refs[0], k_full, k_free),
            (v_gmem_ref, refs.ring_smem_refs[1], v_full, v_free),
        ):
            pl.when(steps >= job.tiling.stages)(functools.partial(plgpu.barrier_wait, free.at[ring]))
            plgpu.copy_gmem_to_smem(source.at[keys], target.at[ring], full.at[ring])

    return walk(line, job, step, None, steps)[1]


def mask_columns(x: Array, span: tuple[Array, Array], value: float) -> Array:
    """x [rows, columns] with columns outside span = [low, high) set to `value`; next to free where there are none."""
    low, high = span

    def masked(x):
        column = plgpu.broadcasted_iota(jnp.int32, x.shape, 1, layout=plgpu.Layout.WGMMA)
        return jnp.where((column >= low) & (column < high), x, jnp.full(x.shape, value, x.dtype))

    return lax.cond((low > 0) | (high < x.shape[1]), masked, lambda x: x, x)


# ------------------------------------------------------------------------------------------------ tensor cores


class _Registers:
    """A value that is read and written like a ref."""

    def __init__(self, value: Array):
        self.value = value

    def __getitem__(self, _) -> Array:
        return self.value

    def __setitem__(self, _, value: Array):
        self.value = value


def with_accumulators(function: Callable[..., None], job: Job | Hopper, accumulators, others=()) -> tuple[Array, ...]:
    """What `accumulators` (float32 matrices) and `others` hold after function(*refs of them all)."""
    if job.interpret is not None:
        refs = [_Registers(x) for x in (*accumulators, *others)]
        function(*refs)
        return tuple(ref.value for ref in refs)
    state: tuple = (*map(plgpu.ACC.init, accumulators), *others)
    return pl.run_state(lambda refs: function(*refs))(state)


def with_scores[T](function: Callable[..., T], job: Job, count: int) -> T:
    """function(`count` accumulators of one warpgroup's scores with a block)."""
    shape = ROWS, job.tiling.block
    if job.interpret is not None:
        return function(*(_Registers(jnp.zeros(shape, jnp.float32)) for _ in range(count)))
    return pl.run_scoped(function, *[plgpu.ACC(shape, jnp.float32)] * count)


def multiply(acc_ref: Ref, a: Array | Ref, b_smem_ref: Ref, there: Array | bool = True) -> None:
    """Starts acc + a @ b; a in registers or shared memory. Unless `there`, the result is nobody's."""
    if not isinstance(acc_ref, _Registers):
        plgpu.wgmma(acc_ref, a, b_smem_ref)
        return

    def product():
        return acc_ref.value + jnp.dot(a[...].astype(jnp.float32), b_smem_ref[...].astype(jnp.float32))

    acc_ref.value = product() if there is True else lax.cond(there, product, lambda: acc_ref.value)
    plgpu.commit_smem()  # plain reads, unlike the tensor cores', are not ordered before the next copy


def result(acc_ref: Ref, pending: int) -> Array:
    """What an accumulator holds, once no more than `pending` later products are under way."""
    if isinstance(acc_ref, _Registers):
        return acc_ref.value
    return plgpu.wgmma_accumulator_load(acc_ref, wait_n=pending)


def multiplied(acc: Array, a: Array, b_smem_ref: Ref, job: Job | Hopper) -> Array:
    """acc + a @ b."""
    return with_accumulators(lambda acc_ref: multiply(acc_ref, a, b_smem_ref), job, [acc])[0]
