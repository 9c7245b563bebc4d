"""Gradients -> updates: clip by global norm, AdamW with a schedule; several batches may make one update together."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from moc_jax.config import ConfigError, OptimizerConfig
from moc_jax.shapes import Array, Float, Int32
from moc_jax.sharding import LogicalAxes, Params, key_path

_ADDED = "bias", "scale", "modulation", "head_modulation"  # weights that no token is multiplied with as a matrix


def make_optimizer(cfg: OptimizerConfig, steps: int, logical: LogicalAxes) -> optax.GradientTransformationExtraArgs:
    """The whole chain; `update` also takes `shots`, how many the gradients are a mean over (used with `accumulate`).

    Args:
        steps: batches of the run; with `cfg.accumulate` several of them make one update.
        logical: names of every weight's dimensions: what has two or more besides `layers` is a matrix and decays,
            unless it is a bias, a norm's scale or a table of modulation.

    Raises:
        ConfigError: `steps` are too few for a single update.
    """
    if steps < cfg.accumulate:
        raise ConfigError(
            f"train.steps = {steps}, but optimizer.accumulate = {cfg.accumulate} batches make one update, so nothing "
            "would be trained: raise train.steps or lower optimizer.accumulate"
        )

    def is_matrix(path, _):
        *_, last = key_path(path)
        return last not in _ADDED and sum(name != "layers" for name in logical[key_path(path)]) >= 2

    chain = optax.chain(
        optax.clip_by_global_norm(cfg.clip_norm) if cfg.clip_norm else optax.identity(),
        optax.adamw(
            learning_rate(cfg, steps),
            b1=cfg.b1,
            b2=cfg.b2,
            eps=cfg.eps,
            weight_decay=cfg.weight_decay,
            mask=lambda params: jax.tree.map_with_path(is_matrix, params),
        ),
    )
    return accumulated(chain, cfg.accumulate) if cfg.accumulate > 1 else optax.with_extra_args_support(chain)


class Accumulated(NamedTuple):
    """What lies between two updates."""

    mini_step: Int32[Array, ""]  # batches since the last update
    shots: Float[Array, ""]  # in these batches
    acc_grads: Params  # mean of the gradients over these shots
    inner_opt_state: optax.OptState


def accumulated(inner: optax.GradientTransformation, count: int) -> optax.GradientTransformationExtraArgs:
    """One update of `inner` from `count` batches: that of all their shots in one batch.

    G = sum_i n_i g_i / sum_i n_i,  n_i the shots of batch i and g_i the mean of their gradients. (In the mean of the
    g_i, which optax.MultiSteps takes, a shot weighs the more, the fewer others its batch holds.)
    """

    def init(params: optax.Params) -> Accumulated:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return Accumulated(jnp.zeros((), jnp.int32), jnp.zeros(()), zeros, inner.init(params))

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None, **extra: Array
    ) -> tuple[optax.Updates, Accumulated]:  # Optax calls them updates before they are
        assert isinstance(state, Accumulated)
        total = state.shots + extra["shots"]
        share = extra["shots"] / jnp.maximum(total, 1)  # a batch of padding alone has no say
        mean = jax.tree.map(lambda m, g: m + share * (g - m), state.acc_grads, updates)

        def gather() -> tuple[optax.Updates, Accumulated]:
            nothing = jax.tree.map(jnp.zeros_like, updates)
            return nothing, Accumulated(state.mini_step + 1, total, mean, state.inner_opt_state)

        def emit() -> tuple[optax.Updates, Accumulated]:
            moved, after = inner.update(mean, state.inner_opt_state, params)
            nothing = jax.tree.map(jnp.zeros_like, mean)
            return moved, Accumulated(jnp.zeros_like(state.mini_step), jnp.zeros_like(total), nothing, after)

        return jax.lax.cond(state.mini_step + 1 == count, emit, gather)

    return optax.GradientTransformationExtraArgs(init, update)


def remainder(cfg: OptimizerConfig, steps: int) -> str:
    """What to report of last batches that are too few for an update; empty if there are none."""
    left = steps % cfg.accumulate
    if not left:
        return ""
    whole = steps - left
    return (
        f"train.steps = {steps} is not a multiple of optimizer.accumulate = {cfg.accumulate}: the last {left} "
        f"batch(es) make no update; {whole} or {whole + cfg.accumulate} steps would waste none"
    )


def learning_rate(cfg: OptimizerConfig, steps: int) -> Callable[[ArrayLike], jax.Array]:
    """Update n = 0, 1, ... -> rate: (n + 1) / warmup_steps of the peak, then constant or a half cosine.

    The cosine reaches `final_fraction` of the peak at the run's last update.
    """
    updates = steps // cfg.accumulate

    def rate(n: ArrayLike) -> jax.Array:
        n = jnp.asarray(n, jnp.float32)
        warm = jnp.minimum(1.0, (n + 1) / max(cfg.warmup_steps, 1))
        if cfg.schedule == "constant":
            return cfg.learning_rate * warm
        done = jnp.clip((n + 1 - cfg.warmup_steps) / max(updates - cfg.warmup_steps, 1), 0.0, 1.0)
        fall = cfg.final_fraction + (1 - cfg.final_fraction) * 0.5 * (1 + jnp.cos(jnp.pi * done))
        return cfg.learning_rate * warm * fall

    return rate
