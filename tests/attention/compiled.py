"""The public functions under jit, shared by all test files so that each config compiles once."""

import dataclasses

import jax

from moc_jax.attention.api import moc_attention, route

BACKENDS = ("reference", "xla")

attention = jax.jit(moc_attention, static_argnames="cfg")
routing = jax.jit(route, static_argnames="cfg")


@jax.jit(static_argnames="cfg")
def attention_and_gradients(q, k, v, table, cfg, dout, key=None):
    """The output, and (dq, dk, dv) for the gradient `dout` of it."""
    out, vjp = jax.vjp(lambda q, k, v: moc_attention(q, k, v, table, cfg, key=key), q, k, v)
    return out, vjp(dout)


def with_backend(cfg, backend):
    return dataclasses.replace(cfg, backend=backend)
