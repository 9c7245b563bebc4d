"""From files to shards: what is stored, what is left out, what is reused, and what a crash or a full disk leaves."""

import dataclasses
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from moc_jax.codecs import pixels_from_unit, pixels_to_unit
from moc_jax.codecs.pca import PCACodec
from moc_jax.config import ConfigError
from moc_jax.data.captions import CaptionError
from moc_jax.data.encode import Encoder
from moc_jax.data.manifest import DataError, codec_of, load_manifest, verify
from moc_jax.data.prepare import prepare
from moc_jax.data.quality import psnr
from moc_jax.data.shards import ShardReader
from moc_jax.data.video import read_video, write_video
from moc_jax.data.work import Work
from tests.data.clips import make_clip
from tests.data.odd_files import stamped
from tests.data.small import SIZE, make_videos, small_config, with_data


def test_stored_latents_are_the_encoded_shots(tmp_path):
    """Shots of 14 and 21 frames are cut to 13 and 21 = 4 n + 1, encoded alone, and read back in half precision."""
    videos = make_videos(tmp_path, a=(14, 21))
    (videos / "a.yaml").write_text("caption: two\nshots: [one]")
    manifest = prepare(small_config(tmp_path, keyframes=3))
    (scene,) = manifest.scenes
    assert (scene.name, scene.source, scene.split) == ("a.mp4#0", "a.mp4", "train")
    assert scene.captions == ("two", "one", "shot 2")
    assert [shot.frames for shot in scene.shots] == [4, 6]
    frames = pixels_to_unit(read_video(videos / "a.mp4", *SIZE, 12.0))
    codec = codec_of(manifest)
    shots, stills = ShardReader(manifest).read(scene)
    for latents, clip in zip(shots, (frames[:13], frames[14:35])):
        expected = codec.encode(clip)
        np.testing.assert_allclose(latents, expected, atol=2e-3 * np.abs(expected).max())
    assert stills.shape == (2, 3, 1, 2, 3, 4)
    for still, frame in zip(stills[1], (14, 24, 34)):
        np.testing.assert_allclose(still, codec.encode(frames[frame : frame + 1]), atol=0.01)
    counts = {"files": 1, "shots": 2, "short_shots": 0, "frames": 35, "unused_frames": 1, "latent_frames": 10}
    assert manifest.counts == counts
    assert "captions for 1 shots, but 2 were found; the others have the default caption" in manifest.summary()
    assert "1 training and 0 held-out scenes from 1 files: 2 shots, 10 latent frames" in manifest.summary()


def test_codec_is_fitted_on_training_clips_alone(tmp_path):
    make_videos(tmp_path, a=(13,), b=(13,))
    make_videos(tmp_path / "held", c=(14,))
    cfg = small_config(tmp_path)
    alone = codec_of(prepare(cfg)).fingerprint
    with_validation = with_data(cfg, validation_source=(str(tmp_path / "held" / "videos"),), refit_codec=True)
    manifest = prepare(with_validation)
    assert codec_of(manifest).fingerprint == alone
    assert [scene.name for scene in manifest.split("validation")] == ["c.mp4#0"]
    both = with_data(cfg, source=(str(tmp_path / "videos"), str(tmp_path / "held" / "videos")), refit_codec=True)
    assert codec_of(prepare(both)).fingerprint != alone


def test_bad_files_are_named_and_the_run_goes_on(tmp_path):
    videos = make_videos(tmp_path, good=(13, 13), short=(7,), also_good=(9,))
    (videos / "broken.mp4").write_bytes(b"not a video" * 50)
    (videos / "empty.avi").touch()
    (videos / "also_good.yaml").write_text("caption: nine frames")
    manifest = prepare(small_config(tmp_path, min_shot_frames=9))
    assert {scene.source for scene in manifest.scenes} == {"good.mp4", "also_good.mp4"}
    assert set(manifest.skipped) == {"broken.mp4", "empty.avi", "short.mp4"}
    assert manifest.skipped["short.mp4"] == "too short: its longest shot has 7 frames at 12 fps, but 9 are needed"
    summary = manifest.summary()
    assert "left out: 3 files, 0 short shots; 0 of 35 frames, there and at the ends of shots (0.0%)" in summary
    assert "skipped broken.mp4: it cannot be decoded (Invalid data" in summary
    assert "note: 1 of 2 files have no caption file but the defaults: good.mp4" in summary


