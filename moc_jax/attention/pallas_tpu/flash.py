"""Forward attention on TPU: tiles of queries against runs of keys, one kernel for anchors and for picked chunks.

A tile is a block of queries that read the same keys: a few *runs* of consecutive rows, walked in blocks. What differs
between the two uses is only the table of tiles:

    anchors    queries in the order of segments, at most three runs (two of text, one of video), the same for all heads
    picks      queries gathered by chunk, one run (the chunk), each head its own tiles

(a) Reference. A softmax may be taken relative to any number near its row's maximum. A tile takes the maximum over 128
    rows from its first key on, once. After that no step waits for a maximum: p = 2^(s - reference) leaves the matrix
    units' results as they come, sums of p stay apart by lane, and nothing is rescaled. (FlashAttention rescales
    everything whenever a maximum grows, which puts a reduction across lanes between the two products of every block.)
(b) A block: s = q k^T, p, then sums and p v, for some rows of queries and some keys at a time, the products of one
    patch before the exponentials of the patch before, so that both units are busy.
(c) Check. Where a later score exceeds the reference by more than float32's exponents hold, a sum of the block is
    infinite or huge: the block is computed again from the state before it, with a running maximum, and the reference
    raised (`_again`). Trained models with normalised queries and keys never need it; it makes any input exact.
(d) Write-out: p v / sum, and the base-2 log-sum-exp, reference + log2(sum), laid along lanes.

A block of keys starts at a multiple of 8 rows and ends where the keys do, so that it may hold rows that are not the
run's. Of such blocks only the patches that hold keys are computed, one after the other, and masked; blocks without such
rows are computed in one go. Where every tile has a single block (picks), nothing is kept between steps, and everything
is masked; most chunks leave the last 128 rows of their block free, which are then left out.

FLOPs: 4 * D per (query, key), padded to tiles and blocks. Bytes: q and out once, k and v once per tile, or once for
consecutive tiles of the same chunk.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from moc_jax.attention.layout import LOG2E, Tiles
from moc_jax.attention.pallas_tpu import packing
from moc_jax.attention.pallas_tpu.device import LANES, ROWS, Chip
from moc_jax.attention.pallas_tpu.steps import Steps
from moc_jax.shapes import Array, Float, typed

_LARGEST_SUM = 2.0**40  # far from overflow, also when multiplied by large values
_LEAST_REFERENCE = -1e30  # of a row none of whose keys were looked at
_NOW, _BEFORE = 0, 1
_AGAIN_ROWS = 256  # queries computed again at a time


@dataclasses.dataclass(frozen=True)
class ForwardTiling:
    """How a block is computed."""

    queries: int  # rows of a tile
    keys: int  # rows of a block of keys
    compute_queries: int = 256  # rows of queries at a time
    compute_keys: int = 512  # keys at a time
    ahead: int = 1  # patches whose scores are computed ahead of the exponentials
    short: tuple[int, int] | None = None  # single blocks whose keys end by this row compute so far, so many at a time

    def __post_init__(self):
        if min(self.queries, self.keys, self.compute_queries, self.compute_keys) < 1 or self.ahead < 0:
            raise ValueError(f"{self}: sizes must be positive")
        if self.queries % self.compute_queries or self.keys % self.compute_keys:
            raise ValueError(f"{self}: compute_queries must divide queries, and compute_keys keys")
        if self.queries % ROWS or self.keys % ROWS:
            raise ValueError(f"{self}: queries and keys must be multiples of {ROWS}, the rows of a tile of memory")
        if self.short and (self.short[0] >= self.keys or self.short[0] % self.short[1]):
            raise ValueError(f"{self}: short blocks must be shorter than others and a multiple of what is at once")

    @property
    def reference_keys(self) -> int:
        """Keys whose maximum is the reference."""
        return min(LANES, self.compute_keys)


@dataclasses.dataclass(frozen=True)
class _Job:
    """What a kernel knows when it is compiled."""

    tiling: ForwardTiling
    steps: Steps
    dim: int
    last_block: int  # the last row that a block of keys may start at
    single: bool  # every tile has at most one block
    packed: bool
    dtype: DTypeLike

    @property
    def scale(self) -> float:
        return LOG2E / math.sqrt(self.dim)


class _Refs(NamedTuple):
    # prefetched
    table_smem: jax.Ref  # of steps
    # inputs
    q_vmem: jax.Ref
    k_vmem: jax.Ref
    v_vmem: jax.Ref
    # outputs
    out_vmem: jax.Ref
    lse_vmem: Any
    # scratch
    reference_vmem: Any  # [queries, lanes]; all lanes of a row are equal
    again_smem: Any  # [1]: whether the block must be computed again
    sums_vmem: Any = None  # [now or before the block, queries, lanes]: a row's sum is over its lanes
    acc_vmem: Any = None  # [now or before the block, queries, D]


@typed
def forward(
    q: Float[Array, "B _ _ D"],
    k: Float[Array, "B H N D"],
    v: Float[Array, "B H N D"],
    tiles: Tiles,
    *,
    first_head: Array | int = 0,
    first_tile: int = 0,
    longest_run: int | None = None,
    mean_keys: int | None = None,
    packed: bool = False,
    tiling: ForwardTiling,
    chip: Chip,
    name: str = "moc_forward",
    into: tuple[Array, Array] | None = None,
) -> tuple[Float[Array, "B _ R ..."], ...]:
    """Output and base-2 log-sum-exp of the queries that tiles hold; of other queries and unused tiles, anything.

    Args:
        q: Queries [B, heads, R, D]: some of the heads, from `first_head` on. Tile g is block `first_tile` + g.
        k, v: Keys and values; N is a multiple of 8 and at least `tiling.keys`.
        tiles: The runs of keys of each tile [begin, end).
        longest_run: No run is longer, if known: where a block holds it, steps keep no state.
        mean_keys: Of a tile, for the compiler's estimate.
        packed: Both in one array [B, H, R, E], as `packing.pack` makes it.
        tiling: Sizes of blocks; `tiling.queries` rows are a tile.
        chip: That the program is for.
        name: Of the kernel, in profiles and listings.
        into: Output and log-sum-exp of other queries, which stay; their memory is used.
    """
    batch, heads, _, dim = q.shape
    runs = tiles.table.shape[3] // 2
    job = _Job(
        tiling=tiling,
        steps=Steps(tiles.table.shape[1], tiles.count, runs, tiling.keys),
        dim=dim,
        last_block=k.shape[2] - tiling.keys,
        single=runs == 1 and longest_run is not None and longest_run + ROWS - 1 <= tiling.keys,
        packed=packed,
        dtype=q.dtype,
    )
    if job.last_block < 0 or job.last_block % ROWS:
        raise ValueError(f"{k.shape[2]} keys: must be a multiple of {ROWS} and no fewer than a block of {tiling.keys}")
    table, most = job.steps.of(tiles.table, ROWS, first_head)
    rows, keys = tiling.queries, tiling.keys
    shapes, blocks = _outputs(job, q, v.dtype, first_tile)
    others = (into[0], into[1][:, :, None]) if into else ()

    def queries_at(b, h, g, j, table_smem_ref):
        return b, h, first_tile + g, 0

    def keys_at(b, h, g, j, table_smem_ref):
        row, *_ = _block(table_smem_ref, job.steps.tile(b, h, g), j, job)
        return b, table_smem_ref[0] + h, pl.multiple_of(row, ROWS), 0

    one = (pl.squeezed, pl.squeezed)
    key_block = pl.BlockSpec((*one, pl.Element(keys), pl.Element(dim)), keys_at)
    found = pl.pallas_call(
        functools.partial(_kernel, job=job, into=len(others)),
        name=name,
        out_shape=shapes,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, heads, tiles.count, 1 if job.single else most),
            in_specs=[
                pl.BlockSpec((*one, rows, dim), queries_at),
                *([key_block] * 2),
                *([pl.BlockSpec(memory_space=pl.ANY)] * len(others)),
            ],
            out_specs=blocks,
            scratch_shapes=[
                pltpu.VMEM((rows, LANES), jnp.float32),
                pltpu.SMEM((1,), jnp.int32),
                *([] if job.single else [pltpu.VMEM((2, rows, LANES), jnp.float32)]),
                *([] if job.single else [pltpu.VMEM((2, rows, dim), jnp.float32)]),
            ],
        ),
        input_output_aliases={4 + i: i for i in range(len(others))},
        compiler_params=chip.params("ppaa"),
        cost_estimate=_cost(q, job, mean_keys or longest_run or -(-k.shape[2] // max(1, tiles.count))),
    )(table, q, k, v, *others)
    return found[0], *(lse[:, :, 0] for lse in found[1:])


def _outputs(job: _Job, q, dtype, first_tile: int):
    """Shapes and blocks."""
    (batch, heads, rows, _), tile, one = q.shape, job.tiling.queries, (pl.squeezed, pl.squeezed)
    width = packing.packed_width(job.dim, dtype) if job.packed else job.dim
    out = jax.ShapeDtypeStruct((batch, heads, rows, width), jnp.float32 if job.packed else dtype)
    lse = jax.ShapeDtypeStruct((batch, heads, 1, rows), jnp.float32)
    out_block = pl.BlockSpec((*one, tile, width), lambda b, h, g, *_: (b, h, first_tile + g, 0))
    lse_block = pl.BlockSpec((*one, 1, tile), lambda b, h, g, *_: (b, h, 0, first_tile + g))
    return ((out,), (out_block,)) if job.packed else ((out, lse), (out_block, lse_block))


def _block(table_smem_ref, tile, j, job: _Job):
    """(first row, low, high) of a tile's block j: its keys are the rows [low, high) of the block."""
    first, begin, end = job.steps.rows(table_smem_ref, tile, j)
    row = jnp.minimum(first, job.last_block)
    return row, jnp.maximum(begin, first) - row, jnp.minimum(end - row, job.tiling.keys)


