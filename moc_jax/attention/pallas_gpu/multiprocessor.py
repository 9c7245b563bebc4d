"""What the kernels share of a multiprocessor: its warpgroups and their roles, the copy engine, the tensor cores.

Pallas' interpreter knows neither products with an operand in registers nor accumulators that outlive a scope; there,
accumulators are plain values and products plain products, and all else is the kernel's own code.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moc_jax.attention.layout import Tiles
from moc_jax.attention.pallas_gpu.device import COMPUTE, Hopper
from moc_jax.attention.pallas_gpu.tiles import ROWS, TILE, Job, Ref, each_tile, walk
from moc_jax.shapes import Array


def swizzled(columns: int):
    """How 16-bit matrices lie in shared memory for tensor cores, which may take some times `columns` columns."""
    return plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(2 * columns)


SWIZZLED = swizzled(64)


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
    more_refs: tuple[Ref, ...]  # what only one kernel has
    turn_gmem_ref: Ref  # counters of turns, where there are any


def tile_rows(job: Job, x: Array, columns: int = 64):
    """Shared memory for rows of x that belong to a tile."""
    return plgpu.SMEM((job.tiling.buffers, TILE, job.dim), x.dtype, transforms=swizzled(columns))


def ring_rows(job: Job, x: Array, columns: int = 64):
    """Shared memory for rows of x that come block after block."""
    return plgpu.SMEM((job.tiling.stages, job.tiling.block, job.dim), x.dtype, transforms=swizzled(columns))


def launch(
    name: str,
    compute,
    copy,
    job: Job,
    inputs,
    tiles: Tiles,
    first_head,
    outputs,
    *,
    tile,
    ring,
    arrivals,
    more=(),
    turns=None,
):
    """Calls a kernel of one persistent thread block per multiprocessor, three or four warpgroups each.

    Args:
        compute: compute(refs, job, warpgroup), by two warpgroups.
        copy: copy(refs, job, first head, item, ...) for each tile, by the third.
        tile, ring: Shared memory for what belongs to a tile, and for what comes block after block.
        arrivals: That each of a tile's barriers awaits, and each of a block's.
        more: Further shared memory and barriers.
        turns: Where tiles take turns, turns(refs, job, item, ...) for each tile, by the fourth, and the shape of the
            counters in memory that it goes by. The interpreter has none: there, all happens in turn anyway.
    """
    keep, counters = turns or (None, ())
    if job.interpret is not None:
        keep = None

    def kernel(*refs):
        count = len(inputs)
        given, written, memory = refs[:count], refs[count + 2 : -5], refs[-5:]
        turns = pl.get_global(plgpu.SemaphoreType.REGULAR(counters)) if keep else None
        refs = Refs(given, refs[count], refs[count + 1], written, *memory, turn_gmem_ref=turns)
        _split_roles(refs, job, compute, copy, keep)

    def barriers(count, arrivals):
        return tuple(plgpu.Barrier(num_barriers=count, num_arrivals=a) for a in arrivals)

    of_tile, of_block = (barriers(n, a) for n, a in zip((job.tiling.buffers, job.tiling.stages), arrivals, strict=True))
    deal = tiles.deal if job.dealt else None
    call = plgpu.kernel(
        kernel,
        out_type=outputs,
        scratch_types=[tile, ring, of_tile, of_block, more],
        kernel_name=name,
        grid=(job.thread_blocks,),
        grid_names=("block",),
        num_threads=COMPUTE + (2 if keep else 1),
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=job.interpret,
    )
    if keep:  # vmap would share the counters
        call = jax.custom_batching.sequential_vmap(call)
    return call(*inputs, tiles.table, first_head if deal is None else jnp.concatenate([first_head, deal]))


def _split_roles(refs: Refs, job: Job, compute, copy, keep) -> None:
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

    if keep:

        @pl.when(warpgroup == COMPUTE + 1)
        def _():
            plgpu.set_max_registers(job.tiling.copy_registers, action="decrease")
            each_tile(refs.table_gmem_ref, job, functools.partial(keep, refs, job), jnp.int32(0))


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

    def step(_, steps, __, row, *___):
        ring = lax.rem(steps, job.tiling.stages)
        keys = (scene, pl.ds(row, job.tiling.block), head)
        for source, target, full, free in (
            (k_gmem_ref, refs.ring_smem_refs[0], k_full, k_free),
            (v_gmem_ref, refs.ring_smem_refs[1], v_full, v_free),
        ):
            pl.when(steps >= job.tiling.stages)(functools.partial(plgpu.barrier_wait, free.at[ring]))
            plgpu.copy_gmem_to_smem(source.at[keys], target.at[ring], full.at[ring])

    return walk(line, job, step, None, steps)[1]


def mask(x: Array, *spans: tuple[int, Array, Array], value: float) -> Array:
    """x with `value` outside of [low, high) of each (axis, low, high); next to free where that is nowhere."""

    def masked(x):
        for axis, low, high in spans:
            place = plgpu.broadcasted_iota(jnp.int32, x.shape, axis, layout=plgpu.Layout.WGMMA)
            x = jnp.where((place >= low) & (place < high), x, jnp.full(x.shape, value, x.dtype))
        return x

    some = functools.reduce(jnp.logical_or, ((low > 0) | (high < x.shape[axis]) for axis, low, high in spans))
    return lax.cond(some, masked, lambda x: x, x)


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


def with_scores[T](function: Callable[..., T], job: Job, count: int, shape: tuple[int, int] | None = None) -> T:
    """function(`count` accumulators of a shape, or that of one warpgroup's scores with a block)."""
    shape = shape or (ROWS, job.tiling.block)
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
