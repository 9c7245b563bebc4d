"""Caption files as documented, defaults, and every way of getting one wrong."""

import pytest

from moc_jax.config import DataConfig
from moc_jax.data.captions import CaptionError, load_captions

CFG = DataConfig(default_caption="a clip", default_shot_caption="shot {shot} of {file}")


def _load(tmp_path, text, suffix=".yaml"):
    (tmp_path / f"clip{suffix}").write_text(text, encoding="utf-8")
    return load_captions(tmp_path / "clip.mp4", CFG)


def test_defaults(tmp_path):
    captions = load_captions(tmp_path / "clip.mp4", CFG)
    assert (captions.file, captions.caption, captions.cuts) == (None, "a clip", None)
    assert captions.shot(1) == "shot 2 of clip"


@pytest.mark.parametrize("suffix", [".yaml", ".yml"])
def test_yaml(tmp_path, suffix):
    text = "caption: Eine Straße \nshots:\n  - ein Bus\n  - {caption: 自転車}\ncuts: [1, 2.5]\n"
    captions = _load(tmp_path, text, suffix)
    assert (captions.caption, captions.shots, captions.cuts) == ("Eine Straße", ("ein Bus", "自転車"), (1.0, 2.5))
    assert captions.file == tmp_path / f"clip{suffix}"
    assert [captions.shot(k) for k in range(3)] == ["ein Bus", "自転車", "shot 3 of clip"]


def test_json(tmp_path):
    captions = _load(tmp_path, '{"caption": "x", "shots": ["y"]}', ".json")
    assert (captions.caption, captions.shots) == ("x", ("y",))


def test_empty_file_and_empty_captions(tmp_path):
    assert _load(tmp_path, "").caption == "a clip"
    captions = _load(tmp_path, 'caption: ""\nshots: [""]\ncuts: []')
    assert (captions.caption, captions.shot(0), captions.cuts) == ("", "", ())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("captoin: x", r"clip.yaml: the file has the unknown key 'captoin'; did you mean 'caption'\?"),
        ("fps: 3", r"unknown key 'fps'; known keys: caption, shots, cuts"),
        ("shots: [{captions: x}]", r"shots\[0\] has the unknown key 'captions'; did you mean 'caption'\?"),
        ("shots: [x, {}]", r"shots\[1\] lacks its caption"),
        ("caption: yes", r"caption is True \(bool\); it must be text"),
        ("caption: 2024", r"caption is 2024 \(int\)"),
        ("shots: a bus", r"shots is 'a bus'; it must be a list"),
        ("shots: [3]", r"shots\[0\] holds 3; it must hold the keys caption"),
        ("shots: [{caption: [a]}]", r"shots\[0\].caption is \['a'\] \(list\)"),
        ("- a\n- b", r"the file holds \['a', 'b'\]; it must hold the keys caption, shots, cuts"),
        ("cuts: [2, 1]", r"cuts is \[2, 1\]; it must be a list of rising times"),
        ("cuts: [0, 1]", r"all above 0"),
        ("cuts: ['1']", r"cuts is \['1'\]"),
        ("cuts: [.nan]", r"cuts is \[nan\]"),
        ("cuts: [1]\nshots: [a, b, c]", r"1 cuts make 2 shots, but shots has 3 captions"),
        ("caption: 'x", r"clip.yaml cannot be read"),
    ],
)
def test_mistakes_are_named(tmp_path, text, message):
    with pytest.raises(CaptionError, match=message):
        _load(tmp_path, text)


def test_broken_json_and_encoding(tmp_path):
    with pytest.raises(CaptionError, match=r"clip.json cannot be read"):
        _load(tmp_path, "{caption: x}", ".json")
    (tmp_path / "clip.json").unlink()
    (tmp_path / "clip.yaml").write_bytes(b"caption: \xff\xfe")
    with pytest.raises(CaptionError, match=r"clip.yaml cannot be read"):
        load_captions(tmp_path / "clip.mp4", CFG)


def test_two_files_for_one_video(tmp_path):
    _load(tmp_path, "caption: x")
    with pytest.raises(CaptionError, match=r"several caption files: clip.yaml, clip.json; keep one"):
        _load(tmp_path, "{}", ".json")


@pytest.mark.parametrize("template", ["{number}", "{0}", "{shot", "{shot:q}"])
def test_default_that_cannot_be_filled_in(tmp_path, template):
    with pytest.raises(CaptionError, match=r"data.default_shot_caption = .* cannot be filled in"):
        load_captions(tmp_path / "clip.mp4", DataConfig(default_shot_caption=template))
