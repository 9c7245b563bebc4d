"""Storyboards: what a good one means, and that every mistake is named with its place."""

import dataclasses
import os
import re
import time
from pathlib import Path

import pytest
import yaml

from moc_jax.sampling.storyboard import (
    Shot,
    Storyboard,
    StoryboardError,
    frames_of,
    load_storyboard,
    parse_storyboard,
    storyboard_digest,
)

GOOD = """
caption: Two cyclists ride through a village
negative_prompt: blurry
seed: 7
shots:
  - caption: wide shot
    seconds: 2.5
  - caption: " close-up "
    seconds: 3
    seed: 12
    image: pictures/rider.png
  - caption: 终点线
    video: finish.mp4
  - caption: the bicycle
    image: pictures/rider.png
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "rider.png").write_bytes(b"a picture")
    (tmp_path / "finish.mp4").write_bytes(b"a video")
    (tmp_path / "dangling.png").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe.mp4")
    return tmp_path


def write(folder, text):
    file = folder / "scene.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def storyboard_text(board):
    """The YAML file that describes `board`."""

    def present(value):
        fields = {k: str(v) if isinstance(v, Path) else v for k, v in vars(value).items() if v not in (None, "")}
        return fields | ({"cut": False} if fields.pop("continues", False) else {})

    content = {**present(board), "shots": [present(shot) for shot in board.shots]}
    del content["name"]
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=100)


def test_a_good_storyboard(folder):
    board = load_storyboard(write(folder, GOOD))
    rider = folder / "pictures" / "rider.png"
    assert board == Storyboard(
        caption="Two cyclists ride through a village",
        negative_prompt="blurry",
        seed=7,
        name=str(folder / "scene.yaml"),
        shots=(
            Shot(caption="wide shot", seconds=2.5),
            Shot(caption="close-up", seconds=3.0, seed=12, image=rider),
            Shot(caption="终点线", video=folder / "finish.mp4"),
            Shot(caption="the bicycle", image=rider),
        ),
    )
    assert [shot.is_given for shot in board.shots] == [False, False, True, True]
    assert [shot.is_reference for shot in board.shots] == [False, False, False, True]


def test_what_is_written_is_read_back(folder):
    board = load_storyboard(write(folder, GOOD))
    assert load_storyboard(write(folder, storyboard_text(board))) == board


BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{k + 1}: &a{k + 1} [*a{k}, *a{k}]\n" for k in range(20))
SMALL_BOMB = "".join(line + "\n" for line in BOMB.splitlines()[:10])
SHOTS = "shots:\n  - caption: a\n    seconds: 1\n  - caption: b\n    seconds: 1\n"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("shots: []\ncaption: a", ["shots is [] (list)", "at least one shot"]),
        ("caption: a", ["shots is missing"]),
        (SHOTS, ["caption is missing"]),
        ("caption: 3\n" + SHOTS, ["caption is 3 (int)", "text, in quotes"]),
        ("caption: no\n" + SHOTS, ["caption is False (bool)"]),
        ("captions: a\n" + SHOTS, ["unknown field captions", "did you mean caption?"]),
        ("caption: a\nzzz: 1\n" + SHOTS, ["unknown field zzz", "known fields: caption, negative_prompt, seed, shots"]),
        ("caption: a\nseed: -1\n" + SHOTS, ["seed is -1; it must lie in 0..4294967295"]),
        ("caption: a\nseed: true\n" + SHOTS, ["seed is True (bool)"]),
        ("caption: a\nnegative_prompt: [x]\n" + SHOTS, ["negative_prompt is ['x'] (list)"]),
        ("caption: a\nshots: b", ["shots is 'b' (str)", "must be a list"]),
        ("caption: a\nshots:\n  - b", ["shots[0] is 'b'", "caption, seconds, seed, image, video, cut"]),
        ("caption: a\n" + SHOTS + "  - seconds: 1", ["shots[2].caption is missing"]),
        ("caption: a\n" + SHOTS + "  - caption: c", ["shots[2].seconds is missing"]),
        ("caption: a\n" + SHOTS + "  - {caption: c, seconds: '3'}", ["shots[2].seconds is '3' (str)", "above 0"]),
        ("caption: a\n" + SHOTS + "  - {caption: c, seconds: 0}", ["shots[2].seconds is 0 (int)", "above 0"]),
        ("caption: a\n" + SHOTS + "  - {caption: c, seconds: .nan}", ["shots[2].seconds is nan"]),
        ("caption: a\n" + SHOTS + "  - {caption: c, seconds: .inf}", ["shots[2].seconds is inf"]),
        ("caption: a\n" + SHOTS + "  - {caption: c, seconds: null}", ["shots[2].seconds is None"]),
        (
            "caption: a\n" + SHOTS + "  - {caption: c, secnds: 1}",
            ["unknown field shots[2].secnds", "shots[2].seconds?"],
        ),
        ("caption: a\n" + SHOTS + "  - {caption: c, seconds: 1, seed: 1.5}", ["shots[2].seed is 1.5 (float)"]),
        ("caption: a\n" + SHOTS + f"  - {{caption: c, seconds: 1, seed: {2**32}}}", ["shots[2].seed is 4294967296;"]),
        ("caption: a\n" + SHOTS + "  - {caption: c, seconds: 1, image: 5}", ["shots[2].image is 5 (int)"]),
        (
            "caption: a\n" + SHOTS + "  - {caption: c, seconds: 1, image: pictures/ridr.png}",
            ["shots[2].image: there is no file", "ridr.png", "did you mean rider.png?"],
        ),
        ("caption: a\n" + SHOTS + "  - {caption: c, video: zzz.mp4}", ["shots[2].video", "relative to the storyboard"]),
        (
            "caption: a\n" + SHOTS + "  - {caption: c, video: finish.mp4, image: pictures/rider.png}",
            ["shots[2].image", "remove one of them"],
        ),
        ("caption: a\nshots:\n  - caption: b\n    seconds: 1\n    caption: c", ["'caption' appears twice", "line 5"]),
        ("caption: a\nshots: [{caption: b, image: pictures/rider.png}]", ["reference pictures only", "`seconds`"]),
        ("caption: [", ["cannot be read"]),
        ("caption: a\nshots: [{cut: false, seconds: 1}]", ["shots[0].cut is False", "no shot before it"]),
        ("caption: a\n" + SHOTS + "  - {cut: 0, seconds: 1}", ["shots[2].cut is 0 (int)", "must be false"]),
        ("caption: a\n" + SHOTS + "  - {cut: true, seconds: 1}", ["shots[2].caption is missing"]),
        ("caption: a\n" + SHOTS + "  - {caption: c, seconds: 1.0e+300}", ["shots[2].seconds is 1e+300", "most 86,400"]),
        ("caption: a\n" + SHOTS + "  - {caption: c, seconds: 1e300}", ["shots[2].seconds is '1e300' (str)", "86,400"]),
        ("caption: a\n" + SHOTS + f"  - {{caption: c, seconds: {'9' * 60}}}", ["shots[2].seconds is 999", "86,400"]),
        (
            "caption: a\n" + SHOTS + f"  - {{caption: c, seconds: {'9' * 400}}}",
            ["line 7", "400 digits; the limit"],
        ),
        ("caption: a\n" + SHOTS + f"seed: 0x{'f' * 9000}", ["line 7", "9,002 digits; the limit is 64"]),
        ("caption: a\n" + SHOTS + f"seed: {'9' * 60}", ["seed is 999", "must lie in 0..4294967295"]),
        ("caption: a\nshots: " + "[" * 5000, ["line 2", "nests deeper than 20 levels"]),
        ("caption: a\nshots: " + "{a: " * 5000, ["nests deeper than 20 levels"]),
        (BOMB + "caption: *a20\n" + SHOTS, ["with its aliases it has more than 2,000,000 values"]),
        (SMALL_BOMB + "caption: *a9\n" + SHOTS, ["unknown field a0"]),
        ("caption: &a [*a]\n" + SHOTS, ["*a is inside itself"]),
        (f"caption: {'x' * 30_000}\n" + SHOTS, ["caption: it has 30,000 characters; the limit is 20,000"]),
        (f"caption: [{'x,' * 30_000}]\n" + SHOTS, ["caption is ['x', 'x', 'x', 'x', ...] (list)"]),
        ("caption: 'a\\ud800'".replace("'", '"') + "\n" + SHOTS, ["cannot be read: line 1"]),
        ('caption: "a\\0b"\n' + SHOTS, ["caption: it holds a NUL character"]),
        ("caption: Scene 1: a dog\n" + SHOTS, ["line 1", 'put it in quotes: caption: "Scene 1: a dog"']),
        ("caption: a\nshots:\n  - Scene 1: a dog", ["unknown field shots[0].Scene 1", "put it in quotes"]),
        ("caption: 2024-13-45\n" + SHOTS, ["must be in quotes"]),
        (f"caption: a\n? {'k' * 9000}\n: b\n" + SHOTS, ["unknown field kkk", "known fields"]),
        ("caption: a\nshots:\n" + "  - {}\n" * 100_001, ["shots has 100,001 entries; the limit is 100,000"]),
        (
            "caption: a\n" + SHOTS + "  - {caption: c, image: pictures}",
            ["shots[2].image: there is no file", "but a folder of that name"],
        ),
        ("caption: a\n" + SHOTS + "  - {caption: c, image: ''}", ["shots[2].image: there is no file"]),
        (
            "caption: a\n" + SHOTS + "  - {caption: c, image: dangling.png}",
            ["shots[2].image: there is no file", "or a broken link"],
        ),
        ("caption: a\n" + SHOTS + "  - {caption: c, video: pipe.mp4}", ["shots[2].video: there is no file"]),
        ("caption: a\n" + SHOTS + f"  - {{caption: c, video: {'x' * 5000}}}", ["shots[2].video: there is no file"]),
        ("caption: a\n" + SHOTS + "  - {caption: c, video: ~no-such-user/x}", ["shots[2].video is", "no home folder"]),
        ("caption: a\n" + SHOTS + '  - {caption: c, video: "a\\0/b"}', ["shots[2].video: it holds a NUL"]),
        ("", ["the file is None"]),
        ("- a", ["the file is ['a']"]),
    ],
    ids=lambda value: value[0][:40] if isinstance(value, list) else "",
)
def test_mistakes_are_named_with_their_place(folder, text, parts):
    file = write(folder, text)
    with pytest.raises(StoryboardError, match=re.escape(str(file))) as caught:
        load_storyboard(file)
    for part in parts:
        assert part in str(caught.value)
    assert len(str(caught.value)) < 700


def test_a_missing_file_suggests_the_near_one(folder):
    write(folder, GOOD)
    with pytest.raises(StoryboardError, match=r"no such storyboard; did you mean .*scene\.yaml"):
        load_storyboard(folder / "scen.yaml")
    with pytest.raises(StoryboardError, match=r"no such storyboard$"):
        load_storyboard(folder / "nowhere" / "x.yaml")


def test_a_file_that_is_no_text(folder):
    (folder / "scene.yaml").write_bytes(b"\xff\xfe\x00caption")
    with pytest.raises(StoryboardError, match="cannot be read"):
        load_storyboard(folder / "scene.yaml")


@pytest.mark.parametrize(
    ("seconds", "fps", "stride", "patch", "frames"),
    [
        (2.0, 12.0, 4, 1, 25),  # 24 frames wanted: 25 is nearer than 21
        (0.1, 12.0, 4, 1, 1),
        (0.24, 12.0, 4, 1, 1),  # 2.88 frames
        (0.26, 12.0, 4, 1, 5),  # 3.12 frames
        (0.01, 12.0, 4, 1, 0),  # no frame at all
        (8.0, 12.0, 4, 1, 97),
        (5.0, 16.0, 4, 1, 81),
        (1.0, 24.0, 1, 1, 24),
        (0.1, 12.0, 4, 2, 5),  # two latent frames at least
        (1.0, 12.0, 4, 2, 13),  # 12 wanted: 13 or 5
    ],
)
def test_seconds_become_the_nearest_possible_frames(seconds, fps, stride, patch, frames):
    assert frames_of(seconds, fps, stride, patch) == frames


def test_frames_survive_the_round_trip_through_seconds():
    for stride in (1, 4, 8):
        for patch in (1, 2, 3):
            for latent in range(patch, 40, patch):
                frames = stride * (latent - 1) + 1
                for fps in (12.0, 16.0, 23.976, 29.97):
                    assert frames_of(round(frames / fps, 4), fps, stride, patch) == frames


def test_content_need_not_come_from_a_file():
    board = parse_storyboard({"caption": "a", "shots": [{"caption": "b", "seconds": 1}]})
    assert board.shots == (Shot(caption="b", seconds=1.0),)


@pytest.mark.parametrize("value", [10**400, 16**9000, -(10**5000), [10**5000], 1e300], ids=range(5))
def test_content_of_absurd_size_is_cut_short(value):
    shots = [{"caption": "b", "seconds": 1}]
    for content in (
        {"caption": value, "shots": shots},
        {"caption": "a", "shots": shots, "seed": value},
        {"caption": "a", "shots": value},
        {"caption": "a", "shots": [{"caption": "b", "seconds": value}]},
        {"caption": "a", "shots": shots, 10**5000: 1},
        value,
    ):
        with pytest.raises(StoryboardError) as caught:
            parse_storyboard(content)
        assert len(str(caught.value)) < 700


@pytest.mark.parametrize("seconds", ["3", 1e300, float("inf"), float("nan"), 10**400, 0.0, -1.0], ids=range(7))
def test_durations_are_checked_however_a_storyboard_is_made(seconds):
    with pytest.raises(StoryboardError, match=r"shots\[0\].seconds is .*; it must be a number of seconds above 0"):
        Storyboard(caption="a", shots=(Shot(caption="b", seconds=seconds),))


@pytest.mark.parametrize("seed", [1.5, "7", 10**400, -1])
def test_seeds_are_checked_however_a_storyboard_is_made(seed):
    with pytest.raises(StoryboardError, match=r"shots\[0\].seed is .*; it must lie in 0\.\.4294967295"):
        Storyboard(caption="a", shots=(Shot(caption="b", seconds=1.0, seed=seed),))


@pytest.mark.parametrize("absolute", ["/nowhere/x.png", "~/x.png"])
def test_a_whole_path_is_not_relative_to_anything(folder, absolute):
    file = write(folder, f"caption: a\nshots:\n  - {{caption: b, seconds: 1, image: {absolute}}}\n")
    with pytest.raises(StoryboardError, match=r"there is no file '/.*x\.png'$"):
        load_storyboard(file)


def test_a_number_that_yaml_takes_for_text_is_named_as_such(folder):
    file = write(folder, "caption: a\nshots:\n  - {caption: b, seconds: 1e3}\n")
    with pytest.raises(StoryboardError, match=r"seconds is '1e3' .* text: write it without quotes and exponent"):
        load_storyboard(file)


def test_quotes_are_not_put_across_a_list_in_braces(folder):
    file = write(folder, "caption: a\nshots:\n  - {caption: b, seconds: *a}\n")
    with pytest.raises(StoryboardError) as caught:
        load_storyboard(file)
    assert '"b, seconds' not in str(caught.value)


def test_twenty_thousand_shots_are_legal_and_quick(folder):
    shot = "  - caption: the dog runs\n    seconds: 1.5\n    seed: 3\n"
    file = write(folder, "caption: a\nshots:\n" + shot * 20_000)
    start = time.thread_time()
    assert len(load_storyboard(file).shots) == 20_000
    assert time.thread_time() - start < 10  # it takes two seconds; pure Python's reader takes over twenty


@pytest.mark.parametrize("name", ["x" * 300, "folder.yaml", "pipe.mp4", "loop.yaml"])
def test_storyboards_that_are_no_files(folder, name):
    (folder / "folder.yaml").mkdir()
    (folder / "loop.yaml").symlink_to("loop.yaml")
    with pytest.raises(StoryboardError, match="there is no such storyboard"):
        load_storyboard(folder / name)


def test_a_byte_order_mark_is_no_part_of_the_text(folder):
    (folder / "scene.yaml").write_bytes(b"\xef\xbb\xbf" + ("caption: a\n" + SHOTS).encode())
    assert load_storyboard(folder / "scene.yaml").caption == "a"


def test_a_shot_may_continue_the_one_before():
    """Under its caption, unless it has another one."""
    content = (
        "caption: a\nshots: [{caption: b, seconds: 1}, {cut: false, seconds: 2}, {cut: false, caption: c, seconds: 1}]"
    )
    shots = parse_storyboard(yaml.safe_load(content)).shots
    assert [(shot.caption, shot.continues) for shot in shots] == [("b", False), ("b", True), ("c", True)]


def test_digest_is_of_what_is_asked_for(tmp_path):
    """Not of what files are called, but of what is in them."""
    board = {"caption": "a street", "shots": [{"caption": "a van", "seconds": 1}, {"caption": "b", "image": "a.png"}]}
    (tmp_path / "a.png").write_bytes(b"one")
    (tmp_path / "b.png").write_bytes(b"one")
    digest = storyboard_digest(parse_storyboard(board, folder=tmp_path))
    other = {**board, "shots": [board["shots"][0], {"caption": "b", "image": "b.png"}]}
    assert storyboard_digest(parse_storyboard(other, name="c", folder=tmp_path)) == digest
    (tmp_path / "b.png").write_bytes(b"two")
    later = parse_storyboard(other, folder=tmp_path)
    assert storyboard_digest(later) != digest
    assert storyboard_digest(dataclasses.replace(later, seed=1)) != storyboard_digest(later)
    pins = [{**board["shots"][0], field: [1]} for field in ("remember", "forget")]
    assert (
        len({storyboard_digest(parse_storyboard({**board, "shots": [of]})) for of in [board["shots"][0], *pins]}) == 3
    )
    (tmp_path / "b.png").unlink()
    with pytest.raises(StoryboardError, match=r"shots\[1\]: .*b.png cannot be read: No such file"):
        storyboard_digest(later)
