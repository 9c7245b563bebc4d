"""benchmarks/scaling.py at toy size: what is measured, and of which devices."""

import dataclasses
import json
from types import SimpleNamespace

import pytest

from benchmarks import model, scaling
from moc_jax.config import MMDiTConfig

SMALL = model.Arguments(model=MMDiTConfig(heads=12, dim=144))


def test_every_split_into_heads_and_tokens_is_measured_with_each_exchange():
    found = list(scaling.cases(scaling.Arguments(scene=SMALL), (1, 2, 4)))
    assert [(c.head_groups, c.devices // c.head_groups, c.exchange) for c in found if c.which == "context"] == [
        (1, 1, "auto"),
        (2, 1, "auto"),
        (1, 2, "gather"),
        (1, 2, "dispatch"),
        (4, 1, "auto"),
        (2, 2, "gather"),
        (2, 2, "dispatch"),
        (1, 4, "gather"),
        (1, 4, "dispatch"),
    ]
    assert [(c.devices, c.scenes) for c in found if c.which == "fsdp"] == [(2, 2), (4, 4)]  # one device is context's
    assert [c.devices for c in found if c.which == "long"] == [4]
    other = model.Arguments(model=dataclasses.replace(SMALL.model, remat="dots"))
    names = {c.name for c in scaling.cases(scaling.Arguments(scene=other), (1, 2, 4))}
    assert names & {c.name for c in found} == {f"sampling, {n} devices" for n in (1, 2, 4)}  # nothing is recomputed
    alone = scaling.cases(scaling.Arguments(scene=SMALL, which=("fsdp",)), (1, 2))
    assert [(c.devices, c.scenes) for c in alone] == [(1, 1), (2, 2)]
    some = scaling.cases(scaling.Arguments(scene=SMALL, which=("context",), head_groups=(2,)), (2, 4))
    assert [(c.devices, c.head_groups, c.exchange) for c in some] == [
        (2, 2, "auto"),
        (4, 2, "gather"),
        (4, 2, "dispatch"),
    ]


def test_collectives_are_timed_and_how_long_nothing_ran_beside_them(monkeypatch):
    times = {"ncclDevKernel_AllGather": (0, 4), "gemm": (1, 2), "sort": (6, 1)}  # begin, and milliseconds
    found = [SimpleNamespace(name=n, start_ns=1e6 * a, duration_ns=1e6 * ms) for n, (a, ms) in times.items()]
    monkeypatch.setattr(scaling, "kernels", lambda profile: profile)
    assert scaling.collectives(found) == (4, 2)


@pytest.mark.slow
def test_all_kinds_run_on_devices_that_there_are(tmp_path, capsys):
    size = ["--shots", "2", "--frames", "2", "--rows", "4", "--columns", "4", "--caption", "2", "--repeats", "1"]
    size += ["--model.dim", "16", "--model.depth", "1", "--model.heads", "2", "--model.text-dim", "8"]
    size += ["--moc.chunk.size", "4", "--attention.backend", "reference", "--attention.exchange", "dispatch"]
    words = [word.replace("--", "--scene.") if word.startswith("--") else word for word in size]
    scaling.run([*words, "--counts", "1", "2", "--out", str(tmp_path)])
    (file,) = tmp_path.glob("scaling-*.json")
    entries = json.loads(file.read_text())["entries"]
    assert {name: entry["groups"] for name, entry in entries.items()} == {
        "context, 1 devices, 1x1, full": [1, 1],
        "context, 2 devices, 1x2, dispatch, full": [1, 2],
        "context, 2 devices, 2x1, full": [2, 1],
        "fsdp, 2 devices, full": [1, 1],
        "long, 2 devices, full": [2, 1],
        "sampling, 1 devices": [1, 1],
        "sampling, 2 devices": [2, 1],
    }
    assert entries["context, 2 devices, 1x2, dispatch, full"]["exchange"] == "dispatch"
    assert entries["long, 2 devices, full"]["tokens"] == 4 * 2 * 2 * 4 + 2 * 9
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(entries)
