"""The training state: everything that a step reads and writes, on the mesh from the first moment."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from moc_jax import models
from moc_jax.config import ModelConfig, OptimizerConfig, TrainConfig
from moc_jax.shapes import Array, Int32
from moc_jax.sharding import LogicalAxes, Params, logical_axes, tree_shardings
from moc_jax.training.optimizer import make_optimizer

Items = dict[str, Any]
"""The parts of a checkpoint, by name: trees of arrays, of what stands in their place, or of their shardings."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """A run after `step` batches."""

    step: Int32[Array, ""]
    params: Params
    optimizer: optax.OptState  # as Optax made it
    ema: Params | None  # moving average of the weights; None where none is kept

    @property
    def sampling_params(self) -> Params:
        """The weights to validate and sample with."""
        return self.params if self.ema is None else self.ema

    def items(self) -> Items:
        """The parts of a checkpoint, by name."""
        ema = {} if self.ema is None else {"ema": self.ema}
        return {"params": self.params, **ema, "optimizer": {"chain": self.optimizer, "step": self.step}}

    @classmethod
    def from_items(cls, items: Items) -> "TrainState":
        """What `items` took apart."""
        optimizer = items["optimizer"]
        return cls(optimizer["step"], items["params"], optimizer["chain"], items.get("ema"))


@dataclasses.dataclass(frozen=True)
class Blueprint:
    """What is fixed for a run: the model's graph, the optimizer, and where every part of the state lies."""

    graph: nnx.GraphDef
    optimizer: optax.GradientTransformationExtraArgs
    logical: LogicalAxes
    shardings: TrainState  # a NamedSharding in place of every array
    abstract: TrainState  # a ShapeDtypeStruct, with its sharding, in place of every array
    initial: Callable[[Params | None], TrainState]  # before the first batch, with these weights or fresh ones


def make_blueprint(model: ModelConfig, optimizer: OptimizerConfig, train: TrainConfig, mesh: Mesh) -> Blueprint:
    """Works out the state's shapes and shardings without making it."""
    graph, weights = models.abstract(model)
    logical = logical_axes(weights)
    chain = make_optimizer(optimizer, train.steps, logical)
    initial = functools.partial(_initial, model, train, chain)
    shapes = jax.eval_shape(lambda: initial(None))
    shardings = tree_shardings(shapes, logical, mesh)
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
    return Blueprint(graph, chain, logical, shardings, abstract, initial)


def device_bytes(tree: object) -> int:
    """Bytes that one device holds of a tree of arrays or ShapeDtypeStructs, by their shardings."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def create_state(blueprint: Blueprint, params: Params | None = None) -> TrainState:
    """The state before the first batch, with these weights or fresh ones.

    Fresh numbers depend on `train.seed` and not on the mesh.
    """
    return jax.jit(blueprint.initial, out_shardings=blueprint.shardings)(params)


def _initial(
    model: ModelConfig, train: TrainConfig, optimizer: optax.GradientTransformation, params: Params | None
) -> TrainState:
    if params is None:
        params = nnx.to_pure_dict(nnx.state(models.build(model, rngs=nnx.Rngs(train.seed)), nnx.Param))
    ema = jax.tree.map(jnp.copy, params) if train.ema_decay else None
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), ema)
