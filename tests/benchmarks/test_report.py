"""Tables and plot; README and docs show exactly what the committed results say."""

import json
import pathlib

import pytest

from benchmarks import report, results
from benchmarks.several import several_table
from benchmarks.tables import attention_tables, milliseconds, model_tables, split_table

ROOT = pathlib.Path(__file__).parents[2]


def timing(ms, samples=5):
    return {"median_ms": ms, "low_ms": 0.99 * ms, "high_ms": 1.01 * ms, "samples": samples, "launches": 1}


def entry(**changed):
    ways = {way: {"moc": timing(10.0), "dense": timing(52.0), "ratio": 5.2} for way in ("forward", "forward_backward")}
    return {
        "setting": "multi_shot",
        "inputs": "random",
        "shrink": 1,
        "backend": "xla",
        "tokens": 1000,
        "pairs": {"bound": 6.3},
        "union_ratio": 14.0,
        **ways,
        "routing": timing(0.5),
        "sorting": timing(0.5),
        "routing_share": 0.1,
        "memory": {"peak_over_tensors": 1.5},
        "command": "python -m benchmarks.attention",
        "date": "2026-01-01",
        "versions": {"jax": "0.11.2"},
        **changed,
    }


def scaling():
    points = [
        {
            "shots": s,
            "tokens": 100 * s,
            "pairs": {"bound": 1.0 * s, "dense": (100.0 * s) ** 2},
            "moc": timing(10.0 * s),
            "per_token_over_base": 1.0,
        }
        for s in (1, 8)
    ]
    points[0]["dense"] = timing(25.0)
    sizes = {"heads": 12, "head_dim": 128, "dense_by": "cudnn", "base_shots": 8}
    return entry(setting="scaling", points=points, **sizes)


@pytest.fixture
def folder(tmp_path):
    quoted = {"what": "FlashMoBA on one NVIDIA H200", "forward_ms": 70.0, "forward_backward_ms": 150.0}
    routed = entry(setting="routed", quoted=quoted)
    for way, ms in (("forward", 70.0), ("forward_backward", 150.0)):
        routed[way] = {"moc": timing(20.0), "quoted_ratio": ms / 20.0}
    entries = {"a": entry(), "b": entry(inputs="correlated"), "c": routed, "d": scaling()}
    (tmp_path / "attention-card.json").write_text(json.dumps({"card": "Card", "entries": entries}))
    return tmp_path


def test_tables_hold_the_figures(folder):
    (file,) = results.load(folder, "attention")
    tables = "\n".join(attention_tables(list(file["entries"].values())))
    assert "| 6.30x | 14.0 | 10 ms ± 0.1 | 52 ms ± 0.52 | 5.20x |" in tables
    assert "| 20 ms ± 0.2 | 70 ms (FlashMoBA on one NVIDIA H200) | 3.50x |" in tables
    assert "quoted, not measured in this run" in tables
    assert "| 1 | 100 | 10 ms ± 0.1 | 25 ms ± 0.25 | 2.50x |" in tables
    assert "| 8 | 800 | 80 ms ± 0.8 |  |  |" in tables
    columns = {block: {line.count("|") for line in block.split("\n")} for block in tables.split("\n\n")}
    assert len(columns) == 3
    assert all(len(counts) == 1 for counts in columns.values())


def test_model_table():
    steps = {
        "training": {name: {**timing(ms), "memory": {"peak": 2**30}} for name, ms in (("moc", 1e4), ("dense", 4e4))}
    }
    steps["training"]["ratio"] = 4.0
    steps["training"]["moc"]["share_of_peak"] = 0.3
    split = {"attention": 6.0, "products": 2.0, "other": 2.0, "kernels": 1234, "longest": {}}
    steps["training"]["moc"]["split"] = split
    sizes = {"model": {"name": "wan", "depth": 30, "dim": 1536}, "parameters": 3.07e9, "tokens": 180_504, "bound": 4.3}
    (_, _, traced) = split_table([{**sizes, "steps": steps}])
    assert traced == "| training | 30 | 1536 | 180,504 | moc | 6.0 ms | 2.0 ms | 2.0 ms | 20% | 1,234 |"
    (_, _, row) = model_tables([{**sizes, "steps": steps}])
    figures = "180,504 | 10 s | 30.0% | 40 s | 4.00x | 4.30x | 1.0 GiB | 1.0 GiB"
    assert row == f"| training | Wan | 30 | 1536 | 3,070 M | {figures} |"


def test_one_sample_has_no_spread():
    assert milliseconds(timing(10.0, samples=1)) == "10 ms"
    assert milliseconds(None) == ""


def test_the_page_shows_both_kinds_of_routes_with_their_command(folder):
    block = report.page_block(folder)
    assert [block.count(f"| multi_shot | {kind} |") for kind in ("random", "correlated")] == [1, 1]
    assert block.count("`python -m benchmarks.attention`, 2026-01-01, jax 0.11.2") == 1
    assert "](pictures/scaling.png)" in block
    assert report.report(folder).count("| multi_shot |") == 2


