"""Grids against published values; solvers against exact flows and a plain transcription of the published updates."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moc_jax.config import SampleConfig
from moc_jax.diffusion import samplers
from moc_jax.diffusion.conditioning import turn_constants, turn_solver

SOLVERS = ("euler", "heun", "unipc", "dpm++")

# sigma at index 0, 1, 2, 48 and 49 of 50 steps, and integer timesteps where the scheduler casts them
PUBLISHED = [
    ("diffusers-unipc", 3, (0.999999, 0.993250, 0.986315, 0.113576, 0.060405), (999, 993, 986, 979, 113, 60)),
    ("diffusers-unipc", 5, (0.999999, 0.995939, 0.991744, 0.175969, 0.096778), (999, 995, 991, 987, 175, 96)),
    ("diffusers-unipc", 8, (0.999999, 0.997458, 0.994824, 0.254663, 0.146347), (999, 997, 994, 992, 254, 146)),
    ("diffusers-euler", 3, (1.000000, 0.993124, 0.986057, 0.066900, 0.008929), None),
    ("diffusers-euler", 5, (1.000000, 0.995872, 0.991605, 0.114819, 0.024414), None),
    ("diffusers-euler", 8, (1.000000, 0.997424, 0.994753, 0.188355, 0.060207), None),
    ("wan-unipc", 3, (0.999666, 0.992907, 0.985963, 0.111008, 0.057637), (999, 992, 985, 978, 111, 57)),
    ("wan-unipc", 5, (0.999800, 0.995732, 0.991530, 0.172265, 0.092507), (999, 995, 991, 987, 172, 92)),
    ("wan-unipc", 8, (0.999875, 0.997328, 0.994690, 0.249805, 0.140228), (999, 997, 994, 991, 249, 140)),
    ("wan-dpm++", 3, (1.000000, 0.993243, 0.986301, 0.111111, 0.057692), (1000, 993, 986, 979, 111, 57)),
    ("wan-dpm++", 5, (1.000000, 0.995935, 0.991736, 0.172414, 0.092593), (1000, 995, 991, 987, 172, 92)),
    ("wan-dpm++", 8, (1.000000, 0.997455, 0.994819, 0.250000, 0.140351), (1000, 997, 994, 992, 250, 140)),
]


@pytest.mark.parametrize(("name", "shift", "values", "timesteps"), PUBLISHED)
def test_grids_have_the_published_values(name, shift, values, timesteps):
    levels = samplers.sigmas(50, float(shift), name)
    assert levels.shape == (51,)
    assert levels[-1] == 0
    assert (np.diff(levels) < 0).all()
    np.testing.assert_allclose(levels[[0, 1, 2, 48, 49]], values, atol=5.1e-7)
    if timesteps:
        assert tuple((1000 * levels[[0, 1, 2, 3, 48, 49]]).astype(np.int64)) == timesteps


def test_auto_takes_the_grid_a_solver_is_published_with():
    for solver, name in samplers.DEFAULT_SCHEDULE.items():
        cfg = SampleConfig(solver=solver, steps=7, shift=5.0)
        np.testing.assert_array_equal(samplers.grid_of(cfg), samplers.sigmas(7, 5.0, name))
    cfg = SampleConfig(solver="unipc", schedule="wan-unipc", steps=7, shift=5.0)
    np.testing.assert_array_equal(samplers.grid_of(cfg), samplers.sigmas(7, 5.0, "wan-unipc"))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_straight_paths_are_solved_exactly(solver, steps):
    noise, video = jax.random.normal(jax.random.key(0), (2, 3, 4, 5)).astype(jnp.float32)[:, None]
    got = samplers.solve(lambda z, t: noise - video, noise, samplers.sigmas(steps, 3.0, "wan-dpm++"), solver)
    np.testing.assert_allclose(got, video, atol=2e-6)


# Video ~ N(MEAN, SPREAD^2) has the marginals N((1-t) MEAN, (1-t)^2 SPREAD^2 + t^2), an exact velocity and exact paths.
MEAN, SPREAD = 0.7, 0.3


def gaussian_velocity(z, t):
    variance = (1 - t) ** 2 * SPREAD**2 + t**2
    centred = z - (1 - t) * MEAN
    noise, video = t / variance * centred, MEAN + (1 - t) * SPREAD**2 / variance * centred
    return noise - video


def reference(levels, z, solver):
    """Diffusers' update rules, transcribed step by step in float64 with their general linear systems."""
    alpha = lambda i: 1 - levels[i]  # noqa: E731
    with np.errstate(divide="ignore"):
        lam = np.log(1 - levels) - np.log(levels)

    def b_vector(hh, b_h, order):
        phi, factorial, out = np.expm1(hh) / hh - 1, 1, []
        for i in range(1, order + 1):
            out.append(phi * factorial / b_h)
            factorial *= i + 1
            phi = phi / hh - 1 / factorial
        return np.array(out)

    def unipc_update(x, s, order, outputs, new=None):
        """UniP (`new` is None) or UniC from level s to s + 1; outputs[-1] is m_s, outputs[-2] the one before."""
        h = lam[s + 1] - lam[s]
        hh = -h
        b_h = np.expm1(hh)
        base = levels[s + 1] / levels[s] * x - alpha(s + 1) * np.expm1(hh) * outputs[-1]
        rks = [(lam[s - i] - lam[s]) / h for i in range(1, order)]
        d1s = [(outputs[-1 - i] - outputs[-1]) / rks[i - 1] for i in range(1, order)]
        if new is None:
            rhos = [0.5] * (order - 1)
            return base - alpha(s + 1) * b_h * sum((r * d for r, d in zip(rhos, d1s)), np.zeros_like(x))
        system = np.array([np.power([*rks, 1.0], i) for i in range(order)])
        rhos = np.array([0.5]) if order == 1 else np.linalg.solve(system, b_vector(hh, b_h, order))
        residual = sum((r * d for r, d in zip(rhos[:-1], d1s)), np.zeros_like(x))
        return base - alpha(s + 1) * b_h * (residual + rhos[-1] * (new - outputs[-1]))

    def dpm_update(x, s, order, outputs):
        h = lam[s + 1] - lam[s]
        ratio, scale = levels[s + 1] / levels[s], alpha(s + 1) * np.expm1(-h)
        if order == 1:
            return ratio * x - scale * outputs[-1]
        r0 = (lam[s] - lam[s - 1]) / h
        return ratio * x - scale * outputs[-1] - 0.5 * scale * (outputs[-1] - outputs[-2]) / r0

    steps, outputs, last_x, last_order = len(levels) - 1, [], None, 0
    for i in range(steps):
        m = z - levels[i] * gaussian_velocity(z, levels[i])
        if solver == "unipc" and i > 0:
            z = unipc_update(last_x, i - 1, last_order, outputs, new=m)
        outputs.append(m)
        order = min(2, steps - i, i + 1)
        last_x, last_order = z, order
        z = (unipc_update if solver == "unipc" else dpm_update)(z, i, order, outputs)
    return z


