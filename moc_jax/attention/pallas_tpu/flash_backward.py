"""Gradients of attention on TPU, from the output's log-sum-exp: one kernel, five products, the same bits on every run.

With the final log-sum-exp L of a query, over all its keys, every part of its attention knows the final weights:

    p = exp(s - L)     dv = p^T do     ds = p (do v^T - delta)     dq = ds k / sqrt(D)     dk = ds^T q / sqrt(D)

with delta = rowsum(do o). So anchors and picks add up, and no gradient passes through the merge. The grid is (scene,
head, tile of keys, step); a step is one block of the tile's queries.

(a) A tile's first step copies its keys and values with zeros for the rows that aren't the tile's, and clears the sums
    of dk and dv in VMEM. No step needs a mask of keys: where k and v are 0, a finite p adds 0 to dq, and the last step
    writes 0 to dk and dv. p is finite since its exponent is at most 0, by a minimum that is idle elsewhere.
(b) A step has keys for rows and queries for columns, so that L and delta are rows. Queries outside the run have L =
    +inf there, hence p = 0: a mask of `block` numbers, not of `block` * `rows`. For some keys at a time: both scores,
    p, dv, ds, dk, and dq with ds transposed.
(c) The step's dq leaves by a copy of its own, awaited when the next one is to leave. If several tiles of keys read a
    query (`accumulate`), the sum of those before comes in while the step computes. It may come in before the last
    step's dq has left, unless both are of the same block: then it waits. Everything older has left.
(d) A tile's last step writes dk and dv, scaled once.

FLOPs: 10 * D per (query, key), padded to tiles and blocks. Bytes of a step of n queries, bfloat16: 4 n D in and 2 n D
out; 8 n D in and 4 n D out where dq accumulates, 1.5 MB for 1024 x 128 beside 1.3 GFLOP. Of a tile: 8 * rows * D.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from moc_jax.attention.layout import LOG2E, Tiles
from moc_jax.attention.pallas_tpu.device import ROWS, Chip
from moc_jax.attention.pallas_tpu.flash import product
from moc_jax.attention.pallas_tpu.steps import Steps
from moc_jax.shapes import Array, Float, Float32, typed

_NONE = -1
_KEYS = 3  # numbers of a tile of keys: its first row, begin and end of its keys


@dataclasses.dataclass(frozen=True, kw_only=True)
class GradientTiling:
    """Sizes of the backward kernel."""

    block: int
    """Queries of a step."""
    at_once: int
    """Keys whose scores are computed at once: must divide a tile's rows."""
    transposed: bool = False
    """dq, dk and dv are summed with the head's dimension for rows, so that p and ds are what a matrix unit holds. Good
    where D is less than the unit is wide: they fill it, while q, k and d_out fill a part."""

    def __post_init__(self):
        if min(self.block, self.at_once) < ROWS or self.block % ROWS or self.at_once % ROWS:
            raise ValueError(f"{self}: sizes must be positive multiples of {ROWS}")


