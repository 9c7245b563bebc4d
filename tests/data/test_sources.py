"""Which files a folder gives: places and identities, links, names of any bytes, and that nothing passes in silence."""

import os
from pathlib import Path

import pytest

from moc_jax.config import ConfigError, DataConfig
from moc_jax.data.captions import CaptionError
from moc_jax.data.folders import SUFFIXES
from moc_jax.data.prepare import prepare
from moc_jax.data.sources import find_sources
from tests.data.small import make_videos, small_config

_NEW_SUFFIXES = [".MTS", ".m2ts", ".VOB", ".3gp", ".mxf", ".asf", ".qt", ".y4m", ".webp", ".TS", ".f4v", ".hevc"]


@pytest.fixture
def videos(tmp_path):
    (tmp_path / "videos").mkdir()
    return tmp_path / "videos"


@pytest.fixture
def store(tmp_path):
    """Three files outside of the folder that is searched."""
    (tmp_path / "store").mkdir()
    for name in "abc":
        (tmp_path / "store" / f"{name}.mp4").write_bytes(name.encode() * 10)
    return tmp_path / "store"


def find(*sources, **settings):
    return find_sources(DataConfig(source=tuple(map(str, sources)), **settings))


def captions_by_name(sources):
    return {source.name: source.captions.caption for source in sources}


def notes_of(sources):
    return "\n".join(sources.notes)


class TestLinks:
    def test_names_and_captions_are_those_of_the_link(self, videos, store):
        (videos / "dog.mp4").symlink_to(store / "a.mp4")
        (videos / "dog.yaml").write_text("caption: a dog")
        (store / "a.yaml").write_text("caption: of the target")
        assert captions_by_name(find(videos)) == {"dog.mp4": "a dog"}
        assert find(videos)[0].path == videos / "dog.mp4"
        assert captions_by_name(find(videos / "dog.mp4")) == {"dog.mp4": "a dog"}

    def test_linked_folders_are_walked(self, videos, store):
        (videos / "more").symlink_to(store)
        (store / "a.txt").write_text("a cat")
        expected = {"more/a.mp4": "a cat", "more/b.mp4": "a video", "more/c.mp4": "a video"}
        assert captions_by_name(find(videos)) == expected

    def test_loops_end_and_are_reported(self, videos, store):
        (videos / "a.mp4").write_bytes(b"a")
        for k in range(8):  # each folder links to all the others: 8! ways through them
            (videos / f"d{k}").mkdir()
            for other in range(8):
                (videos / f"d{k}" / f"to{other}").symlink_to(videos / f"d{other}")
        (videos / "up").symlink_to(videos)
        sources = find(videos)
        assert [source.name for source in sources] == ["a.mp4"]
        assert "up leads to a folder that was searched already" in notes_of(sources)

    def test_a_file_is_found_at_its_own_place_before_links_to_it(self, videos):
        (videos / "z").mkdir()
        (videos / "z" / "clip.mp4").write_bytes(b"x")
        (videos / "a").symlink_to(videos / "z")
        (videos / "b.mp4").symlink_to(videos / "z" / "clip.mp4")
        sources = find(videos)
        assert [source.name for source in sources] == ["z/clip.mp4"]
        assert f"1 duplicate left out, each file is used once: {videos}/b.mp4 = {videos}/z" in notes_of(sources)

    def test_links_to_nothing_and_to_themselves_are_named(self, videos):
        (videos / "a.mp4").write_bytes(b"a")
        (videos / "gone.mp4").symlink_to(videos / "nowhere")
        (videos / "self.mp4").symlink_to(videos / "self.mp4")
        os.mkfifo(videos / "pipe.mp4")
        notes = notes_of(find(videos))
        assert "gone.mp4 is a dangling link" in notes
        assert "self.mp4 cannot be read (Too many levels" in notes
        assert "pipe.mp4 is not a file" in notes

    def test_a_caption_file_that_is_a_link_to_nothing(self, videos):
        (videos / "a.mp4").write_bytes(b"a")
        (videos / "a.yaml").symlink_to(videos / "nowhere")
        with pytest.raises(CaptionError, match=r"a.yaml cannot be read: No such file"):
            find(videos)


