"""Gradients -> updates: clip by global norm, AdamW with a schedule, averaged over several batches if asked."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from moc_jax.config import OptimizerConfig
from moc_jax.sharding import LogicalAxes, key_path


def make_optimizer(cfg: OptimizerConfig, steps: int, logical: LogicalAxes) -> optax.GradientTransformation:
    """The whole chain.

    Args:
        steps: batches of the run; with `cfg.accumulate` several of them make one update.
        logical: names of every weight's dimensions: what has two or more besides `layers` is a matrix and decays.
    """

    def is_matrix(params):
        count = jax.tree.map_with_path(
            lambda path, _: sum(name != "layers" for name in logical[key_path(path)]), params
        )
        return jax.tree.map(lambda dimensions: dimensions >= 2, count)

    chain = optax.chain(
        optax.clip_by_global_norm(cfg.clip_norm) if cfg.clip_norm else optax.identity(),
        optax.adamw(
            learning_rate(cfg, steps), b1=cfg.b1, b2=cfg.b2, eps=cfg.eps, weight_decay=cfg.weight_decay, mask=is_matrix
        ),
    )
    if cfg.accumulate == 1:
        return chain
    return optax.MultiSteps(chain, cfg.accumulate).gradient_transformation()


def learning_rate(cfg: OptimizerConfig, steps: int) -> Callable[[Any], jax.Array]:
    """Update n = 0, 1, ... -> rate: (n + 1) / warmup_steps of the peak, then constant or a half cosine.

    The cosine reaches `final_fraction` of the peak at the run's last update.
    """
    updates = steps // cfg.accumulate

    def rate(n: Any) -> jax.Array:
        n = jnp.asarray(n, jnp.float32)
        warm = jnp.minimum(1.0, (n + 1) / max(cfg.warmup_steps, 1))
        if cfg.schedule == "constant":
            return cfg.learning_rate * warm
        done = jnp.clip((n + 1 - cfg.warmup_steps) / max(updates - cfg.warmup_steps, 1), 0.0, 1.0)
        fall = cfg.final_fraction + (1 - cfg.final_fraction) * 0.5 * (1 + jnp.cos(jnp.pi * done))
        return cfg.learning_rate * warm * fall

    return rate
