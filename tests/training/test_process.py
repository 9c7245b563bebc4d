"""Real processes through train.py: killed at any moment, stopped, and several together, all give one loss curve."""

import re
import signal
import subprocess

import numpy as np
import pytest

from moc_jax.training.metrics import read_metrics
from tests.training.processes import (
    ROOT,
    STEPS,
    TIMEOUT,
    finish,
    finish_both,
    kill,
    log,
    steps_logged,
    two,
    wait_until,
)


@pytest.fixture(scope="session")
def uninterrupted(command, tmp_path_factory):
    """The workdir of a run that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("uninterrupted")
    code, out = finish(command(workdir))
    assert code == 0, out
    return workdir


def checkpoints(workdir):
    folder = workdir / "checkpoints"
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) if folder.exists() else []


def half_written(workdir):
    folder = workdir / "checkpoints"
    return [p.name for p in folder.iterdir() if "tmp" in p.name] if folder.exists() else []


@pytest.mark.long
def test_killed_at_any_moment_the_loss_curve_is_that_of_an_uninterrupted_run(command, uninterrupted, tmp_path):
    for kill_after in (1, 9):
        process = command(tmp_path)
        wait_until(lambda: steps_logged(tmp_path) >= kill_after, process)  # noqa: B023
        kill(process)
    code, out = finish(command(tmp_path))
    assert code == 0, out
    assert "resuming after step" in out
    assert log(tmp_path) == log(uninterrupted)
    assert checkpoints(tmp_path) == checkpoints(uninterrupted) == [STEPS - 4, STEPS]


@pytest.mark.long
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
    assert f"resuming after step {before[-1]} " in out
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


@pytest.mark.slow
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
    assert f"resuming after step {intact[-1]} " in output
    assert f"done after step {intact[-1] + 2}" in output
    assert done.returncode == 0


@pytest.mark.long
def test_the_same_command_twice_leaves_the_first_run_alone(command, uninterrupted, tmp_path):
    first = command(tmp_path)
    wait_until(lambda: (tmp_path / "run.lock").exists(), first)
    code, out = finish(command(tmp_path))
    assert code == 1, out
    assert f"{tmp_path} is in use by process {first.pid} on host " in out
    assert "Traceback" not in out
    code, out = finish(first)
    assert code == 0, out
    assert log(tmp_path) == log(uninterrupted)
    assert not (tmp_path / "run.lock").exists()


@pytest.mark.long
def test_sigterm_saves_and_ends_well(command, uninterrupted, tmp_path):
    process = command(tmp_path)
    wait_until(lambda: steps_logged(tmp_path) >= 2, process)
    process.send_signal(signal.SIGTERM)
    code, out = finish(process)
    assert code == 0, out
    assert "terminated: stopping after this step and saving" in out
    stopped = checkpoints(tmp_path)[-1]
    assert f"stopped after step {stopped}" in out
    assert "the same command resumes from here" in out
    assert log(uninterrupted).startswith(log(tmp_path))
    code, out = finish(command(tmp_path))
    assert code == 0, out
    assert f"resuming after step {stopped} " in out
    assert log(tmp_path) == log(uninterrupted)


@pytest.mark.long
def test_two_processes_train_like_one(command, uninterrupted, tmp_path):
    """Two processes, one of which is asked to stop; and two that resume."""
    processes = two(command, tmp_path)
    wait_until(lambda: steps_logged(tmp_path) >= 1, processes[0])
    processes[1].send_signal(signal.SIGTERM)
    first, second = finish_both(processes)
    assert "2 x cpu in 2 process(es)" in first
    assert "training: " not in second  # only the first one talks
    stopped = checkpoints(tmp_path)[-1]
    assert stopped < STEPS - 4
    assert f"stopped after step {stopped}" in first
    first, _ = finish_both(two(command, tmp_path))
    assert f"resuming after step {stopped} " in first
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
    assert "model.dim = 16 is not a multiple of model.heads = 3" in out
    assert "Traceback" not in out
    code, out = finish(command(tmp_path, "--data.source", str(tmp_path / "nowhere")))
    assert code in (1, 2)
    assert "nowhere" in out
    assert "Traceback" not in out