class TestDuplicates:
    def test_one_clip_with_a_caption_for_each_link_is_used_with_each(self, videos, store):
        for name, caption in {"one": "a dog", "two": "a cat", "three": "a dog"}.items():
            (videos / f"{name}.mp4").symlink_to(store / "a.mp4")
            (videos / f"{name}.txt").write_text(caption)
        sources = find(videos)
        assert captions_by_name(sources) == {"one.mp4": "a dog", "two.mp4": "a cat"}
        assert "different captions, used 2 times" in notes_of(sources)
        assert f"1 duplicate left out, each file is used once: {videos}/three.mp4" in notes_of(sources)

    def test_a_caption_comes_before_defaults(self, videos, store):
        (videos / "a.mp4").symlink_to(store / "a.mp4")
        (videos / "b.mp4").symlink_to(store / "a.mp4")
        (videos / "b.yaml").write_text("shots: [a cat]")
        (source,) = find(videos)
        assert (source.name, source.captions.shots) == ("b.mp4", ("a cat",))

    @pytest.mark.parametrize("link", [os.link, os.symlink])
    def test_hard_links_and_files_given_twice(self, videos, store, link):
        link(store / "a.mp4", videos / "x.mp4")
        sources = find(store, videos, store / "a.mp4", store)
        assert [source.name for source in sources] == ["a.mp4", "b.mp4", "c.mp4"]
        assert "5 duplicates left out" in notes_of(sources)

    def test_copies_are_files_of_their_own(self, videos):
        for name in ("a", "b"):
            (videos / f"{name}.mp4").write_bytes(b"same")
        sources = find(videos)
        assert len(sources) == 2
        assert "b.mp4 have equal content: encoded once, shown 2 times in an epoch" in notes_of(sources)

    def test_copies_lie_in_one_split(self, videos, store):
        for k in range(20):
            (videos / f"{k}.mp4").write_bytes(b"same")
        assert len({source.split for source in find(videos, validation_fraction=0.5)}) == 1
        (store / "copy.mp4").write_bytes(b"same")
        with pytest.raises(ConfigError, match=r"1.mp4, .*copy.mp4 have equal content and lie in both splits"):
            find(videos / "1.mp4", validation_source=(str(store),))

    @pytest.mark.parametrize("link", [os.link, os.symlink])
    def test_a_file_cannot_be_held_out_under_another_name(self, videos, store, link):
        link(store / "a.mp4", videos / "x.mp4")
        with pytest.raises(ConfigError, match=r"share .*a.mp4 = .*x.mp4; a video cannot be both held out"):
            find(store, validation_source=(str(videos),))

    def test_files_without_a_byte_are_not_equal(self, videos, store):
        (videos / "x.mp4").touch()
        (store / "y.mp4").touch()
        found = find(videos, validation_source=(str(store),))
        assert {s.name: s.split for s in found if not s.size} == {"x.mp4": "train", "y.mp4": "validation"}

    def test_one_file_lies_in_one_split_whatever_its_captions(self, videos, store):
        for k in range(20):
            (videos / f"{k}.mp4").symlink_to(store / "a.mp4")
            (videos / f"{k}.txt").write_text(f"caption {k}")
        splits = [source.split for source in find(videos, validation_fraction=0.5)]
        assert len(splits) == 20
        assert len(set(splits)) == 1


