"""Real processes through train.py: killed at any moment, stopped, and several together, all give one loss curve."""

import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from moc_jax.cli import config_to_json
from moc_jax.training.metrics import read_metrics
from tests.training.small import changed

ROOT = pathlib.Path(__file__).parents[2]
STEPS = 24
TIMEOUT = 300


@pytest.fixture(scope="session")
def command(prepared_config, compilation_cache, tmp_path_factory):
    """command(workdir, *arguments) -> what starts train.py; programs are compiled once for all of them."""
    config = changed(prepared_config, train={"steps": STEPS, "checkpoint_every": 4, "validate_every": 6})
    file = tmp_path_factory.mktemp("config") / "config.json"
    file.write_text(config_to_json(config))
    environment = {
        **{name: value for name, value in os.environ.items() if name != "XLA_FLAGS"},
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(compilation_cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }

    def start(workdir, *arguments):
        return subprocess.Popen(
            [sys.executable, "train.py", "--config", str(file), "--workdir", str(workdir), *arguments],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    start.environment = environment
    return start


def finish(process):
    try:
        out, _ = process.communicate(timeout=TIMEOUT)
    finally:
        process.kill()
    return process.returncode, out


def kill(process):
    process.kill()
    process.communicate()


@pytest.fixture(scope="session")
def uninterrupted(command, tmp_path_factory):
    """The workdir of a run that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("uninterrupted")
    code, out = finish(command(workdir))
    assert code == 0, out
    return workdir


def log(workdir):
    return (workdir / "metrics.jsonl").read_bytes()


def steps_logged(workdir):
    return sum("loss" in row for row in read_metrics(workdir / "metrics.jsonl"))


def wait_until(condition, process, pause=0.002):
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(pause)


def checkpoints(workdir):
    folder = workdir / "checkpoints"
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) if folder.exists() else []


def half_written(workdir):
    folder = workdir / "checkpoints"
    return [p.name for p in folder.iterdir() if "tmp" in p.name] if folder.exists() else []


def test_killed_at_any_moment_the_loss_curve_is_that_of_an_uninterrupted_run(command, uninterrupted, tmp_path):
    for kill_after in (1, 6, 15):
        process = command(tmp_path)
        wait_until(lambda: steps_logged(tmp_path) >= kill_after, process)  # noqa: B023
        kill(process)
    code, out = finish(command(tmp_path))
    assert code == 0, out
    assert "going on from step" in out
    assert log(tmp_path) == log(uninterrupted)
    assert checkpoints(tmp_path) == checkpoints(uninterrupted) == [STEPS - 4, STEPS]


def test_killed_while_saving_the_checkpoint_before_is_used(command, uninterrupted, tmp_path):
    for _ in range(10):  # until the kill falls between the first byte and the last
        process = command(tmp_path)
        wait_until(lambda: half_written(tmp_path) and checkpoints(tmp_path), process, pause=0)
        kill(process)
        if half_written(tmp_path):
            break
    (name,) = half_written(tmp_path)
    before = checkpoints(tmp_path)
    code, out = finish(command(tmp_path))
    assert code == 0, out
    assert f"{name} was never finished and was removed" in out
    assert f"going on from step {before[-1]} " in out
    assert log(tmp_path) == log(uninterrupted)
    assert half_written(tmp_path) == []


FULL_DISK = """
mkdir -p {disk} && mount -t tmpfs -o size=3m tmpfs {disk} || exit 77
{command} --train.checkpoint-every 2 --train.keep-every 1
echo "code $?"
ls {disk}
newest=$(ls {disk} | sort -n | tail -1)
rm -r {disk}/2 {disk}/4 {disk}/6
{command} --train.checkpoint-every 100 --train.steps $((newest + 2))
"""


def test_a_full_disk_is_told_in_words_and_costs_no_checkpoint(command, tmp_path):
    """On a real file system of 3 MB; needs the right to mount one in a namespace of its own."""
    process = command(tmp_path / "run")
    kill(process)
    line = " ".join([*process.args, "--train.steps", "40"])
    script = FULL_DISK.format(disk=tmp_path / "run" / "checkpoints", command=line)
    try:
        done = subprocess.run(
            ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script],
            cwd=ROOT,
            env=command.environment,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
        )
    except FileNotFoundError:
        pytest.skip("no unshare")
    if done.returncode == 77 or "unshare:" in done.stderr:
        pytest.skip("no right to mount")
    output = done.stdout + done.stderr
    told = re.search(
        r"checkpoints/(\d+) could not be written; the checkpoints of steps \[([\d, ]+)\] are intact", output
    )
    assert told, output
    intact = [int(step) for step in told[2].split(", ")]
    assert intact == list(range(2, int(told[1]), 2))
    assert "code 1\n" in output
    found = output.split("code 1\n")[1].split("\n")[: len(intact)]
    assert sorted(int(name) for name in found) == intact
    assert f"going on from step {intact[-1]} " in output
    assert f"done after step {intact[-1] + 2}" in output
    assert done.returncode == 0


def test_sigterm_saves_and_ends_well(command, uninterrupted, tmp_path):
    process = command(tmp_path)
    wait_until(lambda: steps_logged(tmp_path) >= 2, process)
    process.send_signal(signal.SIGTERM)
    code, out = finish(process)
    assert code == 0, out
    stopped = checkpoints(tmp_path)[-1]
    assert f"stopped after step {stopped}" in out
    assert "the same command goes on from here" in out
    assert log(uninterrupted).startswith(log(tmp_path))
    code, out = finish(command(tmp_path))
    assert code == 0, out
    assert f"going on from step {stopped} " in out
    assert log(tmp_path) == log(uninterrupted)


def two(command, workdir, *arguments):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    cluster = ["--mesh.distributed", "True", "--mesh.coordinator", f"127.0.0.1:{port}", "--mesh.num-processes", "2"]
    return [command(workdir, *arguments, *cluster, "--mesh.process-id", str(i)) for i in range(2)]


def finish_both(processes):
    results = [finish(process) for process in processes]
    assert [code for code, _ in results] == [0, 0], "\n".join(out for _, out in results)
    return [out for _, out in results]


def test_two_processes_train_like_one(command, uninterrupted, tmp_path):
    """Two processes, one of which is told to stop; two that go on; and one alone for the rest."""
    processes = two(command, tmp_path)
    wait_until(lambda: steps_logged(tmp_path) >= 1, processes[0])
    processes[1].send_signal(signal.SIGTERM)
    first, second = finish_both(processes)
    assert "2 x cpu in 2 process(es)" in first
    assert "step/s" not in second  # only the first one talks
    stopped = checkpoints(tmp_path)[-1]
    assert stopped < STEPS - 4
    assert f"stopped after step {stopped}" in first
    first, _ = finish_both(two(command, tmp_path, "--train.steps", str(STEPS - 4)))
    assert f"going on from step {stopped} " in first
    code, out = finish(command(tmp_path))
    assert code == 0, out
    assert f"going on from step {STEPS - 4} " in out
    ours, theirs = (read_metrics(workdir / "metrics.jsonl") for workdir in (tmp_path, uninterrupted))
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    for a, b in zip(ours, theirs):
        for name in {"loss", "grad_norm"} & a.keys():
            np.testing.assert_allclose(a[name], b[name], rtol=1e-3)
        if "validation" in a:
            np.testing.assert_allclose(a["validation"]["mean"], b["validation"]["mean"], rtol=1e-3)
    np.testing.assert_allclose(ours[0]["loss"], theirs[0]["loss"], rtol=1e-5)  # before rounding adds up
    assert checkpoints(tmp_path) == checkpoints(uninterrupted)


def test_exit_codes_and_messages(command, tmp_path):
    code, out = finish(command(tmp_path, "--model.heads", "3"))
    assert code == 2
    assert "model.dim = 16 is no multiple of model.heads = 3" in out
    assert "Traceback" not in out
    code, out = finish(command(tmp_path, "--data.source", str(tmp_path / "nowhere")))
    assert code in (1, 2)
    assert "nowhere" in out
    assert "Traceback" not in out