def test_short_shots_are_left_out_and_captions_stay_with_their_shots(tmp_path):
    videos = make_videos(tmp_path, a=(13, 7, 13))
    (videos / "a.yaml").write_text("shots: [first, second, third]")
    manifest = prepare(small_config(tmp_path, min_shot_frames=9))
    assert manifest.scenes[0].captions == ("a video", "first", "third")
    assert manifest.counts["short_shots"] == 1
    assert manifest.counts["unused_frames"] == 7


def test_latents_that_are_not_finite_name_the_file(tmp_path, monkeypatch):
    make_videos(tmp_path, a=(13,), b=(13,))
    stills = Encoder._stills

    def poisoned(self, video):
        bad = np.nan if not np.isclose(video[0, 0, 0, 0], poisoned.first, atol=0.01) else 0.0
        return stills(self, video) + np.float32(bad)

    poisoned.first = pixels_to_unit(read_video(tmp_path / "videos" / "b.mp4", *SIZE, 12.0))[0, 0, 0, 0]
    monkeypatch.setattr(Encoder, "_stills", poisoned)
    manifest = prepare(small_config(tmp_path))
    assert manifest.skipped == {"a.mp4": "its latents hold NaN or infinite values"}


def test_long_files_become_several_scenes(tmp_path):
    """Nine shots, at most four a scene: 3 + 3 + 3 rather than 4 + 4 + 1."""
    videos = make_videos(tmp_path, long=(9,) * 9)
    (videos / "long.yaml").write_text(f"shots: {[f'caption {k}' for k in range(9)]}")
    manifest = prepare(small_config(tmp_path, shots_per_scene=4))
    assert [scene.name for scene in manifest.scenes] == ["long.mp4#0", "long.mp4#1", "long.mp4#2"]
    assert [scene.captions[1:] for scene in manifest.scenes][1] == ("caption 3", "caption 4", "caption 5")
    frames = pixels_to_unit(read_video(videos / "long.mp4", *SIZE, 12.0))
    shots, _ = ShardReader(manifest).read(manifest.scenes[2])
    expected = codec_of(manifest).encode(frames[63:72])
    np.testing.assert_allclose(shots[1], expected, atol=2e-3 * np.abs(expected).max())


def test_long_shots_are_used_whole(tmp_path):
    """A shot of 50 frames, of which a part may have 20: three of 17, 17 and 13, each continuing the one before."""
    videos = make_videos(tmp_path, a=(50, 13))
    (videos / "a.yaml").write_text("shots: [long, short]\ncuts: [4.166]")
    manifest = prepare(small_config(tmp_path, max_shot_frames=20))
    (scene,) = manifest.scenes
    assert [(s.frames, s.start, s.continues) for s in scene.shots] == [
        (5, 0, False),
        (5, 17, True),
        (4, 34, True),
        (4, 50, False),
    ]
    assert scene.captions == ("a video", "long", "long", "long", "short")
    assert manifest.counts["unused_frames"] == 3
    assert manifest.counts["short_shots"] == 0
    assert "4 shots (2 of them continue the one before), 18 latent frames" in manifest.summary()
    frames = pixels_to_unit(read_video(videos / "a.mp4", *SIZE, 12.0))
    shots, _ = ShardReader(manifest).read(scene)
    expected = codec_of(manifest).encode(frames[34:47])
    np.testing.assert_allclose(shots[2], expected, atol=2e-3 * np.abs(expected).max())


