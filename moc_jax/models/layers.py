"""What the transformer is built of. Every weight carries `logical`, the names of its axes, for the sharding rules."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint

from moc_jax.attention.residuals import INPUTS, RESIDUALS
from moc_jax.config import ModelConfig
from moc_jax.models.linear import Linear, Staying, linear_of
from moc_jax.models.rope import Turns, rotate
from moc_jax.shapes import Array, Float, Float32, typed
from moc_jax.sharding import apart, constrained, tokens_are_split

TIME_FREQUENCIES = 128
MLP_OUTPUT = "mlp_output"  # its name for policies of `jax.checkpoint`
_policies = jax.checkpoint_policies
_of_attention = _policies.save_only_these_names(*RESIDUALS)
_KEPT: dict[str, Callable[..., bool] | None] = {  # by `remat`, for the backward pass beside a block's inputs
    "dots": _policies.save_from_both_policies(_policies.dots_with_no_batch_dims_saveable, _of_attention),
    "qkv+attention+mlp": _policies.save_only_these_names(*RESIDUALS, INPUTS, MLP_OUTPUT),
    "attention+mlp": _policies.save_only_these_names(*RESIDUALS, MLP_OUTPUT),
    "attention": _of_attention,
    "full": None,
    "auto": None,
}

_EPSILON = 1e-6


def kept_policy(cfg: ModelConfig) -> Callable[..., bool] | None:
    """What of a block is kept for the backward pass beside its inputs.

    An adapter's output is as wide as that of the map beside it, with which it is summed, and is computed again from
    `rank` numbers of a token for next to nothing: it is not kept.
    """
    policy, rank = _KEPT[cfg.remat], cfg.lora.rank
    if policy is None or cfg.remat != "dots" or not rank:
        return policy

    def keep(primitive, *inputs, **params):
        if primitive is jax.lax.dot_general_p:
            (summed, _), _ = params["dimension_numbers"]
            if math.prod(inputs[0].shape[axis] for axis in summed) == rank:
                return False
        return policy(primitive, *inputs, **params)

    return keep


QKV = tuple[Float[Array, "B N H D"], Float[Array, "B N H D"], Float[Array, "B N H D"]]


def _to_tokens(of_groups: Float32[Array, "B groups M"], tokens: int) -> Float32[Array, "B _ M"]:
    """Each token has its group's numbers; groups follow one another, of as many tokens each."""
    if of_groups.shape[1] in (0, 1, tokens):  # what all share, all broadcast
        return of_groups
    size = tokens // of_groups.shape[1]

    def local(x):
        tpu, default = (functools.partial(way, tokens=size * x.shape[1]) for way in (_looked_up, _repeated))
        return jax.lax.platform_dependent(x, tpu=tpu, default=default)

    return apart(local, of_groups)


