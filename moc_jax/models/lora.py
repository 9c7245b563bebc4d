"""Low-rank adapters of linear maps (LoRA, arXiv 2106.09685, section 4.1):

    y = x W + b + alpha / rank · dropout(x) A B

W and b are frozen, A starts random and B at 0. A model with adapters holds each W in the type that its products are in,
which is what they read anyway.
"""

import functools
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import nnx

from moc_jax.config import ConfigError, LoraConfig
from moc_jax.config.lora import unmatched
from moc_jax.models.linear import Linear, affine
from moc_jax.shapes import Array, Float, Key
from moc_jax.sharding import Params

NAME = "lora"
"""Of adapters among a model's weights: `blocks/attention/q/lora/a`."""


class DropoutKey(nnx.Variable):
    """Randomness of an adapter in a training step; in a stack one for each layer."""


class Adapter(nnx.Module):
    """A, B and what they are multiplied with."""

    key: DropoutKey  # while it trains, where inputs are dropped

    def __init__(self, of: Linear, cfg: LoraConfig, *, rngs: nnx.Rngs):
        names, sizes = tuple(of.kernel.get_metadata("logical")), of.kernel.shape
        stack = names[0] == "layers"
        inputs = of.kernel.ndim - of.bias.ndim + stack
        a, b = (*sizes[:inputs], cfg.rank), (*sizes[:stack], cfg.rank, *sizes[inputs:])
        most = math.prod(sizes[stack:inputs]) ** -0.5
        self.a = nnx.Param(jax.random.uniform(rngs.params(), a, minval=-most, maxval=most))
        self.b = nnx.Param(jnp.zeros(b))
        self.a.set_metadata(logical=(*names[:inputs], "rank"))
        self.b.set_metadata(logical=(*names[:stack], "rank", *names[inputs:]))
        self.scale, self.dropout = cfg.scale, cfg.dropout
        self.dtype, self.gradient_dtype = of.dtype, of.gradient_dtype

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """What is added to the linear map's output."""
        if "key" in vars(self):
            kept = jax.random.bernoulli(self.key[...], 1 - self.dropout, x.shape)
            x = jnp.where(kept, x / (1 - self.dropout), 0).astype(x.dtype)
        return self._times(self._times(x, self.a, 1) * self.scale, self.b, self.b.ndim - 1)

    def _times(self, x: Array, weight: nnx.Param, outputs: int) -> Array:
        names = tuple(weight.get_metadata("logical"))[-weight.ndim :]
        nothing = jnp.zeros(weight.shape[weight.ndim - outputs :])
        return affine(x, weight[...], nothing, names, self.dtype, self.gradient_dtype)


def adapted[M](model: M, cfg: LoraConfig, *, rngs: nnx.Rngs) -> M:
    """The model with frozen weights, and adapters beside those that `cfg` names; without any, as it is.

    Raises:
        ConfigError: `model.lora.targets` names no linear map.
    """
    if not cfg.rank:
        return model
    maps = dict(_maps(model))
    if missed := unmatched(cfg, maps):
        raise ConfigError(
            f"model.lora.targets has {', '.join(map(repr, missed))}, which names no linear map of this model; these "
            f"are {', '.join(maps)}"
        )
    for name, of in maps.items():
        of.freeze(Adapter(of, cfg, rngs=rngs) if cfg.names(name) else None)
    return model


def _maps(model: object) -> Iterator[tuple[str, Linear]]:
    found = {"/".join(map(str, path)): of for path, of in nnx.iter_graph(model) if isinstance(of, Linear)}
    yield from sorted(found.items())


def with_dropout[M](model: M, key: Key[Array, ""]) -> M:
    """The model as it trains: adapters that drop inputs have randomness of their own."""
    for i, (_, of) in enumerate(_maps(model)):
        adapter = of.lora if of.frozen else None
        if isinstance(adapter, Adapter) and adapter.dropout:
            own, stack = jax.random.fold_in(key, i), adapter.a.get_metadata("logical")[0] == "layers"
            adapter.key = DropoutKey(jax.random.split(own, adapter.a.shape[0]) if stack else own)
    return model


# ------------------------------------------------------------------------------------------------ frozen and trained


def trained(params: Params) -> Params:
    """What of a model's weights is trained: its adapters, or all where there are none."""
    return _parted(params)[1] or params


def frozen(params: Params) -> Params | None:
    """The weights that adapters are beside; None where there are none."""
    weights, adapters = _parted(params)
    return weights if adapters else None


def _parted(params: Params) -> tuple[Params, Params]:
    """Weights, adapters."""
    weights, adapters = {}, {}
    for name, of in params.items():
        if name == NAME:
            adapters[name] = of
        elif isinstance(of, dict):
            for into, found in zip((weights, adapters), _parted(of)):
                into |= {name: found} if found else {}
        else:
            weights[name] = of
    return weights, adapters


def joined(frozen: Params, trained: Params) -> Params:
    """All of a model's weights, of which these are the parts."""
    both = {**frozen, **trained}
    for name, of in trained.items():
        beside = frozen.get(name)
        if isinstance(of, dict) and isinstance(beside, dict):
            both[name] = joined(beside, of)
    return both


def merged(frozen: Params, trained: Params, cfg: LoraConfig) -> Params:
    """Weights of a model without adapters that computes the same: W + alpha / rank · A B, in float32."""
    found = dict(frozen)
    for name, of in trained.items():
        beside = frozen.get(name)
        if name == NAME:
            found["kernel"] = _merged(frozen["kernel"], of, cfg.scale)
        elif isinstance(of, dict) and isinstance(beside, dict):
            found[name] = merged(beside, of, cfg)
    return found


@functools.partial(jax.jit, static_argnums=2)
def _merged(kernel: Array, adapter: dict[str, Array], scale: float) -> Array:
    a, b = adapter["a"], adapter["b"]
    stack, rank = a.ndim + b.ndim - 2 - kernel.ndim, a.shape[-1]
    a, b = a.reshape(*a.shape[:stack], -1, rank), b.reshape(*b.shape[:stack], rank, -1)
    added = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST).reshape(kernel.shape)
    return kernel.astype(jnp.float32) + scale * added
