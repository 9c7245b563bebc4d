"""A row's log-sum-exp beside its output: packed into one row of memory, or laid along lanes."""

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from moc_jax.attention.pallas_tpu.device import LANES


def packed_width(dim: int, dtype) -> int:
    """Columns of a pair's row of output and log-sum-exp."""
    return dim if jnp.dtype(dtype).itemsize == 2 else -(-dim // LANES) * LANES + LANES


def pack(out, lse, dtype):
    """Rows [n, D] of type `dtype` and log-sum-exps [n, 1], float32 both, as rows of 32-bit numbers.

    bfloat16 takes the upper half of each number; the lower halves of the first two hold those of the log-sum-exp.
    """
    if jnp.dtype(dtype).itemsize == 4:
        gap = packed_width(out.shape[1], dtype) - LANES - out.shape[1]
        parts = [out, *([jnp.zeros((out.shape[0], gap), jnp.float32)] if gap else [])]
        return jnp.concatenate([*parts, jnp.broadcast_to(lse, (out.shape[0], LANES))], axis=1)
    upper = pltpu.bitcast(out.astype(jnp.bfloat16).astype(jnp.float32), jnp.uint32)
    bits = jnp.broadcast_to(pltpu.bitcast(lse, jnp.uint32), upper.shape)
    lane = lax.broadcasted_iota(jnp.int32, upper.shape, 1)
    half = jnp.where(lane == 0, bits >> 16, jnp.where(lane == 1, bits & 0xFFFF, jnp.uint32(0)))
    return pltpu.bitcast(upper | half, jnp.float32)


def unpack(rows, dim: int, dtype):
    """Rows [n, D] and, across their columns, log-sum-exps of what `pack` made."""
    if jnp.dtype(dtype).itemsize == 4:
        first = rows.shape[1] - LANES
        return rows[:, :dim], jnp.broadcast_to(rows[:, first : first + 1], (rows.shape[0], dim))
    bits = pltpu.bitcast(rows, jnp.uint32)
    out = pltpu.bitcast(bits & jnp.uint32(0xFFFF0000), jnp.float32)
    upper, lower = (jnp.broadcast_to(x, bits.shape) for x in (bits[:, :1] << 16, bits[:, 1:2] & 0xFFFF))
    return out, pltpu.bitcast(upper | lower, jnp.float32)


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
