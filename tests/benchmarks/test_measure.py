"""Time, memory and what is compared."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks import results
from benchmarks.measure import Effort, Program, begun, both_ways, dense_attention, time_launches
from moc_jax import timing
from moc_jax.config import LoraConfig, MeshConfig, MMDiTConfig, MoCConfig, OptimizerConfig, TrainConfig
from moc_jax.scene import SceneLengths
from moc_jax.sharding import make_mesh
from moc_jax.training.state import create_state, make_blueprint


@pytest.fixture
def launching(monkeypatch):
    """launching(seconds, ...) -> what to launch, which takes these seconds in turn, by a clock that it moves alone."""
    now = 0.0
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now)

    def launches_of(*seconds):
        turns = itertools.cycle(seconds)

        def launch():
            nonlocal now
            now += next(turns)
            launch.count += 1

        launch.count = 0
        return launch

    return launches_of


def test_samples_are_long_enough(launching):
    launch = launching(0.001)
    timing = time_launches(launch, Effort(samples=4, sample_seconds=0.0195))
    assert (timing.samples, timing.launches) == (4, 20)
    assert launch.count == 1 + 1 + 20 + 4 * 20  # one to warm up, one to see how long it takes, as many as fill a sample
    assert [timing.low_ms, timing.median_ms, timing.high_ms] == pytest.approx([1, 1, 1])


def test_median_and_extremes_are_per_launch(launching):
    timing = time_launches(launching(0.03, 0.01, 0.02), Effort(samples=3, sample_seconds=0.005))
    assert [timing.low_ms, timing.median_ms, timing.high_ms] == pytest.approx([10, 20, 30])


def test_long_programs_get_fewer_samples(launching):
    assert time_launches(launching(0.03), Effort(samples=9, budget_seconds=0.0)).samples == 3
    launch = launching(0.03)
    assert time_launches(launch, Effort(samples=9, single_seconds=0.01)).samples == 1
    assert launch.count == 2


def test_memory_of_a_program():
    x = jnp.zeros((64, 64))
    memory = Program(jax.jit(lambda x: (x, x.T @ x)).lower(x)).memory
    assert memory.arguments == x.nbytes
    assert memory.outputs >= 2 * x.nbytes
    donated = Program(jax.jit(lambda x: x + 1, donate_argnums=0).lower(x)).memory
    assert donated.peak == x.nbytes


def test_both_ways_gives_output_and_gradients():
    keys = jax.random.split(jax.random.key(0), 4)
    d_out, q, k, v = (jax.random.normal(key, (1, 6, 2, 4)) for key in keys)
    out, *gradients = both_ways(dense_attention)(d_out, q, k, v)
    s = np.einsum("bqhd,bkhd->bhqk", q, k) / 2
    p = np.exp(s) / np.exp(s).sum(-1, keepdims=True)
    np.testing.assert_allclose(out, np.einsum("bhqk,bkhd->bqhd", p, v), rtol=1e-5, atol=1e-5)
    expected = jax.grad(lambda *x: jnp.vdot(dense_attention(*x), d_out), argnums=(0, 1, 2))(q, k, v)
    for ours, theirs in zip(gradients, expected):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_other_entries_are_kept(tmp_path):
    results.store(tmp_path, "attention", "one", "command 1", {"value": 1})
    results.store(tmp_path, "attention", "two", "command 2", {"value": 2})
    path = results.store(tmp_path, "attention", "one", "command 3", {"value": 3})
    results.store(tmp_path, "model", "one", "command 4", {"value": 4})
    (file,) = results.load(tmp_path, "attention")
    assert {name: (e["value"], e["command"]) for name, e in file["entries"].items()} == {
        "one": (3, "command 3"),
        "two": (2, "command 2"),
    }
    assert file["entries"]["one"]["versions"]["jax"] == jax.__version__
    assert sorted(p.name for p in tmp_path.iterdir()) == [path.name, path.name.replace("attention", "model")]


def test_a_file_is_replaced_whole(tmp_path):
    path = results.store(tmp_path, "attention", "one", "command", {"value": 1})
    with pytest.raises(TypeError):
        results.store(tmp_path, "attention", "two", "command", {"value": object()})
    (file,) = results.load(tmp_path, "attention")
    assert list(file["entries"]) == ["one"]
    assert path.exists()


@pytest.mark.parametrize(("rank", "most"), [(0, 0.25), (2, 0.4)])
def test_gradients_of_what_is_timed_are_not_zeros(rank, most):
    """In a run's first step those of all blocks are: what comes out of them starts as 0."""
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    model = MMDiTConfig(dim=16, depth=1, heads=2, latent_channels=4, text_dim=8, dtype="float32", remat="none")
    model = dataclasses.replace(model, lora=LoraConfig(rank=rank))
    blueprint = make_blueprint(model, OptimizerConfig(), TrainConfig(ema_decay=0.0), mesh)
    scene = (jnp.ones((1, 2, 4, 4, 4)), jnp.ones((1, 3, 8)), jnp.ones((1, 1)))
    lengths = SceneLengths(jnp.array([[2]]), jnp.array([[1, 2]]))

    def loss(params, state):
        weights = state.model_params(params)
        return jnp.square(nnx.merge(blueprint.graph, weights)(*scene, lengths, MoCConfig(top_k=0)) - 1).sum()

    with jax.set_mesh(mesh):
        zeros = [
            np.mean([not np.any(x) for x in jax.tree.leaves(jax.jit(jax.grad(loss))(state.params, state))])
            for state in (create_state(blueprint), begun(blueprint))
        ]
    assert zeros[0] > 0.5
    assert zeros[1] < most  # captions' way to an output that nobody reads
