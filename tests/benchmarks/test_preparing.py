"""benchmarks/preparing.py end to end on two small videos."""

import re

import pytest

from benchmarks import preparing
from tests.data.clips import make_clip


@pytest.mark.long
def test_each_way_is_timed_and_the_gain_told(tmp_path, monkeypatch, capsys):
    for name in "ab":
        make_clip(tmp_path / f"{name}.mp4", shots=1, frames_per_shot=13)
    monkeypatch.setattr("sys.argv", ["preparing", str(tmp_path), "--size", "32", "48", "--processes", "2"])
    preparing.main()
    out = capsys.readouterr().out
    assert "2 files, 26 frames, prepared at 48x32 and 16 frames/s" in out
    for way in ("bare decoding", "preparation", "by 2 processes"):
        (line,) = re.findall(rf"{way} .*", out)
        assert re.search(r"[\d.]+ s on the clock, +[\d.]+ s of the processor", line)
        assert re.search(r"other work took \d+% of the cores", line)
    assert re.search(r"[\d.]+ times as fast as by one", out)