def _sums(x: Float32[Array, "B N M"], groups: int) -> Float32[Array, "B groups M"]:
    """The transpose of `_to_tokens`."""
    if groups in (0, x.shape[1]):
        return x
    if groups == 1 and tokens_are_split():
        return jnp.sum(x, axis=1, keepdims=True)
    size = x.shape[1] // groups

    def local(x):
        tpu, default = (functools.partial(way, groups=x.shape[1] // size) for way in (_multiplied, _added))
        return jax.lax.platform_dependent(x, tpu=tpu, default=default)

    return apart(local, x)


def _repeated(x, tokens):
    batch, groups, width = x.shape
    return jnp.broadcast_to(x[:, :, None], (batch, groups, tokens // groups, width)).reshape(batch, tokens, width)


def _added(x, groups):
    return summed(x.reshape(x.shape[0], groups, x.shape[1] // groups, x.shape[2]), (2,))


# Groups need not fill whole tiles of a TPU's memory, which would move all tokens to where they do: there, both are
# products. Of a float32 number, two bfloat16 ones are looked up. One is summed, in float32, as a TPU's products do by
# default: the rounding of many tokens averages out.


def _looked_up(x, tokens):
    high = x.astype(jnp.bfloat16)
    parts = jnp.concatenate([high, (x - high.astype(jnp.float32)).astype(jnp.bfloat16)], axis=1)
    of_group = jnp.tile(_one_hot(tokens, x.shape[1], jnp.bfloat16), (1, 2))
    of_group = jnp.broadcast_to(of_group[None], (x.shape[0], *of_group.shape))  # a batch: no product that `dots` keeps
    return jnp.einsum("bnj,bjm->bnm", of_group, parts, preferred_element_type=jnp.float32)


def _multiplied(x, groups):
    return jnp.einsum("nj,bnm->bjm", _one_hot(x.shape[1], groups, jnp.float32), x)


def _one_hot(tokens: int, groups: int, dtype: jax.typing.DTypeLike) -> Float[Array, "N groups"]:
    return jax.nn.one_hot(jnp.arange(tokens) // (tokens // groups), groups, dtype=dtype)


def summed(x: Float32[Array, "..."], axes: tuple[int, ...]) -> Float32[Array, "..."]:
    """The sum over some axes, features last in memory as they are.

    XLA would rather sum along memory: it lays tokens out last, in all that is computed before, and transposes twice.
    """

    def as_they_are(x):
        return jnp.sum(with_layout_constraint(x, Layout(tuple(range(x.ndim)))), axis=axes)

    return jax.lax.platform_dependent(x, tpu=functools.partial(jnp.sum, axis=axes), default=as_they_are)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def modulated_norm(
    x: Float[Array, "B N M"], scale: Float32[Array, "B groups M"], shift: Float32[Array, "B groups M"], dtype: jnp.dtype
) -> Float[Array, "B N M"]:
    """(1 + scale) y + shift, where y is x normed over M with no weights (LayerNorm); float32 inside, `dtype` outside.

    Tokens are groups of as many, each with its own scale and shift. The backward pass is given x alone.
    """
    return _modulated_norm(x, scale, shift, dtype)[0]


def _modulated_norm(x, scale, shift, dtype):
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y**2, axis=-1, keepdims=True) + _EPSILON)
    scale_of, shift_of = (_to_tokens(each, x.shape[1]) for each in (scale, shift))
    return (y * (1 + scale_of) + shift_of).astype(dtype), (x, scale)


def _modulated_norm_gradients(dtype, saved, d_out):
    x, scale = saved
    d = d_out.astype(jnp.float32)
    # All that is summed over M follows from one pass. Less the first number, a large mean costs the variance nothing.
    from_first = x.astype(jnp.float32) - x[..., :1].astype(jnp.float32)
    d_y = d * (1 + _to_tokens(scale, x.shape[1]))
    mean, square, d_mean, along = (
        jnp.mean(each, axis=-1, keepdims=True) for each in (from_first, from_first**2, d_y, d_y * from_first)
    )
    inverse = jax.lax.rsqrt(square - mean**2 + _EPSILON)
    y = (from_first - mean) * inverse
    d_x = inverse * (d_y - d_mean - y * ((along - mean * d_mean) * inverse))
    d_scale, d_shift = (_sums(each, scale.shape[1]) for each in (d * y, d))
    return d_x.astype(x.dtype), d_scale, d_shift


modulated_norm.defvjp(_modulated_norm, _modulated_norm_gradients)


@jax.custom_vjp
def gated_sum(
    x: Float[Array, "B N M"], gate: Float32[Array, "B groups M"], y: Float[Array, "B N M"]
) -> Float[Array, "B N M"]:
    """x + gate y, the gate per group of tokens; float32 inside."""
    return _gated_sum(x, gate, y)[0]


def _gated_sum(x, gate, y):
    added = y.astype(jnp.float32) * _to_tokens(gate, y.shape[1])
    return (x.astype(jnp.float32) + added).astype(x.dtype), (gate, y)


def _gated_sum_gradients(saved, d_out):
    gate, y = saved
    d = d_out.astype(jnp.float32)
    d_y = (d * _to_tokens(gate, y.shape[1])).astype(y.dtype)
    return d_out, _sums(d * y.astype(jnp.float32), gate.shape[1]), d_y


gated_sum.defvjp(_gated_sum, _gated_sum_gradients)


@jax.custom_vjp
def normed_heads(
    qkv: Float[Array, "B N H 3 D"], q_weight: Float32[Array, " D"], k_weight: Float32[Array, " D"], turns: Turns
) -> QKV:
    """q, k and v: of q and k, each head RMS normed, times a weight, and turned to its position (rope.py).

    Float32 inside. The backward pass is given `qkv` alone.
    """
    q, k = (_normed_and_turned(qkv[:, :, :, i], weight, turns) for i, weight in enumerate((q_weight, k_weight)))
    return q, k, qkv[:, :, :, 2]


def _normed_and_turned(x, weight, turns):
    y = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(y**2, axis=-1, keepdims=True) + _EPSILON)
    # Turned before it is divided, so that nothing but x is read from two places.
    return (rotate(y * weight[None, None, None], turns) * inverse).astype(x.dtype)


def _normed_heads_gradients(saved, d_out):
    qkv, weights, (cos, sin) = saved
    back, d_qkv, d_weights = (cos, -sin), [], []
    for i, weight in enumerate(weights):
        x = qkv[:, :, :, i].astype(jnp.float32)
        d = rotate(d_out[i].astype(jnp.float32), back)
        d_y = d * weight[None, None, None]
        square, along = (jnp.mean(each, axis=-1, keepdims=True) for each in (x**2, d_y * x))
        inverse = jax.lax.rsqrt(square + _EPSILON)
        d_weights.append(summed(d * (x * inverse), (0, 1, 2)))
        d_qkv.append((inverse * (d_y - x * (along * inverse**2))).astype(qkv.dtype))
    return _side_by_side(*d_qkv, d_out[2]), *d_weights, None


def _side_by_side(*parts: Float[Array, "B N H D"]) -> Float[Array, "B N H 3 D"]:
    """XLA writes four numbers at a time of parts that follow each other along an axis, and one of parts along a new.

    It is written once: XLA would rather compute it twice, for the bias's gradient.
    """

    def default(*parts):
        joined = jax.lax.optimization_barrier(jnp.concatenate(parts, axis=-1))
        return joined.reshape(*parts[0].shape[:-1], len(parts), parts[0].shape[-1])

    return jax.lax.platform_dependent(*parts, tpu=lambda *parts: jnp.stack(parts, axis=3), default=default)


normed_heads.defvjp(
    lambda *inputs: (normed_heads(*inputs), (inputs[0], inputs[1:3], inputs[3])), _normed_heads_gradients
)


class HeadNorm(nnx.Module):
    """RMS norm over each head, with a weight per component: keeps q . k bounded (QK-norm); see `normed_heads`."""

    def __init__(self, head_dim: int):
        self.scale = nnx.Param(jnp.ones(head_dim), logical=("head_dim",))


@jax.custom_vjp
def gelu(x: Float[Array, "B N width"]) -> Float[Array, "B N width"]:
    """x Phi(x) by its tanh approximation; its gradient is float32 inside, and is given x alone."""
    return jax.lax.platform_dependent(x, tpu=_approximate, default=lambda x: _sigmoid_gelu(x)[0])


_approximate = functools.partial(nnx.gelu, approximate=True)


def _sigmoid_gelu(x):
    """The same and its derivative, float32 inside: (1 + tanh(u)) / 2 = 1 / (1 + exp(-2 u)).

    A GPU takes longer to compute this than to read x: so in few operations, and all but the last of both are the same.
    """
    y, scale = x.astype(jnp.float32), 2 * math.sqrt(2 / math.pi)
    square, cubic = y**2, 0.044715 * scale
    share = jax.lax.logistic(y * (scale + cubic * square))
    out = y * share
    return out.astype(x.dtype), share + out * (1 - share) * (scale + 3 * cubic * square)


def _gelu_gradient(x, d_out):
    def default(x, d_out):
        return (d_out.astype(jnp.float32) * _sigmoid_gelu(x)[1]).astype(x.dtype)

    def cuda(x, d_out):
        # The bias before sums what comes out. In one pass with it, XLA for GPUs takes longer than in two.
        return jax.lax.optimization_barrier(default(x, d_out))

    def tpu(x, d_out):
        _, vjp = jax.vjp(_approximate, x.astype(jnp.float32))
        return vjp(d_out.astype(jnp.float32))[0].astype(x.dtype)

    return (jax.lax.platform_dependent(x, d_out, tpu=tpu, cuda=cuda, default=default),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_gradient)


class Mlp(nnx.Module):
    """Linear, GELU (tanh), linear."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        linear = linear_of(cfg, rngs)
        self.up = linear({"embed": cfg.dim}, {"mlp": cfg.mlp_dim})
        self.down = linear({"mlp": cfg.mlp_dim}, {"embed": cfg.dim})

    def __call__(self, x: Float[Array, "B N M"]) -> Float[Array, "B N M"]:
        hidden = constrained(self.up(x), "batch", "tokens", "mlp")
        return checkpoint_name(self.down(gelu(hidden)), MLP_OUTPUT)


class TimeEmbedding(nnx.Module):
    """t in [0, 1] -> [cos, sin] of 1000 t at geometric frequencies -> linear, SiLU, linear; float32 throughout."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        width = {"embed": cfg.dim}
        self.hidden = Linear({"frequency": 2 * TIME_FREQUENCIES}, width, dtype=jnp.float32, rngs=rngs)
        self.out = Linear(width, {"embed_out": cfg.dim}, dtype=jnp.float32, rngs=rngs)

    def __call__(self, t: Float[Array, "B P"]) -> Float32[Array, "B P M"]:
        frequency = jnp.exp(-math.log(10_000) * jnp.arange(TIME_FREQUENCIES) / TIME_FREQUENCIES)
        angle = 1000 * t[:, :, None] * frequency[None, None]
        return self.out(nnx.silu(self.hidden(jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1))))


class Modulation(nnx.Module):
    """adaLN: shifts, scales and gates from the timestep, one set per caption slot (the global one, then each shot)."""

    def __init__(self, cfg: ModelConfig, count: int, *, rngs: nnx.Rngs):
        outputs = {"modulation": count, "embed": cfg.dim}
        self.linear = Staying({"embed_in": cfg.dim}, outputs, dtype=jnp.float32, rngs=rngs, zero=True)

    def __call__(self, time: Float32[Array, "B P M"]) -> Float32[Array, "*layers B P count M"]:
        """`count` of them for each caption, in each layer where this is a stack of layers."""
        return self.linear(nnx.silu(time))


@typed
def of_groups(
    per_caption: Float32[Array, "B P count M"], slot: Float32[Array, "B groups P"]
) -> list[Float32[Array, "B groups M"]]:
    """Each group of tokens has its caption's. `slot` is one-hot, and a product's transpose is one too: no scatter."""
    batch, captions, count, width = per_caption.shape
    rows = per_caption.reshape(batch, captions, count * width)
    spread = jnp.einsum("bjp,bpe->bje", slot, rows, precision=jax.lax.Precision.HIGHEST)
    return jnp.split(spread, count, axis=2)


def stacked[T: nnx.Module](kind: Callable[..., T], cfg: ModelConfig, rngs: nnx.Rngs) -> T:
    """`depth` modules as one, each weight with a leading `layers` axis: compile time does not grow with depth."""

    @nnx.split_rngs(splits=cfg.depth)
    @nnx.vmap(axis_size=cfg.depth, transform_metadata={nnx.PARTITION_NAME: None})
    def make(rngs):
        return kind(cfg, rngs=rngs)

    modules = make(rngs)
    for _, weight in nnx.iter_graph(modules):
        if isinstance(weight, nnx.Param):
            weight.set_metadata(logical=("layers", *weight.get_metadata("logical")))
    return modules


def over_layers[T, L, S](block: Callable[[T, L], tuple[T, S]], x: T, layers: L, cfg: ModelConfig) -> tuple[T, S]:
    """`lax.scan` of a block over the layers, which keeps what `cfg.remat` says; in a loop or, without
    `cfg.scan_layers`, one after another."""
    if cfg.remat != "none":  # a loop keeps passes apart by itself
        block = jax.checkpoint(block, policy=kept_policy(cfg), prevent_cse=not cfg.scan_layers)
    return jax.lax.scan(block, x, layers, unroll=not cfg.scan_layers)


def shot_means(
    q: Float[Array, "B V H D"], k: Float[Array, "B V H D"], shots: Float32[Array, "B F S"]
) -> Float32[Array, "B 2 S H D"]:
    """The mean of q and of k over the tokens of each shot; `shots` says of which one each frame is."""

    def mean(x):
        of_frames = x.reshape(*shots.shape[:2], -1, *x.shape[2:]).mean(axis=2, dtype=jnp.float32)
        return jnp.einsum("bfs,bfhd->bshd", shots, of_frames, precision="highest")

    counts = jnp.maximum(shots.sum(axis=1), 1)[:, None, :, None, None]
    return jnp.stack([mean(q), mean(k)], axis=1) / counts
