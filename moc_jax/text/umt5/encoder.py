"""umT5's encoder, a layer at a time: each is the same program, whether its weights wait on devices or come from files.

x = x + o(softmax(q k^T + bias) v)          of norm(x); no scale; the bias depends on how far apart, per layer  (1)
x = x + wo(gelu(wi_0 y) * (wi_1 y))         of y = norm(x)                                                      (2)
"""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from moc_jax.shapes import Array, Bool, Float, Int, typed

BUCKETS, _FARTHEST = 32, 128
_EPSILON = 1e-6

Layer = Mapping[str, Array]
"""By names of `names.py`, as the file has them: matrices [out, in]."""


def buckets(length: int) -> Int[np.ndarray, "L L"]:
    """Which entry of a layer's table stands for the distance of each query (rows) to each key: every distance up to 8
    has its own, farther ones share, and keys ahead have theirs apart."""
    distance = np.arange(length)[None] - np.arange(length)[:, None]
    half, near = BUCKETS // 2, BUCKETS // 4
    far = np.abs(distance)
    # In float32, as the original: a distance at the edge of a bucket falls where it did.
    log = np.log(np.maximum(far, 1).astype(np.float32) / np.float32(near)) / np.float32(math.log(_FARTHEST / near))
    shared = np.minimum(near + (log * (half - near)).astype(np.int32), half - 1)
    return np.where(far < near, far, shared) + half * (distance > 0)


@typed
def normed(x: Float[Array, "*N M"], scale: Float[Array, " M"]) -> Float[Array, "*N M"]:
    """x / rms(x) * scale."""
    y = x.astype(jnp.float32)
    y = y * lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + _EPSILON)
    return y.astype(scale.dtype) * jnp.broadcast_to(scale, y.shape)


@typed
def layer(
    w: Layer, x: Float[Array, "B L M"], real: Bool[Array, "B L"], bucket: Int[Array, "L L"]
) -> Float[Array, "B L M"]:
    """(1) and (2); keys that aren't `real` are not attended to."""
    b, length, _ = x.shape
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    heads = w["bias"].shape[1]

    def linear(name: str, y: Array) -> Array:
        return jnp.einsum("bli,oi->blo", y, w[name], precision=precision)

    y = normed(x, w["norm1"])
    q, k, v = (linear(name, y).reshape(b, length, heads, -1) for name in "qkv")
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, precision=precision, preferred_element_type=jnp.float32)
    bias = w["bias"].astype(jnp.float32)[bucket].transpose(2, 0, 1)
    scores = jnp.where(real[:, None, None], scores + bias[None], jnp.finfo(jnp.float32).min)
    shares = jax.nn.softmax(scores, axis=-1).astype(x.dtype)
    attended = jnp.einsum("bhqk,bkhd->bqhd", shares, v, precision=precision)
    x = x + linear("o", attended.reshape(b, length, -1))
    y = normed(x, w["norm2"])
    return x + linear("wo", jax.nn.gelu(linear("wi_0", y), approximate=True) * linear("wi_1", y))
