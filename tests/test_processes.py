"""What several processes share: the private parts of jax that this takes, and few programs for texts of any length."""

import inspect
import threading

import jax
import numpy as np
import pytest

from moc_jax import processes
from moc_jax.config import ConfigError, MeshConfig
from moc_jax.processes import Cluster, recognised


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


def test_hosts_of_a_slice_do_not_run_apart(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 16)
    with pytest.raises(ConfigError, match=r"devices belong to 16 processes.*mesh.distributed True"):
        processes.join(MeshConfig(distributed=False))


def test_a_platform_that_is_not_here_is_named(monkeypatch):
    def devices():
        raise RuntimeError("Unable to initialize backend 'odd'")

    monkeypatch.setattr(jax, "devices", devices)
    with pytest.raises(ConfigError, match=r"JAX_PLATFORMS is 'cpu', .*backend 'odd'.*or unset it"):
        processes.join(MeshConfig())


def test_devices_start_in_a_thread_unless_a_cluster_has_to_be_joined_before(monkeypatch):
    threads, started = [], threading.Event()

    def devices():
        started.set()
        raise RuntimeError("no such platform")  # which `join` reports

    monkeypatch.setattr(jax, "devices", devices)
    processes.wake_devices(MeshConfig(coordinator="host:1"), threads.append)
    assert threads == []
    processes.wake_devices(MeshConfig(), threads.append)
    assert started.wait(10)
    threads[0].join(10)
    assert not threads[0].is_alive()


# ------------------------------------------------------------------------------------------------ clusters

SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[001-002]",
    "SLURM_NTASKS": "16",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_VERSION": "4.1.6",
}
TPUS = {"TPU_WORKER_HOSTNAMES": "a,b,c,d", "TPU_WORKER_ID": "2"}
SLICES = {"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1", "MEGASCALE_COORDINATOR_ADDRESS": "a"}
ONE_SLICE = {"MEGASCALE_NUM_SLICES": "", "MEGASCALE_SLICE_ID": ""}


@pytest.fixture
def started(monkeypatch):
    """started(environment) -> as if this process were started with it, on a host of TPUs where it names some."""

    def start(environment):
        on_tpus = "TPU_WORKER_ID" in environment
        monkeypatch.setattr(processes.clusters.cloud_tpu_cluster, "running_in_cloud_tpu_vm", on_tpus)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)

    return start


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, None),
        (SLURM, Cluster("SLURM", 16, 9, alone=False)),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1(x2)"}, Cluster("SLURM", 16, 9, alone=True)),
        (OPEN_MPI, Cluster("Open MPI", 4, 3, alone=False)),
        (OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, Cluster("Open MPI", 4, 3, alone=True)),
        (TPUS | ONE_SLICE, Cluster("a slice of TPUs (its environment)", 4, 2, alone=False)),
        (TPUS | SLICES, Cluster("a slice of TPUs (its environment)", 8, 6, alone=False)),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),
    ],
)
def test_what_started_a_process_is_recognised(started, environment, found):
    started(environment)
    assert recognised() == found


def test_a_cluster_that_does_not_say_which_process_this_is_is_reported(started):
    started(SLURM | {"SLURM_NTASKS": "many"})
    with pytest.raises(ConfigError, match=r"SLURM started this process, but.*many.*--mesh\.distributed False"):
        recognised()


def test_jax_still_has_this_of_its_clusters():
    kinds = {kind.__name__: kind for kind in processes.clusters.ClusterEnv._cluster_types}
    assert set(processes._CLUSTERS) <= set(kinds)
    for kind in kinds.values():
        assert isinstance(kind.opt_in_only_method, bool)
        assert all(callable(getattr(kind, name)) for name in ("is_env_present", "get_process_count", "get_process_id"))


@pytest.mark.parametrize(
    ("environment", "given", "passed"),
    [
        (SLURM, {}, [(None, None, None, None)]),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1(x16)"}, {}, [(None, None, None, [])]),
        (SLURM, {"local_device_ids": (0, 1)}, [(None, None, None, [0, 1])]),
        (SLURM, {"distributed": False}, []),
        (SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, {}, []),
        (TPUS | ONE_SLICE, {}, [(None, None, None, None)]),
    ],
)
def test_processes_of_a_cluster_join_unless_they_are_told_not_to(monkeypatch, started, environment, given, passed):
    calls = []
    monkeypatch.setattr("jax.distributed.initialize", lambda *arguments, **_: calls.append(arguments))
    started(environment)
    processes.join(MeshConfig(**given))
    assert calls == passed


def test_the_first_process_says_what_joins_and_how_not_to(monkeypatch, started, capsys):
    monkeypatch.setattr("jax.distributed.initialize", lambda *_, **__: None)
    started(SLURM)
    processes.join(MeshConfig())
    assert capsys.readouterr().out == ""
    started(SLURM | {"SLURM_PROCID": "0"})
    processes.join(MeshConfig())
    line = "16 processes, started by SLURM, join in one run; with --mesh.distributed False each runs alone\n"
    assert capsys.readouterr().out == line
