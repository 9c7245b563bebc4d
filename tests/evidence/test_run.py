"""Runs leave whole results, are not done twice, and the page shows what they say."""

import dataclasses
import itertools
import json
import os
import signal
import time
import types

import numpy as np
import pytest
from PIL import Image

from evidence import progress, report, run, runs, settings, small
from evidence.arms import ARMS, arm_of
from evidence.cache import load_weights, save_weights
from evidence.dataset import fit
from evidence.experiment import Programs, Trainer
from evidence.results import RESULTS, finished, kept_in, name_of
from evidence.spread import ALONE
from evidence.world import World
from moc_jax.config import ConfigError, DiffusionConfig, HashConfig, MMDiTConfig, PcaConfig, SampleConfig
from tests.evidence.made import result

TINY = settings.Setting(
    world=World(shots=4, frames=5, characters=2, places=2, still=True),
    codec=PcaConfig(channels=4),
    text=HashConfig(dim=16),
    model=MMDiTConfig(depth=1, dim=32, heads=2, patch=(1, 4, 4), latent_channels=4, text_dim=16, dtype="float32"),
    diffusion=DiffusionConfig(),
    sample=SampleConfig(solver="euler", steps=1),
    batch=2,
    box_weight=2.0,
    warmup=1,
    updates=4,
    every=2,
    stories=3,
    held_out=4,
    quick=2,
    codec_stories=2,
)


@pytest.mark.long
def test_a_run_leaves_its_result_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(run.SETTINGS, "small", TINY)
    monkeypatch.setattr(run, "SHEET", 2)
    folders = ["--out", f"{tmp_path}", "--cache", f"{tmp_path}/kept", "--processes", "1"]
    argv = ["--setting", "small", "--arms", "moc 4x1", *folders]
    run.run([*argv, "--also", "own shot"])
    (found,) = finished(tmp_path / "small")
    assert (found["arm"], found["seed"], found["updates"]) == ("moc 4x1", 0, 4)
    assert [test["updates"] for test in found["curve"]] == [2, 4]
    assert 0 < found["curve"][-1]["gradient"]["to_right"] <= 1
    assert found["test"]["all"]["trials"] == 8
    assert [len(level["into_reveal"][0]) for level in found["levels"]] == [2] * 5  # heads
    assert 0.1 < found["skipped"] < 0.9
    with Image.open(tmp_path / "small" / "moc-4x1_0.001_0.jpg") as strip:
        assert strip.size == (128, 128)
    capsys.readouterr()
    run.run([*argv, "--also", "own shot"])
    assert capsys.readouterr().out == f"1 of 1 runs have results in {tmp_path}/small\n"

    run.run([*argv, "--then", "moc 8x1"])  # by the weights that were kept
    (again,) = finished(tmp_path / "small")
    assert again["curve"] == found["curve"]
    own, other = again["switched"]["own shot"], again["switched"]["moc 8x1"]
    assert "tuned" not in own
    assert (own["zero_shot"]["trials"], other["tuned"]["trials"], other["updates"]) == (8, 8, 1)
    large = dataclasses.replace(TINY, world=dataclasses.replace(TINY.world, size=96), codec_world=TINY.world)
    monkeypatch.setitem(run.SETTINGS, "long", large)
    run.run(["--setting", "long", "--init-from", "small", "--updates", "2", "--arms", "moc 4x1", *folders])
    (long,) = finished(tmp_path / "long")
    assert [test["updates"] for test in long["curve"]] == [0, 2]
    assert long["init_from"] == "small"
    assert np.isnan(long["curve"][0]["loss"])  # of no update
    assert long["milliseconds"] > 0
    page = report.page_block(tmp_path)
    assert "| moc 4x1 | own shot |" in page
    assert "| moc 4x1 |" in page
    sheet = report.pictures(tmp_path / "small")["evidence_small_sheet.jpg"]
    assert sheet.width > 256