def _cost(q, job: _Job, keys: int) -> pl.CostEstimate:
    """Of tiles that are all used and read so many keys each."""
    batch, heads, _, dim = q.shape
    rows = job.steps.tiles * job.tiling.queries
    size, width = q.dtype.itemsize, packing.packed_width(dim, job.dtype)
    per_row = dim * size + (4 * width if job.packed else dim * size + 4)
    return pl.CostEstimate(
        flops=4 * batch * heads * rows * keys * dim,
        transcendentals=batch * heads * rows * keys,
        bytes_accessed=batch * heads * (rows * per_row + 2 * job.steps.tiles * keys * dim * size),
    )


# ------------------------------------------------------------------------------------------------- inside the kernel


def _kernel(table_smem_ref, q_vmem_ref, k_vmem_ref, v_vmem_ref, *others, job: _Job, into: int):
    out_vmem_ref, *others = others[into:]
    lse = [None] if job.packed else []
    refs = _Refs(table_smem_ref, q_vmem_ref, k_vmem_ref, v_vmem_ref, out_vmem_ref, *lse, *others)
    t = job.tiling
    assert refs.q_vmem.shape == (t.queries, job.dim), refs.q_vmem.shape
    assert refs.k_vmem.shape == refs.v_vmem.shape == (t.keys, job.dim), refs.k_vmem.shape
    b, h, g, j = (pl.program_id(i) for i in range(4))
    tile = job.steps.tile(b, h, g)
    _, low, high = _block(table_smem_ref, tile, j, job)
    inside, blocks = (low, high), job.steps.count(table_smem_ref, tile)
    used = j < blocks

    if not job.single:
        pl.when(used & (j == 0))(lambda: _take_reference(refs, low, high, job))
        whole = (low == 0) & (high == t.keys)
        pl.when(used & whole)(lambda: _whole_block(refs, job))
        pl.when(used & ~whole)(lambda: _border_block(refs, inside, job))
    elif t.short:
        pl.when(used & (high <= t.short[0]))(lambda: _single_block(refs, inside, *t.short, job))
        pl.when(used & (high > t.short[0]))(lambda: _long_block(refs, inside, job))
    else:
        pl.when(used)(lambda: _single_block(refs, inside, t.keys, t.compute_keys, job))
    pl.when(used & (refs.again_smem[0] != 0))(lambda: _again(refs, inside, job))

    if not job.single:

        @pl.when(used & (j == blocks - 1))
        def _():
            for first in range(0, t.queries, t.compute_queries):
                rows = pl.ds(first, t.compute_queries)
                _write_out(refs, rows, refs.reference_vmem[rows], refs.sums_vmem[_NOW, rows], refs.acc_vmem[_NOW, rows])


