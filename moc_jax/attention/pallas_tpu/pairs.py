"""Rows of queries -> (query, chunk) pairs sorted by chunk, and back, without a sort, a gather or a scatter.

placement.py says where each pair lies; spans, runs and slots are explained there.

(a) `spread`. Span by span, each row is stored once for each of its pairs at the pair's place in a buffer in VMEM
    that holds the span's runs one after the other; whole runs then go to their slots. A row costs a scalar load and
    a store: 1.6 cycles per pair. What a run holds beyond its pairs is filled.
(b) `merge` and `add` are the way back: a span's runs come into VMEM (with two buffers, while the span before
    is worked on), and each query loads its pairs' rows by the same places.

Rows in VMEM have 32 bits per number: smaller ones share sublanes, of which none is stored alone. A pair's output and
log-sum-exp travel as one row (packing.py). Bytes per pair: 2 D read and written by (a) in bfloat16, 4 D by (b).
No FLOPs.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from moc_jax.attention.layout import Heads, round_up
from moc_jax.attention.pallas_tpu import packing
from moc_jax.attention.pallas_tpu.device import LANES, ROWS, Chip
from moc_jax.attention.pallas_tpu.placement import PARTS, RUN, Placement, Spans
from moc_jax.shapes import Array, Float, Float32, typed

_GROUP = 16  # rows of the unrolled loops: a register of bfloat16
_MERGED = 16  # rows merged at once: more take more registers than there are


# ----------------------------------------------------------------------------------------------------- to the slots


@typed
def spread(
    x: Float[Array, "B _ R D"],
    placement: Placement,
    heads: Heads,
    *,
    chip: Chip,
    fill_first_lane: float = 0.0,
) -> Float[Array, "B _ J D"]:
    """x's rows at the slots of their pairs, for a group of heads; x has all heads or the group's alone.

    Slots of a chunk's tiles that hold no pair are 0, but for `fill_first_lane` in the first column; slots of unused
    tiles are not written.
    """
    batch, _, _, dim = x.shape
    p, shape = placement.spans, (batch, heads.count, placement.slots, dim)
    zeros = jnp.zeros((placement.tile, dim), x.dtype).at[:, 0].set(fill_first_lane)
    return pl.pallas_call(
        functools.partial(_spread_kernel, p=p, fill=fill_first_lane),
        name="moc_spread",
        out_shape=jax.ShapeDtypeStruct(shape, x.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, heads.count, p.count, p.steps),
            in_specs=[
                _in_smem(p.picks * p.step, lambda w, s: w * p.steps + s),
                _in_smem(RUN * p.chunks, lambda w, s: w),
                _in_smem(2 * p.chunks, lambda w, s: 0),
                _queries(p, x.shape, x.shape[1] == placement.places.shape[1]),
                pl.BlockSpec(zeros.shape, lambda *_: (0, 0)),
            ],
            out_specs=pl.BlockSpec(memory_space=pl.ANY),
            scratch_shapes=[
                pltpu.VMEM((p.room, dim), jnp.float32),
                pltpu.VMEM((p.room if p.buffers == 2 else round_up(p.room, PARTS * LANES) // PARTS, dim), x.dtype),
                pltpu.SMEM((1,), jnp.int32),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        compiler_params=chip.params("ppaa"),
        cost_estimate=_cost(p, batch * heads.count, dim, x.dtype.itemsize),
    )(heads.operand, placement.places, placement.runs, placement.tails, x, zeros)


def _in_smem(columns: int, row):
    """A line of integers of the group's head, for a span and a step."""
    block = (*(pl.squeezed,) * 3, 1, columns)
    return pl.BlockSpec(block, lambda b, h, w, s, first: (b, first[0] + h, row(w, s), 0, 0), memory_space=pltpu.SMEM)


def _queries(p: Spans, shape: tuple[int, ...], all_heads: bool = True):
    """A step's rows of arrays [B, H, R, D] or [B, H, 1, R]; or of arrays of the group's heads alone."""
    along_lanes = shape[2] == 1

    def at(b, h, w, s, first):
        head, block = h + first[0] if all_heads else h, p.block(w, s)
        return (b, head, 0, block) if along_lanes else (b, head, block, 0)

    return pl.BlockSpec((pl.squeezed, pl.squeezed, *((1, p.step) if along_lanes else (p.step, shape[3]))), at)


def _cost(p: Spans, heads: int, dim: int, pair_bytes: int) -> pl.CostEstimate:
    moved = heads * p.rows * (2 * dim + p.picks * (4 + dim * pair_bytes))
    return pl.CostEstimate(flops=0, transcendentals=0, bytes_accessed=moved)


