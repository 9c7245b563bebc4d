"""What is shown while waiting: plain lines where there is no terminal, a bar where there is one."""

import io
import re
import threading
import time

import pytest

from moc_jax.progress import Progress, track


class _Terminal(io.StringIO):
    def isatty(self):
        return True


def _until(met, seconds=10.0):
    end = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.005)


def test_without_a_terminal_lines_come_by_themselves_and_hold_no_carriage_return():
    out = io.StringIO()
    with Progress("encoding", total=40, unit="file", file=out, every=0.02) as progress:
        progress.reach(12, frames="1,234")
        _until(lambda: out.getvalue().count("\n") >= 2)  # the work reports once; the lines come all the same
        progress.reach(40)
    lines = out.getvalue().splitlines()
    assert re.fullmatch(r"encoding: 12 of 40 files \(30%\), [\d.e+]+ files/s, [\d:]+ left, frames 1,234", lines[0])
    assert re.fullmatch(r"encoding: 40 of 40 files in 00:00", lines[-1])
    assert "\r" not in out.getvalue()
    assert not any("progress of" in thread.name for thread in threading.enumerate())


def test_short_work_without_a_terminal_prints_nothing():
    out = io.StringIO()
    with Progress("encoding", total=2, unit="file", file=out) as progress:
        progress.reach(2)
    assert out.getvalue() == ""


def test_rate_and_time_left_are_of_the_last_lines_and_leave_pauses_out(monkeypatch):
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    with Progress("training", total=1010, unit="step", done=10, file=io.StringIO(), every=3600) as progress:
        lines = progress._lines
        now = 250.0
        progress.leave_out(50)  # 100 s of steps
        progress.reach(60)
        assert lines._line(now) == "training: 60 of 1,010 steps (6%), 2 s/step, 31:40 left"
        for k in range(12):  # far faster from now on: after ten lines the slow start is forgotten
            now += 30
            progress.reach(60 + 60 * (k + 1))
            line = lines._line(now)
        assert line == "training: 780 of 1,010 steps (77%), 2 steps/s, 01:55 left"


def test_nothing_done_yet_has_no_rate():
    with Progress("training", total=1, unit="step", file=io.StringIO(), every=3600) as progress:
        assert progress._lines._line(time.monotonic() + 30) == "training: 0 of 1 step (0%)"


def test_terminals_get_a_bar():
    out = _Terminal()
    with Progress("encoding", total=3, unit="file", file=out) as progress:
        progress.reach(3, frames="7")
        begun = progress._bar.start_t
        progress.leave_out(1)
        assert progress._bar.start_t == begun + 1
    assert "\rencoding: 100%" in out.getvalue()
    assert "3/3" in out.getvalue()
    assert "frames=7" in out.getvalue()


@pytest.mark.parametrize("terminal", [False, True])
def test_disabled_shows_nothing(terminal):
    out = _Terminal() if terminal else io.StringIO()
    with Progress("encoding", total=3, unit="file", file=out, every=0.001, enabled=False) as progress:
        progress.reach(3)
        progress.leave_out(1)
    assert out.getvalue() == ""


def test_a_log_that_is_closed_ends_no_work():
    out = io.StringIO()
    with Progress("encoding", total=3, unit="file", file=out, every=0.005) as progress:
        _until(lambda: progress._lines._printed)
        out.close()
        progress.reach(3)


def test_said_lines_go_to_stdout(capsys):
    with Progress("training", total=3, unit="step", file=io.StringIO()) as progress:
        progress.say("step 1: saved")
    assert capsys.readouterr().out == "step 1: saved\n"


def test_tracked_items_come_in_order_and_an_error_ends_the_lines():
    assert list(track([1, 2, 3], "counting", unit="thing")) == [1, 2, 3]
    halves = track([1, 0], "dividing", unit="number")
    next(halves)
    with pytest.raises(ZeroDivisionError):
        halves.throw(ZeroDivisionError())
    assert not any("progress of" in thread.name for thread in threading.enumerate())
