"""A block of Wan: self-attention of the video, cross-attention to the captions, MLP."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from moc_jax.attention.continued import Seen
from moc_jax.config import WanConfig
from moc_jax.models.layers import Mlp, gated_sum, modulated_norm, summed
from moc_jax.models.linear import linear_of
from moc_jax.models.rope import Turns, rotate
from moc_jax.models.wan.captions import Read
from moc_jax.shapes import Array, Float, Float32, Int, Key, typed
from moc_jax.sharding import moved

Attended = tuple[Float[Array, "B V H D"], Seen]  # with what else is asked for
Attend = Callable[[Array, Array, Array, Key[Array, ""] | None, Int[Array, ""]], Attended]  # of q, k, v; of a layer

_EPSILON = 1e-6


@jax.custom_vjp
def normed(x: Float[Array, "B N H D"], weight: Float32[Array, "H D"], turns: Turns | None) -> Float[Array, "B N H D"]:
    """RMS norm over all heads together, times a weight, then each head turned to its position (rope.py).

    Float32 inside. The backward pass is given x alone. With heads on several devices the mean is a sum over them.
    """
    y = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(y**2, axis=(2, 3), keepdims=True) + _EPSILON)
    y = y * weight[None, None]
    return ((y if turns is None else rotate(y, turns)) * inverse).astype(x.dtype)


def _normed_gradients(saved, d_out):
    x, weight, turns = saved
    y, d = x.astype(jnp.float32), d_out.astype(jnp.float32)
    d = d if turns is None else rotate(d, (turns[0], -turns[1]))
    d_y = d * weight[None, None]
    square, along = (jnp.mean(each, axis=(2, 3), keepdims=True) for each in (y**2, d_y * y))
    inverse = jax.lax.rsqrt(square + _EPSILON)
    d_x = (inverse * (d_y - y * (along * inverse**2))).astype(x.dtype)
    return d_x, summed(d * (y * inverse), (0, 1)), None


normed.defvjp(lambda *inputs: (normed(*inputs), inputs), _normed_gradients)


class HeadsNorm(nnx.Module):
    """The weight of `normed`."""

    def __init__(self, cfg: WanConfig):
        self.scale = nnx.Param(jnp.ones((cfg.heads, cfg.head_dim)), logical=("heads", "head_dim"))


class Attention(nnx.Module):
    """The weights of one attention."""

    def __init__(self, cfg: WanConfig, *, rngs: nnx.Rngs):
        embed, heads = {"embed": cfg.dim}, {"heads": cfg.heads, "head_dim": cfg.head_dim}
        linear = linear_of(cfg, rngs)
        self.q, self.k, self.v = (linear(embed, heads) for _ in range(3))
        self.q_norm, self.k_norm = HeadsNorm(cfg), HeadsNorm(cfg)
        self.out = linear(heads, embed)

    def queries(self, x: Float[Array, "B N M"], turns: Turns | None = None) -> Float[Array, "B N H D"]:
        """Normed, and turned where there are positions."""
        return normed(self.q(x), self.q_norm.scale[...], turns)

    def keys(self, x: Float[Array, "B N M"], turns: Turns | None = None) -> Float[Array, "B N H D"]:
        """The same."""
        return normed(self.k(x), self.k_norm.scale[...], turns)


class AffineNorm(nnx.Module):
    """LayerNorm with a weight and a bias."""

    def __init__(self, cfg: WanConfig):
        self.scale = nnx.Param(jnp.ones(cfg.dim), logical=("embed",))
        self.bias = nnx.Param(jnp.zeros(cfg.dim), logical=("embed",))

    def __call__(self, x: Float[Array, "B N M"]) -> Float[Array, "B N M"]:
        shape = x.shape[0], 1, x.shape[2]
        scale, bias = (jnp.broadcast_to(each[...][None, None], shape) for each in (self.scale, self.bias))
        return modulated_norm(x, scale - 1, bias, x.dtype)


class Block(nnx.Module):
    """The weights of one block. Modulation is a table, to which all blocks add the same projection of the time."""

    def __init__(self, cfg: WanConfig, *, rngs: nnx.Rngs):
        self.modulation = modulation_table(cfg, 6, rngs=rngs)
        self.attention = Attention(cfg, rngs=rngs)
        self.cross_norm = AffineNorm(cfg)
        self.cross = Attention(cfg, rngs=rngs)
        self.mlp = Mlp(cfg, rngs=rngs)

    @typed
    def __call__(
        self,
        x: Float[Array, "B V M"],
        text: Float[Array, "B rows M"],
        time: list[Float32[Array, "B groups M"]],
        turns: Turns,
        attend: Attend,
        read: Read,
        key: Key[Array, ""] | None,
        index: Int[Array, ""],
    ) -> tuple[Float[Array, "B V M"], Seen]:
        """The tokens after this block, and what `attend` gave beside."""
        table = self.modulation[...]
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = (row[None, None] + of for row, of in zip(table, time))
        own = self.attention
        with jax.named_scope("qkv"):
            h = moved(modulated_norm(x, scale, shift, x.dtype), "tokens", "stream")
            qkv = own.queries(h, turns), own.keys(h, turns), own.v(h)
        with jax.named_scope("attention"):
            attended, seen = attend(*qkv, key, index)
        with jax.named_scope("attention_out"):
            x = gated_sum(x, gate, moved(own.out(attended), "stream", "tokens"))
        with jax.named_scope("captions"):
            h = moved(self.cross_norm(x), "tokens", "stream")
            attended = read(self.cross.queries(h), self.cross.keys(text), self.cross.v(text))
            x = x + moved(self.cross.out(attended), "stream", "tokens")
        with jax.named_scope("mlp"):
            h = moved(modulated_norm(x, mlp_scale, mlp_shift, x.dtype), "tokens", "stream")
            return gated_sum(x, mlp_gate, moved(self.mlp(h), "stream", "tokens")), seen


def modulation_table(cfg: WanConfig, count: int, *, rngs: nnx.Rngs) -> nnx.Param:
    """`count` rows that are added to what the time gives; Wan's initialisation."""
    table = jax.random.normal(rngs.params(), (count, cfg.dim)) / cfg.dim**0.5
    return nnx.Param(table, logical=("modulation", "embed"))
