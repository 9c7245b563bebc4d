"""One training step and one validation: pure functions of the state and a batch, compiled with their shardings.

Everything random in step n comes from fold_in(key(seed), n), so a step is the same on any mesh and after any restart.
"""

import dataclasses
import functools
import os
from collections.abc import Callable
from typing import cast

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from moc_jax import models
from moc_jax.attention.api import RoutedAttention, SceneAttention
from moc_jax.attention.taught import taught
from moc_jax.config import DiffusionConfig, MoCConfig, OptimizerConfig, TrainConfig
from moc_jax.diffusion.process import VelocityFn, flow_loss
from moc_jax.scene import Scene
from moc_jax.shapes import Array, Float, Float32, Int32, Key
from moc_jax.sharding import Params, batch_sharding, replicated
from moc_jax.training.optimizer import learning_rate
from moc_jax.training.state import Blueprint, TrainState
from moc_jax.training.teacher import teacher_forced

_ROUTED = RoutedAttention()
_OPTIONS = {
    "gpu": {
        # What a loop over layers writes whole, layer after layer, is not filled with zeros before.
        "xla_gpu_enable_dus_accumulator_zero_init_elimination": True,
        # Products are cuBLAS's: Triton's made no step faster, and to compile and try its own took a third of the time.
        "xla_gpu_enable_triton_gemm": False,
    }
}
Loss = Callable[[VelocityFn, Scene, Key[Array, ""], DiffusionConfig], tuple[Float[Array, ""], Float[Array, "B S"]]]
"""What a step descends, and each shot's own; as `flow_loss`."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepMetrics:
    """What a step reports; the same on every device."""

    loss: Float32[Array, ""]
    grad_norm: Float32[Array, ""]  # before clipping
    param_norm: Float32[Array, ""]  # of the updated weights
    learning_rate: Float32[Array, ""]  # of the update that the batch is part of; 0 where the run ends before it
    scene_loss: Float32[Array, " B"]  # mean over each scene's shots


def train_step(
    train: TrainConfig,
    optimizer: OptimizerConfig,
    diffusion: DiffusionConfig,
    blueprint: Blueprint,
    attention: SceneAttention = _ROUTED,
    loss_fn: Loss = flow_loss,
) -> Callable[[TrainState, Scene, MoCConfig, Key[Array, ""]], tuple[TrainState, StepMetrics]]:
    """(state, batch, attention config, the run's key) -> (state, metrics), to be compiled as a whole or as a part."""
    rate, accumulate = learning_rate(optimizer, train.steps), optimizer.accumulate
    updates_in_all = train.steps // accumulate

    def step(state, scene, moc, key):
        noise_key, drop_key = jax.random.split(jax.random.fold_in(key, state.step))

        def loss_of(params):
            weights = state.model_params(params)
            if diffusion.teacher_forcing:
                model, sampling = (
                    _model(blueprint, of, moc, taught(attention), key)
                    for of, key in ((weights, drop_key), (jax.lax.stop_gradient(weights), None))
                )
                velocity_fn = teacher_forced(model, scene, jax.random.fold_in(noise_key, 1), diffusion, sampling)
            else:
                velocity_fn = _velocity(blueprint, weights, scene, moc, attention, key=drop_key)
            return loss_fn(velocity_fn, scene, noise_key, diffusion)

        (loss, shot_loss), gradients = jax.value_and_grad(loss_of, has_aux=True)(state.params)
        shots = scene.lengths.shot_frames > 0
        with jax.named_scope("optimizer"):
            updates, moments = blueprint.optimizer.update(gradients, state.optimizer, state.params, shots=shots.sum())
            params = cast(Params, optax.apply_updates(state.params, updates))
        update = state.step // accumulate
        metrics = StepMetrics(
            loss=loss,
            grad_norm=optax.tree.norm(gradients),
            param_norm=optax.tree.norm(params),
            learning_rate=jnp.where(update < updates_in_all, rate(update), 0),
            scene_loss=shot_loss.sum(axis=1) / jnp.maximum(shots.sum(axis=1), 1),
        )
        with jax.named_scope("average"):
            ema = _averaged(state.ema, params, state.step, train.ema_decay, accumulate)
        return TrainState(state.step + 1, params, moments, ema, state.frozen), metrics

    return step


def make_train_step(
    train: TrainConfig,
    optimizer: OptimizerConfig,
    diffusion: DiffusionConfig,
    blueprint: Blueprint,
    mesh: Mesh,
    attention: SceneAttention = _ROUTED,
    loss_fn: Loss = flow_loss,
) -> jax.stages.Wrapped:
    """(state, batch, attention config) -> (state, metrics). Donates the state; compiles once per bucket and config.

    To be called with the mesh in context (`jax.set_mesh`).
    """
    step = train_step(train, optimizer, diffusion, blueprint, attention, loss_fn)

    def of_seed(state: TrainState, scene: Scene, moc: MoCConfig) -> tuple[TrainState, StepMetrics]:
        return step(state, scene, moc, jax.random.key(train.seed))

    return jax.jit(
        of_seed,
        static_argnums=2,
        donate_argnums=0,
        in_shardings=(blueprint.shardings, batch_sharding(mesh)),
        out_shardings=(blueprint.shardings, replicated(mesh)),
        compiler_options=compiler_options(mesh),
    )


def compiler_options(mesh: Mesh) -> dict[str, bool] | None:
    """What a program with a training step is compiled with; what XLA_FLAGS names is left to it."""
    options, flags = _OPTIONS.get(mesh.devices.flat[0].platform, {}), os.environ.get("XLA_FLAGS", "")
    return {name: value for name, value in options.items() if name not in flags} or None


def make_validation_step(
    train: TrainConfig,
    diffusion: DiffusionConfig,
    blueprint: Blueprint,
    mesh: Mesh,
    attention: SceneAttention = _ROUTED,
) -> jax.stages.Wrapped:
    """(weights, batch, its number, attention config) -> (sum of the shots' losses at each fixed t, number of shots).

    t stands at the centres of `train.validation_buckets` equal parts of (0, 1); the noise depends on the batch's number
    alone. Nothing is dropped off or in.
    """
    levels = validation_levels(train.validation_buckets)

    def validation_step(params: Params, scene: Scene, number: Int32[Array, ""], moc: MoCConfig):
        key = jax.random.fold_in(jax.random.key(train.seed), number)
        velocity_fn = _velocity(blueprint, params, scene, moc, attention, key=None)
        shots = scene.lengths.shot_frames

        def loss_at(level: Float[Array, ""]):
            t = jnp.full(shots.shape, level)
            return flow_loss(velocity_fn, scene, key, diffusion, t=t)[1].sum()

        return jax.lax.map(loss_at, levels), (shots > 0).sum()

    return jax.jit(
        validation_step,
        static_argnums=3,
        in_shardings=(blueprint.shardings.sampling_params, batch_sharding(mesh), replicated(mesh)),
        out_shardings=replicated(mesh),
    )


def validation_levels(count: int) -> Float32[Array, " T"]:
    """The fixed noise levels of validation."""
    return (jnp.arange(count, dtype=jnp.float32) + 0.5) / count


def _velocity(
    blueprint: Blueprint,
    params: Params,
    scene: Scene,
    moc: MoCConfig,
    attention: SceneAttention,
    *,
    key: Key[Array, ""] | None,
) -> VelocityFn:
    model = _model(blueprint, params, moc, attention, key)
    return lambda z, t: model(z, scene.text, t, scene.lengths, condition=scene.condition)


def _model(
    blueprint: Blueprint, params: Params, moc: MoCConfig, attention: SceneAttention, key: Key[Array, ""] | None
) -> Callable[..., Array]:
    """(video, text, t, lengths) -> velocity; with `condition`, of models that read one."""
    model = nnx.merge(blueprint.graph, params)
    model = model if key is None else models.with_dropout(model, key)
    return functools.partial(model, moc=moc, key=key, attention=attention)


def _averaged(
    ema: Params | None, params: Params, step: Int32[Array, ""], most: float, accumulate: int
) -> Params | None:
    """The weights' moving average after batch `step`; it moves only when they do.

    After update n:  average <- d average + (1 - d) weights,  d = min(most, (1 + n) / (10 + n))
    """
    if ema is None:
        return None
    n = step // accumulate
    decay = jnp.minimum(most, (1 + n) / (10 + n))
    decay = jnp.where((step + 1) % accumulate == 0, decay, 1.0)
    return jax.tree.map(lambda a, w: decay * a + (1 - decay) * w, ema, params)
