"""How long the devices wait for data, and what is said then."""

import threading

import pytest

from moc_jax.config import DataConfig
from moc_jax.training.input_wait import InputWait


class Result:
    """Of a step that ends when it is said to."""

    def __init__(self):
        self._done = threading.Event()

    def block_until_ready(self):
        assert self._done.wait(10)

    def end(self, waits):
        before = waits._running
        self._done.set()
        for _ in range(1000):
            if waits._running < before:
                return
            threading.Event().wait(0.005)


@pytest.fixture
def now():
    return [0.0]


@pytest.fixture
def waits(now):
    waits = InputWait(DataConfig(), pytest.fail, clock=lambda: now[0])
    yield waits
    waits.close()


def reading(now, seconds, meanwhile=lambda: None):
    """What takes so long to read; halfway something happens."""

    def read():
        now[0] += seconds / 2
        meanwhile()
        now[0] += seconds / 2
        return "batch"

    return read


def test_waiting_counts_from_when_nothing_is_left_to_do(waits, now):
    assert waits.batch(reading(now, 5)) == "batch"
    assert waits.waited() == 0  # the first batch: all else begins, too
    first, second = Result(), Result()
    waits.given(first)
    waits.batch(reading(now, 4))
    assert waits.waited() == 0  # the step took longer
    waits.given(second)
    first.end(waits)
    waits.batch(reading(now, 4, lambda: second.end(waits)))
    assert waits.waited() == 2  # from the step's end to the batch's
    now[0] += 7  # a checkpoint, which is no waiting for data
    waits.batch(reading(now, 3))
    assert waits.waited() == 3
    assert waits.waited() == 0


def test_a_step_that_fails_ends_too(waits, now):
    class Failing:
        def block_until_ready(self):
            raise RuntimeError("as a device does")

    waits.given(Failing())
    for _ in range(1000):
        if not waits._running:
            break
        threading.Event().wait(0.005)
    waits.batch(reading(now, 3))
    assert waits.waited() == 3


def judged(cfg, shares, steps=10, rate=1.0):
    said = []
    waits = InputWait(cfg, said.append)
    for share in shares:
        waits.judge({"steps_per_second": rate, "input_wait": share}, steps)
    return said


def test_advice_is_given_once_when_it_is_due(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(16))
    said = judged(DataConfig(), [0.5] * 20)
    assert said == [
        "input-bound: the devices waited for data 50% of the last 30 s. "
        "--data.workers 4 reads in 4 processes (now in this one)"
    ]
    assert judged(DataConfig(), [0.1] * 20) == []
    assert judged(DataConfig(), [0.9, 0.1, 0.1, 0.1, 0.1, 0.1]) != []
    assert judged(DataConfig(), [0.9, 0.9]) == []  # too short
    assert "--data.workers 8 reads in 8 processes (now 4)" in judged(DataConfig(workers=4), [0.5] * 20)[0]
    (line,) = judged(DataConfig(workers=16, cache="gs://b/cache"), [0.5] * 20)
    assert "data.workers is 16 already, and there are 16 cores" in line
    assert "fetched from gs://b/cache until they are here" in line
