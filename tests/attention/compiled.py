"""The public functions under jit, shared by all test files so that each config compiles once.

Compiled without LLVM's optimisation, which takes half of the tests' time, and with the `xla` backend walking in steps
of 8 tokens, so that small scenes cross the borders of tiles and blocks. test_transforms.py and `test_large_scenes`
compile as users do.
"""

import dataclasses
from unittest import mock

import jax
import numpy as np

from moc_jax.attention import xla
from moc_jax.attention.api import moc_attention, route

BACKENDS = ("reference", "xla")
_FAST = {"xla_backend_optimization_level": 0}
_SMALL = xla.Tiling(anchor_tile=8, anchor_block=8, routed_tile=8, routed_block=8)

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
