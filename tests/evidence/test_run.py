"""Runs leave whole results, are not done twice, and the page shows what they say."""

import json

import pytest
from PIL import Image

from evidence import report, run, settings, small
from evidence.arms import ARMS, arm_of
from evidence.experiment import interval
from evidence.results import best_rates, finished, name_of, updates_to
from evidence.world import World
from moc_jax.config import DiffusionConfig, HashConfig, MMDiTConfig, PcaConfig, SampleConfig

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
    argv = [
        "--setting",
        "small",
        "--arms",
        "own shot",
        "moc 4x1",
        "--out",
        f"{tmp_path}",
        "--cache",
        f"{tmp_path}/kept",
    ]
    argv += ["--processes", "1", "--part", "2/2", "--also", "own shot"]
    run.run(argv)
    (found,) = finished(tmp_path / "small")
    assert (found["arm"], found["seed"], found["updates"]) == ("moc 4x1", 0, 4)
    assert [test["updates"] for test in found["curve"]] == [2, 4]
    assert found["test"]["all"]["trials"] == 8
    assert [len(level["into_reveal"][0]) for level in found["levels"]] == [2] * 5  # heads
    assert 0.1 < found["skipped"] < 0.9
    with Image.open(tmp_path / "small" / "moc-4x1_0.001_0.jpg") as strip:
        assert strip.size == (128, 128)
    capsys.readouterr()
    run.run(argv)
    assert capsys.readouterr().out == f"1 of 1 runs have results in {tmp_path}/small\n"
    assert found["also"]["own shot"]["trials"] == 8
    page = report.page_block(tmp_path)
    assert "| moc 4x1 | own shot |" in page
    assert "| moc 4x1 |" in page
    sheet = report.pictures(tmp_path / "small")["evidence_small_sheet.png"]
    assert sheet.width > 256


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (["--setting", "ful"], "--setting ful: known are full, still, small"),
        (["--part", "3/2"], "--part 3/2: must be i/n"),
        (["--part", "0/2"], "--part 0/2: must be i/n"),
        (["--updates", "0"], "--updates 0: must be at least 1"),
        (["--gpus", "0"], "--gpus 0: must be at least 1"),
    ],
)
def test_what_is_wrong_is_named_before_anything_is_done(wrong, says, tmp_path, capsys):
    folders = ["--out", f"{tmp_path}/out", "--cache", f"{tmp_path}/kept"]
    with pytest.raises(SystemExit):
        run.run([*wrong, *folders])
    assert says in capsys.readouterr().err
    with pytest.raises(ValueError, match="moc8x6"):
        run.run(["--arms", "moc8x6", *folders])
    assert not list(tmp_path.iterdir())


def result(arm, rate, seed, correct, trials=200):
    low, high = interval(correct, trials)
    test = {"correct": correct, "trials": trials, "share": correct / trials, "low": low, "high": high, "of_story": 0.5}
    of_all = test | {"box_psnr": 20.0, "background_psnr": 25.0, "dynamic_degree": 0.01}
    level = {"level": 0.95, "error": 1.0, "box_error": 0.5, "box_error_by_gap": {"1": 0.5}}
    if arm.startswith("moc"):
        level |= {"into_reveal": [[0.25, 0.75], [0.1, 0.1]], "into_reveal_by_chance": 0.125}
    return {
        "arm": arm,
        "learning_rate": rate,
        "seed": seed,
        "setting": "full",
        "final": False,
        "command": "python -m evidence.run",
        "versions": {"jax": "0.12.0"},
        "device": "H200",
        "date": "2026-01-01",
        "stories": 12000,
        "held_out": 200,
        "finished": True,
        "skipped": 0.75,
        "updates": 500,
        "milliseconds": 20.0,
        "truth_dynamic_degree": 0.02,
        "curve": [{"updates": n, **test, "share": share} for n, share in ((250, 0.1), (500, correct / trials))],
        "test": {"all": of_all, "by_gap": {"10": of_all, "2": of_all}},
        "levels": [level],
    }


