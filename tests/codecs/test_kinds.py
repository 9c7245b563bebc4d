"""A second kind of codec, which is downloaded: built by its config, kept out of the checkpoint, checked by its hash."""

import dataclasses
import re

import numpy as np
import pytest

from moc_jax.checkpoint import Checkpoints, load_codec_state
from moc_jax.codecs import CODECS, fit_codec, load_codec
from moc_jax.config import ConfigError, TrainConfig
from tests.config.kinds import SHA256, WEIGHTS, MeanCodec, MeanConfig
from tests.test_checkpoint import CONFIG, mesh_of, state_on


@pytest.fixture
def cfg(tmp_path, monkeypatch):
    monkeypatch.setitem(CODECS, MeanConfig, MeanCodec)
    file = tmp_path / "weights"
    file.write_bytes(WEIGHTS)
    return MeanConfig(file=str(file))


def test_a_kind_of_ones_own_is_built_by_its_config(cfg):
    codec = fit_codec(cfg, [])
    assert isinstance(codec, MeanCodec)
    video = np.random.default_rng(0).uniform(-1, 1, (2, 8, 8, 3)).astype(np.float32)
    latents = load_codec(cfg, codec.state()).encode(video)
    np.testing.assert_allclose(latents, codec.encode(codec.decode(latents)), rtol=1e-6)
    assert latents.shape == (2, 2, 2, codec.channels)


def test_other_weights_than_those_referred_to_are_refused(cfg, tmp_path):
    (tmp_path / "weights").write_bytes(WEIGHTS + b"!")
    named = rf"codec\.weights is tests/mean, version 1, with SHA-256 {SHA256[:12]}…, but that of .*/weights is \w+…"
    with pytest.raises(ConfigError, match=named):
        load_codec(cfg, {})
    gone = dataclasses.replace(cfg, file=str(tmp_path / "gone"))
    with pytest.raises(
        ConfigError, match=r"codec\.weights is tests/mean, version 1, but .*/gone can't be read \(No such"
    ):
        load_codec(gone, {})


def test_a_reference_is_whole():
    with pytest.raises(ConfigError, match=re.escape("reference.sha256 is 'abc'; it must be 64 hexadecimal digits")):
        dataclasses.replace(MeanConfig().weights, sha256="abc")


def test_a_checkpoint_holds_nothing_of_what_was_downloaded(cfg, tmp_path):
    """Its config does: name, version and hash."""
    checkpoints = Checkpoints(str(tmp_path / "run" / "checkpoints"), TrainConfig())
    codec_state = fit_codec(cfg, []).state()
    checkpoints.save(1, state_on(mesh_of(1))[0], config=CONFIG, codec_state=codec_state, data_state={})
    checkpoints.close()
    assert load_codec_state(str(tmp_path / "run")) == (CONFIG, {})
