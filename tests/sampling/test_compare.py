"""PSNR, and a training scene's own reconstruction."""

import re
from pathlib import Path

import numpy as np
import pytest

from moc_jax.codecs import fit_codec, pixels_from_unit, pixels_to_unit
from moc_jax.config import ConfigError
from moc_jax.data.manifest import DataError, codec_of
from moc_jax.data.prepare import prepare
from moc_jax.data.quality import psnr
from moc_jax.data.video import read_video
from moc_jax.sampling.compare import mean_psnr, prepared_scene, training_scene
from moc_jax.sampling.scenes import Canvas, make_request
from moc_jax.text import build_text_encoder
from tests.data.small import SIZE, make_videos, small_config, with_data


def test_psnr_of_bytes_and_of_floats():
    random = np.random.default_rng(0)
    a = random.integers(10, 240, size=(3, 8, 8, 3)).astype(np.uint8)
    assert psnr(a, a) == np.inf
    assert psnr(a, a + np.uint8(5)) == pytest.approx(20 * np.log10(255 / 5))
    as_float = lambda x: x.astype(np.float32) / 127.5 - 1  # noqa: E731
    assert psnr(as_float(a), as_float(a + np.uint8(5))) == pytest.approx(20 * np.log10(255 / 5), abs=1e-4)
    assert psnr(np.zeros((1,), np.uint8), np.full((1,), 255, np.uint8)) == 0
    with pytest.raises(ValueError, match="uint8 with float32"):
        psnr(a, as_float(a))


def test_mean_psnr_weighs_shots_alike():
    a = [np.zeros((1, 2, 2, 3), np.uint8), np.zeros((9, 2, 2, 3), np.uint8)]
    b = [a[0] + np.uint8(1), a[1] + np.uint8(10)]
    mean, per_shot = mean_psnr(a, b)
    assert per_shot == pytest.approx([20 * np.log10(255), 20 * np.log10(25.5)])
    assert mean == pytest.approx(np.mean(per_shot))
    with pytest.raises(ValueError, match="cannot compare shots"):
        mean_psnr(a, a[:1])


