"""Four real processes: they train like one, each on its rows; what they saved resumes on any mesh."""

import ast
import re
import shutil
import time

import numpy as np
import pytest

from moc_jax.training.metrics import read_metrics
from tests.training.processes import (
    finish,
    finish_both,
    free_port,
    kill,
    several,
    start_python,
    steps_logged,
    wait_until,
)

pytestmark = pytest.mark.long
FLAG = "--xla_force_host_platform_device_count="
SETTINGS = ["--train.batch-size", "8", "--train.validate-every", "0", "--train.checkpoint-every", "4"]
# What each process asks of the data, printed.
SHOWS_ROWS = """
import sys
from moc_jax.commands import train
from moc_jax.training import loop
def shown(*arguments, make_pipeline=loop.make_pipeline, **options):
    print("rows", options["rows"], flush=True)
    return make_pipeline(*arguments, **options)
loop.make_pipeline = shown
train.main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def on(command, config_file):
    """on(devices, processes)(workdir, *arguments): the small run, started with so many devices in each process."""

    def with_devices(devices, processes=1):
        flags = f"{command.environment['XLA_FLAGS']} {FLAG}{devices}"
        environment = {**command.environment, "XLA_FLAGS": flags}

        def start(workdir, *arguments):
            line = ["-c", SHOWS_ROWS, "--config", config_file, "--workdir", workdir, *SETTINGS, *arguments]
            return start_python(line, environment)

        return lambda *arguments: several(processes, start, *arguments) if processes > 1 else [start(*arguments)]

    return with_devices


def losses(workdir):
    rows = read_metrics(workdir / "metrics.jsonl")
    return {row["step"]: (row["loss"], row["grad_norm"]) for row in rows if "loss" in row}


@pytest.fixture(scope="module")
def four(on, tmp_path_factory):
    """The folder of a run of eight steps by four processes, and what they printed."""
    folder = tmp_path_factory.mktemp("four") / "run"
    outs = finish_both(on(1, 4)(folder, "--train.steps", "8", "--mesh.data", "2", "--mesh.fsdp", "2"))
    return folder, outs


@pytest.fixture(scope="module")
def one(on, tmp_path_factory):
    """The losses of twelve steps by one process."""
    folder = tmp_path_factory.mktemp("one") / "run"
    finish_both(on(4)(folder, "--train.steps", "12", "--mesh.data", "2", "--mesh.fsdp", "2"))
    return losses(folder)


def test_four_processes_train_like_one_and_each_reads_its_rows(four, one):
    folder, outs = four
    assert "4 x cpu in 4 process(es)" in outs[0]
    rows = [ast.literal_eval(re.search(r"^rows (\(.*\))$", out, re.M)[1]) for out in outs]
    assert sorted(sum(rows, ())) == list(range(8))
    assert {len(mine) for mine in rows} == {2}
    found = losses(folder)
    assert sorted(found) == list(range(1, 9))
    np.testing.assert_allclose([found[n] for n in found], [one[n] for n in found], rtol=1e-4)


@pytest.mark.parametrize(
    ("devices", "processes", "mesh"),
    [
        pytest.param(1, 1, [], marks=pytest.mark.slow),
        pytest.param(2, 1, ["--mesh.data", "1", "--mesh.fsdp", "2"], marks=pytest.mark.slow),
        (8, 1, ["--mesh.data", "1", "--mesh.fsdp", "8"]),
        (1, 2, ["--mesh.data", "2"]),
    ],
)
def test_a_run_of_four_resumes_on_other_meshes(four, one, on, tmp_path, devices, processes, mesh):
    shutil.copytree(four[0], tmp_path / "run")
    outs = finish_both(on(devices, processes)(tmp_path / "run", "--train.steps", "12", *mesh))
    assert "resuming after step 8" in outs[0]
    found = losses(tmp_path / "run")
    assert sorted(found) == list(range(1, 13))
    np.testing.assert_allclose([found[n] for n in found], [one[n] for n in found], rtol=1e-3)


@pytest.mark.parametrize("lost", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_when_one_of_four_is_killed_the_rest_end_and_say_who(on, tmp_path, lost):
    processes = on(1, 4)(tmp_path, "--train.steps", "100000", "--mesh.heartbeat", "10")
    try:
        wait_until(lambda: steps_logged(tmp_path) >= 3, processes[0])
        begin = time.monotonic()
        processes[lost].kill()
        rest = [process for i, process in enumerate(processes) if i != lost]
        for code, out in [finish(process) for process in rest]:
            assert code != 0
            assert re.search(rf"error: process {lost} is gone \(it was killed or crashed\)", out), out
            assert "Traceback" not in out
        assert time.monotonic() - begin < 100
    finally:
        for process in processes:
            kill(process)


def test_tasks_of_slurm_join_by_themselves(command, config_file, tmp_path):
    """Two tasks of a step on one host, started as any program is."""
    slurm = {
        "SLURM_JOB_ID": "1",
        "SLURM_STEP_NODELIST": "127.0.0.1",
        "SLURM_NTASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "JAX_COORDINATOR_PORT": str(free_port()),
    }
    line = [
        "train.py",
        "--config",
        config_file,
        "--workdir",
        tmp_path,
        "--train.steps",
        "2",
        "--train.validate-every",
        "0",
    ]
    processes = [
        start_python(line, {**command.environment, **slurm, "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)})
        for i in range(2)
    ]
    first, second = finish_both(processes)
    assert "2 processes, started by SLURM, join in one run; with --mesh.distributed False each runs alone" in first
    assert "2 x cpu in 2 process(es)" in first
    assert "SLURM" not in second
    assert sorted(losses(tmp_path)) == [1, 2]