@typed
def gradients(
    q: Float[Array, "B Hq Nq D"],
    k: Float[Array, "B H Nk D"],
    v: Float[Array, "B H Nk D"],
    d_out: Float[Array, "B Hq Nq D"],
    lse: Float32[Array, "B Hq Nq"],
    delta: Float32[Array, "B Hq Nq"],
    tiles: Tiles,
    *,
    first_head: Array | int = 0,
    rows: int,
    tiling: GradientTiling,
    chip: Chip,
    accumulate: bool,
    pairs: int | None = None,
    d_q_type: DTypeLike | None = None,
    name: str = "moc_gradients",
) -> tuple[Float[Array, "B Hq Nq D"], Float[Array, "B Hq R D"], Float[Array, "B Hq R D"]]:
    """dq of the queries, and dk and dv of each tile's rows, R = tiles * rows.

    Args:
        q, d_out: Some of the heads, from `first_head` on. Rows that no run holds may be any finite numbers whose
            products are finite.
        k, v: Padded so that `rows` rows from the first of any tile on exist.
        lse: Base-2 log-sum-exp over all keys of each query; +inf: the query adds nothing.
        delta: rowsum(d_out * out); not read where lse is +inf.
        tiles: Keys over queries. Steps beyond a tile's own, and tiles without queries, stay at the block that holds
            the begin of an empty run: nothing is copied where that is the last one walked.
        rows: Keys of a tile.
        chip: That the program is for.
        accumulate: Several tiles may read a query: dq is float32, their sum, and 0 if none does. Otherwise a block of
            queries must be read by one tile at most, and blocks that none reads are not written.
        d_q_type: Of dq if it does not accumulate; q's if None.
        pairs: (query, key) pairs of a scene and head, for the compiler's estimate; the most there can be, if None.
        name: Of the kernel, in profiles and listings.

    Returns:
        dq, dk, dv. Row r of tile g is row r of the keys that it loads; 0 where it is not one of the tile's keys.
    """
    batch, heads, queries, dim = q.shape
    job = Job(
        steps=Steps(tiles.table.shape[1], tiles.count, (tiles.table.shape[3] - _KEYS) // 2, tiling.block),
        queries=queries,
        dim=dim,
        dtype=k.dtype,
        rows=rows,
        tiling=tiling,
        accumulate=accumulate,
    )
    operands = [q, d_out, jnp.stack([lse, delta], axis=2), k, v]
    d_q_type = jnp.float32 if accumulate else d_q_type or q.dtype
    if accumulate:
        operands.append(jnp.zeros(q.shape, d_q_type))
    d_k = jax.ShapeDtypeStruct((batch, heads, tiles.count * rows, dim), k.dtype)
    table, most = job.steps.of(tiles.table[..., _KEYS:], tiling.block, first_head)
    in_specs, out_specs = _specs(job)
    d_q, d_k, d_v = pl.pallas_call(
        functools.partial(_kernel, job=job),
        name=name,
        out_shape=(jax.ShapeDtypeStruct(q.shape, d_q_type), d_k, d_k),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, heads, tiles.count, most),
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=_scratch(job, d_q_type),
        ),
        input_output_aliases={7: 0} if accumulate else {},
        compiler_params=chip.params("ppaa", vmem=chip.info.vmem_capacity_bytes),
        cost_estimate=job.cost(batch * heads, pairs),
    )(table, tiles.table[..., :_KEYS].astype(jnp.int32).reshape(-1), *operands)
    return d_q, d_k, d_v


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """Static facts of one call."""

    steps: Steps
    queries: int
    dim: int
    dtype: DTypeLike
    rows: int
    tiling: GradientTiling
    accumulate: bool

    def __post_init__(self):
        if self.queries % self.tiling.block:
            raise ValueError(f"{self.queries} queries are not a multiple of the {self.tiling.block} of a step")
        if self.rows % self.tiling.at_once:
            raise ValueError(f"{self.rows} keys are not a multiple of the {self.tiling.at_once} computed at once")

    def cost(self, heads: int, pairs: int | None) -> pl.CostEstimate:
        """What the compiler can't see from outside; `heads` of all scenes."""
        if pairs is None:
            pairs = self.queries * self.rows * (self.steps.tiles if self.accumulate else 1)
        pairs *= heads
        size = jnp.dtype(self.dtype).itemsize
        per_pair = pairs // self.rows * self.dim  # each query comes once for each tile that reads it
        return pl.CostEstimate(
            flops=10 * self.dim * pairs,
            transcendentals=pairs,
            bytes_accessed=per_pair * (2 * size + (8 if self.accumulate else size))
            + 4 * heads * self.steps.tiles * self.rows * self.dim * size,
        )


def _specs(job: Job) -> tuple[list[pl.BlockSpec], tuple[pl.BlockSpec, ...]]:
    """Of inputs and of outputs."""
    block, hbm = job.tiling.block, pl.BlockSpec(memory_space=pl.ANY)

    def query_block(scene, head, tile, step, table_smem_ref):
        return lax.div(job.steps.rows(table_smem_ref, job.steps.tile(scene, head, tile), step)[0], jnp.int32(block))

    def wide(scene, head, tile, step, table_smem_ref, _):
        return scene, head, query_block(scene, head, tile, step, table_smem_ref), 0

    def narrow(scene, head, tile, step, table_smem_ref, _):
        return scene, head, 0, query_block(scene, head, tile, step, table_smem_ref)

    def keys(scene, head, tile, step, table_smem_ref, keys_smem_ref):
        row = keys_smem_ref[job.steps.tile(scene, head, tile) * _KEYS]
        return scene, table_smem_ref[0] + head, pl.multiple_of(row, ROWS), 0

    none = pl.squeezed
    query_spec = pl.BlockSpec((none, none, block, job.dim), wide)
    row_spec = pl.BlockSpec((none, none, 2, block), narrow)
    key_spec = pl.BlockSpec((none, none, pl.Element(job.rows), pl.Element(job.dim)), keys)
    tile_spec = pl.BlockSpec((none, none, job.rows, job.dim), lambda scene, head, tile, *_: (scene, head, tile, 0))
    inputs = [query_spec, query_spec, row_spec, key_spec, key_spec]
    return inputs + [hbm] * job.accumulate, (hbm, tile_spec, tile_spec)


