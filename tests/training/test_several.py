"""Several real processes: what one of them alone knows or meets, all of them hear of, and soon."""

import re
import signal
import socket
import time

import jax
import numpy as np
import pytest

from moc_jax.config import ConfigError, MeshConfig
from moc_jax.processes import join, losses_reported
from moc_jax.training.metrics import read_metrics
from tests.data.clips import make_clip
from tests.training.processes import (
    TIMEOUT,
    finish,
    finish_both,
    free_port,
    kill,
    start_python,
    steps_logged,
    two,
    wait_until,
)


def patched(config_file, environment, patch):
    """Like `command`, with `patch` (Python, which knows `process`) run before train.py's main."""
    script = (
        "import sys\nfrom moc_jax.commands import train\n"
        "process = int(sys.argv[sys.argv.index('--mesh.process-id') + 1])\n"
        f"{patch}\nif __name__ == '__main__':\n    train.main(sys.argv[1:])"
    )

    def start(workdir, *arguments):
        return start_python(["-c", script, "--config", config_file, "--workdir", workdir, *arguments], environment)

    return start


@pytest.mark.long
def test_what_is_wrong_with_the_data_ends_all_processes_with_the_reason(command, tmp_path):
    make_clip(tmp_path / "clip.mp4", shots=2)
    (tmp_path / "clip.yaml").write_text("captoin: a square\n")
    begin = time.monotonic()
    data = ["--data.source", str(tmp_path / "clip.mp4"), "--data.cache", str(tmp_path / "cache")]
    (code, first), (other_code, second) = (finish(p) for p in two(command, tmp_path / "run", *data))
    assert (code, other_code) == (1, 1)
    assert "clip.yaml" in first
    assert "error: process 0 could not find the videos and their captions: " in second
    assert "clip.yaml" in second
    assert "Traceback" not in first + second
    assert time.monotonic() - begin < TIMEOUT / 5


@pytest.mark.long
def test_a_workdir_that_hosts_do_not_share_is_refused_at_the_start(command, tmp_path):
    def start(workdir, *arguments):
        return command(workdir / f"host{arguments[-1]}" / "run", *arguments)

    (code, first), (other_code, second) = (finish(process) for process in two(start, tmp_path))
    assert (code, other_code) == (1, 2), first + second
    reason = f"workdir {tmp_path}/host1/run on host {socket.gethostname()} is not the folder that process 0 uses"
    assert f"error: process 1 could not see the workdir of process 0: {reason}" in first
    assert f"error: {reason}" in second
    assert "give a --workdir on storage that all hosts share" in second
    assert "Traceback" not in first + second
    assert not (tmp_path / "host0" / "run").exists()  # what was refused leaves no trace


@pytest.mark.slow
def test_an_empty_cache_is_filled_by_the_first_process(command, tmp_path):
    cache = ["--data.cache", str(tmp_path / "cache"), "--train.steps", "1", "--train.validate-every", "0"]
    first, _ = finish_both(two(command, tmp_path / "run", *cache))
    assert "starting in" in first
    assert "done after step 1" in first


@pytest.mark.slow
def test_preparing_may_take_longer_than_any_collective_waits(config_file, command, tmp_path):
    """Gloo gives up after 30 s."""
    patch = """
import time, moc_jax.data as data
def slow(*arguments, prepare=data.prepare, **options):
    time.sleep(40 if process == 0 else 0)
    return prepare(*arguments, **options)
data.prepare = slow
"""
    start = patched(config_file, command.environment, patch)
    finish_both(two(start, tmp_path, "--train.steps", "1", "--train.validate-every", "0"))


@pytest.mark.slow
def test_compiling_may_take_longer_than_any_collective_waits(config_file, command, tmp_path):
    patch = """
import time, jax
def slow(*arguments, compile=jax.stages.Lowered.compile, **options):
    time.sleep(40 if process == 1 else 0)
    return compile(*arguments, **options)
jax.stages.Lowered.compile = slow
"""
    start = patched(config_file, command.environment, patch)
    finish_both(two(start, tmp_path, "--train.steps", "1", "--train.validate-every", "0"))


@pytest.mark.slow
def test_buckets_of_as_many_frames_are_compiled_one_after_another(command, tmp_path):
    """What the processes tell one another of each compilation has a name of its own."""
    buckets = ["--data.buckets", "2:9:64", "3:9:64", "--train.steps", "2", "--train.validate-every", "0"]
    first, _ = finish_both(two(command, tmp_path, *buckets))
    assert first.count("compiled the step for 9 frames") == 2


# ------------------------------------------------------------------------------------------------ joining


@pytest.fixture
def initialised(monkeypatch):
    """What jax.distributed.initialize is called with, by position."""
    calls = []
    monkeypatch.setattr("jax.distributed.initialize", lambda *arguments, **_: calls.append(arguments))
    return calls


