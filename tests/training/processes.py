"""Starting train.py as real processes, watching and ending them."""

import os
import pathlib
import socket
import subprocess
import sys
import time

from moc_jax.training.metrics import read_metrics

ROOT = pathlib.Path(__file__).parents[2]
STEPS = 24
TIMEOUT = 300


def environment(compilation_cache, **more):
    """What children get: one device, programs compiled in a hurry, and those that were compiled before."""
    return {
        **os.environ,
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(compilation_cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        **more,
    }


def start_python(arguments, environment):
    """A python with these arguments, its output in one pipe."""
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process):
    try:
        out, _ = process.communicate(timeout=TIMEOUT)
    finally:
        process.kill()
    return process.returncode, out


def kill(process):
    process.kill()
    process.communicate()


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


def free_port():
    """One that nobody listens at now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def several(count, command, workdir, *arguments):
    """The same command as so many processes of one run."""
    cluster = ["--mesh.coordinator", f"127.0.0.1:{free_port()}", "--mesh.num-processes", str(count)]
    return [command(workdir, *arguments, *cluster, "--mesh.process-id", str(i)) for i in range(count)]


def two(command, workdir, *arguments):
    """The same command as two processes of one run."""
    return several(2, command, workdir, *arguments)


def finish_both(processes):
    results = [finish(process) for process in processes]
    assert not any(code for code, _ in results), "\n".join(out for _, out in results)
    return [out for _, out in results]