def _take_reference(refs: _Refs, low, high, job: _Job) -> None:
    """(a)"""
    t = job.tiling
    unit = math.gcd(2 * ROWS, t.keys - t.reference_keys)
    key = jnp.minimum(lax.div(low, jnp.int32(unit)) * unit, t.keys - t.reference_keys)
    key = pl.multiple_of(key, unit)
    keys = refs.k_vmem[pl.ds(key, t.reference_keys)]
    for first in range(0, t.queries, t.compute_queries):
        rows = pl.ds(first, t.compute_queries)
        scores = _mask(product(refs.q_vmem[rows], keys, 1, 1), key, (low, high), -math.inf)
        largest = jnp.max(scores, axis=1, keepdims=True) * job.scale
        refs.reference_vmem[rows] = jnp.broadcast_to(largest, (t.compute_queries, LANES))
        refs.sums_vmem[_NOW, rows] = jnp.zeros((t.compute_queries, LANES), jnp.float32)
        refs.acc_vmem[_NOW, rows] = jnp.zeros((t.compute_queries, job.dim), jnp.float32)


def _whole_block(refs: _Refs, job: _Job) -> None:
    """(b), (c) for a block all of whose rows are keys."""
    t = job.tiling
    _check(
        refs, _patches(refs, range(0, t.queries, t.compute_queries), range(0, t.keys, t.compute_keys), job, keep=True)
    )


