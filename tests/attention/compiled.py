"""The public functions as the tests call them, shared by all test files so that each config compiles once.

Compiled without LLVM's optimisation, which takes half of the tests' time, and with the `xla` backend walking in steps
of 8 tokens, so that small scenes cross the borders of tiles and blocks. test_transforms.py and `test_large_scenes`
compile as users do.

The Hopper kernels know bfloat16 and heads of 64 or 128, tests have heads of 16 because their oracles are plain Python.
For `pallas_gpu`, `qkv` draws bfloat16 and the functions here pad heads with zeros to 64. With queries times
sqrt(64 / 16) = 2, which is exact, logits / sqrt(D) are the same numbers.

The TPU kernels run everywhere, in Pallas' interpreter: races and reads out of bounds raise, fresh memory holds NaN.
A step of their grid takes it some ten milliseconds, so blocks are small, but not the smallest.
"""

import contextlib
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from moc_jax.attention import api, parts, xla
from moc_jax.attention.pallas_gpu import device
from moc_jax.attention.pallas_tpu import flash, flash_backward, tuning
from moc_jax.attention.pallas_tpu.device import Tpu
from tests.attention import pieces
from tests.attention.interpreter import interpreted

# All kernels are held to the whole suite where they run: those for Hopper on such a GPU.
BACKENDS = ("reference", "xla", *(["pallas_gpu"] if device.is_hopper() else ["pallas_tpu"]))
# Those that know float32 and can share an oracle's results, and those with inputs of their own, or too slow to share.
FAMILIES = [BACKENDS[:2], *([name] for name in BACKENDS[2:])]

_FAST = {"xla_backend_optimization_level": 0}
_SMALL = {"xla": xla.Xla(tiling=xla.XlaTiling(anchor_tile=8, anchor_block=8, routed_tile=8, routed_block=8))}
SMALL_TPU = tuning.Blocks(
    anchors=flash.ForwardTiling(queries=32, keys=64, compute_queries=32, compute_keys=64, ahead=0),
    text=flash.ForwardTiling(queries=16, keys=64, compute_queries=16, compute_keys=64, ahead=0),
    picks=flash.ForwardTiling(queries=32, keys=24, compute_queries=32, compute_keys=24, ahead=0),
    gradient_keys=32,
    anchor_gradients=flash_backward.GradientTiling(block=32, at_once=32),
    pick_gradient_keys=24,
    pick_gradients=flash_backward.GradientTiling(block=32, at_once=24),
    span=96,
    span_step=32,
)


def moc_attention(q, k, v, table, cfg, *, backend, **options):
    """`api.moc_attention` for any head size, and with TPU kernels interpreted."""
    if backend != "pallas_gpu":
        with _interpreted(backend):
            return api.moc_attention(q, k, v, table, cfg, backend=_value(backend, q), **options)
    return api.moc_attention(*_widened(q, k, v), table, cfg, backend=backend, **options)[..., : v.shape[-1]]


def route(q, k, table, cfg, *, backend, **options):
    """`api.route` for any head size, and with TPU kernels interpreted."""
    with _interpreted(backend):
        q, k = _widened(q, k) if backend == "pallas_gpu" else (q, k)
        return api.route(q, k, table, cfg, backend=_value(backend, q), **options)


def _interpreted(backend):
    return interpreted() if backend == "pallas_tpu" else contextlib.nullcontext()


def _value(backend, q):
    """TPU kernels for small scenes have small blocks."""
    if backend != "pallas_tpu":
        return backend
    return Tpu(chip="v5e", blocks=SMALL_TPU if q.shape[1] < 128 else None)


def _widened(q, *others):
    """Heads of a size that the kernels know, with the same q . k / sqrt(D)."""
    size = q.shape[-1]
    wide = next(size_known for size_known in device.HEAD_DIMS if size_known >= size)
    scale = math.sqrt(wide / size)
    assert math.frexp(scale)[0] == 0.5, f"heads of {size} in {wide}: queries times {scale} are not exact"
    padding = (*[(0, 0)] * 3, (0, wide - size))
    return tuple(jnp.pad(x, padding) for x in (q * jnp.asarray(scale, q.dtype), *others))


_routing = jax.jit(route, static_argnames=("cfg", "backend"), compiler_options=_FAST)


def routing(q, k, table, cfg, *, key=None, query_chunk=None, backend="xla"):
    """The routes, from a program for the config or, of TPU kernels, for all that pick so many."""
    options = dict(key=key, query_chunk=query_chunk, backend=backend)
    if backend != "pallas_tpu":
        return _routing(q, k, table, cfg, **options)
    with pieces.apart():
        return route(jnp.asarray(q), jnp.asarray(k), table, cfg, **options)