def test_a_training_scene_comes_with_its_storyboard_and_its_reconstruction(tmp_path):
    make_videos(tmp_path, film=(9, 14))
    config = small_config(tmp_path, default_shot_caption="part {shot}")
    manifest = prepare(config)
    codec = codec_of(manifest)
    scene = training_scene(config, codec, 0, data=manifest.fingerprint)
    board, shots = scene.board, scene.codec
    assert [shot.caption for shot in board.shots] == ["part 1", "part 2"]
    assert [len(frames) for frames in shots] == [9, 13]
    clip = read_video(tmp_path / "videos" / "film.mp4", *SIZE, config.data.fps)
    # Stored in half precision, or it would be the same to the bit.
    assert psnr(shots[0], pixels_from_unit(codec.decode(codec.encode(pixels_to_unit(clip[:9]))))) > 50
    assert [name for name, _ in scene.rows()] == ["original", "codec"]
    for ours, theirs in zip(scene.original, (clip[:9], clip[9:22]), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    lines = scene.comparison(scene.codec).splitlines()
    assert lines[0] == "PSNR against the codec's own reconstruction: inf dB (by shot: inf, inf)"
    ceiling, per_shot = mean_psnr(shots, scene.original)
    shown = ", ".join(f"{value:.1f}" for value in per_shot)
    assert lines[1] == f"PSNR of the reconstruction against the original: {ceiling:.2f} dB (by shot: {shown})"
    canvas = Canvas(config.data, codec, config.model.patch, config.moc)
    request = make_request([board], canvas, config.sample, build_text_encoder(config.text))
    np.testing.assert_array_equal(request.lengths.shot_frames, [[3, 4]])

    with pytest.raises(ConfigError, match="no training scene 1; the data has 1"):
        training_scene(config, codec, 1, data=manifest.fingerprint)
    held_out = make_videos(tmp_path / "held", another=(9,))
    config = with_data(config, validation_source=(str(held_out),))
    manifest = prepare(config)
    assert len(manifest.scenes) == 2
    with pytest.raises(ConfigError, match="no training scene 1; the data has 1"):
        training_scene(config, codec, 1, data=manifest.fingerprint)
    other = fit_codec(config.codec, [np.random.default_rng(0).uniform(-1, 1, (9, *SIZE, 3)).astype(np.float32)])
    with pytest.raises(ConfigError, match=other.fingerprint):
        training_scene(config, other, 0, data=manifest.fingerprint)


def test_a_training_scene_is_of_the_data_that_the_run_knows_and_its_cache_stays_as_it_is(tmp_path):
    """After another codec was fitted there, another video came, and all of them were moved away."""
    videos = make_videos(tmp_path, film=(9, 14))
    config = small_config(tmp_path)
    manifest, run = prepare(config), with_data(config, refit_codec=True)
    other = make_videos(tmp_path / "more", a=(9,))
    (other / "a.mp4").rename(videos / "a.mp4")
    assert prepare(run).codec_fingerprint != manifest.codec_fingerprint
    (videos / "a.mp4").rename(videos / "another.mp4")
    videos.rename(tmp_path / "elsewhere")
    cache = Path(config.data.cache)
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*")}
    scene = training_scene(run, codec_of(manifest), 0, data=manifest.fingerprint)
    assert scene.board.name.startswith("film.mp4")
    with pytest.raises(DataError, match=r"data\.height = 64, but it was prepared with"):
        training_scene(with_data(run, height=64), codec_of(manifest), 0, data=manifest.fingerprint)
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*")} == before
    codec, gone = codec_of(manifest), f"{manifest.folder} is not there; put it back, or start the run's training again"
    manifest.folder.rename(tmp_path / "moved")
    with pytest.raises(DataError, match=re.escape(gone)):
        training_scene(run, codec, 0, data=manifest.fingerprint)
    assert not manifest.folder.exists()
    named = with_data(run, cache=str(tmp_path / "moved"))
    with pytest.raises(DataError, match=f"moved holds the data of {manifest.fingerprint}; "):
        training_scene(named, codec, 0, data="another")


@pytest.mark.parametrize("change", ["gone", "another", "unreadable", "used as it is"])
def test_an_original_is_shown_only_while_it_is_there(tmp_path, change):
    videos = make_videos(tmp_path, film=(9, 14), other=(9, 14))
    config = small_config(tmp_path, source=(str(videos / "film.mp4"),))
    manifest = prepare(config)
    config = with_data(config, cache=str(manifest.folder))  # needs no video
    if change == "gone":
        (videos / "film.mp4").unlink()
    elif change == "another":
        (videos / "other.mp4").replace(videos / "film.mp4")
    elif change == "unreadable":
        (videos / "film.mp4").unlink()
        (videos / "film.mp4").mkdir()
    scene = training_scene(config, codec_of(manifest), 0, data=manifest.fingerprint)
    there = change == "used as it is"
    assert (scene.original is not None) == there
    assert [name for name, _ in scene.rows()] == ["original"] * there + ["codec"]
    assert len(scene.comparison(scene.codec).splitlines()) == 1 + there


def test_originals_are_found_by_their_path_where_names_repeat(tmp_path):
    """Two folders, one file name: the scenes' sources are whole paths; and scenes begin anywhere in a file."""
    first, second = make_videos(tmp_path / "x", a=(9,)), make_videos(tmp_path / "y", b=(9,), a=(14, 9, 13))
    config = small_config(tmp_path, source=(str(first), str(second)), shots_per_scene=2)
    manifest = prepare(config)
    (entry,) = [scene for scene in manifest.scenes if scene.name.endswith("y/videos/a.mp4#1")]
    codec, clip = codec_of(manifest), read_video(second / "a.mp4", *SIZE, config.data.fps)
    scene = prepared_scene(config.data, manifest, codec, entry)
    (shot,), start = scene.original, entry.shots[0].start
    assert start > 14
    np.testing.assert_array_equal(shot, clip[start : start + 13])
    assert psnr(pixels_from_unit(codec.decode(codec.encode(pixels_to_unit(shot)))), scene.codec[0]) > 50