def _border_block(refs: _Refs, inside, job: _Job) -> None:
    """The same where some are not: the patches that hold keys, one after the other."""
    t = job.tiling

    def keep(i, _):
        rows = pl.ds(pl.multiple_of(i * t.compute_queries, t.compute_queries), t.compute_queries)
        refs.sums_vmem[_BEFORE, rows], refs.acc_vmem[_BEFORE, rows] = (
            refs.sums_vmem[_NOW, rows],
            refs.acc_vmem[_NOW, rows],
        )
        return 0

    def patch(i, worst):
        key = pl.multiple_of(i * t.compute_keys, t.compute_keys)
        return jnp.maximum(worst, _patches(refs, range(0, t.queries, t.compute_queries), [key], job, inside))

    lax.fori_loop(0, t.queries // t.compute_queries, keep, 0)
    size = jnp.int32(t.compute_keys)
    first, end = lax.div(inside[0], size), lax.div(inside[1] + size - 1, size)
    _check(refs, lax.fori_loop(first, end, patch, jnp.zeros((ROWS, LANES), jnp.float32)))


def _single_block(refs: _Refs, inside, keys: int, at_once: int, job: _Job) -> None:
    """The same for the first `keys` rows of a tile's only block."""
    t = job.tiling
    rows = range(0, t.queries, t.compute_queries)
    _check(refs, _patches(refs, rows, range(0, keys, at_once), job, inside, at_once))


def _long_block(refs: _Refs, inside, job: _Job) -> None:
    """The same for all of its rows, which few tiles need, in little code."""
    t = job.tiling

    def some_rows(i, worst):
        row = pl.multiple_of(i * t.compute_queries, t.compute_queries)
        return jnp.maximum(worst, _patches(refs, [row], range(0, t.keys, t.compute_keys), job, inside))

    _check(refs, lax.fori_loop(0, t.queries // t.compute_queries, some_rows, jnp.zeros((ROWS, LANES), jnp.float32)))


def _patches(refs: _Refs, rows, keys, job: _Job, inside=None, at_once: int | None = None, keep=False) -> Array:
    """(b) for patches of a block, which start at these rows of queries and, of each of those, at these keys.

    Returns the largest sums of every eighth row [8, lanes]. With `keep`, the state before goes to `_BEFORE`.
    """
    t = job.tiling
    at_once = at_once or t.compute_keys
    patches = [(row, key) for row in rows for key in keys]
    ready: list[Array] = []
    issued = 0
    worst = jnp.zeros((ROWS, LANES), jnp.float32)
    sums = acc = None
    for index, (row, key) in enumerate(patches):
        while issued < min(index + 1 + t.ahead, len(patches)):
            r, c = patches[issued]
            here = pl.ds(r, t.compute_queries)
            ready.append(product(refs.q_vmem[here], refs.k_vmem[pl.ds(c, at_once)], 1, 1))
            issued += 1
        here = pl.ds(row, t.compute_queries)
        scores = ready.pop(0)
        if job.single and index % len(keys) == 0:  # (a), while products of other patches are under way
            some = _mask(scores[:, : t.reference_keys], key, inside, -math.inf)
            largest = jnp.maximum(jnp.max(some, axis=1, keepdims=True) * job.scale, _LEAST_REFERENCE)
            refs.reference_vmem[here] = jnp.broadcast_to(largest, (t.compute_queries, LANES))
        reference = refs.reference_vmem[here]
        if index % len(keys) == 0:
            sums, acc = (None, None) if job.single else (refs.sums_vmem[_NOW, here], refs.acc_vmem[_NOW, here])
            if keep:  # static places: with places that take turns the compiler can't tell them apart, and waits
                refs.sums_vmem[_BEFORE, here], refs.acc_vmem[_BEFORE, here] = sums, acc
        weights = jnp.exp2(scores * job.scale - _across(reference, at_once))
        weights = _mask(weights, key, inside, 0.0)
        sums = _plus(sums, _by_lane(weights))
        values = refs.v_vmem[pl.ds(key, at_once)]
        acc = _plus(acc, product(weights.astype(values.dtype), values, 1, 0))
        if index % len(keys) == len(keys) - 1:
            worst = jnp.maximum(worst, jnp.max(sums.reshape(-1, ROWS, LANES), axis=0))
            if job.single:
                _write_out(refs, here, reference, sums, acc)
            else:
                refs.sums_vmem[_NOW, here], refs.acc_vmem[_NOW, here] = sums, acc
    return worst


def _check(refs: _Refs, worst: Array) -> None:
    """(c) A sum of NaN is one query's own and must not hide others."""
    refs.again_smem[0] = jnp.where(jnp.max(worst) <= _LARGEST_SUM, 0, 1)


def _again(refs: _Refs, inside, job: _Job) -> None:
    """(c) The block with a running maximum."""
    t = job.tiling
    size = math.gcd(_AGAIN_ROWS, t.queries)

    def some_rows(i, _):
        rows = pl.ds(pl.multiple_of(i * size, size), size)
        reference = refs.reference_vmem[rows]
        if job.single:
            sums, acc = jnp.zeros((size, LANES), jnp.float32), jnp.zeros((size, job.dim), jnp.float32)
        else:
            sums, acc = refs.sums_vmem[_BEFORE, rows], refs.acc_vmem[_BEFORE, rows]
        for key in range(0, t.keys, t.compute_keys):
            scores = product(refs.q_vmem[rows], refs.k_vmem[pl.ds(key, t.compute_keys)], 1, 1) * job.scale
            scores = _mask(scores, key, inside, -math.inf)
            new = jnp.maximum(reference, jnp.max(scores, axis=1, keepdims=True))
            shrink = jnp.exp2(reference - new)
            weights = jnp.exp2(scores - _across(new, t.compute_keys))
            sums = sums * shrink + _by_lane(weights)
            values = refs.v_vmem[pl.ds(key, t.compute_keys)]
            acc = acc * _across(shrink, job.dim) + product(weights.astype(values.dtype), values, 1, 0)
            reference = new
        if job.single:
            _write_out(refs, rows, reference, sums, acc)
        else:
            refs.reference_vmem[rows], refs.sums_vmem[_NOW, rows], refs.acc_vmem[_NOW, rows] = reference, sums, acc
        return 0

    lax.fori_loop(0, t.queries // size, some_rows, 0)


def _write_out(refs: _Refs, rows, reference, sums, acc) -> None:
    """(d)"""
    total = jnp.sum(sums, axis=1, keepdims=True)
    if refs.lse_vmem is None:
        refs.out_vmem[rows] = packing.pack(acc / total, reference[:, :1] + jnp.log2(total), refs.v_vmem.dtype)
        return
    refs.out_vmem[rows] = (acc / total).astype(refs.out_vmem.dtype)
    refs.lse_vmem[:, rows] = packing.along_lanes(reference + jnp.log2(total))


def product(left, right, left_axis: int, right_axis: int):
    """Summed over these axes, in float32."""
    precision = lax.Precision.HIGHEST if left.dtype == jnp.float32 else lax.Precision.DEFAULT
    axes = (((left_axis,), (right_axis,)), ((), ()))
    return lax.dot_general(left, right, axes, precision=precision, preferred_element_type=jnp.float32)


def _plus(total, x):
    return x if total is None else total + x


def _across(x, width: int):
    """x [rows, lanes], equal on all lanes of a row, as [rows, width]."""
    if width <= LANES:
        return x[:, :width]
    return jnp.concatenate([x] * -(-width // LANES), axis=1)[:, :width]


def _by_lane(x):
    """x [rows, columns] summed to [rows, lanes]."""
    width = x.shape[1]
    if width < LANES:
        return jnp.pad(x, ((0, 0), (0, LANES - width)))
    return functools.reduce(jnp.add, [x[:, i : i + LANES] for i in range(0, width, LANES)])


def _mask(x, key: Array | int, inside, value: float):
    """x [rows, columns], whose first column is key `key` of the block, with `value` outside of the inside."""
    if inside is None:
        return x
    column = key + lax.broadcasted_iota(jnp.int32, x.shape, 1)
    return jnp.where((column >= inside[0]) & (column < inside[1]), x, value)
