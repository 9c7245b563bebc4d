"""Scene files of other projects: what they say, and what in them cannot be."""

import json

import pytest

from moc_jax.documents import DocumentError
from moc_jax.sampling.storyboard import StoryboardError, load_storyboard
from moc_jax.stories import BLOCK_SECONDS, PROMPT_SECONDS, parse_story, read_story_folder


def test_storymem():
    story = parse_story(
        {
            "story_overview": "A day.",
            "scenes": [
                {"scene_num": 1, "video_prompts": ["a", "b"], "cut": ["True", "False"]},
                {"scene_num": 7, "video_prompts": ["c"], "cut": [False], "first_frame_prompt": ["x"]},
            ],
        }
    )
    assert story.caption == "A day."
    assert [(s.caption, s.continues, s.name) for s in story.shots] == [
        ("a", False, "01_01"),
        ("b", True, "01_02"),
        ("c", True, "07_01"),
    ]
    assert {s.seconds for s in story.shots} == {PROMPT_SECONDS}


@pytest.mark.parametrize(
    ("more", "cuts", "seconds"),
    [({}, None, [7.5, 7.5625]), ({"shot_cut_frames": [80]}, (80,), [5, 161 / 16]), ({"fps": 24}, None, [5, 121 / 24])],
)
def test_holocine(more, cuts, seconds):
    story = parse_story({"global_caption": "g", "shot_captions": ["a", "b"], **more})
    assert (story.caption, story.cut_frames) == ("g", cuts)
    assert [s.seconds for s in story.shots] == seconds
    assert {s.name for s in story.shots} == {""}


def _longlive(folder, captions, durations=None):
    for k, caption in enumerate(captions):
        (folder / f"{k}.json").write_text(json.dumps({"caption": caption}))
    if durations is not None:
        (folder / "shot_durations.txt").write_text(durations)
    return folder


def test_longlive(tmp_path):
    story = read_story_folder(_longlive(tmp_path, "ab"))
    assert [(s.caption, s.seconds) for s in story.shots] == [("a", PROMPT_SECONDS), ("b", PROMPT_SECONDS)]
    (tmp_path / "global.json").write_text('{"caption": "all"}')
    story = read_story_folder(_longlive(tmp_path, "abc", "2, 2 4\n"))
    assert story.caption == "all"
    assert [s.seconds for s in story.shots] == [2 * BLOCK_SECONDS, 2 * BLOCK_SECONDS, 4 * BLOCK_SECONDS]
    board = load_storyboard(tmp_path)
    assert [shot.seconds for shot in board.shots] == [s.seconds for s in story.shots]


@pytest.mark.parametrize("content", [None, [], {}, {"caption": "x", "shots": []}, {"scenes": []}, {"scenes": [{}]}])
def test_other_files_are_none(content):
    assert parse_story(content) is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"scenes": [{"video_prompts": ["a"], "scene_num": "x"}]}, r"scenes\[0\].scene_num is 'x'; it must be a whole"),
        ({"scenes": [{"video_prompts": ["a"]}] * 1 + [{"video_prompts": ["b"], "scene_num": 1}]}, r"number them apart"),
        ({"scenes": [{"video_prompts": []}]}, r"scenes has no video_prompts"),
        ({"scenes": [{"video_prompts": ["a"], "cut": ["maybe"]}]}, r"it must hold true or false for 1 prompts"),
        ({"shot_captions": ["a"], "num_frames": 0}, r"num_frames is 0; it must lie in 1.."),
        ({"shot_captions": "abc"}, r"shot_captions is 'abc'; it must be a list of texts"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, content, message):
    with pytest.raises(DocumentError, match=message):
        parse_story(content)
    (tmp_path / "x.json").write_text(json.dumps(content))
    with pytest.raises(StoryboardError, match=rf"x.json cannot be read: .*{message}"):
        load_storyboard(tmp_path / "x.json")


@pytest.mark.parametrize("durations", ["1", "1 2 3", "1 0", "1 x", ""])
def test_durations_that_do_not_fit(tmp_path, durations):
    with pytest.raises(DocumentError, match=r"shot_durations.txt is .*; it must hold 2 whole numbers of blocks"):
        read_story_folder(_longlive(tmp_path, "ab", durations))
    (tmp_path / "1.json").write_text("{}")
    with pytest.raises(DocumentError, match=r"1.json holds .*; it must be an object with a text `caption`"):
        read_story_folder(tmp_path)
