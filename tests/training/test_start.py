"""What a run starts from: another run's weights and codec, its own checkpoints, and never the wrong latents."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest

from moc_jax.checkpoint import CheckpointError, load_codec_state, load_for_sampling
from moc_jax.codecs import CodecMismatch, load_codec
from moc_jax.config import ConfigError
from moc_jax.data import DataError, codec_of, prepare
from moc_jax.data.manifest import CODEC, load_manifest
from moc_jax.training.loop import train
from moc_jax.training.metrics import read_metrics
from moc_jax.training.start import check_initial, initial_codec
from moc_jax.training.state import create_state
from tests.data.clips import make_clip
from tests.training.small import CONFIG, blueprint_of, changed, mesh_of


@pytest.fixture(scope="module")
def first(prepared_config, tmp_path_factory):
    """The config of a run of two steps, which is done."""
    workdir = str(tmp_path_factory.mktemp("first"))
    config = dataclasses.replace(changed(prepared_config, train={"steps": 2}), workdir=workdir)
    train(config, prepare(config), mesh_of(1))
    return config


@pytest.fixture
def second(first, tmp_path):
    """A run on other videos that starts from the first one's weights."""
    make_clip(tmp_path / "other.mp4", shots=3, seed=9, frames_per_shot=9)
    config = changed(
        first,
        train={"init_from": first.workdir, "steps": 1},
        data={"source": (str(tmp_path / "other.mp4"),), "validation_source": (), "cache": str(tmp_path / "cache")},
    )
    return dataclasses.replace(config, workdir=str(tmp_path / "second"))


@pytest.mark.long
def test_the_next_stage_has_weights_and_codec_of_the_one_before(first, second, capsys):
    saved, state = load_codec_state(first.workdir)
    assert saved == first
    codec = initial_codec(second)
    assert codec.fingerprint == codec_of(prepare(first)).fingerprint
    manifest = prepare(second, codec)
    assert manifest.codec_fingerprint == codec.fingerprint
    fitted = prepare(second)
    assert fitted.codec_fingerprint != codec.fingerprint
    assert fitted.fingerprint != manifest.fingerprint

    train(second, manifest, mesh_of(1))
    assert f"starting in {second.workdir} from the weights in {first.workdir}" in capsys.readouterr().out
    weights, after = (load_for_sampling(run.workdir) for run in (first, second))
    np.testing.assert_array_equal(after.codec_state["rest_basis"], state["rest_basis"])
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), weights.params, after.params)
    assert 0 < max(jax.tree.leaves(moved)) < 2 * second.optimizer.learning_rate  # one step of Adam away

    # Going on, its own checkpoint wins, and the first run may be gone.
    more = changed(second, train={"steps": 2, "init_from": "/nowhere"})
    train(more, prepare(more, initial_codec(more)), mesh_of(1))
    assert "resuming after step 1" in capsys.readouterr().out
    assert [row["step"] for row in read_metrics(f"{second.workdir}/metrics.jsonl")] == [1, 2]


def test_optimizer_and_average_start_afresh(first):
    blueprint = blueprint_of(first, mesh_of(1))
    params = load_for_sampling(first.workdir, shardings=blueprint.shardings.params).params
    state, fresh = create_state(blueprint, params), create_state(blueprint)
    for part in (state.params, state.ema):
        jax.tree.map(np.testing.assert_array_equal, part, params)
    jax.tree.map(np.testing.assert_array_equal, state.optimizer, fresh.optimizer)
    assert int(state.step) == 0


def test_weights_of_another_model_are_refused_before_any_video_is_opened(first, second):
    with pytest.raises(ConfigError, match=r"init_from .* is of another model: model\.mlp_ratio is 4\.0 there and 2\.0"):
        initial_codec(changed(second, model={"mlp_ratio": 2.0}))
    with pytest.raises(ConfigError, match=r"codec\.whiten is .*; text\.max_tokens is 64 there and 9 here"):
        check_initial(CONFIG, changed(CONFIG, text={"max_tokens": 9}, codec={"whiten": 0.1}))


def test_what_can_not_be_resumed_is_refused_before_any_video_is_opened(first, monkeypatch):
    assert initial_codec(first) is None
    with pytest.raises(ConfigError, match=r"can't be resumed .*: model\.mlp_ratio is 4\.0 there and 2\.0"):
        initial_codec(changed(first, model={"mlp_ratio": 2.0}))
    monkeypatch.setattr("moc_jax.checkpoint_layout.FORMAT", 4)
    with pytest.raises(CheckpointError, match=r"is of format 3, .* reads format 4\. Resume or sample it with"):
        initial_codec(first)


def test_data_of_another_codec_is_refused(first, second):
    with pytest.raises(CodecMismatch, match=r"trained on latents of codec \w+, but the data"):
        train(second, prepare(second), mesh_of(1))
    hand_made = changed(second, data={"cache": str(prepare(second).folder)})
    with pytest.raises(DataError, match=r"was encoded with codec \w+, but this run's is"):
        prepare(hand_made, initial_codec(hand_made))


def test_a_cache_that_was_prepared_again_with_other_bits_is_refused(first, tmp_path):
    """Its fingerprint, of settings and sources, is that of before."""
    shutil.copytree(first.workdir, tmp_path / "run")
    manifest = prepare(first)
    folder = tmp_path / "cache" / manifest.fingerprint
    shutil.copytree(manifest.folder, folder)
    with np.load(folder / CODEC) as arrays:
        state = dict(arrays)
    state["rest_basis"] = np.nextafter(state["rest_basis"], np.float32(2))
    np.savez(folder / CODEC, **state)
    other = load_codec(first.codec, state).fingerprint
    dataclasses.replace(load_manifest(folder), codec_fingerprint=other).save()

    config = changed(first, train={"steps": 3}, data={"cache": str(tmp_path / "cache")})
    config = dataclasses.replace(config, workdir=str(tmp_path / "run"))
    known = manifest.codec_fingerprint
    with pytest.raises(CodecMismatch, match=rf"codec {known}, but .* codec {other}.*--train\.init-from") as error:
        train(config, prepare(config), mesh_of(1))
    assert str(tmp_path / "run") in str(error.value)


def test_going_on_with_other_videos_names_the_way_out(first, second, tmp_path):
    shutil.copytree(first.workdir, second.workdir)
    with pytest.raises(DataError, match="give another --workdir"):
        train(second, prepare(second), mesh_of(1))
