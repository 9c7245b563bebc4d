"""Pallas' TPU interpreter as tests use it: races and reads out of bounds raise, fresh memory holds NaN.

The interpreter calls back into Python for every access to memory. JAX puts the arguments of a callback on a device
before it calls; what the interpreter then does is numpy's, so here they come as they are, which is five times as fast.
The interpreter for Hopper, which may run in the same process, insists on JAX's arrays and gets them.
"""

import functools

import jax
import numpy as np
from jax._src import callback, effects  # a test's shortcuts, for which there is nothing public
from jax.experimental.pallas import tpu as pltpu

INTERPRETER = pltpu.InterpretParams(
    detect_races=True, on_race="raise", out_of_bounds_reads="raise", uninitialized_memory="nan"
)

# The interpreter's callbacks are effects, which kernels on a TPU don't have and jax.checkpoint refuses. Every run of a
# kernel makes memory of its own, so that running it again in the backward pass is harmless.
effects.remat_allowed_effects.add_type(callback.IOEffect)
effects.remat_allowed_effects.add_type(callback.OrderedIOEffect)


def _straight(*args, callback, **options):
    function = callback.callback_func
    while isinstance(function, functools.partial):
        function = function.func
    if "mosaic_gpu" in function.__module__:
        return _usual(*args, callback=callback, **options)
    return jax.tree.map(np.asarray, callback(*map(np.asarray, args)))


if hasattr(callback, "io_callback_impl"):
    _usual = callback.io_callback_impl
    callback.io_callback_impl = _straight