@pytest.mark.long
def test_an_arm_is_trained_by_the_programs_of_its_stages_and_tested_by_its_own(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(run.SETTINGS, "small", dataclasses.replace(TINY, every=4))
    monkeypatch.setattr(run, "SHEET", 2)
    used, probe = [], Programs.probe

    def trained(self, count, programs):
        used.append((programs.arm.moc.chunk.size, count))
        return 1.0

    def probed(self, *of):
        assert self.arm.moc.chunk.size == 4
        return probe(self, *of)

    monkeypatch.setattr(Trainer, "run", trained)
    monkeypatch.setattr(Programs, "compile", lambda *_, **__: None)  # else of updates, too
    monkeypatch.setattr(Programs, "probe", probed)
    arm, folders = "moc 4x1, shrinking chunks", ["--out", f"{tmp_path}", "--cache", f"{tmp_path}/kept"]
    argv = ["--setting", "small", "--arms", arm, "--processes", "1", *folders]
    run.run([*argv, "--updates", "7", "--minutes", "0"])
    assert used == [(16, 2)]  # of one call at least
    assert "is left after 2 of 7 updates" in capsys.readouterr().out
    assert not finished(tmp_path / "small")
    run.run([*argv, "--updates", "7"])
    assert used == [(16, 2), (8, 2), (4, 3)]
    (found,) = finished(tmp_path / "small")
    assert (found["arm"], found["updates"], [test["updates"] for test in found["curve"]]) == (arm, 7, [2, 4, 7])
    with pytest.raises(ValueError, match="the state is of another training"):
        run.run([*argv, "--updates", "9", "--resume"])
    with pytest.raises(ValueError, match="--also and --then: moc 4x1, shrinking chunks has stages of a whole training"):
        run.run([*argv, "--then", arm])


def test_stories_are_tested_in_the_world_and_by_the_codec_that_a_setting_names():
    plain = dataclasses.replace(TINY.world, still=False)
    mixed = dataclasses.replace(TINY, world=dataclasses.replace(plain, mixed="names"), codec_world=plain)
    data, exam, _ = run.stories(dataclasses.replace(mixed, tested_world=plain), False, ALONE, None)
    assert data.world == mixed.world
    assert exam.data.world == dataclasses.replace(plain, split=settings.CHOICES)
    of_plain = fit(plain, TINY.codec, TINY.codec_stories)
    assert (
        exam.codec.fingerprint == of_plain.fingerprint != fit(mixed.world, TINY.codec, TINY.codec_stories).fingerprint
    )
    _, exam, _ = run.stories(mixed, False, ALONE, None)
    assert exam.data.world == dataclasses.replace(mixed.world, split=settings.CHOICES)


@pytest.mark.long
def test_a_run_resumes_bit_for_bit(tmp_path, monkeypatch, capsys, compilation_cache):
    monkeypatch.setitem(run.SETTINGS, "small", TINY)
    monkeypatch.setattr(run, "SHEET", 2)
    monkeypatch.setattr(runs, "STATE_EVERY", 0)  # at each test

    def trained(name, count, *more):
        kept = tmp_path / name / "kept"
        kept.mkdir(parents=True, exist_ok=True)
        if not (kept / "programs").exists():
            (kept / "programs").symlink_to(compilation_cache)
        folders = ["--out", f"{tmp_path}/{name}", "--cache", f"{kept}", "--processes", "1"]
        run.run(["--setting", "small", "--arms", "own shot", "--updates", str(count), *folders, *more])
        weights = kept_in(kept, tmp_path / name) / "weights"
        with np.load(weights / "small" / "own-shot_0.001_0.state.npz") as file:
            return finished(tmp_path / name / "small"), dict(file)

    ((whole,), state), ((half,), _) = trained("whole", 4), trained("parts", 2)
    assert trained("parts", 4)[0] == [half]  # it was not asked to resume
    ((parts,), of_parts) = trained("parts", 4, "--resume")
    assert "own-shot_0.001_0.state.npz resumes after 2 updates" in capsys.readouterr().out
    assert parts["updates"] == state["step"] == 4
    state.pop("progress"), of_parts.pop("progress")
    assert state.keys() == of_parts.keys()
    assert all(np.array_equal(state[name], of_parts[name]) for name in state)
    for test, again in zip(whole["curve"], parts["curve"], strict=True):
        assert {**test, "seconds": 0, "first": 0} == {**again, "seconds": 0, "first": 0}
    assert parts["test"] == whole["test"]
    assert len(parts["earlier_commands"]) == 1

    result = tmp_path / "parts" / "small" / "own-shot_0.001_0.json"  # as if it had been killed before its end
    result.unlink()
    ((again,), _) = trained("parts", 4)
    assert "resumes after 4 updates" in capsys.readouterr().out
    assert again["test"] == whole["test"]
    assert not list(tmp_path.rglob("*.partial.json"))


def left_at(folder, updates, **parts):
    """A finished result of as many updates."""
    found = result("own shot", 1e-3, 0, 100) | {"updates": updates} | parts
    (folder / "out" / "full-mixed").mkdir(parents=True, exist_ok=True)
    (folder / "out" / "full-mixed" / "own-shot_0.001_0.json").write_text(json.dumps(found))


def state_at(folder, updates, training):
    trainer = types.SimpleNamespace(state={"step": np.array(updates)})
    weights = kept_in(folder / "kept", folder / "out") / "weights"
    kept = progress.state_of(weights / "full-mixed", "own-shot_0.001_0")
    curve = [{"updates": updates, "loss": float("nan")}]
    progress.save_state(kept, trainer, progress.Progress(training=training, commands=("a",), curve=curve))
    return kept


def test_a_finished_result_is_not_lost_to_a_training_from_the_beginning(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "_laboratory", lambda *_: None)  # nothing to train with
    left_at(tmp_path, 9)
    argv = [*argv_of(tmp_path), "--updates", "12", "--resume"]
    with pytest.raises(ValueError, match=r"own-shot_0.001_0 is finished in [^,]*, and there is no state"):
        run.run(argv)
    state_at(tmp_path, 9, "another")
    with pytest.raises(ValueError, match="the state is of another training, such as --init-from"):
        run.run(argv)
    left_at(tmp_path, 9, diverged=True)
    run.run(argv)  # it would diverge again
    left_at(tmp_path, 12)
    run.run(argv)


def test_a_training_is_not_lost_to_one_of_fewer_updates(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "_laboratory", lambda *_: None)  # nothing to train with
    one = runs.Run("own shot", 1e-3, 0)
    state_at(tmp_path, 9, runs.training_of(settings.SETTINGS["full-mixed"], one, "", None, 9))
    with pytest.raises(ConfigError, match=r"--updates 8: .*state.npz has 9 of this training; ask for as many"):
        run.run([*argv_of(tmp_path), "--updates", "8"])
    with pytest.raises(AttributeError, match="train"):
        run.run([*argv_of(tmp_path), "--updates", "9"])


def test_states_and_weights_of_other_results_lie_apart(tmp_path):
    cache = tmp_path / "kept"
    assert kept_in(cache, RESULTS) == cache
    assert kept_in(cache, tmp_path / "a") == kept_in(cache, tmp_path / "b" / ".." / "a")
    assert len({kept_in(cache, out) for out in (RESULTS, tmp_path / "a", tmp_path / "b")}) == 3


def test_what_another_process_resumed_meanwhile_is_left(tmp_path, monkeypatch):
    left_at(tmp_path, 9)
    one = runs.Run("own shot", 1e-3, 0)
    state_at(tmp_path, 9, runs.training_of(settings.SETTINGS["full-mixed"], one, "", None, 9))
    trained = []
    lab = types.SimpleNamespace(train=lambda *_: trained.append(1), setting=TINY, switch=lambda *_: None)
    monkeypatch.setattr(run, "_laboratory", lambda *_: lab)
    argv = [*argv_of(tmp_path), "--updates", "12", "--resume"]
    run.run(argv)
    assert trained == [1]
    monkeypatch.setattr(run, "_laboratory", lambda *_: left_at(tmp_path, 10) or lab)  # by its minutes
    run.run(argv)
    assert trained == [1]


def test_a_state_of_another_training_is_not_resumed(tmp_path, capsys):
    kept = state_at(tmp_path, 9, "this")
    trainer = types.SimpleNamespace(state={"step": np.array(0)})
    new = progress.Progress(training="this", commands=("b",))
    other = dataclasses.replace(new, training="other")
    assert progress.resumed(kept, other, trainer) == other
    assert "is of another training: not resumed" in capsys.readouterr().out
    assert trainer.state["step"] == 0
    empty = kept.with_name("empty.npz")  # written before any test
    progress.save_state(empty, trainer, new)
    assert progress.resumed(empty, new, trainer) == new
    found = progress.resumed(kept, new, trainer)
    assert (found.commands, found.curve) == (("a", "b"), [{"updates": 9, "loss": None}])
    assert trainer.state["step"] == 9


def test_an_update_takes_what_all_but_the_first_took():
    curve = [
        {"updates": n, "seconds": seconds} | ({"first": True} if seconds > 9 else {})
        for n, seconds in ((100, 60.0), (200, 2.0), (250, 1.0), (300, 70.0), (400, 2.0))
    ]
    assert runs._pace(curve) == 20
    assert runs._pace([{"updates": 0, "seconds": 0.0, "first": True}, *curve]) == 20  # tested before
    assert runs._pace(curve[:1]) == 600


def argv_of(folder):
    return ["--arms", "own shot", "--out", f"{folder}/out", "--cache", f"{folder}/kept"]


def test_what_another_process_works_on_is_left_to_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "_laboratory", lambda *_: None)  # nothing to train with
    with run._claimed(kept_in(tmp_path / "kept", tmp_path / "out") / "locks" / "full-mixed" / "own-shot_0.001_0"):
        run.run(argv_of(tmp_path))
    assert "own-shot_0.001_0 is left to another process" in capsys.readouterr().out
    with pytest.raises(AttributeError, match="train"):
        run.run(argv_of(tmp_path))


