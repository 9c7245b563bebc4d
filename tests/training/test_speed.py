"""Speed, utilisation and goodput: pauses, kills and unknown chips."""

import pytest

from moc_jax.chips import CHIPS, chip_of
from moc_jax.training.history import read_metrics
from moc_jax.training.metrics import Metrics
from moc_jax.training.speed import Speed


@pytest.fixture
def now(monkeypatch):
    """The time of all clocks, in seconds, to be moved."""
    now = [1000.0]
    for clock in ("time.perf_counter", "time.time", "time.monotonic"):
        monkeypatch.setattr(clock, lambda: now[0])
    return now


def test_rates_leave_pauses_out(now):
    speed = Speed("cpu", 1)
    now[0] += 2
    speed.add(steps=1, tokens=10)
    now[0] += 50
    speed.leave_out(50)
    now[0] += 2
    speed.add(steps=1, tokens=30)
    line = speed.line()
    assert (line["steps_per_second"], line["tokens_per_second"]) == (0.5, 10)
    assert (line["counted"], line["goodput"]) == (4, pytest.approx(4 / 54))
    now[0] += 1
    speed.add(steps=3)
    assert speed.line()["steps_per_second"] == 3
    assert "steps_per_second" not in speed.line()  # nothing was done since


def test_utilisation_is_of_all_chips_and_left_out_for_unknown_ones(now):
    for kind, count in (("TPU v5p", 2), ("NVIDIA H200", 1), ("cpu", 1)):
        speed, chip = Speed(kind, count), chip_of(kind)
        now[0] += 2
        speed.add(steps=1, flops=2 * 0.4 * count * (chip.flops if chip else 1e12))
        line = speed.line()
        assert line.get("model_flops_utilisation") == (pytest.approx(0.4) if chip else None)


def test_kinds_name_one_chip_each():
    kinds = [kind for chip in CHIPS for kind in chip.kinds]
    assert len(set(kinds)) == len(kinds)
    assert len({chip.name for chip in CHIPS}) == len(CHIPS)


def test_goodput_survives_restarts_and_counts_no_step_twice(now, tmp_path):
    """Steps 3 and 4 are lost with a kill and done again: they count once, and the hour between starts never."""

    def start(step: int) -> Metrics:
        return Metrics(str(tmp_path), start=step, steps=9, speed=Speed("cpu", 1, begun=10), enabled=True)

    def steps(metrics: Metrics, first: int, last: int) -> None:
        for step in range(first, last + 1):
            now[0] += 5
            metrics.count(steps=1)
            metrics.times(step)

    metrics = start(0)
    steps(metrics, 1, 2)
    metrics.keep()
    steps(metrics, 3, 4)
    metrics.close()
    now[0] += 3600
    metrics = start(2)
    steps(metrics, 3, 6)
    metrics.close()
    rows = read_metrics(tmp_path / "speed.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5, 6]
    assert rows[0] == {"step": 0, "unix": 990.0, "counted": 0.0}
    assert rows[-1]["counted"] == 6 * 5
    assert rows[-1]["goodput"] == pytest.approx(30 / (10 + 20 + 3600 + 20))