def _scratch(job: Job, d_q_type) -> list[pl.MemoryRef]:
    block, dim = job.tiling.block, job.dim
    tile = pltpu.VMEM((job.rows, dim), job.dtype)
    total = pltpu.VMEM((dim, job.rows) if job.tiling.transposed else (job.rows, dim), jnp.float32)
    return [
        tile,
        tile,
        total,
        total,
        pltpu.VMEM((block, dim), jnp.float32),
        pltpu.VMEM((block, dim) if job.accumulate else (8, 128), jnp.float32),
        pltpu.VMEM((block, dim), d_q_type),
        pltpu.SMEM((1,), jnp.int32),
        pltpu.SemaphoreType.DMA((2,)),
    ]


class _Refs(NamedTuple):
    # prefetched
    table_smem: jax.Ref  # of steps
    keys_smem: jax.Ref
    # inputs
    q_vmem: jax.Ref
    d_out_vmem: jax.Ref
    rows_vmem: jax.Ref  # log-sum-exp, delta
    k_vmem: jax.Ref
    v_vmem: jax.Ref
    # outputs
    d_q_hbm: jax.Ref
    d_k_vmem: jax.Ref
    d_v_vmem: jax.Ref
    # scratch
    keys_vmem: jax.Ref  # k and v with zeros
    values_vmem: jax.Ref
    d_k_sum_vmem: jax.Ref
    d_v_sum_vmem: jax.Ref
    d_q_sum_vmem: jax.Ref  # of this step
    before_vmem: jax.Ref  # of the tiles before
    d_q_vmem: jax.Ref  # on its way out
    leaving_smem: jax.Ref  # the block that is, or _NONE
    semaphores: jax.Ref  # in, out


def _kernel(*all_refs, job: Job):
    refs = _Refs(*all_refs[:7], *all_refs[7 + job.accumulate :])
    block, rows, dim = job.tiling.block, job.rows, job.dim
    assert refs.q_vmem.shape == refs.d_out_vmem.shape == refs.d_q_vmem.shape == (block, dim)
    assert refs.rows_vmem.shape == (2, block)
    assert refs.k_vmem.shape == refs.v_vmem.shape == refs.d_k_vmem.shape == refs.d_v_vmem.shape == (rows, dim)
    scene, head, tile, step = (pl.program_id(axis) for axis in range(4))
    g, last_tile, last_step = job.steps.tile(scene, head, tile), job.steps.tiles - 1, pl.num_programs(3) - 1

    @pl.when(step == 0)
    def _():
        pl.when(tile == 0)(functools.partial(_set_leaving, refs, _NONE))
        _open(refs, job, g)

    @pl.when(step < job.steps.count(refs.table_smem, g))
    def _():
        _step(refs, job, scene, head, g, step)

    @pl.when(step == last_step)
    def _():
        _close(refs, job, g)
        pl.when((tile == last_tile) & (refs.leaving_smem[0] != _NONE))(functools.partial(_wait_left, refs, job))


def _set_leaving(refs: _Refs, block):
    refs.leaving_smem[0] = block


def _mine(refs: _Refs, job: Job, g):
    """Which of the loaded rows are the tile's keys."""
    first, begin, end = (refs.keys_smem[g * _KEYS + i] for i in range(_KEYS))
    row = lax.broadcasted_iota(jnp.int32, (job.rows, job.dim), 0) + first
    return (row >= begin) & (row < end)


def _open(refs: _Refs, job: Job, g):
    """Keys and values with zeros, sums at zero."""
    mine = _mine(refs, job, g)
    refs.keys_vmem[...] = jnp.where(mine, refs.k_vmem[...], 0)
    refs.values_vmem[...] = jnp.where(mine, refs.v_vmem[...], 0)
    refs.d_k_sum_vmem[...] = jnp.zeros_like(refs.d_k_sum_vmem)
    refs.d_v_sum_vmem[...] = jnp.zeros_like(refs.d_v_sum_vmem)