def test_what_would_not_end_in_time_is_left(tmp_path, monkeypatch, capsys):
    trained = []
    lab = types.SimpleNamespace(train=lambda run, *_: trained.append(run), setting=TINY, switch=lambda *_: None)
    monkeypatch.setattr(run, "_laboratory", lambda *_: lab)
    monkeypatch.setattr(run.time, "perf_counter", itertools.count(run._BEGIN, 40.0).__next__)
    run.run([*argv_of(tmp_path), "--seeds", "0", "1", "2", "3", "--within", "3"])  # 40 s each, and between
    assert [of.seed for of in trained] == [0, 1]
    assert "own-shot_0.001_2 and what follows is left: it would not end in 3 minutes" in capsys.readouterr().out


def test_a_run_starts_from_the_weights_of_another_setting(tmp_path):
    (tmp_path / "out" / "still").mkdir(parents=True)
    argv = [*argv_of(tmp_path), "--init-from", "still"]
    with pytest.raises(ValueError, match="has no finished run of 'own shot'"):
        run.run(argv)
    for arm in ("own shot", "dense"):
        path = tmp_path / "out" / "still" / f"{name_of(arm, 2e-3, 0)}.json"
        path.write_text(json.dumps(result(arm, 2e-3, 0, 9)))
    with pytest.raises(ValueError, match=r"own-shot_0.002_0.npz does not exist; train 'own shot' with seed 0"):
        run.run(argv)
    weights = kept_in(tmp_path / "kept", tmp_path / "out") / "weights" / "still" / "dense_0.002_0.npz"
    save_weights(weights, {"a": {"b": np.arange(3.0)}})
    args = run.tyro.cli(run.Arguments, args=[*argv_of(tmp_path), "--init-from", "still/dense"])
    assert run._start(args, run.Run("own shot", 1e-3, 0)) == weights
    assert load_weights(weights, {"a": {"b": 0}})["a"]["b"].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (
            ["--setting", "ful"],
            "--setting ful: known are full, full-mixed, full-words, still, still-narrow, still-wide, "
            "in-turn, long, long-still, video, small",
        ),
        (["--part", "2/2"], "--part 2/2: must be i/n with i from 0 to n - 1"),
        (["--part", "x"], "--part x: must be i/n"),
        (["--updates", "0"], "--updates 0: must be at least 1"),
        (["--gpus", "0"], "--gpus 0: must be at least 1"),
        (["--per-gpu", "0"], "--per-gpu 0: must be at least 1"),
        (["--minutes", "nan"], "--minutes nan: must be 0 or more"),
        (["--within", "0"], "--within 0.0: must be more than 0 minutes"),
        (["--learning-rates", "1e-3", "0"], "--learning-rates 0.0: must be more than 0"),
        (["--seeds", "-1"], "--seeds -1: must lie in 0..2147483647"),
    ],
)
def test_what_is_wrong_is_named_before_anything_is_done(wrong, says, tmp_path, capsys):
    folders = ["--out", f"{tmp_path}/out", "--cache", f"{tmp_path}/kept"]
    with pytest.raises(SystemExit):
        run.run([*wrong, *folders])
    assert says in " ".join(capsys.readouterr().err.replace("│", " ").split())  # it stands in a frame
    with pytest.raises(ValueError, match="moc8x6"):
        run.run(["--arms", "moc8x6", *folders])
    assert not list(tmp_path.iterdir())


