"""Numbers that two environments make alike: weights and inputs by their names, with numpy alone.

The raw bits of numpy's bit generators are the same in all of its versions.
"""

import math
import zlib

import numpy as np

SAMPLED = 16  # numbers of each gradient that are kept


def numbers(name: str, *shape: int) -> np.ndarray:
    """Uniform in [-1, 1), float32; they depend on the name and their place alone."""
    raw = np.random.Philox(key=zlib.crc32(name.encode())).random_raw(math.prod(shape))
    return ((raw >> np.uint64(11)).astype(np.float64) * 2.0**-52 - 1).astype(np.float32).reshape(shape)


def weight(model: str, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor of a public file of `model`: none of them starts at 0 or 1, which would hide errors."""
    x = numbers(f"{model}/{name}", *shape)
    if name.endswith("scale_shift_table"):
        return 0.5 * x
    if len(shape) > 1:
        return x * np.float32(math.sqrt(3 / math.prod(shape[1:])))
    return 1 + 0.3 * x if "norm" in name and name.endswith("weight") else 0.2 * x


def relative(a: np.ndarray, b: np.ndarray) -> float:
    """|a - b| / |b|."""
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def sampled(gradient: np.ndarray) -> np.ndarray:
    """Its norm, and some of its numbers from all over it."""
    flat = np.asarray(gradient, np.float32).ravel()
    places = np.linspace(0, flat.size - 1, min(SAMPLED, flat.size)).astype(int)
    return np.concatenate([[np.float32(np.linalg.norm(flat.astype(np.float64)))], flat[places]]).astype(np.float32)
