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
import math
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from moc_jax.attention import api, xla
from moc_jax.attention.pallas_gpu import device
from moc_jax.attention.pallas_tpu import device as tpu
from moc_jax.attention.pallas_tpu import flash, flash_backward, tuning
from tests.attention import pieces
from tests.attention.interpreter import INTERPRETER

# All kernels are held to the whole suite where they run: those for Hopper on such a GPU.
BACKENDS = ("reference", "xla", *(["pallas_gpu"] if device.is_hopper() else ["pallas_tpu"]))
# Those that know float32 and can share an oracle's results, and those with inputs of their own, or too slow to share.
FAMILIES = [BACKENDS[:2], *([name] for name in BACKENDS[2:])]

_FAST = {"xla_backend_optimization_level": 0}
_SMALL = {"xla": xla.Xla(tiling=xla.XlaTiling(anchor_tile=8, anchor_block=8, routed_tile=8, routed_block=8))}
_SMALL_TPU = tuning.Blocks(
    anchors=flash.Tiling(queries=32, keys=64, compute_queries=32, compute_keys=64, ahead=0),
    text=flash.Tiling(queries=16, keys=64, compute_queries=16, compute_keys=64, ahead=0),
    picks=flash.Tiling(queries=32, keys=24, compute_queries=32, compute_keys=24, ahead=0),
    gradient_keys=32,
    anchor_gradients=flash_backward.Tiling(block=32, at_once=32),
    pick_gradient_keys=24,
    pick_gradients=flash_backward.Tiling(block=32, at_once=24),
    window=96,
    window_step=32,
)


def moc_attention(q, k, v, table, cfg, *, backend, **options):
    """`api.moc_attention` for any head size, and with TPU kernels interpreted."""
    if backend != "pallas_gpu":
        with _interpreted(backend, q):
            return api.moc_attention(q, k, v, table, cfg, backend=backend, **options)
    return api.moc_attention(*_widened(q, k, v), table, cfg, backend=backend, **options)[..., : v.shape[-1]]


def route(q, k, table, cfg, *, backend, **options):
    """`api.route` for any head size, and with TPU kernels interpreted."""
    with _interpreted(backend, q):
        q, k = _widened(q, k) if backend == "pallas_gpu" else (q, k)
        return api.route(q, k, table, cfg, backend=backend, **options)


@contextlib.contextmanager
def _interpreted(backend, q):
    if backend != "pallas_tpu":
        yield
        return
    small = (
        mock.patch.object(tuning, "blocks", return_value=_SMALL_TPU) if q.shape[1] < 128 else contextlib.nullcontext()
    )
    with tpu.interpreted(INTERPRETER), small:
        yield


def _widened(q, *others):
    """Heads of a size that the kernels know, with the same q . k / sqrt(D)."""
    size = q.shape[-1]
    wide = next(size_known for size_known in device.HEAD_DIMS if size_known >= size)
    scale = math.sqrt(wide / size)
    assert math.frexp(scale)[0] == 0.5, f"heads of {size} in {wide}: queries times {scale} are not exact"
    padding = (*[(0, 0)] * 3, (0, wide - size))
    return tuple(jnp.pad(x, padding) for x in (q * jnp.asarray(scale, q.dtype), *others))


_routing = jax.jit(route, static_argnames=("cfg", "backend"), compiler_options=_FAST)


def routing(q, k, table, cfg, *, key=None, backend="xla"):
    """The routes, from a program for the config or, of TPU kernels, for all that pick so many."""
    if backend != "pallas_tpu":
        return _routing(q, k, table, cfg, key=key, backend=backend)
    with pieces.apart():
        return route(jnp.asarray(q), jnp.asarray(k), table, cfg, key=key, backend=backend)


def outputs_and_gradients(q, k, v, table, cfg, dout, key=None, *, backend):
    """The output, and (dq, dk, dv) for the gradient `dout` of it."""
    out, vjp = jax.vjp(lambda q, k, v: moc_attention(q, k, v, table, cfg, key=key, backend=backend), q, k, v)
    return out, vjp(dout)


_outputs_and_gradients = jax.jit(outputs_and_gradients, static_argnames=("cfg", "backend"), compiler_options=_FAST)


def attention_and_gradients(q, k, v, table, cfg, dout, key=None, *, backend):
    """As `outputs_and_gradients`, compiled: as one program or, with TPU kernels, in pieces."""
    if backend != "pallas_tpu":
        return _outputs_and_gradients(q, k, v, table, cfg, dout, key, backend=_SMALL.get(backend, backend))
    with pieces.apart():
        arrays = map(jnp.asarray, (q, k, v))
        return outputs_and_gradients(*arrays, table, cfg, jnp.asarray(dout), key, backend=backend)


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
