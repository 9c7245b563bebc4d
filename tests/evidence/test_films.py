"""Films are made shot by shot: what each is shown, and what is said of them."""

import dataclasses
import json
import re
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import Image

from evidence import dataset, films, report, run
from evidence.arms import arm_of
from evidence.experiment import Programs, levels
from evidence.runs import task_of
from evidence.world import World
from tests.evidence.test_run import TINY

IN_TURN = dataclasses.replace(TINY, in_turn=True, updates=2)
ARM = "moc 4x1, past"


@pytest.fixture(scope="module")
def longer():
    """Two stories of seven shots."""
    codec = dataset.fit(IN_TURN.world, IN_TURN.codec, 2)
    return dataset.make(dataclasses.replace(IN_TURN.world, shots=7), codec, IN_TURN.text, range(2))


def test_in_training_any_number_of_first_shots_is_known_at_a_level_of_its_own(longer):
    task = task_of(IN_TURN)
    scene = longer.scenes(np.zeros(64, int))
    t, known = map(np.asarray, levels(jax.random.key(0), scene, 2, task))
    counts = known.sum(axis=1)
    assert set(counts) == {2, 3, 4, 5, 6}
    low, high = task.diffusion.history_noise
    for of_scene, count in zip(t, counts):
        assert len(set(of_scene[:count])) == len(set(of_scene[count:])) == 1
        assert low <= of_scene[0] <= high
    assert len(set(t[:, 0])) > 32


@pytest.mark.long_for("window", "all")
@pytest.mark.parametrize(
    ("memory", "seen"),
    [
        ("window", [[], [], [0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 4], [3, 4, 5]]),
        ("all", [[], [], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5]]),
        ("retrieved", None),
    ],
)
def test_a_shot_is_shown_what_its_memory_holds(memory, seen, longer):
    programs = Programs(task_of(IN_TURN), arm_of(ARM), IN_TURN.world)
    made = films.Maker(programs, programs.state(0).params, shown=3)
    latents, shown = made(longer, memory, jax.random.key(0))
    truth = np.asarray(longer.latents, np.float32)
    frames = truth.shape[1] // 7
    np.testing.assert_array_equal(latents[:, : 2 * frames], truth[:, : 2 * frames])  # the reveals
    assert (np.abs(latents[:, 2 * frames :] - truth[:, 2 * frames :]).max(axis=(2, 3, 4)) > 0.01).all()
    assert np.isfinite(latents).all()
    for of_film in shown:
        if seen is not None:
            assert of_film == seen
        for shot, read in enumerate(of_film[2:], 2):
            assert len(read) == (shot if memory == "all" else min(shot, 3))
            assert read == sorted(set(read))
            assert read[-1] < shot


def test_the_shots_whose_mean_keys_match_best_are_retrieved(longer, monkeypatch):
    """Shot 6 looks for what shots 0, 2 and 3 are like, and shot 5 for what 1 is, beside the later of the others."""
    programs = Programs(task_of(IN_TURN), arm_of(ARM), IN_TURN.world)
    made = films.Maker(programs, {}, shown=3)
    keys, queries = np.eye(7), {4: [1, 1, 1, 0, 0, 0, 0], 5: [0, 1, 0, 0, 0, 0, 0], 6: [3, 0, 1, 2, 0, 0, 0]}

    def means(scenes, shot, query, key):
        of_shot = np.array(queries[shot] if query else keys[shot], float)
        return np.tile(of_shot, (len(scenes.film), 1, 1, 1))  # one layer and head

    monkeypatch.setattr(made, "_means", means)
    monkeypatch.setattr(made, "_sampled", lambda weights, scene, known, key: np.zeros(scene.video.shape))
    _, shown = made(longer, "retrieved", jax.random.key(0))
    assert shown[0][4:] == [[0, 1, 2], [1, 3, 4], [0, 2, 3]]


def test_spans_hold_all_gaps_and_all_sampled_shots(monkeypatch):
    """Backgrounds are of shots after the reveals, counted from 1."""
    near = np.tile(np.arange(1.0, 61.0), (2, 1))
    monkeypatch.setattr(films, "backgrounds", lambda exam, latents: near)
    monkeypatch.setattr(films, "grade", lambda exam, latents: [])
    world = dataclasses.replace(IN_TURN.world, shots=64, characters=4)
    exam = SimpleNamespace(questions=[], data=SimpleNamespace(world=world))
    monkeypatch.setattr(films, "share", lambda recalls: {})
    found = films.findings(exam, near, [])["background_by_shot"]
    assert found == {"1-11": 6, "12-23": 17.5, "24-35": 29.5, "36-47": 41.5, "48 and more": 54}


@pytest.mark.long
def test_the_films_of_a_trained_model_are_graded(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(run.SETTINGS, "in-turn", IN_TURN)
    monkeypatch.setattr(run, "SHEET", 2)
    monkeypatch.setattr(films, "SPANS", ((1, 2), (3, 6)))
    folders = ["--out", f"{tmp_path}", "--cache", f"{tmp_path}/kept", "--processes", "1"]
    with pytest.raises(
        ValueError, match=r"no finished run of 'moc 4x1, past': python -m evidence.run --setting in-turn"
    ):
        films.run(["--arm", ARM, *folders])
    run.run(["--setting", "in-turn", "--arms", ARM, *folders])
    films.run(["--arm", ARM, "--shots", "7", "--films", "4", "--together", "2", "--memories", "window", *folders])
    assert "window, t_c = 0.02, 4 films, 7 shots of in-turn, moc 4x1, past, seed 0: " in capsys.readouterr().out
    with Image.open(tmp_path / "in-turn" / "truth.jpg") as recalls:  # of stories, which films leave as they are
        assert recalls.size == (128, 128)
    (file,) = tmp_path.glob("films-*.json")
    (entry,) = json.loads(file.read_text())["entries"].values()
    assert (tmp_path / "films" / "truth-7-shots-of-in-turn.jpg").exists()
    assert sum(of["trials"] for of in entry["by_gap"].values()) == entry["all"]["trials"] == 4 * 2
    assert list(entry["background_by_shot"]) == ["1-2", "3-6"]
    page = report.films_block(tmp_path)
    assert re.search(r"\| window \| moc 4x1, past, seed 0 \| 0.02 \| 4 \| \d+ \(\d+..\d+\); 100 % \|", page)
    root = tmp_path / "page"
    for name in (report.PAGE, report.FILMS_PAGE):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{report.BEGIN}\n{report.END}\n")
    report.run(["--results", f"{tmp_path}", "--root", f"{root}", "--write"])
    assert page in (root / report.FILMS_PAGE).read_text()
    with Image.open(root / report.PICTURES / "films.jpg") as picture:
        assert picture.height > 128  # truth, and what was made of it


def test_backgrounds_are_compared_with_the_storys_places():
    world = dataclasses.replace(IN_TURN.world, split=1)
    codec = dataset.fit(IN_TURN.world, IN_TURN.codec, 2)
    exam = films.make_exam(world, codec, IN_TURN.text, range(2))
    truth = films.backgrounds(exam, np.asarray(exam.data.latents))
    assert truth.shape == (2, world.shots - world.characters)
    assert (truth > 35).all()  # patches of the codec lie across the edge
    assert (films.backgrounds(exam, 0 * np.asarray(exam.data.latents)) < 25).all()


def test_moving_worlds_are_refused(monkeypatch):
    monkeypatch.setitem(run.SETTINGS, "in-turn", dataclasses.replace(IN_TURN, world=World()))
    with pytest.raises(ValueError, match="films are of still worlds"):
        films.run([])