@pytest.mark.parametrize(
    ("given", "passed"),
    [
        ({"coordinator": "host:1"}, ("host:1", None, None, None)),
        ({"num_processes": 2, "process_id": 1}, (None, 2, 1, None)),
        ({"coordinator": "host:1", "num_processes": 2, "process_id": 0}, ("host:1", 2, 0, None)),
        ({"local_device_ids": (0, 3)}, (None, None, None, [0, 3])),
    ],
)
def test_what_is_not_given_is_left_to_the_cluster(initialised, given, passed):
    join(MeshConfig(**given))
    assert initialised == [passed]


def test_the_heartbeat_is_passed_on(monkeypatch):
    told = []
    monkeypatch.setattr("jax.distributed.initialize", lambda *_, **named: told.append(named))
    join(MeshConfig(num_processes=2))
    join(MeshConfig(num_processes=2, heartbeat=20))
    assert [named["heartbeat_timeout_seconds"] for named in told] == [100, 20]  # 100 s is jax's own, too


@pytest.mark.parametrize("distributed", [True, False])
def test_one_process_joins_nothing(initialised, distributed):
    join(MeshConfig(distributed=distributed))
    assert initialised == []


@pytest.mark.long
@pytest.mark.parametrize("process", [0, 1])
def test_a_process_that_waits_for_others_in_vain_says_so(command, process):
    script = (
        "from moc_jax.config import MeshConfig\nfrom moc_jax.processes import join\n"
        f"join(MeshConfig(coordinator='127.0.0.1:{free_port()}', num_processes=2, process_id={process}, "
        "initialization_timeout=2))"
    )
    code, out = finish(start_python(["-c", script], command.environment))
    assert code == 1, out
    assert re.search(rf"error: process {process} waited 2 s at 127.0.0.1:\d+, but not all 2 processes came", out)
    assert "Check failure" not in out


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"num_processes": 2, "process_id": 2}, r"process_id is 2, .* must lie in 0\.\.1"),
        ({"num_processes": -1}, "num_processes is -1"),
        ({"process_id": -2}, "process_id is -2"),
        ({"heartbeat": 1}, r"heartbeat is 1; it must lie in 2\.\.86400"),
        ({"initialization_timeout": 0}, r"initialization_timeout is 0; it must lie in 1\.\.86400"),
        ({"distributed": False, "coordinator": "host:1"}, r"mesh\.distributed is False"),
        ({"distributed": False, "process_id": 0}, r"mesh\.distributed is False"),
        ({"distributed": False, "local_device_ids": (0,)}, r"mesh\.distributed is False"),
    ],
)
def test_processes_that_cannot_find_each_other_are_refused(given, problem):
    with pytest.raises(ConfigError, match=problem):
        MeshConfig(**given)


def test_a_coordinator_alone_outside_of_a_cluster_is_told_in_words(command, tmp_path):
    code, out = finish(command(tmp_path, "--mesh.coordinator", "127.0.0.1:1"))
    assert code == 2
    assert "give --mesh.coordinator host:port, --mesh.num-processes and --mesh.process-id" in out
    assert "Traceback" not in out


# ------------------------------------------------------------------------------------------------ losing one


GONE = r"error: process {} is gone \({}\), .* the same command resumes from the newest"

JOINED = """
import sys, time
from moc_jax.config import MeshConfig
from moc_jax.processes import join
coordinator, process = sys.argv[sys.argv.index("--mesh.coordinator") + 1], int(sys.argv[-1])
join(MeshConfig(coordinator=coordinator, num_processes=2, process_id=process))
print("joined", flush=True)
time.sleep(1000 if "wait" in sys.argv else 0)
"""


def joined(environment, *arguments):
    return lambda workdir, *cluster: start_python(["-c", JOINED, *arguments, *cluster], environment)


def test_a_killed_process_is_named_at_once_and_ends_the_other(command, tmp_path):
    survivor, lost = two(joined(command.environment, "wait"), tmp_path)
    assert [process.stdout.readline() for process in (survivor, lost)] == ["joined\n"] * 2
    begin = time.monotonic()
    lost.kill()
    code, out = finish(survivor)
    assert code == 1
    assert re.search(GONE.format(1, "it was killed or crashed"), out), out
    assert time.monotonic() - begin < 20  # jax's heartbeat takes 100 s
    finish(lost)


@pytest.mark.slow
def test_processes_that_are_done_end_without_a_word(command, tmp_path):
    assert finish_both(two(joined(command.environment), tmp_path)) == ["joined\n"] * 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "why"), [(signal.SIGKILL, "it was killed or crashed"), (signal.SIGSTOP, "it is stopped")]
)
@pytest.mark.parametrize("which", [0, 1])
def test_a_process_that_is_lost_in_training_is_named_within_the_heartbeat(command, tmp_path, which, how, why):
    processes = two(command, tmp_path, "--train.steps", "100000", "--mesh.heartbeat", "10")
    try:
        wait_until(lambda: steps_logged(tmp_path) >= 5, processes[0])
        begin = time.monotonic()
        processes[which].send_signal(how)
        code, out = finish(processes[1 - which])
        assert time.monotonic() - begin < 20
        assert code != 0
        assert re.search(GONE.format(which, why), out), out
        assert "Traceback" not in out
    finally:
        for process in processes:
            kill(process)


