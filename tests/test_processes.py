"""What several processes share: the private parts of jax that this takes, and few programs for texts of any length."""

import inspect
import threading

import jax
import numpy as np
import pytest

from moc_jax import processes
from moc_jax.config import MeshConfig


@pytest.mark.parametrize("name", ["client", "num_processes", "process_id", "coordinator_address"])
def test_jax_still_has_this_of_a_cluster(name):
    assert hasattr(processes.distributed.global_state, name)


@pytest.mark.parametrize("name", ["key_value_set", "blocking_key_value_get"])
def test_jax_still_has_this_of_the_store(name):
    assert callable(getattr(processes.distributed._jax.DistributedRuntimeClient, name))


@pytest.mark.parametrize("name", ["initialize", "reached_sync_point", "shutdown"])
def test_jax_still_has_this_for_stopping_together(name):
    assert callable(getattr(processes.distributed._jax.create_preemption_sync_manager(), name))


def test_jax_still_takes_a_heartbeat():
    assert "heartbeat_timeout_seconds" in inspect.signature(jax.distributed.initialize).parameters


def test_texts_of_other_lengths_need_no_other_programs(monkeypatch):
    shapes = set()

    def allgather(array):
        shapes.add(array.shape)
        return np.stack([array, array])

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(processes.multihost_utils, "process_allgather", allgather)
    for text in ("1.5", "0.25", "ä" * 3, "", "123456"):
        assert processes.gather(text) == [text, text]
    assert len(shapes - {()}) <= 3


def test_a_platform_that_is_not_here_is_named(monkeypatch):
    def devices():
        raise RuntimeError("Unable to initialize backend 'odd'")

    monkeypatch.setattr(jax, "devices", devices)
    with pytest.raises(processes.ConfigError, match=r"JAX_PLATFORMS is 'cpu', .*backend 'odd'.*or unset it"):
        processes.join(processes.MeshConfig())


def test_devices_start_in_a_thread_unless_a_cluster_has_to_be_joined_before(monkeypatch):
    threads, started = [], threading.Event()

    def devices():
        started.set()
        raise RuntimeError("no such platform")  # which `join` reports

    monkeypatch.setattr(jax, "devices", devices)
    processes.wake_devices(MeshConfig(distributed=True), threads.append)
    assert threads == []
    processes.wake_devices(MeshConfig(), threads.append)
    assert started.wait(10)
    threads[0].join(10)
    assert not threads[0].is_alive()
