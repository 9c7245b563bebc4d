"""The shipped experiments: each loads, says how to run it, and names only files that are there."""

import dataclasses
import pathlib
import re

import pytest

from moc_jax.cli import load_config, read_config_file
from moc_jax.config.presets import PRESETS
from moc_jax.config_json import config_from_json, config_to_json
from moc_jax.sampling.storyboard import load_storyboard

ROOT = pathlib.Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.py"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_loads_and_says_how_to_run_it(path):
    config, about = read_config_file(str(path))
    assert load_config(["--config", str(path)]) == load_config(["--config", path.stem]) == config
    assert config_from_json(config_to_json(config)) == config
    assert f"moc-train --config {path.stem}" in about
    for named in re.findall(r"configs/[\w/.-]+\.(?:py|yaml)", about):
        assert (ROOT / named).is_file(), f"{path.name} names {named}, which is not there"


def test_configs_are_built_from_the_sizes_that_have_names():
    sizes = {(m.dim, m.depth, m.heads) for m in PRESETS.values()}
    for path in CONFIGS:
        model = read_config_file(str(path))[0].model
        assert (model.dim, model.depth, model.heads) in sizes, path.name


def test_the_demo_has_a_storyboard_of_the_clip_that_it_learns():
    config, _ = read_config_file(str(ROOT / "configs/demo.py"))
    board = load_storyboard(ROOT / "configs/demo/storyboard.yaml")
    assert len(board.shots) == 6
    assert PRESETS["demo"] == dataclasses.replace(config.model, latent_channels=16, text_dim=256)
