"""Videos in tables, tar files, snapshots and other projects' folders: what is taken, with which words."""

import csv
import dataclasses
import io
import json
import os
import pickle
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moc_jax.codecs import pixels_to_unit
from moc_jax.config import ConfigError, DataConfig, TrainConfig
from moc_jax.data import codec_of, make_pipeline, prepare
from moc_jax.data.captions import CaptionError
from moc_jax.data.shards import ShardReader
from moc_jax.data.shots import GivenCuts
from moc_jax.data.sources import find_file, find_sources
from moc_jax.data.tars import TarMember, open_bytes
from moc_jax.data.video import read_video
from tests.data.clips import make_clip
from tests.data.small import SIZE, make_videos, small_config

CLIPS = {"a": (13,), "b": (9, 9), "c": (17,)}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_videos(tmp_path_factory.mktemp("clips"), **CLIPS)


@pytest.fixture
def videos(made, tmp_path):
    return shutil.copytree(made, tmp_path / "videos")


def _found(*source, **data):
    return find_sources(DataConfig(source=tuple(map(str, source)), **data))


def _said(sources):
    return {s.name: (s.captions.caption, s.captions.shots, s.captions.cuts, s.split, s.weight) for s in sources}


ROWS = [
    {"media": "videos/a.mp4", "caption": "the first", "split": "train", "weight": 3},
    {"media": "videos/b.mp4", "caption": "two", "shots": ["one", "other"], "cuts": [0.7], "split": "val"},
    {"media": "videos/c.mp4"},
]
SAID = {
    "videos/a.mp4": ("the first", (), None, "train", 3),
    "videos/b.mp4": ("two", ("one", "other"), (0.7,), "validation", 1),
    "videos/c.mp4": ("a video", (), None, "train", 1),
}


def _jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _csv(path, rows, delimiter=","):
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, delimiter=delimiter)
        writer.writeheader()
        writer.writerows({k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()} for row in rows)
    return path


