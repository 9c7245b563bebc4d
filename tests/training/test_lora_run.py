"""Runs that train adapters: what their checkpoints hold, what they are beside, and that resuming is not stopping."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest

from moc_jax import models
from moc_jax.checkpoint import CheckpointError, load_for_sampling, newest_meta
from moc_jax.config import ConfigError, LoraConfig
from moc_jax.data import prepare
from moc_jax.training.loop import train
from moc_jax.training.start import begin, check_initial, check_public, check_resumable, initial_codec, licence_of
from moc_jax.training.state import make_blueprint
from moc_jax.weights.adapters import export_adapters
from tests.training.small import CONFIG, changed, mesh_of
from tests.training.test_public_weights import MODEL
from tests.weights.folders import arrays, write, write_tensors

LORA = LoraConfig(rank=3, alpha=6.0, dropout=0.1)


def run_of(config, tmp_path, name, base, steps, **model):
    config = dataclasses.replace(config, workdir=str(tmp_path / name))
    return changed(config, train={"init_from": str(base), "steps": steps, "checkpoint_every": 2}, model=model)


def trained(config):
    """What its newest checkpoint says after the run."""
    check_public(config)
    train(config, prepare(config, initial_codec(config)), mesh_of(1))
    return newest_meta(config.workdir)


@pytest.fixture
def public(prepared_config, tmp_path):
    """A run with adapters beside public weights."""
    base = write(tmp_path / "base", arrays(MODEL, "original"), MODEL, "original")
    config = dataclasses.replace(prepared_config, model=dataclasses.replace(MODEL, lora=LORA))
    return run_of(config, tmp_path, "run", base, 2)


@pytest.mark.long
def test_resuming_is_not_stopping_and_the_base_is_known_wherever_it_lies(public, tmp_path, capsys):
    first = trained(public)
    out = capsys.readouterr().out
    assert "parameters of adapters, beside" in out
    assert out.count("licence of the weights in") == 1
    more = changed(public, train={"steps": 4})
    at_once = trained(dataclasses.replace(more, workdir=str(tmp_path / "at once")))
    moved = tmp_path / "moved"
    (tmp_path / "base").rename(moved)
    with pytest.raises(CheckpointError, match=r"train\.init_from .*base, the weights that .* is not there; name"):
        initial_codec(more)
    second = trained(changed(more, train={"init_from": str(moved)}))
    out = capsys.readouterr().out
    assert out.partition("resuming after step 2")[2].count("licence of the weights in") == 1
    assert (second.step, second.digests) == (4, at_once.digests)
    assert first.digests != at_once.digests
    assert (first.base.place, second.base.place) == (str(tmp_path / "base"), str(moved))
    assert first.base.digests == second.base.digests

    held = {part: {name.split("/")[-2] for name in of} for part, of in second.digests.items() if part != "optimizer"}
    assert held == {"params": {"lora"}, "ema": {"lora"}}  # no base, whatever its size
    assert not any("kernel" in name for name in second.digests["optimizer"])

    tensors = arrays(MODEL, "original")
    tensors["blocks.1.ffn.0.weight"] = tensors["blocks.1.ffn.0.weight"] + 1
    write_tensors(moved / "diffusion_pytorch_model.safetensors", tensors)
    with pytest.raises(
        CheckpointError, match=r"moved holds other weights .* 1 of 42 arrays .* network/blocks/mlp/up/k"
    ):
        trained(changed(more, train={"init_from": str(moved), "steps": 5}))
    with pytest.raises(CheckpointError, match="holds other weights"):
        load_for_sampling(public.workdir)


@pytest.mark.long
def test_a_run_is_a_base_and_adapters_are_merged_or_apart(prepared_config, tmp_path):
    whole = dataclasses.replace(prepared_config, workdir=str(tmp_path / "whole"))
    trained(changed(whole, train={"steps": 3}))
    config = run_of(whole, tmp_path, "run", tmp_path / "whole", 2, lora=LORA)
    assert trained(config).base.place == str(tmp_path / "whole/checkpoints/3")
    shutil.move(tmp_path / "whole", tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"the checkpoint's base .*whole/checkpoints/3, .* is not there; name"):
        load_for_sampling(config.workdir)
    place = str(tmp_path / "elsewhere")
    merged = load_for_sampling(config.workdir, base=place)
    apart = load_for_sampling(config.workdir, base=place, adapters="apart")
    alone = load_for_sampling(config.workdir, adapters="alone")
    base = load_for_sampling(place).params
    assert (merged.config.model.lora, apart.config.model.lora) == (LoraConfig(), LORA)
    assert jax.tree.structure(alone.params) == jax.tree.structure(models.trained(apart.params))
    jax.tree.map(np.testing.assert_array_equal, models.frozen(apart.params), base)  # float32
    found = models.merged(base, alone.params, LORA)
    jax.tree.map(np.testing.assert_array_equal, found, merged.params)
    moved = np.abs(found["blocks"]["video"]["qkv"]["kernel"] - base["blocks"]["video"]["qkv"]["kernel"])
    assert moved.max() > 0

    # Whole training continues from both together, but no adapters beside adapters.
    check_initial(config, whole)
    again = run_of(whole, tmp_path, "again", config.workdir, 1)
    shutil.move(tmp_path / "elsewhere", tmp_path / "whole")
    assert trained(again).base is None
    with pytest.raises(CheckpointError, match=r"init_from .*run holds adapters, and no weights"):
        trained(run_of(whole, tmp_path, "third", config.workdir, 1, lora=LORA))


def test_adapters_start_from_a_file(tmp_path):
    cfg = dataclasses.replace(MODEL, lora=LORA)
    blueprint = make_blueprint(cfg, CONFIG.optimizer, CONFIG.train, mesh_of(1))
    shapes = blueprint.abstract.params
    random = np.random.default_rng(0)
    ours = jax.tree.map(lambda x: random.normal(size=x.shape).astype(np.float32), shapes)
    export_adapters(cfg, ours, tmp_path / "lora", names="comfyui")
    config = changed(CONFIG, train={"init_adapters": str(tmp_path / "lora"), "init_from": "theirs"})
    frozen = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), blueprint.abstract.frozen)
    state, report = begin(dataclasses.replace(config, model=cfg), None, blueprint, frozen)
    assert report.endswith(f"from the weights in theirs and the adapters in {tmp_path / 'lora'}")
    for part in (state.params, state.ema):
        jax.tree.map(np.testing.assert_array_equal, part, ours)
    assert state.frozen is frozen


def test_adapters_need_a_base_and_stay_what_they_are():
    adapted = changed(CONFIG, model={"lora": LORA})
    with pytest.raises(ConfigError, match=r"train\.init_adapters names adapters, but model\.lora\.rank is 0"):
        check_public(changed(CONFIG, train={"init_adapters": "lora"}))
    with pytest.raises(ConfigError, match=r"rank = 3 trains adapters .* train\.init_from names none"):
        check_public(adapted)
    with pytest.raises(ConfigError, match=r"model\.lora\.rank is 3 there and 4 here"):
        check_resumable(adapted, changed(CONFIG, model={"lora": dataclasses.replace(LORA, rank=4)}))
    check_initial(CONFIG, adapted)


def test_other_adapters_are_refused_before_any_data_is_prepared(tmp_path):
    cfg = dataclasses.replace(MODEL, lora=LORA)
    shapes = make_blueprint(cfg, CONFIG.optimizer, CONFIG.train, mesh_of(1)).abstract.params
    export_adapters(cfg, jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes), tmp_path / "lora", names="comfyui")
    base = write(tmp_path / "base", arrays(MODEL), MODEL)
    config = changed(CONFIG, train={"init_adapters": str(tmp_path / "lora"), "init_from": str(base)})
    config = dataclasses.replace(config, workdir=str(tmp_path / "run"))
    check_public(dataclasses.replace(config, model=cfg))
    for other in ({"rank": 4}, {"alpha": 3.0}, {"targets": ("mlp/*",)}):
        differs = dataclasses.replace(cfg, lora=dataclasses.replace(LORA, **other))
        with pytest.raises(ConfigError, match=r"train\.init_adapters .*lora has other adapters than model\.lora says"):
            check_public(dataclasses.replace(config, model=differs))


def test_the_licence_of_public_weights_is_reported(tmp_path):
    assert "licence of the weights in" in licence_of(str(write(tmp_path / "base", arrays(MODEL), MODEL)))
    assert licence_of("") == licence_of(str(tmp_path / "run")) == ""
