"""The TPU backend piece by piece: each kernel is a program of its own, which all configs share.

The interpreter makes some thousand operations of a kernel, so that compiling takes most of a test's time. Configs
differ in what lies between the kernels; of most kernels they need the same few.
"""

import contextlib
import functools
from unittest import mock

import jax
import numpy as np

from moc_jax.attention.pallas_tpu import attend, flash, flash_backward, moves, packing, pairs, pool, router

_PIECES = (
    (attend, "ordered_tiles"),
    (flash, "forward"),
    (flash_backward, "gradients"),
    (moves, "move"),
    (moves, "move_lanes"),
    (packing, "columns"),
    (attend, "place"),
    (pairs, "spread"),
    (pairs, "merge"),
    (pairs, "add"),
    (pool, "_means"),
    (router, "select"),
)


@contextlib.contextmanager
def apart():
    """Functions that hold kernels are compiled by themselves, what is between them operation by operation."""
    with contextlib.ExitStack() as stack:
        for module, name in _PIECES:
            stack.enter_context(mock.patch.object(module, name, _apart(getattr(module, name))))
        yield


@functools.cache
def _apart(function):
    def call(*args, **options):
        leaves, tree = jax.tree.flatten((args, options))
        is_array = [isinstance(leaf, jax.Array | np.ndarray) for leaf in leaves]
        static = tuple(None if array else leaf for leaf, array in zip(leaves, is_array))
        return _program(function, tree, static)([leaf for leaf, array in zip(leaves, is_array) if array])

    return call


@functools.cache
def _program(function, tree, static):
    """jit of `function` for arguments of which all but the arrays are known."""

    def run(arrays):
        arrays = iter(arrays)
        args, options = jax.tree.unflatten(tree, [next(arrays) if leaf is None else leaf for leaf in static])
        return function(*args, **options)

    run.__name__ = function.__name__  # what the log of compilations shows
    return jax.jit(run)
