"""Today's figures beside stored ones: what is worse is marked, what has no pair is said."""

import json

import pytest

from benchmarks import compare


def write(folder, entries, script="attention", **device):
    folder.mkdir(exist_ok=True)
    file = {**(device or {"card": "NVIDIA H200"}), "entries": entries}
    (folder / f"{script}-card.json").write_text(json.dumps(file))


def entry(ms, **more):
    return {"tokens": 1000, "forward": {"moc": {"median_ms": ms, "low_ms": 0.9 * ms}}, **more}


@pytest.fixture
def folders(tmp_path):
    return tmp_path / "today", tmp_path / "stored"


def shown(folders, tolerance=0.03):
    return compare.table(compare.compare(*folders), tolerance)


def test_only_what_is_worse_by_more_than_the_tolerance_is_marked(folders):
    today, stored = folders
    write(stored, {"slow": entry(10.0), "close": entry(10.0), "fast": entry(10.0)})
    write(today, {"slow": entry(10.4), "close": entry(10.2), "fast": entry(8.0)})
    lines = [line for line in shown(folders) if "median_ms" in line]
    assert [("+4.0 %" in line, "worse" in line) for line in lines] == [(True, True), (False, False), (False, False)]
    assert "-20.0 %" in lines[2]
    assert len(compare.worse(compare.compare(*folders), 0.05)) == 0


def test_costs_of_parts_memory_and_chips_are_compared_and_sizes_are_not(folders):
    for folder, part, peak in zip(folders, (2.0, 1.0), (5e9, 4e9)):
        parts = [{"part": "anchors", "gflop": 3.0, "time": {"median_ms": part}}]
        write(folder, {"a": entry(1.0, parts=parts, memory={"peak": peak})})
        write(folder, {"f": {"total_ms": 7, "kernels": {"moc_pool": {"cycles": 3, "ms": 0.5}}}}, "tpu", chip="v5p")
    found = {figure.name: figure.change for figure in compare.compare(*folders)}
    assert found == {
        "NVIDIA H200, a: forward moc median_ms": 0,
        "NVIDIA H200, a: parts anchors time median_ms": 1,
        "NVIDIA H200, a: memory peak": 0.25,
        "v5p, f: total_ms": 0,
        "v5p, f: kernels moc_pool ms": 0,
    }


def test_what_has_no_pair_is_said(folders):
    today, stored = folders
    write(stored, {"a": entry(10.0, routing={"median_ms": 1.0})})
    write(today, {"a": entry(10.0, sorting={"median_ms": 2.0}), "b": entry(3.0)})
    verdicts = {line.split("|")[1].strip(): line.split("|")[5].strip() for line in shown(folders)[2:]}
    assert verdicts == {
        "NVIDIA H200, a: forward moc median_ms": "",
        "NVIDIA H200, a: sorting median_ms": "new",
        "NVIDIA H200, a: routing median_ms": "not measured today",
        "NVIDIA H200, b: forward moc median_ms": "new",
    }


def test_nothing_in_common_is_an_error(folders):
    today, stored = folders
    today.mkdir()
    with pytest.raises(compare.NothingToCompare, match="holds no results; benchmarks write them there with --out"):
        compare.compare(today, stored)
    write(today, {"a": entry(10.0)})
    with pytest.raises(compare.NothingToCompare, match=r"no figure of attention-card\.json is in"):
        compare.compare(today, stored)


def test_the_exit_status_says_whether_something_is_worse(folders, capsys):
    today, stored = folders
    write(stored, {"a": entry(10.0)})
    write(today, {"a": entry(11.0)})
    with pytest.raises(SystemExit, match=r"1 of 1 figures are more than 3 % worse"):
        compare.run([str(today), "--stored", str(stored)])
    compare.run([str(today), "--stored", str(stored), "--tolerance", "0.2"])
    assert "+10.0 %" in capsys.readouterr().out