class TestTables:
    @pytest.mark.parametrize("name", ["list.jsonl", "list.csv", "list.tsv", "list.json"])
    def test_columns_are_found_by_name(self, videos, tmp_path, name):
        path = tmp_path / name
        if path.suffix == ".json":
            path.write_text(json.dumps(ROWS))
        elif path.suffix == ".jsonl":
            _jsonl(path, ROWS)
        else:
            _csv(path, ROWS, "\t" if path.suffix == ".tsv" else ",")
        found = _found(path)
        assert _said(found) == SAID
        assert found[0].captions.file == path
        assert found[0].captions.line == (1 if path.suffix in (".jsonl", ".json") else 2)
        cfg = DataConfig(source=(str(path),))
        assert [find_file(cfg, s.name, s.digest) for s in found] == [s.path for s in found]

    @pytest.mark.parametrize(("media", "caption"), [("video", "text"), ("file_name", "prompt"), ("path", "cap")])
    def test_names_that_other_projects_use(self, videos, tmp_path, media, caption):
        path = _jsonl(tmp_path / "x.jsonl", [{media: "videos/a.mp4", caption: "words", "fps": 24, "id": None}])
        assert _said(_found(path))["videos/a.mp4"][0] == "words"

    def test_a_column_that_is_passed_over_is_noted(self, videos, tmp_path):
        path = _jsonl(tmp_path / "x.jsonl", [{"video": "videos/a.mp4", "caption": "x", "prompt": "y", "path": "z"}])
        found = _found(path)
        assert found[0].captions.caption == "x"
        assert any("caption is taken, not prompt" in note for note in found.notes)
        assert any("video is taken, not path" in note for note in found.notes)

    def test_in_a_folder_it_speaks_of_the_videos_there(self, videos):
        """As in a folder of the Hugging Face hub; those that it does not name keep their own caption files."""
        _jsonl(videos / "metadata.jsonl", [{"file_name": "a.mp4", "text": "from the list"}])
        (videos / "b.txt").write_text("from beside")
        said = _said(_found(videos))
        assert {name: of[0] for name, of in said.items()} == {
            "a.mp4": "from the list",
            "b.mp4": "from beside",
            "c.mp4": "a video",
        }

    def test_two_tables_of_a_folder_are_both_heard(self, videos):
        _jsonl(videos / "metadata.jsonl", [{"file_name": "a.mp4", "text": "one"}])
        (videos / "metadata.csv").write_text("file_name,text\na.mp4,another\n")
        found = _found(videos)
        assert sorted(s.captions.caption for s in found if s.path.name == "a.mp4") == ["another", "one"]
        assert len({s.name for s in found}) == len(found) == 4

    def test_one_video_on_several_lines_is_a_source_each(self, videos, tmp_path):
        rows = [
            {"media": "videos/b.mp4", "caption": "first", "cuts": [0.7]},
            {"media": "videos/b.mp4", "caption": "2nd"},
        ]
        found = _found(_jsonl(tmp_path / "x.jsonl", rows))
        assert [s.name for s in found] == ["videos/b.mp4:1", "videos/b.mp4:2"]
        same = _found(_jsonl(tmp_path / "x.jsonl", rows[:1] * 2))
        assert [s.name for s in same] == ["videos/b.mp4"]
        split = [rows[0] | {"split": "train"}, rows[1] | {"split": "test"}]
        with pytest.raises(
            ConfigError, match=r"videos/b.mp4 is in both splits, according to .*x.jsonl, line 1, .*line 2"
        ):
            _found(_jsonl(tmp_path / "x.jsonl", split))

    def test_tables_that_share_a_line_number_are_told_apart(self, videos, tmp_path):
        tables = [_jsonl(tmp_path / f"{of}.jsonl", [{"media": "videos/b.mp4", "caption": of}]) for of in ("x", "y")]
        found = _found(*tables)
        assert [s.name for s in found] == [f"videos/b.mp4:{table}:1" for table in tables]
        cfg = DataConfig(source=tuple(map(str, tables)))
        assert [find_file(cfg, s.name, s.digest) for s in found] == [videos / "b.mp4"] * 2

    def test_in_a_folder_it_may_name_videos_elsewhere(self, videos, tmp_path):
        folder = tmp_path / "tables"
        folder.mkdir()
        _jsonl(folder / "metadata.jsonl", [{"video": str(videos / "a.mp4"), "caption": "far"}])
        assert _said(_found(folder)) == {(videos / "a.mp4").as_posix(): ("far", (), None, "train", 1)}

    def test_videos_that_are_not_there_are_named_and_the_rest_is_used(self, videos, tmp_path):
        path = _jsonl(tmp_path / "x.jsonl", [*ROWS, {"media": "videos/d.mp4"}])
        found = _found(path)
        assert len(found) == 3
        assert any(
            f"x.jsonl, line 4: {tmp_path}/videos/d.mp4 cannot be read (there is no such file)" in n for n in found.notes
        )
        with pytest.raises(ConfigError, match=r"of the videos that .*x.jsonl lists none is there; .*line 1: .*d.mp4"):
            _found(_jsonl(tmp_path / "x.jsonl", [{"media": "videos/d.mp4"}]))

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ('{"caption": "x"}', r"no column names the video; call it media, or one of media_path, .*; it has"),
            ('{"mdia": "a.mp4"}', r"no column names the video; .*did you mean mdia by media\?"),
            ('{"media": 3}', r"the video is 3; name it"),
            ('{"media": "a", "caption": 3}', r"the caption is 3; it must be text"),
            ('{"media": "a", "cuts": "soon"}', r"cuts is 'soon'; it must be a list in JSON, such as \[1.5, 3\]"),
            ('{"media": "a", "cuts": [2, 1]}', r"cuts is \[2, 1\]; it must be a list of rising times in seconds"),
            (
                '{"media": "a", "shot_cut_frames": [0]}',
                r"shot_cut_frames is \[0\]; .* rising frame numbers, all above 0",
            ),
            (
                '{"media": "a", "cuts": [1], "shot_cut_frames": [9]}',
                r"it has both cuts, in seconds, and shot_cut_frames",
            ),
            ('{"media": "a", "cuts": [1], "shots": ["x", "y", "z"]}', r"1 cuts make 2 shots, but shots has 3 captions"),
            ('{"media": "a", "shots": [3]}', r"shots\[0\] is 3; it must be text"),
            ('{"media": "a", "split": "dev"}', r"the split is 'dev'; it must be one of train, training, validation"),
            ('{"media": "a", "weight": 0.5}', r"the weight is 0.5; it must be a whole number in 1..1000"),
            ('{"media": "a", "weight": 0}', r"the weight is 0; it must be a whole number in 1..1000"),
            ("[1]", r"it holds \[1\]; it must be an object with a key for each column"),
            ('{"media": "a"', r"it is not JSON"),
            ('{"media": "a", "media": "b"}', r"the key 'media' appears twice"),
            ("\udc00", r"byte 0 \(0xed\) is not UTF-8"),
        ],
    )
    def test_what_cannot_be_is_named_with_its_line(self, tmp_path, line, message):
        path = tmp_path / "x.jsonl"
        path.write_bytes(b"\n" + line.encode("utf-8", "surrogatepass") + b"\n")
        with pytest.raises(CaptionError, match=rf"x.jsonl(, line 2| cannot be read: line 2): {message}"):
            _found(path)

    def test_all_lines_that_cannot_be_are_named_at_once(self, tmp_path):
        path = _jsonl(tmp_path / "x.jsonl", [{"media": 3}, {"media": "a.mp4"}, {"media": ""}] * 10)
        with pytest.raises(CaptionError, match=r"(?s)line 1: .*line 3: the video is ''.*line 30: .*") as caught:
            _found(path)
        assert str(caught.value).count("\n") == 19

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("media,caption\na.mp4,one,two\n", r"line 2: it has 3 cells, but the header has 2; put text with a ','"),
            ("media,media\na,b\n", r"line 1: its header .* names a column twice"),
            ('media\n"a', r"line 2: it is not CSV: unexpected end of data"),
            ("media\n", r"lists no videos; give a line for each, with a column media, or delete the file"),
            ("", r"is empty \(0 bytes\); give a line for each, with a column media, or delete the file"),
            ("Media;caption\na.mp4;one, two\n", r"line 1: its cells are separated by ';'; save it with commas between"),
            ("videos/a.mp4,one\nb.mp4,two\n", r"line 1: it has no header: its first line is .*, such as media,caption"),
        ],
    )
    def test_csv_that_is_none(self, videos, tmp_path, text, message):
        (tmp_path / "x.csv").write_text(text)
        with pytest.raises(CaptionError, match=rf"x.csv.*{message}"):
            _found(tmp_path / "x.csv")

    @pytest.mark.parametrize(
        ("name", "text", "message"),
        [
            ("metadata.csv", "file_name;text\na.mp4;one\n", r"its cells are separated by ';'; save it with commas"),
            ("metadata.tsv", "file_name,text\na.mp4,one\n", r"its cells are separated by ','; save it with tabs"),
            ("metadata.csv", "a.mp4,one\n", r"it has no header: its first line is \['a.mp4', 'one'\]; put one before"),
            ("metadata.jsonl", "", r"is empty \(0 bytes\); give a line for each, .* or delete the file"),
        ],
    )
    def test_a_list_in_a_folder_that_is_none(self, videos, name, text, message):
        (videos / name).write_text(text)
        with pytest.raises(CaptionError, match=rf"{name}.*{message}"):
            _found(videos)
        (videos / name).write_text('{"speaks": "of something else"}')
        assert len(_found(videos)) == 3

    def test_json_without_a_byte(self, tmp_path):
        (tmp_path / "x.json").touch()
        with pytest.raises(CaptionError, match=r"x.json is empty \(0 bytes\); give a line for each, with a column"):
            _found(tmp_path / "x.json")

    def test_lines_that_differ_by_their_weights_alone(self, videos, tmp_path):
        rows = [{"media": "videos/b.mp4", "caption": "first", "weight": weight} for weight in (2, 2, 5)]
        path = _jsonl(tmp_path / "x.jsonl", rows)
        weights = rf"2 \({path}, line 1\), 5 \({path}, line 3\); keep one line"
        with pytest.raises(ConfigError, match=rf"b.mp4 has several weights with the same captions: {weights}"):
            _found(path)
        assert [s.weight for s in _found(_jsonl(path, rows[:2]))] == [2]
        assert [s.weight for s in _found(_jsonl(path, [*rows[:2], rows[2] | {"caption": "2nd"}]))] == [2, 5]
        assert [s.weight for s in _found(videos, path)][1:] == [2, 5, 1]


