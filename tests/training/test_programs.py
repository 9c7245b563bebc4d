"""Steps are compiled in a thread: in order, ahead of their stage, and none is waited for that is not needed."""

import dataclasses
import threading

import jax
import jax.numpy as jnp
import pytest

from moc_jax.config import BucketConfig, ChunkStage, TrainConfig
from moc_jax.data import prepare
from moc_jax.signals import Signals
from moc_jax.training import loop, start
from moc_jax.training.loop import train
from moc_jax.training.programs import Programs, StagePrograms, Wanted
from moc_jax.training.stop import RunStop
from tests.training.small import CONFIG, changed, mesh_of

PROGRAM = jax.jit(lambda x: x + 1)


def wanted(name, build=None):
    return Wanted(
        what=name, made_of=name, devices=jax.devices()[:1], build=build or PROGRAM.lower(jnp.float32(1)).compile
    )


@pytest.fixture
def compiler():
    made = Programs(RunStop(Signals()))
    yield made
    made.close()


def test_programs_are_compiled_in_the_order_in_which_they_are_asked_for(compiler):
    order, go = [], threading.Event()

    def build(name):
        assert threading.current_thread().name == "compiler"
        go.wait(10)
        order.append(name)
        return PROGRAM.lower(jnp.float32(1)).compile()

    first, *others = [compiler.ask(wanted(name, lambda name=name: build(name))) for name in "abc"]
    assert not first.result.done()
    go.set()
    assert compiler.get(others[1])(jnp.float32(1)) == 2
    assert order == ["a", "b", "c"]
    assert [line.split(" in ")[0] for line in compiler.news()] == ["compiled a", "compiled b", "compiled c"]


def test_what_fails_is_raised_where_it_is_needed(compiler):
    asked = compiler.ask(wanted("a", lambda: 1 // 0))
    with pytest.raises(ZeroDivisionError):
        compiler.get(asked)
    assert compiler.news() == []  # the error says it
    assert compiler.get(compiler.ask(wanted("b")))(jnp.float32(1)) == 2


def test_what_fails_ahead_is_reported_at_once_and_tried_again_when_it_is_needed(compiler):
    tries = []

    def build():
        tries.append(1)
        if len(tries) == 1:
            raise RuntimeError("no memory is left")
        return PROGRAM.lower(jnp.float32(1)).compile()

    asked = compiler.ask(wanted("a", build), ahead=True)
    assert asked.result.exception(10) is not None
    (line,) = compiler.news()
    assert line == "could not compile a ahead: RuntimeError: no memory is left; it is tried again when it is needed"
    assert compiler.get(asked)(jnp.float32(1)) == 2
    assert len(tries) == 2


def test_the_end_waits_for_no_program(compiler):
    """The one that is being compiled is left behind, and the others are never begun."""
    go, begun, left = threading.Event(), threading.Event(), []
    compiler._stop.leave = left.append
    compiler.ask(wanted("a", lambda: begun.set() or go.wait(10)))
    compiler.ask(wanted("b", lambda: pytest.fail("it was begun")))
    assert begun.wait(10)
    compiler.close()
    assert [thread.is_alive() for thread in left] == [True]
    go.set()
    left[0].join(10)
    assert not left[0].is_alive()


def test_of_several_processes_each_compiles_all_that_was_asked_for(compiler, monkeypatch):
    """A compiler that waits for what another process measured would wait in vain."""
    go, begun = threading.Event(), []
    for name in "ab":
        compiler.ask(wanted(name, lambda name=name: begun.append(name) or go.wait(10)))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    threading.Timer(0.2, go.set).start()
    compiler.close()
    assert begun == ["a", "b"]


def test_each_stage_asks_for_the_next_and_forgets_the_one_before(compiler):
    config = dataclasses.replace(
        CONFIG, train=TrainConfig(steps=9, chunk_schedule=(ChunkStage(step=2, size=3), ChunkStage(step=5, size=4)))
    )
    buckets = [BucketConfig(frames=2), BucketConfig(frames=3)]
    made = []

    def step(moc, bucket):
        made.append((moc.chunk.size, bucket.frames))
        return wanted(str(made[-1]))

    steps = StagePrograms(compiler, config.stages, lambda begin, end: buckets, step)
    steps.begin(0)
    assert made == [(1, 2), (1, 3)]
    assert not steps.ready(0, buckets[1])
    steps.get(0, buckets[1])
    assert steps.ready(1, buckets[1])
    assert made[2:] == [(3, 2), (3, 3)]
    again = steps.get(1, buckets[0])
    assert steps.get(1, buckets[0]) is again
    assert not steps.ready(2, buckets[0])
    steps.get(2, buckets[0])
    assert made[4:] == [(4, 2), (4, 3)]
    assert {moc.chunk.size for moc, _ in steps._asked} == {3, 4}
    steps.get(7, buckets[0])
    assert len(made) == 6


@pytest.mark.long
def test_the_next_stage_is_compiled_before_it_begins(prepared_config, tmp_path, monkeypatch):
    """While the run is still in the stage before; the first one while the state is made."""
    config = changed(prepared_config, train={"steps": 4, "chunk_schedule": (ChunkStage(step=3, size=2),)})
    config = dataclasses.replace(config, workdir=str(tmp_path / "run"))
    events, compiled = [], threading.Event()

    class Told(Programs):
        def _compile(self, asked):
            super()._compile(asked)
            events.append(asked.wanted.what.rpartition("and ")[2])
            if asked.ahead:
                compiled.set()

    dispatch, create = loop._Run._dispatch, start.create_state

    def dispatched(self, step):
        if step == 3:
            assert compiled.wait(100)
        events.append(step)
        dispatch(self, step)

    monkeypatch.setattr(loop, "Programs", Told)
    monkeypatch.setattr(loop._Run, "_dispatch", dispatched)
    monkeypatch.setattr(start, "create_state", lambda *args: events.append("state") or create(*args))
    train(config, prepare(config), mesh_of(1))
    first, then = events.index("chunks of 1 frames"), events.index("chunks of 2 frames")
    assert events.index(1) < then < events.index(3) < events.index(4)
    assert first < then
