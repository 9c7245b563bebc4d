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


@pytest.mark.parametrize(
    "template", ["{shot.__class__}", "{file[0]}", "{shot!r}", "{file:>1000000000}", "{shot.__init__.__globals__}", "{}"]
)
def test_defaults_are_plain_substitution(tmp_path, template):
    """Nothing of Python is within reach of a config's text, nor is a width that fills the memory."""
    with pytest.raises(CaptionError, match=r"cannot be filled in \(.* is not one of {shot}, {file}"):
        load_captions(tmp_path / "clip.mp4", DataConfig(default_shot_caption=template))


def test_what_a_name_holds_is_not_substituted_again(tmp_path):
    captions = load_captions(tmp_path / "{shot}.mp4", DataConfig(default_shot_caption="{{{file}}} {shot}"))
    assert captions.shot(1) == "{{shot}} 2"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("clip.txt", b"a dog\nruns: fast\n"),
        ("clip.TXT", b"\xef\xbb\xbfa dog runs: fast"),
        ("clip.YAML", b"caption: 'a dog runs: fast'"),
        ("clip.Yml", b"\xef\xbb\xbfcaption: 'a dog runs: fast'\r\n"),
        ("clip.JSON", b'{"caption": "a dog runs: fast"}'),
        ("clip.json", b'\xef\xbb\xbf{"caption": "a dog runs: fast"}'),
    ],
)
def test_every_kind_of_caption_file(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    captions = load_captions(tmp_path / "clip.mp4", CFG)
    assert captions.caption == "a dog runs: fast"
    assert captions.file == tmp_path / name


@pytest.mark.parametrize("name", ["clip.txt", "clip.json", "clip.yaml"])
def test_an_empty_file_gives_the_defaults(tmp_path, name):
    (tmp_path / name).write_text(" \n")
    assert load_captions(tmp_path / "clip.mp4", CFG).caption == "a clip"


NESTED = "[" * 5000 + "]" * 5000
ALIASES = "a0: &a0 [x, x]\n" + "".join(f"a{k + 1}: &a{k + 1} [*a{k}, *a{k}]\n" for k in range(40))


@pytest.mark.parametrize(
    ("suffix", "text", "message"),
    [
        (".yaml", "caption: a\nshots: []\ncaption: b", r"line 3: the key 'caption' appears twice"),
        (".yaml", "shots:\n- {caption: a, caption: b}", r"line 2: the key 'caption' appears twice"),
        (".json", '{"caption": "a", "caption": "b"}', r"the key 'caption' appears twice"),
        (".yaml", "caption: Scene 1: a dog", r'line 1: .*put it in quotes: caption: "Scene 1: a dog"'),
        (".yaml", "shots:\n  - Scene 1: a dog", r"unknown key 'Scene 1'.* put it in quotes: \"Scene 1: a dog\""),
        (".yaml", "Scene 1: a dog", r"unknown key 'Scene 1'.* put it in quotes"),
        (".yaml", "a dog", r"the keys caption, shots, cuts; write caption: 'a dog'"),
        (".yaml", "Caption: a dog", r"unknown key 'Caption'; did you mean 'caption'\?$"),
        (".yaml", "caption: @home", r"line 1: .*put it in quotes"),
        (".yaml", "caption: 'It's a dog'", r"line 1: .*put it in quotes"),
        (".yaml", "caption: !wow a dog", r"line 1: the tag '!wow' means nothing here"),
        (".yaml", "caption: !!python/name:os.system x", r"line 1: the tag"),
        (".yaml", "caption: #1", r"caption is None \(NoneType\); it must be text, in quotes"),
        (".yaml", "caption: 1.5", r"caption is 1.5 \(float\)"),
        (".yaml", "shots: [12:30]", r"shots\[0\] holds 750"),
        (".yaml", "caption: 2024-13-45", r"text that looks like a date or a number must be in quotes"),
        (".yaml", "caption: 0b_", r"text that looks like a date or a number must be in quotes"),
        (".yaml", "shots:\n\t- a", r"line 2: .*indent with spaces, not with tabs"),
        (".yaml", "caption: a\0b", r"line 1: it holds a NUL byte"),
        (".txt", "a\nb\0", r"line 2: it holds a NUL byte"),
        (".yaml", "caption: a\x07b", r"holds the control character 0x07"),
        (".yaml", "a: 1\n---\nb: 2", r"line 2: .*another document"),
        (".yaml", "caption: &a [*a]", r"\*a is inside itself"),
        (".yaml", ALIASES, r"with its aliases it has more than 2,000,000 values"),
        (".yaml", f"caption: {NESTED}", r"nests deeper than 20 levels"),
        (".json", f'{{"caption": {NESTED}}}', r"nests deeper than 20 levels"),
        (".yaml", f"cuts: [{'9' * 400}]", r"a number has 400 digits; the limit is 64"),
        (".yaml", f"cuts: [0x{'f' * 20_000}]", r"a number has 20,002 digits; the limit is 64"),
        (".json", f'{{"cuts": [{"9" * 5000}]}}', r"a number has 5,000 digits; the limit is 64"),
        (".yaml", "cuts: [010]", r"YAML reads 010 in base 8; write 10, or put it in quotes"),
        (".json", '{"cuts": [NaN]}', r"holds NaN, which is not JSON"),
        (".json", '{"cuts": [1e999]}', r"cuts is \[inf\]"),
        (".json", '{"caption": "\\ud83d"}', r"caption: it holds half of a surrogate pair"),
        (".txt", "x" * 30_000, r"30,000 characters; the limit is 20,000"),
        (".yaml", f"shots: ['{'x' * 30_000}']", r"shots\[0\]: it has 30,000 characters; the limit is 20,000"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_odd_content_is_named_at_once(tmp_path, suffix, text, message):
    with pytest.raises(CaptionError, match=rf"clip{suffix}.*{message}") as caught:
        _load(tmp_path, text, suffix)
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_other_encodings_say_how_to_save(tmp_path, encoding):
    (tmp_path / "clip.txt").write_bytes("a dog".encode(encoding))
    with pytest.raises(CaptionError, match=rf"clip.txt cannot be read: it is {encoding.upper()}; save it as UTF-8"):
        load_captions(tmp_path / "clip.mp4", CFG)


def test_latin_letters_say_where(tmp_path):
    (tmp_path / "clip.txt").write_bytes("ein Café".encode("latin-1"))
    with pytest.raises(CaptionError, match=r"byte 7 \(0xe9\) is not UTF-8; save it as UTF-8"):
        load_captions(tmp_path / "clip.mp4", CFG)


def test_a_huge_file_is_not_read(tmp_path):
    with (tmp_path / "clip.json").open("wb") as file:
        file.truncate(40 << 20)
    with pytest.raises(CaptionError, match=r"clip.json cannot be read: it has 41,943,040 bytes; the limit is 33,"):
        load_captions(tmp_path / "clip.mp4", CFG)


def test_capitals_and_text_count_as_a_second_file(tmp_path):
    (tmp_path / "clip.Txt").write_text("a")
    with pytest.raises(CaptionError, match=r"several caption files: clip.YAML, clip.Txt; keep one"):
        _load(tmp_path, "caption: x", ".YAML")


def test_a_folder_in_the_place_of_a_caption_file(tmp_path):
    (tmp_path / "clip.yaml").mkdir()
    with pytest.raises(CaptionError, match=r"clip.yaml cannot be read: it is not a regular file"):
        load_captions(tmp_path / "clip.mp4", CFG)


def test_merged_keys_may_be_overridden(tmp_path):
    captions = _load(tmp_path, "<<: {caption: a, cuts: [1]}\ncaption: b")
    assert (captions.caption, captions.cuts) == ("b", (1.0,))