def _tar(path: Path, **members) -> Path:
    """`name__suffix` = bytes, text or a file."""
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            data = content.read_bytes() if isinstance(content, Path) else content.encode()
            info = tarfile.TarInfo(name.replace("__", "."))
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


class TestTars:
    def test_of_members_with_one_name_the_last_counts_and_none_is_absolute(self, videos, tmp_path):
        with tarfile.open(tmp_path / "x.tar", "w") as tar:
            for name in "ab":
                info = tar.gettarinfo(videos / f"{name}.mp4")
                info.name = "/clips/v.mp4"
                with (videos / f"{name}.mp4").open("rb") as file:
                    tar.addfile(info, file)
        (source,) = _found(tmp_path / "x.tar")
        assert source.name == "x.tar/clips/v.mp4"
        with open_bytes(source.path) as file:
            assert file.read() == (videos / "b.mp4").read_bytes()

    def test_videos_are_read_where_they_lie(self, videos, tmp_path):
        tar = _tar(
            tmp_path / "shard: 0.tar",
            k1__txt="the first\n",
            k1__mp4=videos / "a.mp4",
            k2__mp4=videos / "b.mp4",
            k2__json=json.dumps({"caption": "two", "cuts": [0.7], "split": "val", "key": "k2", "weight": 2}),
            k3__mp4=videos / "c.mp4",
            k3__cls="7",
        )
        found = _found(tar)
        assert _said(found) == {
            "shard: 0.tar/k1.mp4": ("the first", (), None, "train", 1),
            "shard: 0.tar/k2.mp4": ("two", (), (0.7,), "validation", 2),
            "shard: 0.tar/k3.mp4": ("a video", (), None, "train", 1),
        }
        assert any("1 other file not taken as video: 1 .cls" in note for note in found.notes)
        for source, name in zip(found, CLIPS):
            for path in (source.path, pickle.loads(pickle.dumps(source.path))):
                assert isinstance(path, TarMember)
                with open_bytes(path) as file:
                    assert file.read() == (videos / f"{name}.mp4").read_bytes()
                np.testing.assert_array_equal(
                    read_video(path, *SIZE, 12.0), read_video(videos / f"{name}.mp4", *SIZE, 12.0)
                )
        alone = _found(videos / "c.mp4")
        assert alone[0].digest == found[2].digest  # what is in it counts, not where it lies

    def test_in_a_folder(self, videos, tmp_path):
        _tar(videos / "more.tar", x__mp4=videos / "a.mp4", x__txt="in the tar")
        said = _said(_found(videos))
        assert said["more.tar/x.mp4"][0] == "in the tar"
        assert set(said) == {"a.mp4", "b.mp4", "c.mp4", "more.tar/x.mp4"}

    def test_what_is_none_is_named(self, videos, tmp_path):
        (tmp_path / "x.tar").write_bytes(b"\x1f\x8b" + b"x" * 600)
        with pytest.raises(ConfigError, match=r"x.tar holds no video; .*it is compressed, .*unpack it with gunzip"):
            _found(tmp_path / "x.tar")
        whole = _tar(tmp_path / "y.tar", a__mp4=videos / "a.mp4").read_bytes()
        (tmp_path / "x.tar").write_bytes(b"z" * 600)
        with pytest.raises(ConfigError, match=r"x.tar holds no video; .*it is not a whole tar file"):
            _found(tmp_path / "x.tar")
        (tmp_path / "x.tar").write_bytes(whole[:-11000])
        with pytest.raises(ConfigError, match=r"x.tar holds no video; .*it is not a whole tar file"):
            _found(tmp_path / "x.tar")
        bad = _tar(tmp_path / "z.tar", a__mp4=videos / "a.mp4", a__json='{"weight": -1}')
        with pytest.raises(CaptionError, match=r"z.tar/a.mp4: the weight is -1; it must be a whole number"):
            _found(bad)


