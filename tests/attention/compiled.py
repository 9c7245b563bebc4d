"""The public functions under jit, shared by all test files so that each config compiles once.

Compiled without LLVM's optimisation, which takes half of the tests' time; test_transforms.py compiles as users do.
"""

import dataclasses

import jax
import numpy as np

from moc_jax.attention.api import moc_attention, route

BACKENDS = ("reference", "xla")

_FAST = {"xla_backend_optimization_level": 0}

routing = jax.jit(route, static_argnames="cfg", compiler_options=_FAST)


@jax.jit(static_argnames="cfg", compiler_options=_FAST)
def attention_and_gradients(q, k, v, table, cfg, dout, key=None):
    """The output, and (dq, dk, dv) for the gradient `dout` of it."""
    out, vjp = jax.vjp(lambda q, k, v: moc_attention(q, k, v, table, cfg, key=key), q, k, v)
    return out, vjp(dout)


def attention(q, k, v, table, cfg, *, key=None):
    """The output as numpy; from the program that also takes gradients, to compile only one."""
    return np.asarray(attention_and_gradients(q, k, v, table, cfg, np.zeros_like(v), key)[0])


def with_backend(cfg, backend):
    return dataclasses.replace(cfg, backend=backend)