def test_the_readme_shows_the_worst_case_of_the_largest_setting(folder):
    _, _, *rows = report.readme_block(folder).split("\n")
    assert rows == [
        "| one layer's attention, forward | Card | 10 ms ± 0.1 | 52 ms ± 0.52 | 5.20x |",
        "| one layer's attention, forward and backward | Card | 10 ms ± 0.1 | 52 ms ± 0.52 | 5.20x |",
    ]
    training = {"moc": timing(1e4), "dense": timing(5e4), "ratio": 5.0}
    shared = {"parameters": 3.1e9, "steps": {"training": training, "denoising": {"moc": timing(1e4)}}}
    entries = {name: {**shared, "tokens": tokens} for name, tokens in (("same scene", 1000), ("another", 999))}
    (folder / "model-card.json").write_text(json.dumps({"card": "Card", "entries": entries}))
    _, _, *rows = report.readme_block(folder).split("\n")
    # Not the step that was measured without dense attention.
    assert rows[2:] == ["| model of 3.1 B parameters, a training step | Card | 10 s | 50 s | 5.00x |"]


def test_files_are_rewritten_between_their_markers(folder, tmp_path):
    (tmp_path / "docs/pictures").mkdir(parents=True)
    for name in (report.README, report.PAGE):
        (tmp_path / name).write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.run(["--results", str(folder), "--root", str(tmp_path), "--write"])
    for name, block in report.blocks(folder).items():
        assert (tmp_path / name).read_text() == f"before\n{report.BEGIN}\n{block}\n{report.END}\nafter\n"
    assert (tmp_path / report.PLOT).stat().st_size > 10_000
    with pytest.raises(ValueError, match="must hold"):
        report.with_block("no markers", "block")


def test_nothing_measured_is_nothing_shown(tmp_path):
    assert set(report.blocks(tmp_path).values()) == {"*Not measured yet.*"}
    assert report.draw(tmp_path, tmp_path / "plot.png") is None


@pytest.mark.parametrize("name", [report.README, report.PAGE])
def test_what_is_shown_is_up_to_date(name):
    """`python -m benchmarks.report --write` would change nothing."""
    text = (ROOT / name).read_text()
    assert report.with_block(text, report.blocks(results.FOLDER)[name]) == text
    assert "pictures/scaling.png" in text
    assert (ROOT / report.PLOT).exists()


def test_several_gpus_stand_beside_the_plan_of_their_split():
    both = {"gib": 1.0, "tokens_per_second": 10.0, "exchange": "gather", "model": {"dim": 8, "remat": "full"}}
    entries = {
        "context, 1 devices, 1x1": both | {"devices": 1, "groups": [1, 1], "ms": 180.0, "tokens_per_second": 5.0},
        "context, 2 devices, 2x1": both | {"devices": 2, "groups": [2, 1], "ms": 100.0},
        "context, 2 devices, 1x2, gather": both | {"devices": 2, "groups": [1, 2], "ms": 100.0},
        "fsdp, 2 devices": both | {"devices": 2, "groups": [1, 1], "ms": 300.0, "model": {"dim": 4, "remat": "full"}},
        "context, 2 devices, 2x1, dots": both
        | {"devices": 2, "groups": [2, 1], "ms": 90.0, "model": {"dim": 8, "remat": "dots"}},
        "sampling, 1 devices": both | {"devices": 1, "groups": [1, 1], "ms": 50.0, "tokens_per_second": 5.0},
        "sampling, 2 devices": both
        | {"devices": 2, "groups": [2, 1], "ms": 25.0, "model": {"dim": 8, "remat": "dots"}},  # which changes no call
        "context, 1 devices, 1x1, first step": both
        | {"devices": 1, "groups": [1, 1], "ms": 90.0, "tokens_per_second": 8.0, "first_step": True},
        "context, 2 devices, 2x1, first step": both
        | {"devices": 2, "groups": [2, 1], "ms": 80.0, "tokens_per_second": 12.0, "first_step": True},
        "long, 4 devices": both | {"devices": 4, "groups": [4, 1], "ms": 300.0},
    }
    times = {"training, context 1": 180.0, "training, context 2": 110.0, "training, context 4": 60.0}
    planned = {name: {"step_ms": ms, "bytes": 2**30, "remat": "full"} for name, ms in times.items()}
    _, _, *rows = several_table(entries, planned)
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [(*row[:5], row[6], *row[-2:]) for row in cells] == [
        ("context", "1", "1x1", "full", "180", "1.00x", "180", "+0.0%"),
        ("sampling", "1", "1x1", "", "50", "1.00x", "", ""),
        ("context, first step", "1", "1x1", "full", "90", "1.00x", "", ""),
        ("context", "2", "2x1", "full", "100", "2.00x", "110", "+10.0%"),
        ("context", "2", "1x2, gather", "full", "100", "2.00x", "", ""),
        ("fsdp", "2", "", "full", "300", "", "", ""),
        ("context", "2", "2x1", "dots", "90", "", "", ""),
        ("sampling", "2", "2x1", "", "25", "2.00x", "", ""),
        ("context, first step", "2", "2x1", "full", "80", "1.50x", "", ""),
        ("long", "4", "4x1", "full", "300", "", "", ""),
        ("context", "4", "", "full", "not measured", "3.00x", "60", ""),
    ]
