"""The public functions as the tests call them, shared by all test files so that each config compiles once.

Compiled without LLVM's optimisation, which takes half of the tests' time, and with the `xla` backend walking in steps
of 8 tokens, so that small scenes cross the borders of tiles and blocks. test_transforms.py and `test_large_scenes`
compile as users do.

The Hopper kernels know bfloat16 and heads of 64 or 128, tests have heads of 16 because their oracles are plain Python.
For `pallas_gpu`, `qkv` draws bfloat16 and the functions here pad heads with zeros to 64. With queries times
sqrt(64 / 16) = 2, which is exact, logits / sqrt(D) are the same numbers.
"""

import dataclasses
import math
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from moc_jax.attention import api, xla
from moc_jax.attention.pallas_gpu import device

# The kernels are held to the whole suite where they run: on a Hopper GPU.
BACKENDS = ("reference", "xla", *(["pallas_gpu"] if device.is_hopper() else []))
# Those that know float32 and can share an oracle's results, and those with inputs of their own.
FAMILIES = [BACKENDS[:2], *([name] for name in BACKENDS[2:])]

_FAST = {"xla_backend_optimization_level": 0}
_SMALL = xla.Tiling(anchor_tile=8, anchor_block=8, routed_tile=8, routed_block=8)


def moc_attention(q, k, v, table, cfg, **options):
    """`api.moc_attention` for any head size."""
    if cfg.backend != "pallas_gpu":
        return api.moc_attention(q, k, v, table, cfg, **options)
    return api.moc_attention(*_widened(q, k, v), table, cfg, **options)[..., : v.shape[-1]]


def route(q, k, table, cfg, **options):
    """`api.route` for any head size."""
    return api.route(*(_widened(q, k) if cfg.backend == "pallas_gpu" else (q, k)), table, cfg, **options)


def _widened(q, *others):
    """Heads of a size that the kernels know, with the same q . k / sqrt(D)."""
    size = q.shape[-1]
    wide = next(size_known for size_known in device.HEAD_DIMS if size_known >= size)
    scale = math.sqrt(wide / size)
    assert math.frexp(scale)[0] == 0.5, f"heads of {size} in {wide}: queries times {scale} are not exact"
    padding = (*[(0, 0)] * 3, (0, wide - size))
    return tuple(jnp.pad(x, padding) for x in (q * jnp.asarray(scale, q.dtype), *others))


routing = jax.jit(route, static_argnames="cfg", compiler_options=_FAST)


def outputs_and_gradients(q, k, v, table, cfg, dout, key=None):
    """The output, and (dq, dk, dv) for the gradient `dout` of it."""
    out, vjp = jax.vjp(lambda q, k, v: moc_attention(q, k, v, table, cfg, key=key), q, k, v)
    return out, vjp(dout)


@jax.jit(static_argnames="cfg", compiler_options=_FAST)
def attention_and_gradients(q, k, v, table, cfg, dout, key=None):
    with mock.patch.object(xla, "default_tiling", return_value=_SMALL):
        return outputs_and_gradients(q, k, v, table, cfg, dout, key)


def attention(q, k, v, table, cfg, *, key=None):
    """The output as numpy; from the program that also takes gradients, to compile only one."""
    return np.asarray(attention_and_gradients(q, k, v, table, cfg, np.zeros_like(v), key)[0])


def with_backend(cfg, backend):
    return dataclasses.replace(cfg, backend=backend)