def test_parts_of_long_shots_as_scenes_of_their_own(tmp_path):
    """Nothing is encoded again: what makes a scene is the manifest's."""
    videos = make_videos(tmp_path, a=(9, 9, 30, 9))
    (videos / "a.yaml").write_text("cuts: [0.75, 1.5, 4.0]")
    cfg = small_config(tmp_path, max_shot_frames=20)
    assert [len(scene.shots) for scene in prepare(cfg).scenes] == [5]
    manifest = prepare(with_data(cfg, long_shots="scenes"))
    assert [[s.start for s in scene.shots] for scene in manifest.scenes] == [[0, 9], [18], [35], [48]]
    assert not any(shot.continues for scene in manifest.scenes for shot in scene.shots)
    assert [scene.record for scene in manifest.scenes] == [0, 2, 3, 4]
    assert len(list((tmp_path / "cache" / "encoded").glob("*/*.json"))) == 1


def test_shots_fill_whole_temporal_patches(tmp_path):
    """With two latent frames per token, a shot of 4 n + 1 frames keeps an even number of latent frames."""
    make_videos(tmp_path, a=(13, 21, 9, 4))
    cuts = "cuts: [1.083, 2.833, 3.583]"
    (tmp_path / "videos" / "a.yaml").write_text(cuts)
    manifest = prepare(small_config(tmp_path, patch=2, keyframes=2))
    assert [shot.frames for shot in manifest.scenes[0].shots] == [4, 6, 2]  # of 4, 6, 3 and 1
    assert manifest.counts["short_shots"] == 1
    _, stills = ShardReader(manifest).read(manifest.scenes[0])
    assert stills.shape == (3, 2, 2, 2, 3, 4)
    frames = pixels_to_unit(read_video(tmp_path / "videos" / "a.mp4", *SIZE, 12.0))
    still = codec_of(manifest).encode(np.repeat(frames[13:14], 5, axis=0))
    np.testing.assert_allclose(stills[1, 0], still, atol=0.01)


def test_captions_and_cuts_that_miss_the_video_are_noted(tmp_path):
    videos = make_videos(tmp_path, a=(13, 13), b=(13, 13))
    (videos / "a.yaml").write_text("shots: [one, two, three]")
    (videos / "b.yaml").write_text("cuts: [1.0, 9.0]")
    notes = prepare(small_config(tmp_path)).notes
    assert notes[0].endswith("a.yaml: captions for 3 shots, but 2 were found; the rest go unused")
    assert notes[1].endswith("b.yaml: its cuts make 3 shots, but the video ends after 2")


class TestSplit:
    def test_fraction_holds_out_whole_files_by_name(self, tmp_path):
        make_videos(tmp_path, **{f"clip{k}": (9, 9) for k in range(12)})
        cfg = small_config(tmp_path, validation_fraction=0.4, shots_per_scene=1)
        held = {s.source for s in prepare(cfg).split("validation")}
        assert 2 <= len(held) <= 8
        make_videos(tmp_path, another=(9,))
        again = prepare(cfg)
        assert {s.source for s in again.split("validation")} - {"another.mp4"} == held
        assert not {s.source for s in again.split("train")} & held

    def test_given_files_are_held_out_instead_of_a_fraction(self, tmp_path):
        make_videos(tmp_path, a=(13,), b=(13,))
        held = make_videos(tmp_path / "held", c=(14,))
        manifest = prepare(small_config(tmp_path, validation_source=(str(held),), validation_fraction=1.0))
        assert {s.source: s.split for s in manifest.scenes} == {
            "a.mp4": "train",
            "b.mp4": "train",
            "c.mp4": "validation",
        }

    def test_a_file_cannot_be_in_both(self, tmp_path):
        videos = make_videos(tmp_path, a=(13,), b=(13,))
        cfg = small_config(tmp_path, validation_source=(str(videos / "a.mp4"),))
        with pytest.raises(ConfigError, match=r"share .*a.mp4; a video cannot be both held out and trained on"):
            prepare(cfg)

    def test_files_of_one_name_in_two_folders(self, tmp_path):
        make_videos(tmp_path / "x", a=(13,))
        make_videos(tmp_path / "y", a=(13, 9))
        cfg = small_config(tmp_path, source=(str(tmp_path / "x"), str(tmp_path / "y"), str(tmp_path / "x")))
        assert sorted(len(s.shots) for s in prepare(cfg).scenes) == [1, 2]
        assert len({s.name for s in prepare(cfg).scenes}) == 2


