"""The user's command that writes captions: what it is shown, what it may answer, and that it is asked once."""

import json
import sys

import pytest
from PIL import Image

from moc_jax.data import encode, prepare
from moc_jax.data.captions import CaptionError
from tests.data.small import make_videos, small_config, with_data

SCRIPT = """
import json, sys
from PIL import Image
print("starting", file=sys.stderr)
for line in sys.stdin:
    asked = json.loads(line)
    size = Image.open(asked["sheet"]).size
    with open({log!r}, "a") as log:
        log.write(json.dumps([asked["video"], asked["shot"], asked["start"], asked["seconds"], size]) + "\\n")
    {answer}
"""
ANSWER = "print(json.dumps({\"caption\": f\"seen  {asked['video']} {asked['shot']}\"}), flush=True)"


@pytest.fixture
def cfg(tmp_path):
    videos = make_videos(tmp_path, a=(13, 9), b=(9, 9))
    (videos / "b.yaml").write_text("caption: both\nshots: [by hand]\ncuts: [0.74]")
    return small_config(tmp_path)


def _asking(cfg, tmp_path, answer=ANSWER):
    script = tmp_path / "my captions.py"
    script.write_text(SCRIPT.format(log=str(tmp_path / "log"), answer=answer))
    return with_data(cfg, caption_command=f"{sys.executable} '{script}'")


def _log(tmp_path):
    return [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]


def test_shots_without_a_caption_are_shown_once(cfg, tmp_path):
    plain = prepare(cfg)
    asking = _asking(cfg, tmp_path)
    manifest = prepare(asking)
    assert {s.source: s.captions for s in manifest.scenes} == {
        "a.mp4": ("a video", "seen a.mp4 1", "seen a.mp4 2"),
        "b.mp4": ("both", "by hand", "seen b.mp4 2"),
    }
    assert manifest.shards == plain.shards  # nothing is encoded again
    size = [3 * 30 * 12, 2 * 30 * 8]  # three columns and two rows of frames of at least 240 rows
    expected = [["a.mp4", 1, 0.0, 1.083, size], ["a.mp4", 2, 1.083, 0.75, size], ["b.mp4", 2, 0.75, 0.75, size]]
    assert _log(tmp_path) == expected
    assert "no caption file" not in manifest.summary()
    assert prepare(asking) == manifest
    make_videos(tmp_path, a=(13, 9), b=(9, 9), c=(17,))
    assert [s.captions[1:] for s in prepare(asking).scenes if s.source == "c.mp4"] == [("seen c.mp4 1",)]
    assert len(_log(tmp_path)) == 4


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("print('a dog', flush=True)", r"asked about shot 1 of a.mp4: it is not JSON: .* \(starting\)"),
        ("print('[]', flush=True)", r"""it answered \[\]; it must print {"caption": "..."} in one line"""),
        ("""print('{"caption": " "}', flush=True)""", r"it answered {'caption': ' '}; it must print"),
        ("raise SystemExit('no GPU')", r"shot 1 of a.mp4: it ended without an answer \(no GPU\)"),
    ],
)
def test_other_answers_are_named(cfg, tmp_path, answer, message):
    with pytest.raises(CaptionError, match=rf"data.caption_command, .*{message}"):
        prepare(_asking(cfg, tmp_path, answer))


def test_what_was_answered_before_it_failed_stays(cfg, tmp_path):
    failing = _asking(cfg, tmp_path, f"{ANSWER} if asked['video'] == 'a.mp4' else sys.exit(1)")
    with pytest.raises(CaptionError, match=r"shot 2 of b.mp4"):
        prepare(failing)
    prepare(_asking(cfg, tmp_path))
    assert [asked[:2] for asked in _log(tmp_path)] == [["a.mp4", 1], ["a.mp4", 2], ["b.mp4", 2], ["b.mp4", 2]]


def test_a_video_is_decoded_once_for_all_its_sheets(cfg, tmp_path, monkeypatch):
    prepare(cfg)
    names, decode = [], encode.decode
    monkeypatch.setattr(
        encode, "decode", lambda path, *rest, **more: names.append(path.name) or decode(path, *rest, **more)
    )
    prepare(_asking(cfg, tmp_path))
    assert names == ["a.mp4", "b.mp4"]


def test_a_command_that_is_none(cfg):
    with pytest.raises(CaptionError, match=r"data.caption_command 'no-such-program' cannot be run: No such file"):
        prepare(with_data(cfg, caption_command="no-such-program --fast"))


def test_a_picture_is_its_own_sheet(cfg, tmp_path):
    Image.new("RGB", (60, 40), (200, 30, 90)).save(tmp_path / "videos" / "rose.png")
    prepare(with_data(_asking(cfg, tmp_path), stills=True))
    assert ["rose.png", 1, 0.0, 0.083, [360, 240]] in _log(tmp_path)
