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
from jax.sharding import AbstractMesh, Mesh

from moc_jax import models
from moc_jax.config import ModelConfig, OptimizerConfig, TrainConfig
from moc_jax.shapes import Array, Int32
from moc_jax.sharding import LogicalAxes, Params, check_tensor, logical_axes, tree_shardings
from moc_jax.training.optimizer import make_optimizer

Items = dict[str, Any]
"""The parts of a checkpoint, by name: trees of arrays, of what stands in their place, or of their shardings."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """A run after `step` batches."""

    step: Int32[Array, ""]
    params: Params  # what is trained: adapters, where the model has some
    optimizer: optax.OptState  # as Optax made it
    ema: Params | None  # moving average of `params`; None where none is kept
    frozen: Params | None = None  # the weights that adapters are beside

    @property
    def sampling_params(self) -> Params:
        """The weights to validate and sample with."""
        return self.model_params(self.params if self.ema is None else self.ema)

    def model_params(self, trained: Params) -> Params:
        """All of a model's weights."""
        return trained if self.frozen is None else models.joined(self.frozen, trained)

    def items(self) -> Items:
        """The parts of a checkpoint, by name; frozen weights are none of them."""
        ema = {} if self.ema is None else {"ema": self.ema}
        return {"params": self.params, **ema, "optimizer": {"chain": self.optimizer, "step": self.step}}

    @classmethod
    def from_items(cls, items: Items, frozen: Params | None = None) -> "TrainState":
        """What `items` took apart."""
        optimizer = items["optimizer"]
        return cls(optimizer["step"], items["params"], optimizer["chain"], items.get("ema"), frozen)


@dataclasses.dataclass(frozen=True)
class Blueprint:
    """What is fixed for a run: the model's graph, the optimizer, and where every part of the state lies."""

    graph: nnx.GraphDef
    optimizer: optax.GradientTransformationExtraArgs
    logical: LogicalAxes
    shardings: TrainState  # a NamedSharding in place of every array
    abstract: TrainState  # a ShapeDtypeStruct, with its sharding, in place of every array
    initial: Callable[[Params | None], TrainState]  # before the first batch, with these weights or fresh ones
    fresh: Callable[[], Params | None]  # weights that adapters may be beside


def make_blueprint(
    model: ModelConfig, optimizer: OptimizerConfig, train: TrainConfig, mesh: Mesh | AbstractMesh
) -> Blueprint:
    """Works out the state's shapes and shardings without making it.

    Raises:
        ConfigError: the mesh's tensor axis does not divide heads and MLP.
    """
    graph, weights = models.abstract(model)
    logical = logical_axes(weights)
    chain = make_optimizer(optimizer, train.steps, logical)
    shapes = abstract_state(model, optimizer, train)
    check_tensor(shapes.sampling_params, logical, mesh)
    shardings = tree_shardings(shapes, logical, mesh)
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
    initial = functools.partial(_initial, model, train, chain)
    return Blueprint(graph, chain, logical, shardings, abstract, initial, lambda: models.frozen(_fresh(model, train)))


def abstract_state(model: ModelConfig, optimizer: OptimizerConfig, train: TrainConfig) -> TrainState:
    """The state's shapes, wherever it will lie."""
    weights = models.abstract(model)[1]
    chain = make_optimizer(optimizer, train.steps, logical_axes(weights))
    shapes = jax.eval_shape(lambda: _initial(model, train, chain, None))
    return dataclasses.replace(shapes, frozen=models.frozen(nnx.to_pure_dict(weights)))


def device_bytes(tree: object) -> int:
    """Bytes that one device holds of a tree of arrays or ShapeDtypeStructs, by their shardings."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def create_state(blueprint: Blueprint, params: Params | None = None, frozen: Params | None = None) -> TrainState:
    """The state before the first batch, with these weights or fresh ones.

    Fresh numbers depend on `train.seed` and not on the mesh.

    Args:
        frozen: of a model with adapters, the weights that these are beside.
    """
    places = blueprint.shardings
    begun = jax.jit(blueprint.initial, out_shardings=dataclasses.replace(places, frozen=None))(params)
    if frozen is None and places.frozen is not None:
        frozen = jax.jit(blueprint.fresh, out_shardings=places.frozen)()
    return dataclasses.replace(begun, frozen=frozen)


def _fresh(model: ModelConfig, train: TrainConfig) -> Params:
    return nnx.to_pure_dict(nnx.state(models.build(model, rngs=nnx.Rngs(train.seed)), nnx.Param))


def _initial(
    model: ModelConfig, train: TrainConfig, optimizer: optax.GradientTransformation, params: Params | None
) -> TrainState:
    if params is None:
        params = models.trained(_fresh(model, train))
    ema = jax.tree.map(jnp.copy, params) if train.ema_decay else None
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), ema)
