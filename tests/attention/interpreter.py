"""Pallas' TPU interpreter as tests use it: races and reads out of bounds raise, fresh memory holds NaN.

`interpreted` is `pltpu.force_tpu_interpret_mode`, with what makes the interpreter fast beneath it. It calls back into
Python for every access to memory. Each is made cheaper (tests/private_jax.py says how and why), and there are fewer:
rows of pairs, which a TPU moves one by one, move all at once, but for the tests of just that (`row_by_row`), and index
maps' accesses to prefetched scalars are computed instead, but for the tests of single kernels (`every_access`), which
must see a map that reads beyond its table.
"""

import contextlib
import contextvars
import functools
import operator
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from moc_jax.attention.pallas_tpu import pairs
from tests import private_jax

_RAISES = {"on_race": "raise"} if "on_race" in pltpu.InterpretParams.__dataclass_fields__ else {}
INTERPRETER = pltpu.InterpretParams(
    detect_races=True, out_of_bounds_reads="raise", uninitialized_memory="nan", **_RAISES
)
_every_access = contextvars.ContextVar("every_access", default=False)
_row_by_row = contextvars.ContextVar("row_by_row", default=False)


@contextlib.contextmanager
def interpreted(params: pltpu.InterpretParams = INTERPRETER):
    """Programs traced and run inside have their TPU kernels interpreted."""
    at_once = [(pairs, "_store", _store_at_once), (pairs, "_load", _load_at_once)]
    with contextlib.ExitStack() as stack:
        stack.enter_context(pltpu.force_tpu_interpret_mode(params))
        for module, name, function in () if _row_by_row.get() else at_once:
            stack.enter_context(mock.patch.object(module, name, function))
        yield


def every_access():
    """Programs traced and compiled inside have index maps whose reads are checked like all others."""
    return _set(_every_access, True)


def row_by_row():
    """Kernels interpreted inside move their rows as on a TPU, one by one, which takes milliseconds for each."""
    return _set(_row_by_row, True)


@contextlib.contextmanager
def _set(variable, value):
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


# --------------------------------------------------------------------------------- rows of pairs, which move at once


def _store_at_once(places_smem_ref, x_vmem_ref, rows_vmem_ref, p) -> None:
    span = rows_vmem_ref[...]
    for pick in range(p.picks):
        places = places_smem_ref[0, pl.ds(pick * p.step, p.step)]
        span = span.at[places].set(x_vmem_ref[...].astype(jnp.float32))
    rows_vmem_ref[...] = span


def _load_at_once(places_smem_ref, span_vmem_ref, some_vmem_ref, first, p) -> None:
    span, size = span_vmem_ref[...], some_vmem_ref.shape[0] // p.picks
    rows = [span[places_smem_ref[0, pl.ds(pick * p.step + first, size)]] for pick in range(p.picks)]
    some_vmem_ref[...] = jnp.concatenate(rows)


# ------------------------------------------------------------------------------------------------ the interpreter


def _set_or_raise(self, name, value):
    if name == "races_found" and value:
        raise RuntimeError("a data race; printed above")
    object.__setattr__(self, name, value)


def _straight(*args, callback, **options):
    function = callback.callback_func
    while isinstance(function, functools.partial):
        function = function.func
    if "mosaic_gpu" in function.__module__:  # the interpreter for Hopper insists on JAX's arrays
        return _usual(*args, callback=callback, **options)
    return jax.tree.map(np.asarray, callback(*map(np.asarray, args)))


def _ordered(self, other) -> bool:
    """As `NpVectorClock` has it, without a dozen calls of numpy for a few numbers."""
    a, b = self.clock.tolist(), other.clock.tolist()
    return a != b and (all(map(operator.le, a, b)) or all(map(operator.ge, a, b)))


_prefetched: contextvars.ContextVar[tuple] = contextvars.ContextVar("prefetched", default=())


def _call(*args, grid_mapping, **options):
    first = grid_mapping.num_dynamic_grid_bounds
    with _set(_prefetched, args[first : first + grid_mapping.num_index_operands]):
        return _usual_call(*args, grid_mapping=grid_mapping, **options)


def _start_indices(block_mapping, loop_idx, *args, ctx, token):
    if _every_access.get():
        return _usual_start_indices(block_mapping, loop_idx, *args, ctx=ctx, token=token)
    discharged = private_jax.discharge_state.value(block_mapping.index_map_jaxpr, strip_memory_space=True)
    shape = block_mapping.block_shape
    found = tuple(private_jax.jaxpr_as_fun.value(discharged)(*loop_idx, *_prefetched.get())[: len(shape)])
    starts = [i * b.block_size if isinstance(b, pl.Blocked) else i for i, b in zip(found, shape)]
    return token, found, jnp.array(starts, dtype=jnp.int32)


if not _RAISES:
    private_jax.race_detection_state.value.__setattr__ = _set_or_raise
for _effect in (private_jax.io_effect, private_jax.ordered_io_effect):
    private_jax.remat_allowed_effects.value.add_type(_effect.value)
_usual = private_jax.io_callback_impl.replace(_straight)
_usual_call = private_jax.interpret_pallas_call.replace(_call)
_usual_start_indices = private_jax.compute_start_indices.replace(_start_indices)
private_jax.ordered.replace(_ordered)
private_jax.summarize.replace(functools.lru_cache(private_jax.summarize.value))
