"""Every close runs, whatever the others do."""

import types

import pytest

from moc_jax.training.closing import closing_all
from moc_jax.training.metrics import Metrics
from moc_jax.training.speed import Speed


def failing(name, done, error=OSError):
    def close():
        done.append(name)
        raise error(name)

    return close


def close_all(*closes, error=None):
    with closing_all() as take:
        for close in closes:
            take(close)
        if error is not None:
            raise error


def test_every_close_runs_newest_first_and_the_first_error_is_raised_with_the_others():
    done = []
    closes = failing("checkpoints", done, KeyboardInterrupt), lambda: done.append("data"), failing("metrics", done)
    with pytest.raises(OSError, match="metrics") as caught:
        close_all(*closes)
    assert done == ["metrics", "data", "checkpoints"]
    assert caught.value.__notes__ == ["While closing: KeyboardInterrupt: checkpoints"]


def test_what_failed_inside_comes_first():
    """Also half-way through a constructor: what was opened until then is closed."""
    done = []
    with pytest.raises(ValueError, match="the cause") as caught:
        close_all(failing("file", done), error=ValueError("the cause"))
    assert done == ["file"]
    assert caught.value.__notes__ == ["While closing: OSError: file"]


def test_nothing_wrong_is_nothing_raised():
    done = []
    close_all(lambda: done.append(1))
    assert done == [1]


def test_a_bar_that_cannot_be_closed_loses_no_log(tmp_path):
    """As when the terminal is gone."""
    metrics = Metrics(str(tmp_path), start=0, steps=3, speed=Speed("cpu", 1), enabled=True)
    metrics.write(1, {"loss": 1.0})
    metrics._progress.close()
    metrics._progress = types.SimpleNamespace(close=lambda: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        metrics.close()
    assert metrics._file._file.closed
