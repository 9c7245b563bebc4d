"""How near one video comes to another, such as a codec's reconstruction to what it encoded."""

import math

import numpy as np

from moc_jax.shapes import Shaped, typed


@typed
def psnr(a: Shaped[np.ndarray, "*shape"], b: Shaped[np.ndarray, "*shape"]) -> float:
    """Peak signal-to-noise ratio in dB: 10 log10(range^2 / mean squared error); infinite for equal arrays.

    Args:
        a, b: frames of one type: uint8 (range 255) or floats in [-1, 1] (range 2).

    Raises:
        ValueError: the types differ.
    """
    if a.dtype != b.dtype:
        raise ValueError(f"cannot compare {a.dtype} with {b.dtype} frames; convert one of them")
    peak = 255.0 if a.dtype == np.uint8 else 2.0
    error = np.mean(np.square(a.astype(np.float64) - b.astype(np.float64)))
    return math.inf if error == 0 else float(10 * np.log10(peak**2 / error))