@pytest.mark.parametrize("solver", ["unipc", "dpm++"])
@pytest.mark.parametrize("steps", [1, 2, 3, 10, 30])
@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_multistep_solvers_follow_the_published_updates(solver, steps, shift):
    z = np.random.default_rng(0).normal(size=(2, 3, 5))
    for name in ("diffusers-unipc", "wan-unipc"):
        levels = samplers.sigmas(steps, shift, name)
        got = samplers.solve(gaussian_velocity, jnp.asarray(z, jnp.float32), levels, solver)
        np.testing.assert_allclose(got, reference(levels, z, solver), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("solver", "schedule", "values"),
    [
        ("unipc", "diffusers-unipc", (0.365122, 0.532561, 0.700000, 0.867439, 1.034877)),
        ("euler", "diffusers-euler", (0.396667, 0.548333, 0.700000, 0.851667, 1.003333)),
        ("dpm++", "wan-unipc", (0.364576, 0.532269, 0.699961, 0.867653, 1.035346)),  # its flow sigmas are that grid
    ],
)
def test_samples_equal_those_of_diffusers(solver, schedule, values):
    """Eight steps at shift 3, run with the schedulers of diffusers 0.42.1 (torch 2.14.1, float64 samples)."""
    cfg = SampleConfig(solver=solver, schedule=schedule, steps=8, shift=3.0)
    got = samplers.solve(gaussian_velocity, jnp.linspace(-2.0, 2.0, 5), samplers.grid_of(cfg), solver)
    np.testing.assert_allclose(got, values, atol=2e-6)