def test_several_gpus_share_the_runs(monkeypatch):
    started = []

    class Process:
        def __init__(self, command, env):
            started.append((command, env["CUDA_VISIBLE_DEVICES"], env["XLA_PYTHON_CLIENT_MEM_FRACTION"]))

        def wait(self):
            return 0

        def terminate(self):
            pass

    monkeypatch.setattr(run.subprocess, "Popen", Process)
    with pytest.raises(SystemExit) as end:
        run.run(["--arms", "dense", "moc 8x6", "--gpus", "2", "--per-gpu", "2"])
    assert end.value.code is None
    words = ["-m", "evidence.run", "--arms", "dense", "moc 8x6", "--gpus", "2", "--per-gpu", "2"]
    assert [(command[1:], *rest) for command, *rest in started] == [
        ([*words, "--gpus=1", "--per-gpu=1", f"--part={i}/4"], gpu, "0.45")
        for i, gpu in enumerate(("0", "1", "0", "1"))
    ]
    args = run.tyro.cli(run.Arguments, args=started[0][0][3:])
    assert (args.gpus, args.per_gpu, args.part, args.arms) == (1, 1, "0/4", ("dense", "moc 8x6"))


def test_parts_end_with_the_command_that_started_them(monkeypatch):
    ended = []

    class Process:
        def __init__(self, *_, **__):
            pass

        def wait(self):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)

        def terminate(self):
            ended.append(self)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(run.subprocess, "Popen", Process)
    with pytest.raises(SystemExit) as end:
        run.side_by_side([], [{}, {}])
    assert end.value.code == 143
    assert len(ended) == 2
    assert signal.getsignal(signal.SIGTERM) == before


