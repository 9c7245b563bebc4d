"""Pallas' TPU interpreter as tests use it: races and reads out of bounds raise, fresh memory holds NaN.

The interpreter calls back into Python for every access to memory. JAX puts the arguments of a callback on a device
before it calls; what the interpreter then does is numpy's, so here they come as they are, which is five times as fast.
The interpreter for Hopper, which may run in the same process, insists on JAX's arrays and gets them. Each access is
compared with all earlier ones of its buffer, which halves the time again if the comparison is a fast one.

Half of all accesses are index maps' to prefetched scalars, which nothing writes: they are computed instead, but for the
tests of single kernels (`every_access`), which must see a map that reads beyond its table.
"""

import contextlib
import contextvars
import functools
import operator

import jax
import numpy as np
from jax._src import callback, core, effects, source_info_util
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreting
from jax._src.pallas.mosaic.interpret import race_detection_state, vector_clock
from jax._src.state.discharge import discharge_state
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

_RAISES = {"on_race": "raise"} if "on_race" in pltpu.InterpretParams.__dataclass_fields__ else {}
INTERPRETER = pltpu.InterpretParams(
    detect_races=True, out_of_bounds_reads="raise", uninitialized_memory="nan", **_RAISES
)


def _set_or_raise(self, name, value):
    if name == "races_found" and value:
        raise RuntimeError("a data race; printed above")
    object.__setattr__(self, name, value)


if not _RAISES:  # before jax 0.12 races were printed and noted
    race_detection_state.RaceDetectionState.__setattr__ = _set_or_raise

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


def _ordered(self, other) -> bool:
    """As `NpVectorClock` has it, without a dozen calls of numpy for a few numbers."""
    a, b = self.clock.tolist(), other.clock.tolist()
    return a != b and (all(map(operator.le, a, b)) or all(map(operator.ge, a, b)))


vector_clock.NpVectorClock.ordered = _ordered
source_info_util.summarize = functools.lru_cache(source_info_util.summarize)

_prefetched: contextvars.ContextVar[tuple] = contextvars.ContextVar("prefetched", default=())
_every_access = contextvars.ContextVar("every_access", default=False)


@contextlib.contextmanager
def every_access():
    """Programs traced and compiled inside have index maps whose reads are checked like all others."""
    token = _every_access.set(True)
    try:
        yield
    finally:
        _every_access.reset(token)


def _call(*args, grid_mapping, **options):
    first = grid_mapping.num_dynamic_grid_bounds
    token = _prefetched.set(args[first : first + grid_mapping.num_index_operands])
    try:
        return _usual_call(*args, grid_mapping=grid_mapping, **options)
    finally:
        _prefetched.reset(token)


def _start_indices(block_mapping, loop_idx, *args, ctx, token):
    if _every_access.get():
        return _usual_start_indices(block_mapping, loop_idx, *args, ctx=ctx, token=token)
    index_map = core.jaxpr_as_fun(discharge_state(block_mapping.index_map_jaxpr, strip_memory_space=True))
    shape = block_mapping.block_shape
    found = tuple(index_map(*loop_idx, *_prefetched.get())[: len(shape)])
    starts = [i * b.block_size if isinstance(b, pl.Blocked) else i for i, b in zip(found, shape)]
    return token, found, jax.numpy.array(starts, dtype=jax.numpy.int32)


_usual_call, interpreting.interpret_pallas_call = interpreting.interpret_pallas_call, _call
_usual_start_indices, interpreting._compute_start_indices = interpreting._compute_start_indices, _start_indices
