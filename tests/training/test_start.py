"""What a run starts from: another run's weights and codec, its own checkpoints, and never the wrong latents."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest

from moc_jax.checkpoint import CheckpointError, load_codec_state, load_for_sampling
from moc_jax.codecs import CodecMismatch
from moc_jax.config import ConfigError
from moc_jax.data import DataError, codec_of, prepare
from moc_jax.data.work import Work
from moc_jax.training.loop import train
from moc_jax.training.metrics import read_metrics
from moc_jax.training.start import check_initial, initial_codec, trained_on
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


@pytest.mark.long
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
    assert initial_codec(first).fingerprint == prepare(first).codec_fingerprint
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


@pytest.mark.long
def test_a_run_keeps_its_codec_when_another_is_fitted(first, tmp_path, capsys):
    """The cache is lost, or a run beside this one fits a codec on more videos: latents stay what they were."""
    shutil.copytree(first.workdir, tmp_path / "run")
    known = prepare(first)
    config = changed(first, train={"steps": 3}, data={"cache": str(tmp_path / "cache")})
    config = dataclasses.replace(config, workdir=str(tmp_path / "run"))
    beside = changed(config, data={"source": (*config.data.source, *config.data.validation_source)})
    assert prepare(changed(beside, data={"validation_source": ()})).codec_fingerprint != known.codec_fingerprint
    manifest = prepare(config, initial_codec(config))
    assert manifest.fingerprint == known.fingerprint
    assert manifest.codec_fingerprint == known.codec_fingerprint
    train(config, manifest, mesh_of(1))
    assert "resuming after step 2" in capsys.readouterr().out


def test_resuming_with_other_videos_names_the_ways_out_before_any_is_opened(first, second, tmp_path, monkeypatch):
    shutil.copytree(first.workdir, second.workdir)
    known = trained_on(second)
    assert known == prepare(first).fingerprint
    monkeypatch.setattr(Work, "__init__", lambda *_, **__: pytest.fail("work began"))
    ways = r"--train\.allow-new-data True; .* --train\.init-from and another --workdir"
    with pytest.raises(DataError, match=rf"trained on other data than it is given now; .*{ways}"):
        prepare(second, initial_codec(second), known=known)
    there = changed(second, data={"cache": first.data.cache})
    with pytest.raises(DataError, match=r"given now \(1 video new, 3 videos gone\); "):
        prepare(there, initial_codec(there), known=known)
    settings = changed(first, data={"keyframes": 2})
    with pytest.raises(DataError, match=r"given now \(data\.keyframes = 2\); "):
        prepare(settings, initial_codec(first), known=known)
    captions = changed(
        first, data={"validation_source": (), "source": (*first.data.source, *first.data.validation_source)}
    )
    with pytest.raises(DataError, match=r"given now \(captions or splits differ\); "):
        prepare(captions, initial_codec(first), known=known)
    assert prepare(first, known=known).fingerprint == known
    assert trained_on(changed(second, train={"allow_new_data": True})) is None
    assert trained_on(dataclasses.replace(second, workdir=str(tmp_path / "new"))) is None


@pytest.mark.long
def test_a_run_takes_more_videos_when_told_so(first, tmp_path, capsys):
    """Steps are counted on, with the codec of before; the new data's first epoch begins, and resumes exactly."""
    shutil.copytree(first.workdir, tmp_path / "run")
    make_clip(tmp_path / "more.mp4", shots=2, seed=7, frames_per_shot=9)
    config = changed(
        dataclasses.replace(first, workdir=str(tmp_path / "run")),
        train={"steps": 4, "allow_new_data": True},
        data={"source": (*first.data.source, str(tmp_path / "more.mp4"))},
    )
    manifest = prepare(config, initial_codec(config), known=trained_on(config))
    assert manifest.codec_fingerprint == prepare(first).codec_fingerprint
    train(config, manifest, mesh_of(1))
    assert "other data than before step 2: its first epoch begins" in capsys.readouterr().out
    train(changed(config, train={"steps": 5, "allow_new_data": False}), manifest, mesh_of(1))
    assert "other data" not in capsys.readouterr().out
    assert [row["step"] for row in read_metrics(f"{config.workdir}/metrics.jsonl")] == [1, 2, 3, 4, 5]
