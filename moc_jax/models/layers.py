"""What the transformer is built of. Every weight carries `logical`, the names of its axes, for the sharding rules."""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from moc_jax.config import ModelConfig
from moc_jax.shapes import Array, Float, Float32, typed

TIME_FREQUENCIES = 128
MLP_OUTPUT = "mlp_output"  # its name for policies of `jax.checkpoint`
_init = nnx.initializers.xavier_uniform()

Axes = Mapping[str, int]  # an axis of a weight: what it is, which the sharding rules go by -> its size


def dense(
    inputs: Axes, outputs: Axes, *, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs, zero: bool = False
) -> nnx.LinearGeneral:
    """A linear map of the last axes, `inputs`, to `outputs`: dense({"embed": M}, {"heads": H, "head_dim": D}).

    Starts as the matrix from all inputs to all outputs would (Glorot), or with `zero` as a map to nothing (adaLN-Zero,
    DiT, section 3.2).
    """
    return nnx.LinearGeneral(
        tuple(inputs.values()),
        tuple(outputs.values()),
        axis=tuple(range(-len(inputs), 0)),
        dtype=dtype,
        kernel_init=nnx.initializers.zeros if zero else _init,
        kernel_metadata={"logical": (*inputs, *outputs)},
        bias_metadata={"logical": (*outputs,)},
        rngs=rngs,
    )


@typed
def layer_norm(x: Float[Array, "B N M"]) -> Float32[Array, "B N M"]:
    """LayerNorm with no parameters (shift and scale come from the timestep), in float32."""
    x = x.astype(jnp.float32)
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + 1e-6)


class HeadNorm(nnx.Module):
    """RMS norm over each head, in float32, with a weight per component: keeps q . k bounded (QK-norm)."""

    def __init__(self, head_dim: int):
        self.scale = nnx.Param(jnp.ones(head_dim), logical=("head_dim",))

    def __call__(self, x: Float[Array, "B N H D"]) -> Float[Array, "B N H D"]:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y**2, axis=-1, keepdims=True) + 1e-6)
        return (y * self.scale[...][None, None, None]).astype(x.dtype)


class Mlp(nnx.Module):
    """Linear, GELU (tanh), linear."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        dtype = jnp.dtype(cfg.dtype)
        self.up = dense({"embed": cfg.dim}, {"mlp": cfg.mlp_dim}, dtype=dtype, rngs=rngs)
        self.down = dense({"mlp": cfg.mlp_dim}, {"embed": cfg.dim}, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B N M"]) -> Float[Array, "B N M"]:
        return checkpoint_name(self.down(nnx.gelu(self.up(x), approximate=True)), MLP_OUTPUT)


class TimeEmbedding(nnx.Module):
    """t in [0, 1] -> [cos, sin] of 1000 t at geometric frequencies -> linear, SiLU, linear; float32 throughout."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        width = {"embed": cfg.dim}
        self.hidden = dense({"frequency": 2 * TIME_FREQUENCIES}, width, dtype=jnp.float32, rngs=rngs)
        self.out = dense(width, {"embed_out": cfg.dim}, dtype=jnp.float32, rngs=rngs)

    def __call__(self, t: Float[Array, "B P"]) -> Float32[Array, "B P M"]:
        frequency = jnp.exp(-math.log(10_000) * jnp.arange(TIME_FREQUENCIES) / TIME_FREQUENCIES)
        angle = 1000 * t[:, :, None] * frequency[None, None]
        return self.out(nnx.silu(self.hidden(jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1))))


class Modulation(nnx.Module):
    """adaLN: shifts, scales and gates from the timestep, one set per caption slot (the global one, then each shot)."""

    def __init__(self, cfg: ModelConfig, count: int, *, rngs: nnx.Rngs):
        outputs = {"modulation": count, "embed_out": cfg.dim}
        self.linear = dense({"embed": cfg.dim}, outputs, dtype=jnp.float32, rngs=rngs, zero=True)

    def __call__(self, time: Float32[Array, "B P M"], slot: Float32[Array, "B N P"]) -> list[Float32[Array, "B N M"]]:
        """`slot` is one-hot: a token's shot picks its modulation. A product, since its transpose is one too."""
        per_shot = self.linear(nnx.silu(time))
        return [jnp.einsum("bnp,bpm->bnm", slot, per_shot[:, :, i]) for i in range(per_shot.shape[2])]