def outputs_and_gradients(q, k, v, table, cfg, dout, key=None, query_chunk=None, *, backend):
    """The output, and (dq, dk, dv) for the gradient `dout` of it."""
    options = dict(key=key, query_chunk=query_chunk, backend=backend)
    with _interpreted(backend):
        out, vjp = jax.vjp(lambda q, k, v: moc_attention(q, k, v, table, cfg, **options), q, k, v)
        return out, vjp(dout)


_outputs_and_gradients = jax.jit(outputs_and_gradients, static_argnames=("cfg", "backend"), compiler_options=_FAST)


def attention_and_gradients(q, k, v, table, cfg, dout, key=None, query_chunk=None, *, backend):
    """As `outputs_and_gradients`, compiled: as one program or, with TPU kernels, in pieces."""
    if backend != "pallas_tpu":
        small = _SMALL.get(backend, backend)
        return _outputs_and_gradients(q, k, v, table, cfg, dout, key, query_chunk, backend=small)
    with pieces.apart():
        q, k, v, dout = map(jnp.asarray, (q, k, v, dout))
        return outputs_and_gradients(q, k, v, table, cfg, dout, key, query_chunk, backend=backend)


def _parts(q, k, v, routes, table, cfg, query_chunk=None, *, backend):
    q, k, v = (q, k, v) if backend != "pallas_gpu" else _widened(q, k, v)
    options = dict(query_chunk=query_chunk, backend=_value(backend, q))
    with _interpreted(backend):
        anchors = parts.anchor_part(q, k, v, table, cfg, **options)
        return anchors, parts.pick_part(q, k, v, routes, table, cfg, **options)


def _part_gradients(q, k, v, routes, dout, lse, delta, table, cfg, query_chunk=None, *, backend):
    size, scale = q.shape[-1], 1
    if backend == "pallas_gpu":
        wide = _widened(q, k, v, dout)
        scale = math.sqrt(wide[0].shape[-1] / size)
        q, k, v, dout = wide
    options = dict(query_chunk=query_chunk, backend=_value(backend, q))
    with _interpreted(backend):
        found = (
            parts.anchor_gradients(q, k, v, dout, lse, delta, table, cfg, **options),
            parts.pick_gradients(q, k, v, routes, dout, lse, delta, table, cfg, **options),
        )
    return [(dq[..., :size] * scale, dk[..., :size], dv[..., :size]) for dq, dk, dv in found]


_jitted = functools.partial(jax.jit, static_argnames=("cfg", "backend"), compiler_options=_FAST)
_compiled_parts, _compiled_part_gradients = _jitted(_parts), _jitted(_part_gradients)


def in_parts(q, k, v, routes, table, cfg, query_chunk=None, *, backend):
    """(output, log-sum-exp) of anchors and of picks."""
    size = v.shape[-1]
    if backend == "pallas_tpu":
        with pieces.apart():
            q, k, v, routes = map(jnp.asarray, (q, k, v, routes))
            found = _parts(q, k, v, routes, table, cfg, query_chunk, backend=backend)
    else:
        small = _SMALL.get(backend, backend)
        found = _compiled_parts(q, k, v, routes, table, cfg, query_chunk, backend=small)
    return [(out[..., :size], lse) for out, lse in found]


def gradients_in_parts(q, k, v, routes, dout, lse, delta, table, cfg, query_chunk=None, *, backend):
    """(dq, dk, dv) of anchors and of picks, given the final log-sum-exp and delta."""
    if backend == "pallas_tpu":
        with pieces.apart():
            arrays = map(jnp.asarray, (q, k, v, routes, dout, lse, delta))
            return _part_gradients(*arrays, table, cfg, query_chunk, backend=backend)
    arrays, small = (q, k, v, routes, dout, lse, delta), _SMALL.get(backend, backend)
    return _compiled_part_gradients(*arrays, table, cfg, query_chunk, backend=small)


_attention = jax.jit(moc_attention, static_argnames=("cfg", "backend"))


def attention(q, k, v, table, cfg, *, key=None, routes=None, backend):
    """The output as numpy; from the program that also takes gradients, to compile only one."""
    if backend == "pallas_tpu":
        with pieces.apart():
            routes = None if routes is None else jnp.asarray(routes)
            arrays = map(jnp.asarray, (q, k, v))
            return np.asarray(moc_attention(*arrays, table, cfg, key=key, routes=routes, backend=backend))
    if routes is not None:
        return np.asarray(_attention(q, k, v, table, cfg, routes=routes, backend=backend))
    return np.asarray(attention_and_gradients(q, k, v, table, cfg, np.zeros_like(v), key, backend=backend)[0])