def _spread_kernel(
    first_head_smem_ref,
    places_smem_ref,  # [1, K * step]
    runs_smem_ref,  # [1, 3 * chunks], of the span
    tails_smem_ref,  # [1, 2 * chunks], of the head
    x_vmem_ref,  # [step, D]
    fill_vmem_ref,  # [tile, D]
    out_hbm_ref,  # [B, H, J, D]
    rows_vmem_ref,  # [room, D]: the span's pairs
    ready_vmem_ref,  # [room or a part of it, D]: those of the span before, or the last of them, on their way out
    leaving_smem_ref,  # [1]: rows of that
    semaphores,  # of those, and of tails
    *,
    p: Spans,
    fill: float,
):
    assert x_vmem_ref.shape == (p.step, rows_vmem_ref.shape[1])
    del first_head_smem_ref
    b, h, w, s = (pl.program_id(i) for i in range(4))
    out_hbm_ref = out_hbm_ref.at[b, h]
    last_step = s == pl.num_programs(3) - 1
    left, tails_left = semaphores.at[0], semaphores.at[1]

    @pl.when((w == 0) & (s == 0))
    def _():
        leaving_smem_ref[0] = jnp.int32(0)
        send_tail = functools.partial(_send_tail, fill_vmem_ref, out_hbm_ref, tails_left)
        _each_run(tails_smem_ref, 2, p, send_tail)

    @pl.when(s == 0)
    def _():
        _each_run(runs_smem_ref, RUN, p, lambda rows, place, _: _fill_end(rows_vmem_ref, rows, place, fill))

    pl.when(_end_of_runs(runs_smem_ref, p) > 0)(lambda: _store(places_smem_ref, x_vmem_ref, rows_vmem_ref, p))

    @pl.when(last_step)
    def _():
        total, part = _end_of_runs(runs_smem_ref, p), ready_vmem_ref.shape[0]

        def make_ready(first):
            _await(ready_vmem_ref, out_hbm_ref, leaving_smem_ref[0], left)
            rows = jnp.minimum(total - first, part)

            def convert(i, _):
                at = pl.multiple_of(i * LANES, LANES)
                some = rows_vmem_ref[pl.ds(first + at, LANES)]
                ready_vmem_ref[pl.ds(at, LANES)] = some.astype(ready_vmem_ref.dtype)
                return 0

            lax.fori_loop(0, lax.div(rows + LANES - 1, jnp.int32(LANES)), convert, 0)
            leaving_smem_ref[0] = rows

        def send(rows, place, slot):
            source = ready_vmem_ref.at[pl.ds(place, rows)]
            pltpu.make_async_copy(source, out_hbm_ref.at[pl.ds(slot, rows)], left).start()

        if part == p.room:
            make_ready(0)
            _each_run(runs_smem_ref, RUN, p, send)
        else:
            _in_parts(runs_smem_ref, p, total, part, make_ready, send)

    @pl.when(last_step & (w == pl.num_programs(2) - 1))
    def _():
        _await(ready_vmem_ref, out_hbm_ref, leaving_smem_ref[0], left)
        _each_run(tails_smem_ref, 2, p, lambda first, rows: _await(fill_vmem_ref, out_hbm_ref, rows, tails_left))


