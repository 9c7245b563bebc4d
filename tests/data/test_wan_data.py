"""Data encoded by Wan's autoencoder: from its files, in batches, wherever they lie later."""

import dataclasses
import shutil

import numpy as np
import pytest

from moc_jax.codecs import pixels_to_unit
from moc_jax.config import WanVaeConfig
from moc_jax.data import prepare
from moc_jax.data.manifest import codec_of
from moc_jax.data.shards import ShardReader
from moc_jax.data.video import read_video
from moc_jax.training.start import check_resumable
from moc_jax.weights import WeightsError
from tests.data.small import make_videos, small_config
from tests.parity.vae_figures import arrays, write


def config(folder, weights):
    cfg = small_config(folder, height=16, width=24, keyframes=3, max_shot_frames=9, long_shots="scenes")
    codec = WanVaeConfig(weights=str(weights), dtype="float32", batch=2)
    return dataclasses.replace(cfg, codec=codec, model=dataclasses.replace(cfg.model, latent_channels=16))


def test_weights_that_lack_are_named_before_anything_is_read(tmp_path):
    with pytest.raises(WeightsError, match="gone is not there"):
        prepare(config(tmp_path, tmp_path / "gone"))


@pytest.mark.long
def test_clips_are_encoded_in_batches_and_weights_may_move(tmp_path):
    """Parts of one length go together; two of the three stills, too."""
    videos, weights = make_videos(tmp_path, a=(25,)), write(tmp_path / "weights", arrays("2.1"))
    cfg = config(tmp_path, weights)
    manifest = prepare(cfg)
    frames = pixels_to_unit(read_video(videos / "a.mp4", 16, 24, 12.0))
    codec = codec_of(manifest)
    shots = [shot for scene in manifest.scenes for shot in ShardReader(manifest).read(scene)[0]]
    used = np.cumsum([0] + [4 * (len(shot) - 1) + 1 for shot in shots])
    assert len(shots) > 2
    for latents, begin, end in zip(shots, used, used[1:]):
        expected = codec.encode(frames[begin:end])
        np.testing.assert_allclose(latents, expected, atol=2e-3 * np.abs(expected).max())

    shutil.move(weights, tmp_path / "elsewhere")
    moved = config(tmp_path, tmp_path / "elsewhere")
    assert prepare(moved).fingerprint == manifest.fingerprint
    assert codec_of(manifest, moved.codec).fingerprint == codec.fingerprint
    assert check_resumable(cfg, moved).keys() == {"codec.weights"}