def test_a_snapshot_of_the_hub(videos, tmp_path):
    """Files are links into a folder of blobs, whose names say nothing; two revisions share them."""
    root = tmp_path / "datasets--me--clips"
    (root / "blobs").mkdir(parents=True)
    for revision in ("aaa", "bbb"):
        snapshot = root / "snapshots" / revision
        snapshot.mkdir(parents=True)
        for k, name in enumerate(("a.mp4", "b.mp4")):
            blob = root / "blobs" / f"{k:064x}"
            shutil.copy(videos / name, blob)
            (snapshot / name).symlink_to(os.path.relpath(blob, snapshot))
        rows = root / "blobs" / "meta"
        _jsonl(rows, [{"file_name": "a.mp4", "text": "from the hub"}])
        (snapshot / "metadata.jsonl").symlink_to(rows)
    said = _said(_found(root / "snapshots" / "bbb"))
    assert {name: of[0] for name, of in said.items()} == {"a.mp4": "from the hub", "b.mp4": "a video"}
    whole = _found(root)
    assert [s.captions.caption for s in whole] == ["from the hub", "a video"]
    assert any("2 duplicates left out" in note for note in whole.notes)


class TestStills:
    @pytest.fixture
    def mixed(self, videos):
        Image.new("RGB", (30, 20), (200, 30, 90)).save(videos / "rose.PNG")
        (videos / "rose.txt").write_text("a rose")
        return videos

    def test_only_where_they_are_wanted(self, mixed):
        found = _found(mixed)
        assert len(found) == 3
        assert any("--data.stills True takes the 1 picture, as shots of a frame" in note for note in found.notes)
        found = _found(mixed, stills=True)
        assert {s.name: s.still for s in found} == {"a.mp4": False, "b.mp4": False, "c.mp4": False, "rose.PNG": True}
        assert _said(found)["rose.PNG"][0] == "a rose"
        assert [s.still for s in _found(mixed / "rose.PNG")] == [True]

    @pytest.mark.parametrize("patch", [1, 2])
    def test_it_is_the_shortest_shot_that_there_is(self, mixed, tmp_path, patch):
        cfg = small_config(tmp_path, patch=patch, stills=True, min_shot_frames=9)
        manifest = prepare(cfg)
        (scene,) = [scene for scene in manifest.scenes if scene.source == "rose.PNG"]
        assert [shot.frames for shot in scene.shots] == [patch]
        (latents,), _ = ShardReader(manifest).read(scene)
        codec, picture = codec_of(manifest), read_video(mixed / "rose.PNG", *SIZE, 12.0)
        expected = codec.encode(pixels_to_unit(np.repeat(picture, 4 * patch - 3, axis=0)))
        np.testing.assert_allclose(latents, expected, atol=2e-3 * np.abs(expected).max())