def _store(places_smem_ref, x_vmem_ref, rows_vmem_ref, p: Spans) -> None:
    """Each of a step's rows at its pairs' places."""

    def some_rows(i, _):
        first = pl.multiple_of(i * _GROUP, _GROUP)
        x = x_vmem_ref[pl.ds(first, _GROUP)].astype(jnp.float32)
        for row in range(_GROUP):
            places = _places_of(places_smem_ref, first + row, p)
            for pick in range(p.picks):
                rows_vmem_ref[pl.ds(places[pick * p.step], 1), :] = x[row : row + 1]
        return 0

    lax.fori_loop(0, p.step // _GROUP, some_rows, 0)


def _places_of(places_smem_ref, row, p: Spans):
    """A row's places, at multiples of `step`: addresses then differ from row to row by one, which takes one addition
    per row; addresses of each place by itself would take as long as loading it."""
    return places_smem_ref.at[0, pl.ds(row, (p.picks - 1) * p.step + 1)]


def _each_run(runs_smem_ref, columns: int, p: Spans, body) -> None:
    """body(columns of the run) for each chunk's run with rows; all are multiples of 8."""

    def one(chunk, _):
        run = [pl.multiple_of(runs_smem_ref[0, chunk * columns + i], ROWS) for i in range(columns)]
        rows = run[0] if columns == RUN else run[1]
        pl.when(rows > 0)(lambda: body(*run))
        return 0

    lax.fori_loop(0, p.chunks, one, 0)


def _in_parts(runs_smem_ref, p: Spans, total, part: int, before, body) -> None:
    """before(first row) and body(rows, place, slot) of each run, part by part of a span's rows."""

    def one_part(i, chunk):
        first = pl.multiple_of(i * part, LANES)
        before(first)

        def begins(chunk):
            return (chunk < p.chunks) & (runs_smem_ref[0, jnp.minimum(chunk, p.chunks - 1) * RUN + 1] < first + part)

        def one(chunk):
            rows, place, slot = (runs_smem_ref[0, chunk * RUN + i] for i in range(RUN))
            begin, end = jnp.maximum(place, first), jnp.minimum(place + rows, first + part)
            run = end - begin, begin - first, slot + begin - place
            pl.when(end > begin)(lambda: body(*(pl.multiple_of(x, ROWS) for x in run)))
            return chunk + 1

        return jnp.maximum(lax.while_loop(begins, one, chunk) - 1, 0)  # the last one's run may go on

    lax.fori_loop(0, lax.div(total + part - 1, jnp.int32(part)), one_part, jnp.int32(0))


def _end_of_runs(runs_smem_ref, p: Spans):
    last = (p.chunks - 1) * RUN
    return runs_smem_ref[0, last] + runs_smem_ref[0, last + 1]


def _send_tail(fill_vmem_ref, out_hbm_ref, semaphore, first, rows) -> None:
    source = fill_vmem_ref.at[pl.ds(0, rows)]
    pltpu.make_async_copy(source, out_hbm_ref.at[pl.ds(first, rows)], semaphore).start()


def _fill_end(rows_vmem_ref, rows, place, fill: float) -> None:
    """The last 8 rows of a run, before its pairs come."""
    shape = (ROWS, rows_vmem_ref.shape[1])
    first_lane = lax.broadcasted_iota(jnp.int32, shape, 1) == 0
    end = pl.ds(pl.multiple_of(place + rows - ROWS, ROWS), ROWS)
    rows_vmem_ref[end] = jnp.where(first_lane, jnp.float32(fill), 0.0)


def _await(source, target, rows, semaphore) -> None:
    """Waits until so many rows have arrived."""
    rows = pl.multiple_of(rows, ROWS)

    @pl.when(rows > 0)
    def _():
        pltpu.make_async_copy(source.at[pl.ds(0, rows)], target.at[pl.ds(0, rows)], semaphore).wait()


# --------------------------------------------------------------------------------------------------------- and back


@typed
def merge(
    pairs: Float32[Array, "B _ J _"],
    placement: Placement,
    heads: Heads,
    *,
    anchors: tuple[Float[Array, "B H R D"], Float32[Array, "B H R"]] | None = None,
    into: tuple[Float[Array, "B H R D"], Float32[Array, "B H R"]] | None = None,
    dim: int,
    dtype: DTypeLike,
    chip: Chip,
) -> tuple[Float[Array, "B H R D"], Float32[Array, "B H R"]]:
    """One softmax over each query's pairs and anchors: output and base-2 log-sum-exp; 0 and -inf for neither.

    Args:
        pairs: What `packing.pack` made of the pairs' outputs [B, heads, J, E], of a group of heads.
        anchors: Their outputs and base-2 log-sum-exps, -inf for rows without. Those of the group become the results,
            in the same memory; those of other heads stay.
        heads: The group.
        into: Without anchors, the results of other heads.
        dim, dtype: D and the type of outputs.
    """
    rows = (*placement.places.shape[:2], placement.spans.rows)
    shapes = (
        jax.ShapeDtypeStruct((*rows, dim), dtype),
        jax.ShapeDtypeStruct((*rows[:2], 1, rows[2]), jnp.float32),
    )
    inputs, others = ([x[0], x[1][:, :, None]] if x else [] for x in (anchors, into))
    out, lse = _collect(
        functools.partial(_merge_rows, dim=dim, dtype=dtype),
        "moc_merge",
        pairs,
        placement,
        heads,
        inputs,
        inputs or others,
        shapes,
        nothing=-jnp.inf,
        chip=chip,
    )
    return out, lse[:, :, 0]


@typed
def add(
    pairs: Float32[Array, "B _ J D"],
    placement: Placement,
    heads: Heads,
    *,
    anchors: Float[Array, "B H R D"] | None = None,
    into: Float[Array, "B H R D"] | None = None,
    dtype: DTypeLike,
    chip: Chip,
) -> Float[Array, "B H R D"]:
    """The sum of each query's pairs and its anchors' row, for a group of heads; other heads are `into`'s."""
    dim = pairs.shape[3]
    return _collect(
        functools.partial(_add_rows, dim=dim, dtype=dtype),
        "moc_add",
        pairs,
        placement,
        heads,
        [] if anchors is None else [anchors],
        [] if into is None else [into],
        (jax.ShapeDtypeStruct((*placement.places.shape[:2], placement.spans.rows, dim), dtype),),
        nothing=0.0,
        chip=chip,
    )[0]


def _collect(body, name: str, pairs, placement, heads: Heads, inputs, into, shapes, *, nothing: float, chip: Chip):
    """body(rows of pairs, inputs, outputs) for each block of queries of the group's heads; results go into `into`."""
    batch, _, _, width = pairs.shape
    p, operands = placement.spans, [placement.places, placement.runs, placement.runs, pairs, *inputs]
    some, first = min(LANES, p.step), 5  # of `into` among all operands
    unread = [] if into is inputs else into
    if unread:
        first += len(inputs)
    return pl.pallas_call(
        functools.partial(_collect_kernel, p=p, body=body, inputs=len(inputs), unread=len(unread), nothing=nothing),
        name=name,
        out_shape=shapes,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, heads.count, p.count, p.steps),
            in_specs=[
                _in_smem(p.picks * p.step, lambda w, s: w * p.steps + s),
                _in_smem(RUN * p.chunks, lambda w, s: w),
                _in_smem(RUN * p.chunks, lambda w, s: jnp.minimum(w + 1, p.count - 1)),
                pl.BlockSpec(memory_space=pl.ANY),
                *(_queries(p, x.shape) for x in inputs),
                *([pl.BlockSpec(memory_space=pl.ANY)] * len(unread)),
            ],
            out_specs=tuple(_queries(p, x.shape) for x in shapes),
            scratch_shapes=[
                pltpu.VMEM((p.buffers, p.room, width), jnp.float32),
                pltpu.VMEM((p.picks * some, width), jnp.float32),
                pltpu.SemaphoreType.DMA((p.buffers,)),
            ],
        ),
        input_output_aliases={first + i: i for i in range(len(into))},
        compiler_params=chip.params("ppaa"),
        cost_estimate=_cost(p, batch * heads.count, shapes[0].shape[3], 4),
    )(heads.operand, *operands, *unread)


