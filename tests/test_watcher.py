"""Watchers of processes that do nothing: whoever is lost is named by all that are left, and they end."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from moc_jax import watcher

# Starts a watcher as moc_jax/processes.py does, and ends with 1 when that says so, or with 0 when told to leave.
PARENT = """
import json, os, subprocess, sys, threading
w = subprocess.Popen([sys.executable, "-I", "-S", sys.argv[1]], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                     start_new_session=True)
w.stdin.write(json.dumps(json.loads(sys.argv[2]) | {"parent": os.getpid()}).encode() + b"\\n")
w.stdin.flush()
print(w.pid, int(w.stdout.readline()), flush=True)
threading.Thread(target=lambda: os._exit(1) if w.stdout.readline() else None, daemon=True).start()
sys.stdin.readline()
w.stdin.write(b"goodbye\\n")
w.stdin.flush()
"""
LIMIT, GRACE = 60, 0.5


class Run:
    """Three processes and their watchers."""

    def __init__(self, heartbeat, reachable=True):
        self.processes, self.watchers, self.port = [], [], 0
        for number in range(3):
            settings = {"process": number, "heartbeat": heartbeat, "token": "secret", "grace": GRACE}
            settings |= {"address": ["127.0.0.1", self.port] if number else None}
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", PARENT, watcher.__file__, json.dumps(settings)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            self.processes.append(process)
            pid, port = map(int, process.stdout.readline().split())
            self.watchers.append(pid)
            self.port = self.port or port if reachable else 1
        time.sleep(2 * watcher.PULSE)  # until all are connected

    def signal(self, number, what):
        self.processes[number].send_signal(what)

    def leave(self, number):
        """Its exit code and what was said on its error output."""
        _, error = self.processes[number].communicate("leave\n", timeout=LIMIT)
        return self.processes[number].returncode, error

    def end(self, number):
        """The same, without being asked to."""
        self.processes[number].wait(timeout=LIMIT)
        return self.processes[number].returncode, self.processes[number].stderr.read()


@pytest.fixture
def start():
    runs = []

    def start(heartbeat=100.0, **more):
        runs.append(Run(heartbeat, **more))
        return runs[-1]

    yield start
    for run in runs:
        for process, pid in zip(run.processes, run.watchers):
            process.kill()
            process.communicate()
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("lost", [0, 1])
def test_a_killed_process_is_named_by_all_others_at_once(start, lost):
    run, begin = start(), time.monotonic()
    run.signal(lost, signal.SIGKILL)
    for number in range(3):
        code, error = run.end(number)
        assert code == (-signal.SIGKILL if number == lost else 1)
        assert error == (
            f"\nerror: process {lost} is gone (it was killed or crashed), and the run can't continue without it. "
            "Checkpoints are intact: once all processes are started again, the same command resumes from the newest\n"
        )
    assert time.monotonic() - begin < 10


@pytest.mark.parametrize("lost", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_stopped_process_is_gone_after_the_heartbeat(start, lost):
    heartbeat = 0.2
    run, begin = start(heartbeat), time.monotonic()
    run.signal(lost, signal.SIGSTOP)
    for number in {0, 1, 2} - {lost}:
        code, error = run.end(number)
        assert code == 1
        assert f"process {lost} is gone (it is stopped)" in error
    assert heartbeat < time.monotonic() - begin < heartbeat + 10


@pytest.mark.parametrize("lost", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_machine_that_is_lost_with_its_watcher_is_gone_after_the_heartbeat(start, lost):
    run = start(0.2)
    os.kill(run.watchers[lost], signal.SIGKILL)
    run.signal(lost, signal.SIGKILL)
    for number in {0, 1, 2} - {lost}:
        code, error = run.end(number)
        assert code == 1
        assert f"process {lost} is gone (it can't be reached)" in error


def test_a_process_that_jax_ends_for_anothers_sake_names_the_other(start):
    run = start()
    run.signal(1, signal.SIGSTOP)
    time.sleep(3 * watcher.PULSE)
    for number in (2, 0):
        run.signal(number, signal.SIGABRT)
    for number in (2, 0):
        code, error = run.end(number)
        assert code == -signal.SIGABRT
        assert "process 1 is gone (it is stopped)" in error


def test_whoever_said_goodbye_is_not_missed(start):
    run = start(0.1)
    assert run.leave(1) == (0, "")
    assert run.leave(0) == (0, "")
    time.sleep(GRACE + 2 * watcher.PULSE)
    assert run.leave(2) == (0, "")


def test_a_stranger_is_not_believed(start):
    run = start()
    with socket.create_connection(("127.0.0.1", run.port)) as stranger:
        stranger.sendall(b'{"lost": [1, "so I say"]}\n')
        stranger.settimeout(5)
        with contextlib.suppress(ConnectionError):
            assert stranger.recv(100) == b""  # it hung up
    with socket.create_connection(("127.0.0.1", run.port)) as stranger:
        stranger.sendall(b"\xff\xfe GET / HTTP/1.1\n")
    assert [run.leave(number) for number in range(3)] == [(0, "")] * 3


def test_where_the_watchers_cannot_reach_each_other_nobody_is_ended_for_it(start):
    run = start(0.1, reachable=False)
    time.sleep(GRACE + 2 * watcher.PULSE)
    assert run.leave(0) == (0, "")
    for number in (1, 2):
        code, error = run.leave(number)
        assert code == 0
        assert error.startswith(f"note: process {number} can't reach 127.0.0.1 at port 1, where losses of")
        assert error.count("\n") == 1
