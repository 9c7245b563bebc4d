"""A signal is served first: after the step that runs comes the save, and what was due is made up on resume."""

import dataclasses
import os
import signal
import threading

import pytest

from moc_jax.checkpoint_names import CheckpointError
from moc_jax.data import DataError, prepare
from moc_jax.errors import PreviewError
from moc_jax.signals import Interrupted, Signals
from moc_jax.training import loop, validation
from moc_jax.training.lock import LockError
from moc_jax.training.loop import train
from moc_jax.training.metrics import Metrics, read_metrics
from moc_jax.training.programs import Programs
from tests.training.small import changed, mesh_of


class Previews:
    """Previews that exist once they were made."""

    def __init__(self, at=lambda step: None):
        self.made, self._at = [], at

    def __call__(self, params, step):
        self._at(step)
        self.made.append(step)

    def missing(self, step):
        return step not in self.made


@pytest.fixture
def config(prepared_config, tmp_path):
    """Validation in two batches and a preview after every second step; a checkpoint only at the end."""
    train = {"steps": 4, "batch_size": 1, "checkpoint_every": 100, "validate_every": 2, "preview_every": 2}
    config = changed(prepared_config, train=train, data={"shots_per_scene": 1})
    return dataclasses.replace(config, workdir=str(tmp_path / "run"))


@pytest.fixture
def batches(monkeypatch):
    """Calls what is appended with the number of each batch, of training and of validation, before it is used."""
    calls, count = [], []

    def shard_batch(scene, mesh, shard_batch=loop.shard_batch):
        count.append(1)
        for call in calls:
            call(len(count))
        return shard_batch(scene, mesh)

    for module in (loop, validation):
        monkeypatch.setattr(module, "shard_batch", shard_batch)
    return calls


@pytest.fixture
def uncompiled(monkeypatch):
    """Of a run that takes no step: else compilers would be at work long after its test."""
    monkeypatch.setattr(Programs, "_work", lambda self: list(iter(self._queue.get, None)))


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def saved(config):
    folder = os.path.join(config.workdir, "checkpoints")
    return sorted(int(name) for name in os.listdir(folder)) if os.path.isdir(folder) else []


def rows(config):
    return [(row["step"], "validation" in row) for row in read_metrics(f"{config.workdir}/metrics.jsonl")]


@pytest.mark.long
def test_what_was_due_waits_for_the_resumed_run(config, batches, tmp_path, capfd):
    previews, manifest = Previews(), prepare(config)
    assert len(manifest.split("validation")) == 2

    def run(signal_at=0, steps=4):
        batches[:] = [lambda number: number == signal_at and terminate()]
        there = changed(config, train={"steps": steps})
        train(there, manifest, mesh_of(1), preview=previews)

    count = 0

    def at(number):
        return count + number

    run(signal_at=at(2))  # in step 2
    count += 2
    assert (saved(config), rows(config), previews.made) == ([2], [(1, False), (2, False)], [])
    out, err = capfd.readouterr()
    assert "stopped after step 2: " in out
    assert "terminated: stopping after this step and saving" in err
    run(signal_at=at(1))  # in the first batch of the validation that is made up
    count += 1
    assert (saved(config), rows(config), previews.made) == ([2], [(1, False), (2, False)], [])
    previews._at = lambda step: terminate()
    run()  # in the preview
    count += 2
    assert (saved(config), rows(config), previews.made) == ([2], [(1, False), (2, False), (2, True)], [2])
    previews._at = lambda step: None
    run()
    assert previews.made == [2, 4]
    assert saved(config) == [2, 4]
    log = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    os.rename(tmp_path / "run", tmp_path / "interrupted")
    previews.made.clear()
    run()
    assert previews.made == [2, 4]
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == log


@pytest.mark.long
def test_a_preview_that_is_left_costs_no_step(config, batches):
    def leave(step):
        raise Interrupted

    train(config, prepare(config), mesh_of(1), preview=Previews(leave))
    assert saved(config) == [2]
    assert rows(config)[-1] == (2, True)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_preview_that_fails_costs_no_step(config, monkeypatch, uncompiled, processes):
    """Of several processes, those that wait for one that failed alone have to hear of its end."""

    def fail(step):
        raise PreviewError("full") if step == 2 else OSError("gone")

    plain = changed(config, train={"validate_every": 0})
    monkeypatch.setattr(loop._Run, "_one", lambda self, step: setattr(self, "_done", step))
    monkeypatch.setattr(loop._Run, "_save", lambda self, step: None)
    show = loop._Run._show_preview

    def counted(self, step):
        with monkeypatch.context() as patch:
            patch.setattr("jax.process_count", lambda: processes)
            show(self, step)

    monkeypatch.setattr(loop._Run, "_show_preview", counted)
    alone = "training continues without the preview of step 4: gone"
    with (
        pytest.warns(UserWarning, match="training continues without the preview of step 2: full"),
        pytest.warns(UserWarning, match=alone) if processes == 1 else pytest.raises(OSError, match="gone"),
    ):
        train(plain, prepare(config), mesh_of(1), preview=Previews(fail))


