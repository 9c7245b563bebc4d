"""Time, memory and what is compared."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import results
from benchmarks.measure import Effort, Program, both_ways, dense_attention, time_launches


def test_samples_are_long_enough():
    count = 0

    def launch():
        nonlocal count
        count += 1
        time.sleep(0.001)

    timing = time_launches(launch, Effort(samples=4, sample_seconds=0.02))
    assert timing.samples == 4
    assert 8 <= timing.launches <= 20  # sleeping may take longer than a millisecond, never less
    assert timing.median_ms >= 1
    assert timing.low_ms <= timing.median_ms <= timing.high_ms
    assert count >= 4 * timing.launches


def test_long_programs_get_fewer_samples():
    counts = []

    def launch():
        counts.append(1)
        time.sleep(0.03)

    assert time_launches(launch, Effort(samples=9, budget_seconds=0.0)).samples == 3
    counts.clear()
    assert time_launches(launch, Effort(samples=9, single_seconds=0.01)).samples == 1
    assert len(counts) == 1


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