class TestWhatIsTaken:
    @pytest.mark.parametrize("suffix", _NEW_SUFFIXES)
    def test_containers_in_capitals_or_not(self, videos, suffix):
        (videos / f"clip{suffix}").write_bytes(b"x")
        assert [source.name for source in find(videos)] == [f"clip{suffix}"]

    def test_captions_and_pictures_are_not_videos(self):
        assert not SUFFIXES & {".txt", ".json", ".yaml", ".yml", ".png", ".jpg", ".npz", ".srt", ".py"}

    def test_all_other_files_are_counted_by_suffix(self, videos):
        names = ["a.mp4", "a.yaml", "x.jpg", "y.JPG", "z.npy", "README", ".hidden.mp4", "metadata.jsonl"]
        for name in [*names, "lost.txt", "a.mp4.txt"]:
            (videos / name).touch()
        (videos / "metadata.jsonl").write_text('{"speaks": "of something else"}')
        notes = notes_of(find(videos))
        assert "8 other files not taken as video" in notes
        for part in ("2 .jpg", "1 .npy", "1 without suffix", "1 hidden", "1 .jsonl", "2 .txt"):
            assert part in notes
        assert "no video has the name of 2 caption files: a.mp4.txt, lost.txt" in notes

    def test_captions_that_say_nothing_or_serve_two_videos(self, videos):
        for name in ("a.mp4", "b.mp4", "b.webp"):
            (videos / name).write_bytes(name.encode())
        (videos / "a.txt").write_text("\n")
        (videos / "b.txt").write_text("a dog")
        notes = notes_of(find(videos))
        assert "1 caption file without a caption, the defaults are used" in notes
        assert f"{videos / 'b.txt'} is the caption file of b.mp4, b.webp" in notes

    def test_folders_that_cannot_be_read_are_named(self, videos, monkeypatch):
        scan = os.scandir

        def refuse(folder):
            if Path(folder).name == "closed":
                raise PermissionError(13, "Permission denied")
            return scan(folder)

        (videos / "closed").mkdir()
        (videos / "a.mp4").write_bytes(b"a")
        monkeypatch.setattr(os, "scandir", refuse)
        assert "the folder closed cannot be read (Permission denied)" in notes_of(find(videos))

    def test_nothing_to_report(self, videos):
        (videos / "a.mp4").write_bytes(b"x")
        (videos / "a.JSON").write_text('{"caption": "x"}')
        assert find(videos).notes == ()

    def test_a_given_file_is_taken_whatever_its_suffix(self, videos):
        for name in ("clip", "clip.bin"):
            (videos / name).write_bytes(name.encode())
        (videos / "clip.yaml").write_text("caption: x")
        sources = find(videos / "clip", videos / "clip.bin", videos / "clip.yaml")
        assert captions_by_name(sources) == {"clip": "x", "clip.bin": "x"}
        assert "data.source names 1 caption file, not taken as video: clip.yaml" in notes_of(sources)

    def test_a_folder_without_videos_says_what_it_holds(self, videos):
        for name in ("a.jpg", "b.jpg", "c.txt"):
            (videos / name).touch()
        (videos / "gone.mp4").symlink_to("nowhere")
        with pytest.raises(
            ConfigError, match=r"(?s)holds no video file; it holds 2 .jpg, 1 .txt.*gone.mp4 is a dangling link"
        ):
            find(videos)

    @pytest.mark.parametrize(
        ("entry", "message"),
        [
            ("", "is empty; name a file or folder"),
            ("a" * 300, "cannot be read: File name too long"),
            ("a\0b", "can't contain that character"),
            ("/dev/null", "is neither a file nor a folder"),
            ("~no-such-user-here/x", "has no home folder here"),
        ],
    )
    def test_entries_that_cannot_be(self, entry, message):
        with pytest.raises(ConfigError, match=rf"data.source.*({message})"):
            find(entry)

    def test_unreadable_files_are_named_and_the_others_used(self, store, monkeypatch):
        opened = Path.open

        def refuse(self, *args, **kwargs):
            if self.name == "b.mp4":
                raise PermissionError(13, "Permission denied")
            return opened(self, *args, **kwargs)

        monkeypatch.setattr(Path, "open", refuse)
        sources = find(store)
        assert [source.name for source in sources] == ["a.mp4", "c.mp4"]
        assert "b.mp4 cannot be read (Permission denied)" in notes_of(sources)
        with pytest.raises(ConfigError, match=r"no file of data.source can be read"):
            find(store / "b.mp4")


def test_names_of_any_bytes_are_data(tmp_path):
    """A name that is not UTF-8, and one with a newline: prepared, found again, and printed on one line each."""
    videos = make_videos(tmp_path, a=(13,), b=(13,), c=(13,))
    latin = Path(os.fsdecode(bytes(videos) + b"/caf\xe9.mp4"))
    (videos / "a.mp4").rename(latin)
    (videos / "b.mp4").rename(videos / "new\nline.mp4")
    (videos / "c.mp4").write_bytes(b"no video")
    (videos / "c.mp4").rename(Path(os.fsdecode(bytes(videos) + b"/\xff.mp4")))
    cfg = small_config(tmp_path, default_shot_caption="shot {shot} of {file}", validation_fraction=0.01)
    manifest = prepare(cfg)
    assert [scene.source for scene in manifest.scenes] == [latin.name, "new\nline.mp4"]
    assert manifest.scenes[0].captions == ("a video", "shot 1 of caf\ufffd")
    assert list(manifest.skipped) == ["\udcff.mp4"]
    assert prepare(cfg) == manifest
    summary = manifest.summary()
    summary.encode()
    assert r"skipped \udcff.mp4: " in summary
    assert r"new\nline.mp4" in summary


def test_notes_are_of_today(tmp_path):
    """A prepared folder is used again, but what lies beside the videos by now is reported."""
    videos = make_videos(tmp_path, a=(13,))
    cfg = small_config(tmp_path)
    prepare(cfg)
    (videos / "later.jpg").touch()
    assert "1 other file not taken as video: 1 .jpg" in prepare(cfg).summary()