class TestMistakesBeforeWork:
    @pytest.fixture(autouse=True)
    def _no_decoding(self, monkeypatch):
        monkeypatch.setattr(Work, "__init__", lambda *_, **__: pytest.fail("work began"))

    def test_no_source(self, tmp_path):
        with pytest.raises(ConfigError, match=r"data.source is empty"):
            prepare(small_config(tmp_path, source=()))

    def test_missing_source(self, tmp_path):
        with pytest.raises(ConfigError, match=r"data.source: .*/videos does not exist"):
            prepare(small_config(tmp_path))

    def test_folder_without_videos(self, tmp_path):
        (tmp_path / "videos").mkdir()
        with pytest.raises(ConfigError, match=r"holds no video file"):
            prepare(small_config(tmp_path))

    def test_all_bad_caption_files_at_once(self, tmp_path):
        videos = make_videos(tmp_path, a=(13,), b=(13,))
        (videos / "a.yaml").write_text("shot: [x]")
        (videos / "b.json").write_text("{")
        with pytest.raises(CaptionError, match=r"(?s)a.yaml: .*did you mean 'shots'.*b.json cannot be read"):
            prepare(small_config(tmp_path))

    def test_caption_too_long(self, tmp_path):
        videos = make_videos(tmp_path, a=(13,))
        (videos / "a.yaml").write_text(f"shots: [short, {'word ' * 64}]")
        with pytest.raises(CaptionError, match=r"a.yaml: the caption 'word .*65 tokens.*text.max_tokens is 64"):
            prepare(small_config(tmp_path))


def test_nothing_usable_says_why(tmp_path):
    videos = make_videos(tmp_path, short=(4,))
    (videos / "broken.mp4").write_bytes(b"x" * 99)
    with pytest.raises(DataError, match=r"(?s)no clip.*\n  broken.mp4: .*\n  short.mp4: too short: .* 4 frames"):
        prepare(small_config(tmp_path, min_shot_frames=5))
    assert not list((tmp_path / "cache").glob("*/manifest.json"))


