"""A run that starts from public weights, and whose own become public: `train.init_from`, `moc_jax.weights export`."""

import dataclasses

import numpy as np
import pytest

from moc_jax import weights
from moc_jax.config import ConfigError, WanConfig
from moc_jax.data import prepare
from moc_jax.training.loop import train
from moc_jax.training.start import check_public, initial_codec
from moc_jax.weights.__main__ import main
from tests.training.small import CONFIG, changed, mesh_of
from tests.weights.folders import arrays, write
from tests.weights.test_weights import contents

MODEL = WanConfig(
    dim=24, depth=2, heads=2, mlp_dim=32, latent_channels=4, text_dim=8, text_rows=4, dtype="float32", remat="none"
)


def starting(config, folder, tmp_path, **model):
    config = dataclasses.replace(config, model=dataclasses.replace(MODEL, **model), workdir=str(tmp_path / "run"))
    return changed(config, train={"init_from": str(folder), "steps": 1})


@pytest.mark.long
def test_a_run_starts_from_public_weights_and_ends_in_public_ones(prepared_config, tmp_path, capsys):
    before = arrays(MODEL, "original")
    folder = write(tmp_path / "theirs", before, MODEL, "original")
    config = starting(prepared_config, folder, tmp_path)
    check_public(config)
    assert initial_codec(config) is None
    train(config, prepare(config), mesh_of(1))
    assert f"from the weights in {folder}" in capsys.readouterr().out
    main(["export", config.workdir, str(tmp_path / "ours"), "--names", "original"])
    assert "after 1 steps" in capsys.readouterr().out
    after = contents(tmp_path / "ours")["network"]
    assert after.keys() == before.keys()
    moved = [float(np.abs(after[name] - before[name]).max()) for name in before]
    assert 0 < max(moved) < 2 * config.optimizer.learning_rate  # one step of Adam away
    weights.check_model(weights.open_weights(tmp_path / "ours"), config.model, "it")


def test_weights_of_another_model_are_refused_before_any_video_is_opened(tmp_path):
    folder = write(tmp_path / "theirs", arrays(MODEL), MODEL)
    with pytest.raises(
        ConfigError, match=r"^train\.init_from .* model\.mlp_dim is 32 there and 40 here; model\.bou.* 0\.5 h"
    ):
        check_public(starting(CONFIG, folder, tmp_path, mlp_dim=40, boundary=0.5))
    with pytest.raises(ConfigError, match=r"model\.name is 'wan' there and 'mmdit' here"):
        check_public(changed(CONFIG, train={"init_from": str(folder)}))
    (folder / "config.json").write_text("{")
    with pytest.raises(weights.WeightsError, match=r"config\.json can't be read"):
        check_public(starting(CONFIG, folder, tmp_path))
    check_public(starting(CONFIG, tmp_path, tmp_path))  # no public weights, and so not looked at here