def test_weights_count_in_an_epoch(videos, tmp_path):
    """And captions come from the table, with cuts; nothing is encoded twice for another weight."""
    path = _jsonl(tmp_path / "list.jsonl", [dict(row, split="train") for row in ROWS])
    cfg = small_config(tmp_path, source=(str(path),), max_buckets=1, caption_dropout=0.0, image_conditioning=0.0)
    manifest = prepare(cfg)
    assert {scene.source: scene.captions for scene in manifest.scenes}["videos/b.mp4"] == ("two", "one", "other")
    data = make_pipeline(dataclasses.replace(cfg, train=TrainConfig(batch_size=5)), manifest, split="train")
    frames = sorted(next(data).lengths.shot_frames.sum(1).tolist())
    data.close()
    assert frames == [4, 4, 4, 5, 6]  # a.mp4 three times


class TestOtherProjects:
    def test_storymem(self, videos):
        story = {
            "story_overview": "A princess in a tower.",
            "scenes": [
                {"scene_num": 1, "video_prompts": ["She waits.", "She looks up."], "cut": ["True", "False"], "x": 1},
                {"scene_num": 2, "video_prompts": ["A dragon."], "cut": [True], "first_frame_prompt": ["Red sky."]},
            ],
        }
        (videos / "a.json").write_text(json.dumps(story))
        said = _said(_found(videos))["a.mp4"]
        assert said[:3] == ("A princess in a tower.", ("She waits. She looks up.", "A dragon."), None)

    def test_holocine(self, videos):
        """Cuts are numbers of the file's own frames."""
        scene = {
            "global_caption": "A ball.",
            "shot_captions": ["Wide.", "Close."],
            "num_frames": 18,
            "shot_cut_frames": [9],
        }
        (videos / "b.json").write_text(json.dumps(scene))
        (source,) = [s for s in _found(videos) if s.name == "b.mp4"]
        assert (source.captions.caption, source.captions.shots) == ("A ball.", ("Wide.", "Close."))
        assert (source.captions.cuts, source.captions.cut_unit) == ((9.0,), "frames")
        is_cut = GivenCuts(source.captions.cuts, source.captions.cut_unit)
        assert [k for k in range(18) if is_cut(k / 24, np.zeros((8, 12, 3), np.uint8))] == [9]

    def test_longlive(self, tmp_path):
        for k in range(2):
            make_clip(tmp_path / "video" / "lab" / f"{k}.mp4", shots=1, frames_per_shot=(9,), size=SIZE, seed=k)
            (tmp_path / "caption" / "lab").mkdir(parents=True, exist_ok=True)
            (tmp_path / "caption" / "lab" / f"{k}.json").write_text(json.dumps({"caption": f"shot {k}", "refers": []}))
        found = _found(tmp_path)
        assert {name: of[0] for name, of in _said(found).items()} == {
            "video/lab/0.mp4": "shot 0",
            "video/lab/1.mp4": "shot 1",
        }
        assert not any("no video has the name" in note for note in found.notes)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ({"scenes": [{"video_prompts": "x"}]}, r"scenes\[0\].video_prompts is 'x'; it must be a list of texts"),
            ({"scenes": [{"video_prompts": ["x"], "cut": []}]}, r"scenes\[0\].cut is \[\]; .* for 1 prompts"),
            ({"scenes": [{"video_prompts": ["x", 3]}]}, r"scenes\[0\].video_prompts\[1\] is 3; it must be text"),
            (
                {"shot_captions": ["a", "b"], "shot_cut_frames": [9, 20]},
                r"shot_cut_frames is \[9, 20\]; for 2 shots of",
            ),
            (
                {"shot_captions": ["a", "b"], "shot_cut_frames": [300]},
                r"shot_cut_frames is \[300\]; .* 1 rising numbers below 241",
            ),
            ({"shot_captions": []}, r"shot_captions is empty"),
            ({"shot_captions": ["a"], "fps": 0}, r"fps is 0; it must lie in 0.01..1000"),
        ],
    )
    def test_what_does_not_fit_is_named(self, videos, content, message):
        (videos / "a.json").write_text(json.dumps(content))
        with pytest.raises(CaptionError, match=rf"a.json cannot be read: {message}"):
            _found(videos)


def test_a_config_speaks_of_all_of_it(videos, tmp_path):
    """Several kinds at once, each under its own name."""
    tar = _tar(tmp_path / "x.tar", a__mp4=videos / "a.mp4")
    table = _jsonl(tmp_path / "list.jsonl", [{"media": "videos/b.mp4", "caption": "b"}])
    found = _found(tar, table, videos / "c.mp4")
    assert [s.name for s in found] == ["x.tar/a.mp4", "videos/b.mp4", "c.mp4"]
