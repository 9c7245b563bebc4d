"""The check of a pod, on eight virtual devices."""

import json

import pytest

from benchmarks.pod_check import Arguments, main


@pytest.mark.long
def test_all_parts_work_and_are_written(tmp_path, capsys):
    out = tmp_path / "check.json"
    sizes = {"preset": "demo", "depth": 1, "shots": 2, "frames": 2, "rows": 4, "columns": 4, "mib": (1,)}
    args = Arguments(workdir=str(tmp_path / "work"), out=out, meshes=("2:4:1:1",), **sizes)
    main(args, f"python -m benchmarks.pod_check --workdir {args.workdir}")
    found = json.loads(out.read_text())
    assert not [name for name, part in found.items() if isinstance(part, dict) and "error" in part], found
    assert found["devices"]["count"] == 8
    assert found["devices"]["meshes"][0]["shape"] == {"data": 2, "fsdp": 4, "context": 1, "tensor": 1}
    rates = found["collectives"][0]["gb_per_second"]
    assert set(rates) == {"data", "fsdp"}
    assert all(rate["1 MiB"] > 0 for kinds in rates.values() for rate in kinds.values())
    assert max(found["attention"]["errors"].values()) < 0.02
    assert found["attention"]["same_bits_twice"]
    assert found["training"]["losses"][1] < found["training"]["losses"][0]
    assert found["save"]["equal"]
    assert str(tmp_path) not in out.read_text()
    assert not list((tmp_path / "work").iterdir())
    assert "8 x cpu in 1 process" in capsys.readouterr().out
