"""benchmarks/generation.py end to end on a small model, and what it compares."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import generation
from moc_jax.codecs import fit_codec
from moc_jax.sampling.generate import Sampler

SMALL = generation.Arguments(shots=8, retrieve_shots=2, frames=2, rows=8, columns=8, caption=3)


@pytest.mark.slow
def test_the_last_shots_are_stored_beside_the_first(tmp_path, capsys):
    size = ["--shots", "6", "--retrieve-shots", "1", "--frames", "2", "--rows", "8", "--columns", "8", "--caption", "2"]
    network = ["--model.dim", "16", "--model.depth", "1", "--model.heads", "2", "--model.text-dim", "8"]
    generation.run([*size, *network, "--moc.chunk.size", "8", "--moc.top-k", "1", "--out", str(tmp_path)])
    (file,) = tmp_path.glob("generation-*.json")
    ((name, entry),) = json.loads(file.read_text())["entries"].items()
    assert name == "6 shots of 32 tokens, 1 shown, 1 step, 1 layers of 16, xla"
    assert len(entry["seconds"]) == 6
    assert [*entry["memory"]] == ["4", "6"]
    assert (entry["first"]["shots"], entry["last"]["shots"]) == ([3, 4], [5, 6])
    assert entry["ratios"]["time"] == entry["last"]["median_ms"] / entry["first"]["median_ms"]
    assert entry["ratios"]["host"] == pytest.approx(1, abs=0.1)
    assert entry["video_seconds"] > 0
    assert "shots 5 to 6 take" in capsys.readouterr().out


def test_stretches_lie_apart_and_behind_what_is_compiled():
    seconds = [9.0, 9.0, 9.0, 1.0, 3.0, 9.0, 2.0, 6.0]
    memory = {5: {"peak": 100, "host": 10}, 8: {"peak": 110, "host": 10}}
    found = generation.compared(SMALL, seconds, memory)
    assert found["first"] == {"shots": [4, 5], "median_ms": 2000, "memory": memory[5]}
    assert found["last"] == {"shots": [7, 8], "median_ms": 4000, "memory": memory[8]}
    assert found["ratios"] == {"time": 2.0, "peak": pytest.approx(1.1), "host": 1.0}
    assert generation.Arguments().stretch == 16


def test_memory_is_looked_at_after_some_shots(monkeypatch):
    now = iter([0.0, 1.0, 2.0, 5.0, 6.0, 8.0, 8.0, 9.0])  # a shot ends, the next begins
    monkeypatch.setattr(generation, "time", SimpleNamespace(monotonic=lambda: next(now)))
    watch = generation.Watch({2})
    watch.begin()
    for shot in range(3):
        watch.note(f"shot {shot + 1}")
    assert watch.seconds == [1.0, 1.0, 0.0]
    assert [*watch.memory] == [2]
    assert watch.memory[2]["host"] > 1 << 20


def test_all_shots_have_the_scenes_sizes(tmp_path):
    config = generation.config_of(SMALL)
    film = generation.begun(tmp_path / "film", config, SMALL)
    sampler = Sampler(config, fit_codec(config.codec, [np.zeros((2, 16, 16, 3), np.float32)]))
    assert [sampler.canvas.frames(shot) for shot in film.shots] == [SMALL.frames] * SMALL.shots
    assert sampler.canvas.latent_size == (SMALL.rows, SMALL.columns)
    captions = [film.boards[0].caption, *(shot.caption for shot in film.shots)]
    assert len({*captions}) == SMALL.shots + 1
    assert {sampler.text_tokens(caption) for caption in captions} == {SMALL.caption}


def test_too_few_shots_to_compare_are_refused():
    with pytest.raises(SystemExit, match="--shots is 5; to compare, --retrieve-shots and 3 more"):
        generation.run(["--shots", "5"])
