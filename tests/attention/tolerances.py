"""What rounding explains, per dtype: the one table of tolerances for attention against its oracles.

Inputs are unit normal unless a test says otherwise, so outputs and gradients are of order one.
"""

import numpy as np

# Largest error of an output and of a gradient, as a fraction of the largest value compared with (and at least of 1).
OUTPUT = {"float32": 2e-6, "bfloat16": 6e-3, "float16": 8e-4}
GRADIENT = {"float32": 4e-6, "bfloat16": 1.6e-2, "float16": 2e-3}


def assert_close(got, want, name: str, *, table=OUTPUT, dtype=None, scale=1):
    """`dtype`: of the computation; if None, of `got`, where float32 is the least that is asked for.

    `scale`: the size of queries that are not unit normal. Rounding of logits and of dk grows with it.
    """
    dtype = dtype or _narrow(got)
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, f"{name}: {got.shape} against {want.shape}"
    assert np.isfinite(got).all(), f"{name}: {np.count_nonzero(~np.isfinite(got))} values are not finite"
    error, limit = np.abs(got - want).max(initial=0), scale * table[dtype] * max(1, np.abs(want).max(initial=0))
    worst = np.unravel_index(np.abs(got - want).argmax(), got.shape) if got.size else ()
    assert error <= limit, f"{name}: off by {error:.3g} at {tuple(map(int, worst))}, allowed {limit:.3g}"


def _narrow(x) -> str:
    name = str(x.dtype) if hasattr(x, "dtype") else "float32"
    return name if name in ("bfloat16", "float16") else "float32"
