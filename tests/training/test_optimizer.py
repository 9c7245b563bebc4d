"""The schedule's numbers, and what decays."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from moc_jax import models
from moc_jax.config import ConfigError, MMDiTConfig, OptimizerConfig
from moc_jax.sharding import key_path, logical_axes
from moc_jax.training.optimizer import accumulated, learning_rate, make_optimizer, remainder

LOGICAL = {("kernel",): ("layers", "embed", "mlp"), ("bias",): ("layers", "mlp"), ("out",): ("embed", "patch")}
PARAMS = {"kernel": jnp.ones((2, 3, 4)), "bias": jnp.ones((2, 4)), "out": jnp.ones((3, 5))}


def rates(cfg, steps, count):
    rate = learning_rate(cfg, steps)
    return np.array([rate(n) for n in range(count)])


def test_warm_up_then_constant():
    cfg = OptimizerConfig(learning_rate=2.0, warmup_steps=4)
    np.testing.assert_allclose(rates(cfg, 100, 6), [0.5, 1, 1.5, 2, 2, 2])


def test_warm_up_then_cosine_to_the_last_update():
    cfg = OptimizerConfig(learning_rate=2.0, warmup_steps=2, schedule="cosine", final_fraction=0.1)
    got = rates(cfg, 10, 12)
    np.testing.assert_allclose(got[:2], [1, 2])
    np.testing.assert_allclose(got[5], 2 * (0.1 + 0.9 * 0.5))  # half way
    np.testing.assert_allclose(got[9:], [0.2, 0.2, 0.2], rtol=1e-6)
    assert (np.diff(got[1:10]) < 0).all()


def test_accumulation_stretches_the_schedule():
    cfg = OptimizerConfig(learning_rate=1.0, warmup_steps=0, schedule="cosine", accumulate=5)
    assert rates(cfg, 50, 10)[9] == pytest.approx(0, abs=1e-7)
    assert rates(cfg, 50, 10)[4] == pytest.approx(0.5)


def test_only_matrices_decay():
    cfg = OptimizerConfig(learning_rate=0.1, warmup_steps=0, weight_decay=0.5)
    optimizer = make_optimizer(cfg, 10, LOGICAL)
    nothing = jax.tree.map(jnp.zeros_like, PARAMS)
    updates, _ = optimizer.update(nothing, optimizer.init(PARAMS), PARAMS)
    np.testing.assert_allclose(updates["kernel"], -0.05, rtol=1e-6)
    np.testing.assert_allclose(updates["out"], -0.05, rtol=1e-6)
    np.testing.assert_array_equal(updates["bias"], 0)


@pytest.mark.long
def test_of_the_model_kernels_decay_and_no_bias_or_scale():
    """Also where heads are an axis of their own, a bias's too."""
    weights = models.abstract(MMDiTConfig(dim=16, depth=2, heads=2, latent_channels=4, text_dim=8))[1]
    params = jax.tree.map(lambda x: jnp.ones(x.shape), nnx.to_pure_dict(weights))
    cfg = OptimizerConfig(learning_rate=0.1, warmup_steps=0, weight_decay=0.5)
    optimizer = make_optimizer(cfg, 10, logical_axes(weights))
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    for path, update in jax.tree.leaves_with_path(updates):
        *_, last = key_path(path)
        assert last in ("kernel", "bias", "scale")
        np.testing.assert_allclose(update, -0.05 if last == "kernel" else 0, rtol=1e-6)


@pytest.mark.parametrize("clip_norm", [0.0, 2.0])
def test_gradients_are_clipped_by_their_global_norm(clip_norm):
    cfg = OptimizerConfig(clip_norm=clip_norm, weight_decay=0.0)
    optimizer = make_optimizer(cfg, 10, LOGICAL)
    gradients = jax.tree.map(lambda x: 3 * x, PARAMS)
    _, state = optimizer.update(gradients, optimizer.init(PARAMS), PARAMS)
    norm = np.sqrt(sum(x.size * 9 for x in PARAMS.values()))
    factor = clip_norm / norm if clip_norm else 1
    np.testing.assert_allclose(state[1][0].mu["out"], 0.1 * 3 * factor, rtol=1e-5)


def test_the_state_has_one_structure_with_and_without_clipping():
    structures = set()
    for clip_norm in (0.0, 1.0):
        cfg = OptimizerConfig(clip_norm=clip_norm)
        structures.add(jax.tree.structure(make_optimizer(cfg, 10, LOGICAL).init(PARAMS)))
    assert len(structures) == 1
    accumulated = make_optimizer(dataclasses.replace(cfg, accumulate=2), 10, LOGICAL).init(PARAMS)
    assert jax.tree.structure(accumulated) not in structures


def test_accumulated_gradients_are_the_mean_over_all_shots():
    """Shots by batch, one of them all padding; exact, since every number is a small whole one."""
    shots, means = np.array([1, 0, 6, 1]), np.array([8.0, 99.0, 2.0, -4.0])
    optimizer = accumulated(optax.sgd(1.0), 4)
    state = optimizer.init(PARAMS)
    for _ in range(2):  # the second window knows nothing of the first
        for n, mean in zip(shots, means):
            gradients = jax.tree.map(lambda x: mean * x, PARAMS)  # noqa: B023
            updates, state = optimizer.update(gradients, state, PARAMS, shots=n)
            wanted = -2.0 if n == 1 and mean < 0 else 0.0
            jax.tree.map(lambda x: np.testing.assert_allclose(x, wanted, rtol=1e-6), updates)  # noqa: B023
    assert state.mini_step == state.shots == 0


def test_a_window_of_padding_alone_moves_nothing():
    optimizer = accumulated(optax.sgd(1.0), 2)
    state = optimizer.init(PARAMS)
    for _ in range(2):
        updates, state = optimizer.update(jax.tree.map(jnp.zeros_like, PARAMS), state, PARAMS, shots=0)
    jax.tree.map(lambda x: np.testing.assert_array_equal(x, 0), updates)


def test_without_accumulation_the_state_is_the_chain_alone():
    """Checkpoints that were written without accumulation stay what they were."""
    state = make_optimizer(OptimizerConfig(), 10, LOGICAL).init(PARAMS)
    names = {"/".join(key_path(path)) for path, _ in jax.tree.leaves_with_path(state)}
    moments = {f"1/0/{moment}/{name}" for moment in ("mu", "nu") for name in PARAMS}
    assert names == {"1/0/count", "1/2/count", *moments}


def test_batches_at_the_end_that_make_no_update_are_reported():
    cfg = OptimizerConfig(accumulate=4)
    assert remainder(cfg, 12) == remainder(OptimizerConfig(), 7) == ""
    assert remainder(cfg, 14) == (
        "train.steps = 14 is not a multiple of optimizer.accumulate = 4: the last 2 batch(es) make no update; 12 or 16 "
        "steps would waste none"
    )


def test_a_run_that_would_never_update_is_refused():
    with pytest.raises(ConfigError, match=r"train\.steps = 3, but optimizer\.accumulate = 4 .* lower"):
        make_optimizer(OptimizerConfig(accumulate=4), 3, LOGICAL)