def test_a_grid_that_starts_at_pure_noise_is_the_limit_of_one_that_nearly_does():
    z = jax.random.normal(jax.random.key(1), (64,))
    levels = samplers.sigmas(10, 3.0, "wan-dpm++")
    assert levels[0] == 1
    nearly = levels.copy()
    nearly[0] = 1 - 1e-9
    for solver in ("unipc", "dpm++"):
        got = samplers.solve(gaussian_velocity, z, levels, solver)
        np.testing.assert_allclose(got, reference(nearly, np.asarray(z, np.float64), solver), atol=1e-4)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2), ("unipc", 2), ("dpm++", 2)])
def test_order_of_convergence(solver, order):
    """Between t = 0.9 and 0.1, where log(alpha / sigma) has no pole, halving the step divides the error by 2^order."""
    with jax.enable_x64(True):  # the solver's error is measured, not float32's rounding
        eps = np.random.default_rng(1).normal(size=256)
        path = lambda t: (1 - t) * MEAN + np.hypot((1 - t) * SPREAD, t) * eps  # noqa: E731
        errors = []
        for steps in (80, 160, 320):
            got = samplers.solve(gaussian_velocity, jnp.asarray(path(0.9)), np.linspace(0.9, 0.1, steps + 1), solver)
            errors.append(np.abs(np.asarray(got) - path(0.1)).max())
    rates = np.log2(np.array(errors[:-1]) / errors[1:])
    assert np.abs(rates - order).max() < 0.2, rates


@pytest.mark.parametrize(("solver", "most"), [("euler", 0.12), ("heun", 2e-3), ("unipc", 0.02), ("dpm++", 0.02)])
def test_from_pure_noise_to_video(solver, most):
    """Whole grids, poles included: 40 steps land within `most` of the exact video, 10 steps 3 times farther."""
    z = jax.random.normal(jax.random.key(3), (256,))
    errors = []
    for steps in (40, 10):
        levels = samplers.grid_of(SampleConfig(solver=solver, steps=steps))
        got = samplers.solve(gaussian_velocity, z, levels, solver)
        errors.append(np.abs(np.asarray(got) - (MEAN + SPREAD * np.asarray(z))).max())
    assert errors[0] < most
    assert errors[1] > 3 * errors[0]


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_last_zero_returns_the_predicted_video(solver):
    """Whatever came before, the last step returns z - sigma v of the last level that was evaluated."""
    seen = []

    def velocity(z, t):
        v = jnp.sin(5 * z) + t
        jax.debug.callback(lambda z, t, v: seen.append((float(t), np.asarray(z), np.asarray(v))), z, t, v, ordered=True)
        return v

    levels = samplers.sigmas(4, 3.0, "diffusers-unipc")
    got = samplers.solve(velocity, jax.random.normal(jax.random.key(2), (3, 4)), levels, solver)
    jax.effects_barrier()
    t, z, v = seen[-1]
    assert t == np.float32(levels[-2])
    np.testing.assert_allclose(got, z - t * v, atol=1e-6)
    assert len(seen) == (7 if solver == "heun" else 4)


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_model_is_traced_once(solver):
    traces = []

    def velocity(z, t):
        traces.append(t.shape)
        return gaussian_velocity(z, t)

    levels = samplers.sigmas(12, 3.0, "wan-unipc")
    jax.jit(lambda z: samplers.solve(velocity, z, levels, solver)).lower(jnp.zeros((2, 3))).compile()
    assert traces == [()]


@pytest.mark.parametrize(("solver", "whole"), [("unipc", True), ("dpm++", True), ("euler", False), ("heun", False)])
def test_models_read_whole_thousandths_where_publishers_give_them(solver, whole):
    """The solver itself steps along the exact levels."""
    cfg = SampleConfig(solver=solver, steps=50, shift=3.0, whole_timesteps=True)
    levels = turn_solver(cfg).levels
    read, exact, *_ = turn_constants(cfg)
    np.testing.assert_array_equal(exact, levels.astype(np.float32))
    wanted = np.floor(1000 * levels) / 1000 if whole else levels
    np.testing.assert_array_equal(read, wanted.astype(np.float32))
    np.testing.assert_array_equal(turn_constants(dataclasses.replace(cfg, whole_timesteps=False))[0], exact)