@pytest.mark.long
def test_a_compilation_is_left_and_what_was_trained_is_saved(config, monkeypatch, capfd):
    """That of the validation, which comes after two steps; then that of the first step, before which nothing is."""
    waiting = threading.Event()
    unless_asked = Signals.unless_asked

    def compile_slowly(self, action, which=[]):  # noqa: B006
        which.append(1)
        if len(which) in (2, 3):
            threading.Timer(0.2, terminate).start()
            return unless_asked(self, lambda: waiting.wait(100))
        return unless_asked(self, action)

    monkeypatch.setattr(Signals, "unless_asked", compile_slowly)
    train(config, prepare(config), mesh_of(1), preview=Previews())
    assert saved(config) == [2]
    again = dataclasses.replace(config, workdir=f"{config.workdir}-again")
    train(again, prepare(config), mesh_of(1), preview=Previews())
    assert saved(again) == []
    assert "stopped before its first step; the same command resumes from here" in capfd.readouterr().out
    waiting.set()


@pytest.mark.long
def test_a_run_whose_workdir_was_taken_over_saves_nothing(config):
    class Lost:
        def check(self, *, now=False):
            if now:
                raise LockError("taken over")

    plain = changed(config, train={"validate_every": 0, "preview_every": 0, "steps": 1})
    with pytest.raises(LockError):
        train(plain, prepare(config), mesh_of(1), lock=Lost())
    assert saved(plain) == []


@pytest.mark.long
def test_an_error_that_ends_a_run_costs_no_step(config, batches, capfd):
    """Here that of a batch that can't be read."""

    def fail(number):
        if number == 3:
            raise DataError("damaged")

    plain = changed(config, train={"validate_every": 0, "preview_every": 0})
    batches.append(fail)
    with pytest.raises(DataError, match="damaged"):
        train(plain, prepare(config), mesh_of(1))
    assert saved(config) == [2]
    assert "what was trained until step 2 is saved, before this error:" in capfd.readouterr().out


@pytest.mark.parametrize("why", ["data", "NaN", "lock", "checkpoint", "several", "saved before"])
def test_what_may_be_saved_is_saved_before_an_error(monkeypatch, why):
    run, saves = object.__new__(loop._Run), []
    run._start_step, run._done, run._saved = 0, 2, 2 if why == "saved before" else None
    run._finite = why != "NaN"
    run._between = lambda action, step: saves.append(step)
    monkeypatch.setattr("jax.process_count", lambda: 2 if why == "several" else 1)
    run._rescue({"lock": LockError, "checkpoint": CheckpointError}.get(why, DataError)("gone"))
    assert saves == [2] * (why == "data")


def test_a_close_that_fails_stops_no_other(config, monkeypatch, uncompiled):
    closed = []
    monkeypatch.setattr(loop.Checkpoints, "close", lambda self: closed.append("checkpoints"))

    class Failing(Metrics):
        def close(self):
            super().close()
            raise OSError("the log")

    monkeypatch.setattr(loop, "Metrics", Failing)
    monkeypatch.setattr(loop._Run, "to_the_end", lambda self: None)
    with pytest.raises(OSError, match="the log"):
        train(config, prepare(config), mesh_of(1), preview=Previews())
    assert closed == ["checkpoints"]
    monkeypatch.setattr(loop, "Metrics", lambda *_, **__: 1 // 0)  # half-way through the start
    with pytest.raises(ZeroDivisionError):
        train(config, prepare(config), mesh_of(1), preview=Previews())
    assert closed == ["checkpoints"] * 2


@pytest.mark.long
def test_long_steps_are_waited_for(config, monkeypatch):
    """So that from a signal to the save at most one of them passes."""
    plain = changed(config, train={"validate_every": 0, "preview_every": 0, "steps": 4})
    lags = []
    monkeypatch.setattr(loop._Run, "_finish", lambda self, stopped: lags.append(self._lag))
    monkeypatch.setattr(loop, "_LONG", 0.0)
    train(plain, prepare(config), mesh_of(1))
    assert lags == [0]
