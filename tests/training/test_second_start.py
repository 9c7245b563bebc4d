"""A second start of train.py and of sample.py compiles nothing."""

import json

import pytest

from tests.training.processes import finish, log, start_python

# Trains, then samples from what came of it, and prints how many programs were asked for, found and compiled.
SCRIPT = """
import collections, json, sys
from moc_jax.commands import sample, train
from jax import monitoring
counts = collections.Counter()
monitoring.register_event_listener(lambda name, **_: counts.update([name.rpartition("/")[2]]))
config, workdir = sys.argv[1:]
train.main(["--config", config, "--workdir", workdir])
sample.main(["--checkpoint", workdir, "--training-scene", "0", "--steps", "2", "--out", f"{workdir}/a.mp4"])
print(json.dumps([counts[name] for name in ("compile_requests_use_cache", "cache_hits", "cache_misses")]))
"""


@pytest.mark.long
def test_the_second_start_compiles_nothing(command, config_file, tmp_path):
    """In the folder of all these tests, where most lies already; but every program counts, however small it is."""
    environment = {name: value for name, value in command.environment.items() if "PERSISTENT_CACHE" not in name}
    counts = []
    for start in ("first", "second"):
        code, out = finish(start_python(["-c", SCRIPT, config_file, tmp_path / start], environment))
        assert code == 0, out
        assert "compilation cache" not in out
        counts.append(json.loads(out.splitlines()[-1]))
    (asked, hits, misses), second = counts
    assert asked == hits + misses
    assert 10 < asked < 40  # each costs time at every start
    assert second == [asked, asked, 0]
    assert log(tmp_path / "first") == log(tmp_path / "second")
    assert (tmp_path / "first" / "a.mp4").read_bytes() == (tmp_path / "second" / "a.mp4").read_bytes()
