"""What a start's seconds were for."""

import gc
import time

from moc_jax.phases import Phases, garbage_left


def test_seconds_are_shown_by_what_they_were_for(monkeypatch):
    now = iter([0.0, 1.0, 3.5, 3.55, 6.0, 100.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    phases = Phases()
    for what in ("imports", "data", "nothing"):
        phases.done(what)
    assert phases.total("data") == "6.0 s (imports 1.0, data 5.0)"
    phases.done("later")
    assert phases._seconds.keys() == {"imports", "data", "nothing"}


def test_garbage_is_left_until_the_last_block_ends():
    """Whichever thread's that is."""
    blocks = [garbage_left() for _ in range(2)]
    assert gc.isenabled()
    for block in blocks:
        block.__enter__()
        assert not gc.isenabled()
    blocks[0].__exit__(None, None, None)
    assert not gc.isenabled()
    blocks[1].__exit__(None, None, None)
    assert gc.isenabled()


def test_garbage_that_nobody_looked_for_before_is_left_afterwards():
    gc.disable()
    try:
        with garbage_left():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
