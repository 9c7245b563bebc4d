"""What is known of a query's softmax beside its output: the log-sum-exp of its scores, and delta in the gradients."""

import functools

import jax.numpy as jnp
from jax import lax

from moc_jax.shapes import Array, Float32

_WRITTEN = 32  # partial sums of a row that are written: one GPU thread for all of a row reads it number by number
Part = tuple[Array, Array]  # output [B, Q, H, D], natural log-sum-exp [B, H, Q] in float32; 0 and -inf of no keys


def merge(*parts: Part) -> Part:
    """One softmax over the keys of all parts, which are disjoint; in the type of the first part's output.

    lse = log sum_p exp(lse_p),  out = sum_p exp(lse_p - lse) out_p
    """
    outs, lses = zip(*parts, strict=True)
    largest = functools.reduce(jnp.maximum, lses)
    base = jnp.where(jnp.isneginf(largest), 0.0, largest)
    weights = [jnp.exp(lse - base) for lse in lses]
    total = functools.reduce(jnp.add, weights)
    shares = []
    for out, weight in zip(outs, weights, strict=True):
        share = jnp.swapaxes(weight / jnp.where(total == 0, 1.0, total), 1, 2)[..., None]
        # What a part of no weight holds may be anything, so it is left out and not multiplied by 0.
        shares.append(jnp.where(share == 0, 0.0, share * out.astype(jnp.float32)))
    return functools.reduce(jnp.add, shares).astype(outs[0].dtype), base + jnp.log(total)


def row_dot(a: Array, b: Array) -> Float32[Array, "*rows"]:
    """sum over D of a * b, for arrays [..., D].

    By halves, in an order that is written down: compilers choose a reduction's by all of its sizes, and a query's bits
    would depend on how many others there are.
    """
    x = a.astype(jnp.float32) * b.astype(jnp.float32)
    size = 1 << (x.shape[-1] - 1).bit_length()
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, size - x.shape[-1])])
    while size > 1:
        size //= 2
        x = x[..., :size] + x[..., size:]
        if size == _WRITTEN:
            x = lax.platform_dependent(x, tpu=lambda x: x, default=lax.optimization_barrier)
    return x[..., 0]