def test_the_final_table_is_of_its_own_seeds_at_the_rates_that_choices_made(tmp_path):
    args = run.Arguments(final=True, arms=("dense", "moc 8x6"), out=tmp_path)
    (tmp_path / "full-mixed").mkdir()
    (tmp_path / "full-mixed" / "a.json").write_text(json.dumps(result("dense", 2e-3, 0, 9)))
    with pytest.raises(ValueError, match=r"has no finished run of moc 8x6; give --learning-rates"):
        run._runs(args)
    (tmp_path / "full-mixed" / "b.json").write_text(json.dumps(result("moc 8x6", 5e-4, 0, 9)))
    seeds = json.loads(settings.FINAL_FILE.read_text())["training_seeds"]
    assert [dataclasses.astuple(of) for of in run._runs(args)] == [
        (arm, rate, seed) for arm, rate in (("dense", 2e-3), ("moc 8x6", 5e-4)) for seed in seeds
    ]
    args = dataclasses.replace(args, learning_rates=(1e-3,), seeds=(5,))
    assert [(of.learning_rate, of.seed) for of in run._runs(args)] == [(1e-3, 5)] * 2
    assert dataclasses.astuple(run._runs(run.Arguments(arms=("dense",)))[0]) == ("dense", 1e-3, 0)


def test_final_stories_are_others_than_those_of_training_and_choices():
    seeds, rows = settings.final_seeds()
    assert len(seeds) >= 200
    assert settings.final_seeds(100) == (seeds[:100], [3, 29, 58, 81])
    assert len(rows) == 10
    assert set(rows) <= set(range(len(seeds)))
    assert len({settings.TRAINING, settings.CHOICES, settings.FINAL}) == 3
    assert json.loads(settings.FINAL_FILE.read_text())["split"] == settings.FINAL


def test_names_of_files_are_each_arms_own():
    assert len({name_of(arm, 1e-3, 0) for arm in ARMS}) == len(ARMS)


def test_the_small_evidence_fails_without_memory_and_with_a_leak():
    good, bad = result("moc 4x2", 1e-3, 0, 60), result("own shot", 1e-3, 0, 14)
    assert small.verdict(good, bad) is None
    assert "did not remember" in small.verdict(bad, bad)
    assert "something but memory tells" in small.verdict(good, good)
    for name in small.ARMS:
        arm_of(name)
