"""Signals, in small real processes: heard at once, obeyed without loss, and the second one ends at once."""

import signal
import subprocess
import sys
import time

import pytest

PRELUDE = """
import contextlib, hashlib, os, sys, threading, time
from moc_jax import signals
from moc_jax.cli import clean_exit
from moc_jax.signals import Signals

def native(rounds=10**9):  # for minutes in C, where no Python handler runs
    hashlib.pbkdf2_hmac("sha256", b"a", b"b", rounds)

def ready():
    print("ready", flush=True)
"""


@pytest.fixture
def start():
    """start(script) -> the process, once it has printed that it is ready."""
    started = []

    def run(script):
        process = subprocess.Popen(
            [sys.executable, "-c", PRELUDE + script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        started.append(process)
        assert process.stdout.readline() == "ready\n", process.stderr.read()
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()


def ended(process, within=20):
    """(exit code, its output, its messages)"""
    out, err = process.communicate(timeout=within)
    return process.returncode, out, err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_is_acknowledged_and_the_second_ends_at_once_in_native_code_too(start, number, code):
    process = start("with Signals() as s, s.deferred():\n    ready()\n    native()")
    process.send_signal(number)
    line = process.stderr.readline()
    assert "stopping after this step and saving" in line
    assert ("press Ctrl-C again to stop at once" in line) == (number == signal.SIGINT)
    process.send_signal(number)
    assert ended(process)[0] == code


def test_another_signal_is_no_second_one(start):
    """docker stop after Ctrl-C asks for the same thing."""
    process = start("with Signals() as s, s.deferred():\n    ready()\n    native()")
    process.send_signal(signal.SIGINT)
    assert "interrupted: stopping" in process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    assert "terminated: stopping" in process.stderr.readline()
    assert process.poll() is None


@pytest.mark.parametrize(
    ("number", "code", "message"),
    [
        (signal.SIGINT, 130, "interrupted; what was completed before is kept\n"),
        (signal.SIGTERM, 143, "terminated; what was completed before is kept\n"),
    ],
)
def test_before_there_is_anything_to_save_all_is_closed_and_the_process_ends(start, number, code, message):
    process = start(
        "with Signals(), clean_exit(), contextlib.ExitStack() as stack:\n"
        "    stack.callback(print, 'closed')\n    ready()\n    time.sleep(100)"
    )
    process.send_signal(number)
    assert ended(process) == (code, "closed\n", message)


def test_native_code_that_does_not_come_back_is_ended(start):
    process = start("signals._PATIENCE = 0.3\nwith Signals(), clean_exit():\n    ready()\n    native()")
    process.send_signal(signal.SIGTERM)
    assert ended(process) == (143, "", "terminated; what was completed before is kept\n")


def test_ctrl_c_in_native_code_is_acknowledged(start):
    process = start("with Signals(), clean_exit():\n    threading.Timer(0.3, ready).start()\n    native()")
    process.send_signal(signal.SIGINT)
    assert "press Ctrl-C again to stop at once" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    code, _, err = ended(process)
    assert code == 130
    assert "Traceback" not in err


def test_what_cannot_ask_is_left_behind(start):
    """As a compilation is: the rest is closed as usual."""
    process = start(
        "with Signals(whole_process=True) as s, clean_exit():\n"
        "    with s.deferred():\n        try:\n            s.unless_asked(lambda: ready() or native())\n"
        "        except signals.Interrupted as error:\n            print('left', error)\n    print('saved')"
    )
    begin = time.monotonic()
    process.send_signal(signal.SIGTERM)
    code, out, err = ended(process)
    assert (code, out) == (0, "left terminated\nsaved\n")
    assert err == "terminated: stopping after this step and saving\n"
    assert time.monotonic() - begin < 10


def test_what_was_not_interrupted_returns_or_raises_as_usual():
    from moc_jax.signals import Signals

    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with Signals() as signals:
        assert signals.unless_asked(lambda: 7) == 7
        with pytest.raises(ZeroDivisionError):
            signals.unless_asked(lambda: 1 // 0)
        assert not signals.asked()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_forked_child_ends_when_it_is_terminated(start):
    process = start(
        "import multiprocessing\nwith Signals() as s, s.deferred():\n"
        "    fork = multiprocessing.get_context('fork')\n    runs = fork.Event()\n"
        "    child = fork.Process(target=lambda: runs.set() or time.sleep(100))\n"
        "    child.start()\n    runs.wait()\n    child.terminate()\n    child.join()\n"
        "    ready()\n    print(child.exitcode, s.asked(), file=sys.stderr)"
    )
    assert ended(process) == (0, "", "-15 False\n")