@pytest.fixture
def folder(tmp_path):
    runs = [("dense", 1e-3, 0, 40), ("moc 8x6", 1e-3, 0, 100), ("moc 8x6", 2e-3, 0, 160), ("moc 8x6", 2e-3, 1, 180)]
    (tmp_path / "full").mkdir()
    Image.new("RGB", (256, 640)).save(tmp_path / "full" / "truth.jpg")
    for of in runs:
        path = tmp_path / "full" / f"{name_of(*of[:3])}.json"
        path.write_text(json.dumps(result(*of)))
        Image.new("RGB", (256, 640)).save(path.with_suffix(".jpg"))
    (tmp_path / "full" / "half.json").write_text(json.dumps(result("own shot", 1e-3, 0, 9) | {"finished": False}))
    return tmp_path


def test_the_page_has_each_arm_at_its_best_rate(folder):
    found = finished(folder / "full")
    assert best_rates(found) == {"dense": 1e-3, "moc 8x6": 2e-3}
    assert [updates_to(r, 0.5) for r in found] == [None, 500, 500, 500]
    lines = report.page_block(folder).splitlines()
    low, high = (round(100 * of) for of in interval(340, 400))
    row = f"| moc 8x6 | 75 % | 2 | 0.002 of 2 | 500 | 20 | 85 ({low}..{high}) | 80, 90 | 50 | 500, 500 |"
    row += " 20.0 | 25.0 | 0.0100 |"
    assert row in lines
    assert lines.index(row) < next(n for n, line in enumerate(lines) if line.startswith("| dense |"))
    assert "| moc 8x6 | 0.95 | 12 | 50 (75) | 10 (10) |" in lines
    assert "| arm | 2 | 10 |" in lines
    assert not any("own shot" in line for line in lines)


def test_plots_and_sheets_are_drawn_and_the_page_is_rewritten(folder):
    root = folder / "root"
    (root / "docs" / "pictures").mkdir(parents=True)
    (root / "docs" / "evidence.md").write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.main(report.Arguments(results=folder, write=True, root=root))
    text = (root / "docs" / "evidence.md").read_text()
    assert text == f"before\n{report.BEGIN}\n{report.page_block(folder)}\n{report.END}\nafter\n"
    for kind in ("updates", "gap", "sheet"):
        assert f"pictures/evidence_full_{kind}.png" in text
        with Image.open(root / "docs" / "pictures" / f"evidence_full_{kind}.png") as picture:
            assert picture.width > 700


def test_several_gpus_share_the_runs(monkeypatch):
    started = []

    class Process:
        def __init__(self, command, env):
            started.append((command, env["CUDA_VISIBLE_DEVICES"]))

        def wait(self):
            return 0

    monkeypatch.setattr(run.subprocess, "Popen", Process)
    with pytest.raises(SystemExit) as end:
        run.run(["--arms", "dense", "moc 8x6", "--gpus", "2"])
    assert end.value.code is None
    words = ["-m", "evidence.run", "--arms", "dense", "moc 8x6", "--gpus", "2", "--gpus=1"]
    assert [(command[1:], gpu) for command, gpu in started] == [
        ([*words, "--part=1/2"], "0"),
        ([*words, "--part=2/2"], "1"),
    ]
    args = run.tyro.cli(run.Arguments, args=started[0][0][3:])
    assert (args.gpus, args.part, args.arms) == (1, "1/2", ("dense", "moc 8x6"))


def test_final_stories_are_others_than_those_of_training_and_choices():
    seeds, rows = settings.final_seeds()
    assert len(seeds) >= 200
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


def test_the_page_shows_the_committed_results():
    text = (report.ROOT / report.PAGE).read_text()
    assert report.with_block(text, report.page_block(report.RESULTS), report.BEGIN, report.END) == text
