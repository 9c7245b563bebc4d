"""What the parity of umT5's encoder is proven on: narrow, two captions of unequal length, far apart positions."""

import numpy as np

from tests.parity.numbers import numbers

VOCABULARY, DIM, HEADS, HEAD_DIM, MLP_DIM, DEPTH = 8000, 24, 4, 5, 40, 3
LENGTHS = 170, 23  # beyond 128 all distances are one
KEPT = 1500  # numbers of the result


def ids() -> np.ndarray:
    """[B, L]"""
    return ((numbers("umt5/ids", len(LENGTHS), max(LENGTHS)) + 1) / 2 * VOCABULARY).astype(np.int32)


def real() -> np.ndarray:
    """[B, L], which of them are."""
    return np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None]