@pytest.mark.parametrize(
    ("error", "processes", "waits"),
    [
        (jax.errors.JaxRuntimeError("UNKNOWN: Gloo AllReduce failed: Connection reset by peer"), 2, [30]),
        (jax.errors.JaxRuntimeError("UNKNOWN: Gloo AllReduce failed: Connection reset by peer"), 1, []),
        (ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer"), 2, [30]),  # in the midst of dispatch
        (ConfigError("data.fps is 0: too few"), 2, []),
    ],
)
def test_an_error_of_xla_waits_for_the_watchers_verdict(monkeypatch, error, processes, waits):
    slept = []
    monkeypatch.setattr("time.sleep", slept.append)
    monkeypatch.setattr("jax.process_count", lambda: processes)
    with pytest.raises(type(error), match=str(error)), losses_reported(20):
        raise error
    assert slept == waits


# ------------------------------------------------------------------------------------------------ training together


PERMUTED = """
import sys
import jax, numpy as np
from moc_jax.config import MeshConfig
from moc_jax.processes import gather, join
from moc_jax.sharding import AXES, own_rows, shard_batch
coordinator, process = sys.argv[sys.argv.index("--mesh.coordinator") + 1], int(sys.argv[-1])
join(MeshConfig(coordinator=coordinator, num_processes=2, process_id=process))
mesh = jax.sharding.Mesh(np.array(jax.devices())[[0, 2, 1, 3]].reshape(2, 2, 1, 1), AXES)
mine = own_rows(8, mesh)
x = shard_batch(np.array(mine), mesh)
for shard in x.addressable_shards:
    assert shard.data.tolist() == list(range(8))[shard.index[0]], shard
print(gather(str(mine)), flush=True)
"""


def test_each_process_reads_the_rows_that_its_devices_hold(command, tmp_path):
    """In the mesh, devices of the two processes take turns, as they do on TPUs."""
    flags = f"{command.environment['XLA_FLAGS']} --xla_force_host_platform_device_count=2"
    environment = {**command.environment, "XLA_FLAGS": flags}
    outs = finish_both(two(lambda workdir, *cluster: start_python(["-c", PERMUTED, *cluster], environment), tmp_path))
    assert [out.splitlines()[-1] for out in outs] == ["['(0, 1, 4, 5)', '(2, 3, 6, 7)']"] * 2


@pytest.mark.slow
def test_nan_in_the_data_of_another_process_is_named(config_file, command, tmp_path):
    patch = """
from moc_jax.training import loop
def poisoned(scene, mesh, shard_batch=loop.shard_batch):
    scene.video[:, 0] = float("nan") if process == 1 else 0
    return shard_batch(scene, mesh)
loop.shard_batch = poisoned
"""
    start = patched(config_file, command.environment, patch)
    for code, out in [finish(process) for process in two(start, tmp_path)]:
        assert code == 1, out
        assert re.search(r"error: step 1: loss nan.* Cause: the data itself holds NaN or infinity: \S+ from", out), out
        assert "Nothing was saved yet" in out


@pytest.mark.slow
def test_ctrl_c_stops_several_processes_like_one(command, tmp_path):
    processes = two(command, tmp_path)
    wait_until(lambda: steps_logged(tmp_path) >= 1, processes[0])
    for process in processes:  # as a terminal does
        process.send_signal(signal.SIGINT)
    first, _ = finish_both(processes)
    assert re.search(r"stopped after step \d+: ", first)
    assert "the same command resumes from here" in first


@pytest.mark.slow
def test_the_demo_trains_alike_on_one_process_and_on_two(command, tmp_path):
    """Both have two devices with one scene each, so they compute the same.

    The programs differ only in who adds up the gradients, threads or Gloo, and a sum of two does not depend on the
    order: float32's rounding (6e-8), grown over a few steps, is all that is left.
    """
    make_clip(tmp_path / "clip.mp4", shots=3, frames_per_shot=9, size=(64, 160))
    settings = ["--data.source", str(tmp_path / "clip.mp4"), "--data.cache", str(tmp_path / "cache")]
    settings += ["--train.batch-size", "2", "--train.steps", "4"]
    flags = f"{command.environment['XLA_FLAGS']} --xla_force_host_platform_device_count="

    def start(devices):
        environment = {**command.environment, "XLA_FLAGS": f"{flags}{devices}"}
        line = ["train.py", "--config", "configs/demo.py", *settings, "--workdir"]
        return lambda workdir, *cluster: start_python([*line, workdir, *cluster], environment)

    code, out = finish(start(2)(tmp_path / "one"))
    assert code == 0, out
    assert "2 x cpu in 1 process(es)" in out
    first, _ = finish_both(two(start(1), tmp_path / "two"))
    assert "2 x cpu in 2 process(es)" in first
    one, both = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    assert [row["step"] for row in one] == [1, 2, 3, 4]
    for name in ("loss", "grad_norm", "param_norm"):
        np.testing.assert_allclose([row[name] for row in both], [row[name] for row in one], rtol=1e-5, err_msg=name)