class TestReuse:
    def test_found_again_without_opening_a_video(self, tmp_path, monkeypatch):
        make_videos(tmp_path, a=(13,))
        cfg = small_config(tmp_path)
        first = prepare(cfg)
        monkeypatch.setattr(Work, "__init__", lambda *_, **__: pytest.fail("prepared again"))
        os.utime(tmp_path / "videos" / "a.mp4", (0, 0))  # a copied or downloaded file is the same file
        assert prepare(cfg) == first
        # What does not touch the encoded scenes may change.
        assert prepare(with_data(cfg, caption_dropout=0.5, workers=1)) == first

    def test_the_same_bytes_as_text_and_as_yaml(self, tmp_path):
        videos = make_videos(tmp_path, a=(13,))
        (videos / "a.txt").write_text("caption: a dog")
        assert prepare(small_config(tmp_path)).scenes[0].caption == "caption: a dog"
        (videos / "a.txt").rename(videos / "a.yaml")
        assert prepare(small_config(tmp_path)).scenes[0].caption == "a dog"

    def test_a_folder_under_the_name_of_another_is_not_believed(self, tmp_path):
        make_videos(tmp_path, a=(13,))
        cfg = small_config(tmp_path)
        first, other = prepare(cfg).folder, prepare(with_data(cfg, default_caption="another")).folder
        shutil.rmtree(first)
        other.rename(first)
        with pytest.raises(
            DataError, match=rf"{first} holds the data of {other.name}, according to its manifest; rename"
        ):
            prepare(cfg)

    @pytest.mark.parametrize("change", ["setting", "video", "captions", "another file", "split"])
    def test_made_anew_when_something_changed(self, tmp_path, change):
        videos = make_videos(tmp_path, a=(13,), b=(13,))
        cfg = small_config(tmp_path)
        first = prepare(cfg)
        if change == "setting":
            cfg = with_data(cfg, keyframes=2)
        elif change == "video":
            make_clip(videos / "a.mp4", shots=1, frames_per_shot=13, size=SIZE, seed=9)
        elif change == "captions":
            (videos / "b.yaml").write_text("caption: new")
        elif change == "another file":
            make_clip(videos / "c.mp4", shots=1, frames_per_shot=13, size=SIZE)
        else:
            cfg = with_data(cfg, source=(str(videos / "a.mp4"),), validation_source=(str(videos / "b.mp4"),))
        assert prepare(cfg).folder != first.folder
        assert load_manifest(first.folder) == first  # what was there stays

    def test_a_prepared_folder_can_be_moved_and_used_without_videos(self, tmp_path):
        videos = make_videos(tmp_path, a=(13,))
        cfg = small_config(tmp_path)
        name = prepare(cfg).folder.name
        (tmp_path / "cache").rename(tmp_path / "moved")
        (videos / "a.mp4").unlink()
        moved = with_data(cfg, source=(), cache=str(tmp_path / "moved" / name))
        assert prepare(moved).folder == tmp_path / "moved" / name
        with pytest.raises(DataError, match=r"data.height = 32, but it was prepared with 8; data.fps = 24.0, .* 12.0"):
            prepare(with_data(moved, height=32, fps=24.0))

    def test_what_a_killed_run_left_is_cleared(self, tmp_path):
        make_videos(tmp_path, a=(13,))
        cfg = small_config(tmp_path)
        folder = prepare(cfg).folder
        partial = folder.with_name(f".{folder.name}.partial")
        folder.rename(partial)
        (partial / "manifest.json").unlink()
        assert prepare(cfg).folder == folder
        assert not partial.exists()
        verify(load_manifest(folder), [0])

    def test_two_processes_at_once(self, tmp_path):
        """Both get the same folder; only one did the work."""
        make_videos(tmp_path, a=(13, 13), b=(13,))
        cfg = small_config(tmp_path)
        with multiprocessing.get_context("spawn").Pool(2) as pool:
            manifests = pool.map(prepare, [cfg, cfg])
        assert manifests[0] == manifests[1]
        verify(manifests[0], [0])


class TestDamage:
    @pytest.fixture
    def manifest(self, tmp_path):
        make_videos(tmp_path, a=(13,), b=(13, 13))
        return prepare(small_config(tmp_path))

    def test_missing_and_shortened_shards(self, manifest):
        shard = manifest.shard_path(0)
        content = shard.read_bytes()
        shard.write_bytes(content[:-1])
        with pytest.raises(DataError, match=rf"{shard.name} has {len(content) - 1} bytes instead of {len(content)}"):
            load_manifest(manifest.folder)
        shard.unlink()
        with pytest.raises(DataError, match=rf"{shard.name} is missing"):
            load_manifest(manifest.folder)

    def test_changed_byte(self, manifest):
        """The checksum finds it in any place; reading finds it where it matters, and names shard and scene."""
        shard = manifest.shard_path(0)
        content = bytearray(shard.read_bytes())
        start = content.index(b"video.npy")
        content[start : start + 64] = bytes(64)
        shard.write_bytes(content)
        manifest = load_manifest(manifest.folder)
        with pytest.raises(DataError, match=rf"{shard.name} is damaged: its SHA-256 is"):
            verify(manifest, [0])
        with pytest.raises(DataError, match=rf"{shard.name} is damaged at record 0 \(scene a.mp4#0\)"):
            ShardReader(manifest).read(manifest.scenes[0])

    def test_manifest(self, manifest):
        path = manifest.folder / "manifest.json"
        content = json.loads(path.read_text())
        path.write_text(json.dumps(content | {"version": 0}))
        with pytest.raises(DataError, match=r"another version"):
            load_manifest(manifest.folder)
        path.write_text(path.read_text()[:100])
        with pytest.raises(DataError, match=r"manifest.json cannot be read"):
            load_manifest(manifest.folder)

    def test_codec(self, manifest):
        path = manifest.folder / "codec.npz"
        with np.load(path) as arrays:
            state = dict(arrays)
        np.savez(path, **state | {"rest_mean": state["rest_mean"] + 1})
        with pytest.raises(DataError, match=r"codec.npz is not the codec"):
            codec_of(manifest)
        for content in (path.read_bytes()[:2000], b""):
            path.write_bytes(content)
            with pytest.raises(DataError, match=r"codec.npz cannot be read"):
                codec_of(manifest)

    def test_another_shape_than_the_manifest_says(self, manifest):
        other = dataclasses.replace(manifest, latent_shape=(2, 3, 5))
        with pytest.raises(DataError, match=r"scene a.mp4#0\): it holds latents \(4, 2, 3, 4\)"):
            ShardReader(other).read(other.scenes[0])