def _close(refs: _Refs, job: Job, g):
    """dk and dv leave."""
    mine = _mine(refs, job, g)
    d_k, d_v = refs.d_k_sum_vmem[...] * (1 / math.sqrt(job.dim)), refs.d_v_sum_vmem[...]
    if job.tiling.transposed:
        d_k, d_v = d_k.T, d_v.T
    refs.d_k_vmem[...] = jnp.where(mine, d_k, 0.0).astype(refs.d_k_vmem.dtype)
    refs.d_v_vmem[...] = jnp.where(mine, d_v, 0.0).astype(refs.d_v_vmem.dtype)


def _copy_out(refs: _Refs, job: Job, scene, head, block):
    return pltpu.make_async_copy(refs.d_q_vmem, _d_q_rows(refs, job, scene, head, block), refs.semaphores.at[1])


def _copy_in(refs: _Refs, job: Job, scene, head, block):
    return pltpu.make_async_copy(_d_q_rows(refs, job, scene, head, block), refs.before_vmem, refs.semaphores.at[0])


def _d_q_rows(refs: _Refs, job: Job, scene, head, block):
    size = job.tiling.block
    return refs.d_q_hbm.at[scene, head, pl.ds(pl.multiple_of(block * size, size), size)]


def _wait_left(refs: _Refs, job: Job):
    _copy_out(refs, job, 0, 0, 0).wait()  # for as many bytes as any block has
    _set_leaving(refs, _NONE)


def _step(refs: _Refs, job: Job, scene, head, g, step):
    """All gradients of one block of queries and the tile's keys."""
    first, begin, end = job.steps.rows(refs.table_smem, g, step)
    block = lax.div(first, jnp.int32(job.tiling.block))
    if job.accumulate:
        pl.when(refs.leaving_smem[0] == block)(functools.partial(_wait_left, refs, job))
        _copy_in(refs, job, scene, head, block).start()

    column = lax.broadcasted_iota(jnp.int32, (1, job.tiling.block), 1) + first
    lse = refs.rows_vmem[0:1]
    counts = (column >= begin) & (column < end) & (lse < jnp.inf)
    lse, delta = jnp.where(counts, lse, jnp.inf), jnp.where(counts, refs.rows_vmem[1:2], 0.0)
    for first in range(0, job.rows, job.tiling.at_once):
        d_q = _add_keys(refs, job, lse, delta, pl.ds(first, job.tiling.at_once))
        refs.d_q_sum_vmem[...] = d_q if first == 0 else refs.d_q_sum_vmem[...] + d_q

    pl.when(refs.leaving_smem[0] != _NONE)(functools.partial(_wait_left, refs, job))
    d_q = refs.d_q_sum_vmem[...] * (1 / math.sqrt(job.dim))
    if job.accumulate:
        _copy_in(refs, job, scene, head, block).wait()
        d_q = d_q + refs.before_vmem[...]
    refs.d_q_vmem[...] = d_q.astype(refs.d_q_vmem.dtype)
    _copy_out(refs, job, scene, head, block).start()
    _set_leaving(refs, block)


def _add_keys(refs: _Refs, job: Job, lse, delta, keys):
    """Adds to dk and dv of some of the tile's keys; their part of dq, not scaled."""
    q, d_out, k, v = refs.q_vmem[...], refs.d_out_vmem[...], refs.keys_vmem[keys], refs.values_vmem[keys]

    def add(total_vmem, weights, rows):
        if job.tiling.transposed:  # into sums [D, keys]
            total_vmem[:, keys] += product(rows.T, weights, 1, 1)
        else:
            total_vmem[keys] += product(weights, rows, 1, 0)

    p = _weights(k, q, lse)
    add(refs.d_v_sum_vmem, p.astype(q.dtype), d_out)
    d_s = (p * (product(v, d_out, 1, 1) - delta)).astype(q.dtype)
    add(refs.d_k_sum_vmem, d_s, q)
    return product(k.T, d_s, 1, 0).T if job.tiling.transposed else product(d_s.T, k, 1, 0)


def _weights(k, q, lse):
    """p [keys, queries]; at most 1 also where k is 0 for a mask."""
    return jnp.exp2(jnp.minimum(product(k, q, 1, 1) * (LOG2E / math.sqrt(q.shape[-1])) - lse, 0.0))