def _collect_kernel(
    first_head_smem_ref,
    places_smem_ref,  # [1, K * step]
    runs_smem_ref,  # [1, 3 * chunks], of the span
    next_smem_ref,  # the same, of the next span
    pairs_hbm_ref,  # [B, H, J, E]
    *refs,  # of the queries' blocks: inputs, where outputs go, outputs; then scratch
    p: Spans,
    body,
    inputs: int,
    unread: int,
    nothing: float,
):
    del first_head_smem_ref
    *blocks, span_vmem_ref, some_vmem_ref, semaphores = refs
    sources, results = blocks[:inputs], blocks[inputs + unread :]
    b, h, w, s = (pl.program_id(i) for i in range(4))
    pairs_hbm_ref = pairs_hbm_ref.at[b, h]
    buffers = span_vmem_ref.shape[0]
    here = lax.rem(w, jnp.int32(buffers))

    def fetch(runs_smem_ref, parity):
        def one(rows, place, slot):
            target = span_vmem_ref.at[parity, pl.ds(place, rows)]
            pltpu.make_async_copy(pairs_hbm_ref.at[pl.ds(slot, rows)], target, semaphores.at[parity]).start()

        _each_run(runs_smem_ref, RUN, p, one)

    @pl.when((w == 0) & (s == 0))
    def _():
        shape = (ROWS, span_vmem_ref.shape[2])
        for one in range(buffers):  # what pairs that pick nothing find
            span_vmem_ref[one, pl.ds(p.room - ROWS, ROWS)] = _nothing(shape, nothing)
        if buffers == 2:
            fetch(runs_smem_ref, here)

    @pl.when(s == 0)
    def _():
        if buffers == 1:
            fetch(runs_smem_ref, here)
        _await(pairs_hbm_ref, span_vmem_ref.at[here], _end_of_runs(runs_smem_ref, p), semaphores.at[here])
        if buffers == 2:
            pl.when(w + 1 < pl.num_programs(2))(lambda: fetch(next_smem_ref, 1 - here))

    size = some_vmem_ref.shape[0] // p.picks

    def some_rows(i, _):
        first = pl.multiple_of(i * size, size)
        _load(places_smem_ref, span_vmem_ref.at[here], some_vmem_ref, first, p)
        rows = [some_vmem_ref[pl.ds(pick * size, size)] for pick in range(p.picks)]
        body(rows, sources, results, pl.ds(first, size))
        return 0

    def no_rows(i, _):
        body([], sources, results, pl.ds(pl.multiple_of(i * size, size), size))
        return 0

    def run(each):
        lax.fori_loop(0, p.step // size, each, 0)

    # The last span's steps beyond the queries leave the last block as it is.
    there = w * pl.num_programs(3) + s < p.blocks
    picked = _end_of_runs(runs_smem_ref, p) > 0
    pl.when(there & picked)(lambda: run(some_rows))
    pl.when(there & ~picked)(lambda: run(no_rows))


def _load(places_smem_ref, span_vmem_ref, some_vmem_ref, first, p: Spans) -> None:
    """The pairs' rows of some of a step's rows, from `first` on, pick after pick."""
    size = some_vmem_ref.shape[0] // p.picks

    def few_rows(j, _):
        at = pl.multiple_of(j * _GROUP, _GROUP)
        target_vmem_ref = some_vmem_ref.at[pl.ds(at, (p.picks - 1) * size + _GROUP)]
        for row in range(_GROUP):
            places = _places_of(places_smem_ref, first + at + row, p)
            for pick in range(p.picks):
                place = places[pick * p.step]
                target_vmem_ref[pl.ds(pick * size + row, 1), :] = span_vmem_ref[pl.ds(place, 1), :]
        return 0

    lax.fori_loop(0, size // _GROUP, few_rows, 0)


def _nothing(shape, value: float):
    """Rows of a pair that adds nothing: 0 and, where there is one, a log-sum-exp of -inf, however it is packed."""
    if value == 0.0:
        return jnp.zeros(shape, jnp.float32)
    lane = lax.broadcasted_iota(jnp.int32, shape, 1)
    wide = lane >= shape[1] - LANES if shape[1] > LANES else lane < 0
    upper = pltpu.bitcast(jnp.full(shape, -jnp.inf, jnp.float32), jnp.uint32) >> 16
    packed = pltpu.bitcast(jnp.where(lane < shape[1] // 2, upper, jnp.uint32(0)), jnp.float32)
    return jnp.where(wide, jnp.float32(value), packed)


def _merge_rows(rows, inputs, outputs, block, *, dim: int, dtype) -> None:
    size = block.size
    some = min(size, _MERGED)
    if not rows and not inputs:
        outputs[0][block] = jnp.zeros((size, dim), dtype)
        outputs[1][:, block] = jnp.full((1, size), -jnp.inf)
        return
    anchor_lse: Any = packing.across_rows(inputs[1][:, block]) if inputs else None
    lses = []
    for first in range(0, size, some):
        here = slice(first, first + some)
        parts = [packing.unpack(x[here], dim, dtype) for x in rows]
        if inputs:
            out = inputs[0][pl.ds(block.start + first, some)].astype(jnp.float32)
            parts.append((out, jnp.broadcast_to(anchor_lse[here], out.shape)))
        largest = functools.reduce(jnp.maximum, [lse for _, lse in parts])
        base = jnp.where(jnp.abs(largest) < jnp.inf, largest, 0.0)
        weights = [jnp.exp2(lse - base) for _, lse in parts]
        total = functools.reduce(jnp.add, weights)
        shares = [jnp.where(w != 0, out * w, 0.0) for (out, _), w in zip(parts, weights, strict=True)]
        merged = functools.reduce(jnp.add, shares) / jnp.where(total == 0, 1.0, total)  # a NaN stays one
        outputs[0][pl.ds(block.start + first, some)] = merged.astype(dtype)
        lses.append(base + jnp.log2(total))
    outputs[1][:, block] = packing.along_lanes(jnp.concatenate(lses, axis=0))


def _add_rows(rows, inputs, outputs, block, *, dim: int, dtype) -> None:
    rows = [x[:, :dim] for x in rows] + [x[block].astype(jnp.float32) for x in inputs]
    outputs[0][block] = functools.reduce(jnp.add, rows, jnp.zeros((block.size, dim), jnp.float32)).astype(dtype)
