"""A row's log-sum-exp beside its output: packed into one row of memory, or laid along lanes."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from moc_jax.attention.pallas_tpu.device import LANES
from moc_jax.shapes import Array, Float32, typed


def packed_width(dim: int, dtype) -> int:
    """Columns of a pair's row of output and log-sum-exp."""
    return dim if jnp.dtype(dtype).itemsize == 2 else -(-dim // LANES) * LANES + LANES


def pack(out, lse, dtype):
    """Rows [n, D] of type `dtype` and log-sum-exps [n, 1], float32 both, as rows of 32-bit numbers.

    bfloat16 takes the upper half of each number. The lower halves hold the log-sum-exp: its upper half in the left half
    of a row, its lower half in the right one, so that one turn of a row by half brings every column what it lacks.
    """
    if jnp.dtype(dtype).itemsize == 4:
        gap = packed_width(out.shape[1], dtype) - LANES - out.shape[1]
        parts = [out, *([jnp.zeros((out.shape[0], gap), jnp.float32)] if gap else [])]
        return jnp.concatenate([*parts, jnp.broadcast_to(lse, (out.shape[0], LANES))], axis=1)
    upper = pltpu.bitcast(out.astype(jnp.bfloat16).astype(jnp.float32), jnp.uint32)
    bits = jnp.broadcast_to(pltpu.bitcast(lse, jnp.uint32), upper.shape)
    return pltpu.bitcast(upper | jnp.where(_left(bits), bits >> 16, bits & 0xFFFF), jnp.float32)


def unpack(rows, dim: int, dtype):
    """Rows [n, D] and, across their columns, log-sum-exps of what `pack` made."""
    if jnp.dtype(dtype).itemsize == 4:
        first = rows.shape[1] - LANES
        return rows[:, :dim], jnp.broadcast_to(rows[:, first : first + 1], (rows.shape[0], dim))
    bits = pltpu.bitcast(rows, jnp.uint32)
    out = pltpu.bitcast(bits & jnp.uint32(0xFFFF0000), jnp.float32)
    here = bits & 0xFFFF
    there = _turned(here)
    return out, pltpu.bitcast(jnp.where(_left(bits), here << 16 | there, there << 16 | here), jnp.float32)


def _left(x):
    return lax.broadcasted_iota(jnp.int32, x.shape, 1) < x.shape[1] // 2


def _turned(x):
    """x with the halves of its rows exchanged."""
    half = x.shape[1] // 2
    if x.shape[1] % LANES == 0:
        return pltpu.bitcast(pltpu.roll(pltpu.bitcast(x, jnp.int32), half, 1), jnp.uint32)
    return jnp.concatenate([x[:, half:], x[:, :half]], axis=1)


@typed
def columns(x: Float32[Array, "B H J 128"], count: int) -> tuple[Float32[Array, "B H J"], ...]:
    """The first `count` columns, each along lanes; XLA would copy all of x in a layout of one number per row."""
    batch, heads, rows, _ = x.shape
    block = next(n for n in (2048, 1024, 512, 256, LANES, rows) if rows % n == 0)
    at_once = min(block, LANES)

    def kernel(x_vmem_ref, out_vmem_ref):
        for i in range(0, block, at_once):
            out_vmem_ref[:, i : i + at_once] = x_vmem_ref[i : i + at_once].T[:count]

    one = (pl.squeezed, pl.squeezed)
    found = pl.pallas_call(
        kernel,
        name="moc_columns",
        out_shape=jax.ShapeDtypeStruct((batch, heads, count, rows), jnp.float32),
        grid=(batch, heads, rows // block),
        in_specs=[pl.BlockSpec((*one, block, LANES), lambda b, h, i: (b, h, i, 0))],
        out_specs=pl.BlockSpec((*one, count, block), lambda b, h, i: (b, h, 0, i)),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(flops=0, transcendentals=0, bytes_accessed=x.nbytes),
    )(x)
    return tuple(found[:, :, i] for i in range(count))


def along_lanes(x):
    """x [rows, columns], equal on all columns of a row, as [1, rows]."""
    width = min(x.shape[0], LANES)
    if x.shape[1] < width:
        x = jnp.broadcast_to(x[:, :1], (x.shape[0], width))
    parts = [
        jnp.sum(jnp.where(_diagonal(width), x[i : i + width, :width], 0.0), axis=0, keepdims=True)
        for i in range(0, x.shape[0], width)
    ]
    return jnp.concatenate(parts, axis=1)


def across_rows(x):
    """x [1, rows] as [rows, 1], for up to 128 rows."""
    width = x.shape[1]
    return jnp.sum(jnp.where(_diagonal(width), jnp.broadcast_to(x, (width, width)), 0.0), axis=1, keepdims=True)


def _diagonal(width: int):
    row = lax.broadcasted_iota(jnp.int32, (width, width), 0)
    return row == lax.broadcasted_iota(jnp.int32, (width, width), 1)