_FULL_DISK = """
import resource, sys
from pathlib import Path
from moc_jax.data.prepare import prepare
from moc_jax.data.quality import psnr
from tests.data.small import small_config
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
prepare(small_config(Path(sys.argv[1]), keyframes=200))
"""


@pytest.mark.parametrize("room", [pytest.param(20_000, marks=pytest.mark.long), 70_000])
def test_full_disk_leaves_nothing_half_written(tmp_path, room):
    """Files may not grow past a limit, which fails as a full disk does: first the codec, then a shard. What was
    completed before is kept."""
    make_videos(tmp_path, a=(13, 13, 13), b=(13, 13, 13))
    command = [sys.executable, "-c", _FULL_DISK, str(tmp_path), str(room)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert f"DataError: the encoded scenes cannot be written to {tmp_path / 'cache'}" in last
    assert "File too large" in last
    left = {path.suffix for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    if room > 50_000:
        assert re.search(r"encoded/\w\w/\.\w{32}\.array_record\.\d+\.tmp cannot be written", last)
        assert left == {".npz", ".frames", ".json", ".claim", ".captions", ""}
        assert len(list((tmp_path / "cache" / "waiting").glob("*.frames"))) == 2
    else:
        assert not left & {".npz", ".array_record", ".tmp"}
    done = prepare(small_config(tmp_path, keyframes=200))
    assert done.counts["files"] == 2
    verify(done, range(2))


def test_memory_does_not_grow_with_the_video(tmp_path):
    """Ten times the video, the same memory: one shot at a time is held, never a file."""

    def peak(folder, shots):
        videos = make_videos(folder, long=(24,) * shots)
        (videos / "long.yaml").write_text(f"cuts: {[2.0 * k for k in range(1, shots)]}")
        tracemalloc.start()
        prepare(small_config(folder, height=64, width=96, shots_per_scene=2))
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    short, long = peak(tmp_path / "short", 4), peak(tmp_path / "long", 40)
    assert long < 1.1 * short, f"{long / 1e6:.1f} MB against {short / 1e6:.1f} MB"
    pixels = 40 * 24 * 64 * 96 * 3
    assert long < pixels, f"{long / 1e6:.1f} MB for {pixels / 1e6:.1f} MB of pixels"


@pytest.mark.long
def test_memory_does_not_grow_with_the_shot(tmp_path):
    """One uncut shot, in parts of 9 frames."""

    def peak(folder, frames):
        make_videos(folder, long=(frames,))
        tracemalloc.start()
        manifest = prepare(small_config(folder, height=64, width=96, max_shot_frames=9))
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert manifest.counts["frames"] == frames
        assert manifest.counts["unused_frames"] < 4
        return most

    short, long = peak(tmp_path / "short", 30), peak(tmp_path / "long", 300)
    assert long < 1.1 * short, f"{long / 1e6:.1f} MB against {short / 1e6:.1f} MB"


def test_what_a_video_has_lost_is_noted_once(tmp_path):
    """Also when its frames waited for the codec."""
    (tmp_path / "videos").mkdir()
    stamped(tmp_path / "videos" / "a.mkv", [0, *range(40, 2000, 40), 1960, 14_000, 14_040])
    manifest = prepare(small_config(tmp_path))
    notes = [note for note in manifest.notes if "caption" not in note]
    assert notes == [
        "a.mkv: a frame is shown for more than 10 s (once, at 1.96 s; 12.04 s)",
        "a.mkv: a frame has the time stamp of the next one and is not shown (once, at 1.96 s)",
    ]
    assert "note: a.mkv: a frame is shown" in manifest.summary()
    assert manifest.counts["frames"] == 169


def test_the_codec_is_measured_on_what_it_encodes(tmp_path):
    """The first part of each video. PSNR by split; kept, so that later runs report it too."""
    videos = make_videos(tmp_path, a=(13, 9), b=(17,))
    (videos / "a.yaml").write_text("cuts: [1.083]")
    held = make_videos(tmp_path / "held", c=(13,), other=(5,))
    cfg = small_config(tmp_path, validation_source=(str(held / "c.mp4"),))
    manifest = prepare(cfg)
    codec, means = codec_of(manifest), {}
    for split, cuts in {"train": {"a": (13,), "b": (17,)}, "validation": {"c": (13,)}}.items():
        folder = videos if split == "train" else held
        clips = [np.split(read_video(folder / f"{name}.mp4", *SIZE, 12.0), ends)[:-1] for name, ends in cuts.items()]
        shots = [shot for clip in clips for shot in clip]
        made = [pixels_from_unit(codec.decode(codec.encode(pixels_to_unit(shot)))) for shot in shots]
        means[split] = np.mean([psnr(a, b) for a, b in zip(shots, made)])
    line = f"PSNR {means['train']:.1f} dB on training scenes, PSNR {means['validation']:.1f} dB on held-out scenes"
    assert f"the codec's reconstruction, which no sample surpasses: {line}" in manifest.summary()
    assert prepare(cfg).codec_psnr == manifest.codec_psnr == load_manifest(manifest.folder).codec_psnr


def test_an_exact_reconstruction_has_a_finite_psnr(tmp_path):
    """JSON knows no infinity."""
    (tmp_path / "videos").mkdir()
    write_video(tmp_path / "videos" / "black.mp4", np.zeros((13, *SIZE, 3), np.uint8), 12)
    manifest = prepare(small_config(tmp_path))
    assert load_manifest(manifest.folder).codec_psnr == {"train": 99.0}


def test_many_shots_are_measured_in_part(tmp_path, monkeypatch):
    monkeypatch.setattr("moc_jax.data.encode._ONE_IN", 4)
    videos = make_videos(tmp_path, a=(5,) * 9)
    (videos / "a.yaml").write_text(f"cuts: {[round(5 * k / 12, 3) for k in range(1, 9)]}")
    decoded, decode = [], PCACodec.decode
    monkeypatch.setattr(PCACodec, "decode", lambda self, latents: decoded.append(len(latents)) or decode(self, latents))
    manifest = prepare(small_config(tmp_path))
    assert manifest.counts["shots"] == 9
    assert len(decoded) == 3  # the first, the fifth and the ninth
    assert manifest.codec_psnr.keys() == {"train"}


def test_long_shots_are_measured_in_part(tmp_path, monkeypatch):
    make_videos(tmp_path, a=(50,))
    decoded, decode = [], PCACodec.decode
    monkeypatch.setattr(PCACodec, "decode", lambda self, latents: decoded.append(len(latents)) or decode(self, latents))
    prepare(small_config(tmp_path))
    assert decoded == [5]  # 17 frames


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_is_shown_for_a_log_and_for_a_terminal(tmp_path, capsys, monkeypatch, terminal):
    """In a log, plain lines now and then; on a terminal, a bar."""
    monkeypatch.setattr("moc_jax.progress.EVERY", 0.001)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    make_videos(tmp_path, a=(13, 13), b=(13,))
    prepare(small_config(tmp_path))
    shown = capsys.readouterr().err
    for what in ("finding shots", "encoding"):
        assert (f"\r{what}" in shown) == terminal
        assert (f"{what}: 2 of 2 files in 00:0" in shown) != terminal
    assert ("\r" in shown) == terminal
