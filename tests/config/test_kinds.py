"""Tagged unions: `name` says of which kind a codec is, in Python, in JSON and on the command line."""

import contextlib
import dataclasses
import io
import json
import re

import pytest

from moc_jax.cli import load_config, parse
from moc_jax.config import Config, ConfigError, HashConfig, MMDiTConfig, ModelConfig, PcaConfig, Reference, WanConfig
from moc_jax.config.base import kinds_of
from moc_jax.config.presets import PRESETS, with_preset
from moc_jax.config_json import config_from_json, config_to_json, differences, settings_from_tree
from tests.config.kinds import SHA256, MeanConfig, WideConfig

MODEL = MMDiTConfig(latent_channels=3)
WIDE = WideConfig(codec=MeanConfig(stride=(1, 8, 8)), model=MODEL)


def test_a_union_is_of_settings_that_have_one_name_each():
    assert kinds_of(PcaConfig | MeanConfig) == {"pca": PcaConfig, "mean": MeanConfig}
    assert kinds_of(PcaConfig) == {"pca": PcaConfig}
    for other in (int, int | None, Config, Reference, PcaConfig | Config, PcaConfig | None):
        assert kinds_of(other) == {}
    assert kinds_of(ModelConfig) == {"mmdit": MMDiTConfig, "wan": WanConfig}
    assert kinds_of(HashConfig) == {"hash": HashConfig}


def test_a_value_is_of_one_of_the_kinds():
    assert WIDE.codec.weights.sha256 == SHA256
    with pytest.raises(ConfigError, match=r"codec is HashConfig.*it must be a PcaConfig or a MeanConfig"):
        WideConfig(codec=HashConfig())
    with pytest.raises(ConfigError, match=r"codec is MeanConfig.*it must be a PcaConfig or a WanVaeConfig$"):
        Config(codec=MeanConfig())
    with pytest.raises(ConfigError, match=r"model\.latent_channels = 16, but codec\.channels = 3"):
        WideConfig(codec=MeanConfig())


# ------------------------------------------------------------------------------------------------ JSON


@pytest.mark.parametrize("config", [WIDE, WideConfig()], ids=["mean", "pca"])
def test_either_kind_comes_back_from_json(config):
    text = config_to_json(config)
    assert json.loads(text)["codec"]["name"] == config.codec.name
    assert config_from_json(text, kind=WideConfig) == config


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda codec: codec.pop("name"), "codec lacks name, which says what it is; it must be one of pca, mean"),
        (
            lambda codec: codec.update(name="meen"),
            "codec.name is 'meen'; it must be one of pca, mean; did you mean mean?",
        ),
        (lambda codec: codec.update(name=3), "codec.name is 3; it must be one of pca, mean"),
        (
            lambda codec: codec.update(name="pca"),
            "unknown key codec.file: file is a setting of mean; pca has name, stride",
        ),
        (lambda codec: codec.update(whiten=0.5), "unknown key codec.whiten: whiten is a setting of pca; mean has name"),
        (lambda codec: codec.update(chanels=3), "unknown key codec.chanels; did you mean codec.channels?"),
        (lambda codec: codec["weights"].pop("version"), "codec.weights lacks version"),
        (lambda codec: codec["weights"].update(sha256="ABC"), "reference.sha256 is 'ABC'; it must be 64 hexadecimal"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*lacks")
def test_json_is_read_strictly_by_name(edit, message):
    tree = json.loads(config_to_json(WIDE))
    edit(tree["codec"])
    with pytest.raises(ConfigError, match="^" + re.escape(f"old.json: {message}")):
        config_from_json(json.dumps(tree), name="old.json", kind=WideConfig)


@pytest.mark.parametrize("field", ["model", "codec", "text"])
def test_a_kind_must_be_named_also_where_there_is_one_alone(field):
    """As it is missing from the files of before there were kinds."""
    tree = json.loads(config_to_json(Config()))
    del tree[field]["name"]
    with pytest.raises(ConfigError, match=rf"old\.json: {field} lacks name, which says what it is; it must be one of"):
        config_from_json(json.dumps(tree), name="old.json")


def test_a_part_of_a_config_is_read_by_name_too():
    tree = {"name": "mean", **json.loads(json.dumps(dataclasses.asdict(WIDE.codec)))}
    assert settings_from_tree(PcaConfig | MeanConfig, tree, "codec", name="a file") == WIDE.codec
    with pytest.raises(
        ConfigError, match=r"codec is 3; it must be an object with the fields of PcaConfig or MeanConfig"
    ):
        settings_from_tree(PcaConfig | MeanConfig, 3, "codec", name="a file")


def test_two_kinds_differ_in_their_name():
    assert differences(WIDE, WideConfig(model=MODEL, codec=PcaConfig(channels=3))) == {"codec.name": ("mean", "pca")}
    other = dataclasses.replace(WIDE.codec, weights=dataclasses.replace(WIDE.codec.weights, version="2"))
    assert differences(WIDE, dataclasses.replace(WIDE, codec=other)) == {"codec.weights.version": ("1", "2")}


# ------------------------------------------------------------------------------------------------ command line


def parsed(*argv, default=None):
    return parse(WideConfig, argv, default=default or WideConfig(), flags=False)


def test_a_name_switches_to_that_kinds_defaults():
    """Also where they fit the model only together with the options that follow."""
    config = parsed("--codec.name", "mean", "--model.latent-channels", "3", "--codec.stride", "1", "8", "8")
    assert config == WIDE
    assert parsed("--codec.name=pca", "--model.latent-channels", "16", default=WIDE).codec == PcaConfig()


def test_the_name_of_the_same_kind_changes_nothing():
    assert parsed("--codec.name", "mean", "--codec.weights.version", "2", default=WIDE).codec == dataclasses.replace(
        WIDE.codec, weights=dataclasses.replace(WIDE.codec.weights, version="2")
    )
    assert parsed(default=WIDE) == WIDE


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--codec.name", "meen"], "--codec.name is 'meen'; it must be one of pca, mean; did you mean mean?"),
        (["--codec.name"], "--codec.name is ''; it must be one of pca, mean"),
        (["--codec.name", "mean", "--codec.whiten", "1"], "--codec.whiten: whiten is a setting of pca; mean has name"),
        (["--codec.file", "x"], "--codec.file: file is a setting of mean; pca has name, stride, channels, whiten"),
        (["--codec.weights.version", "2"], "--codec.weights: weights is a setting of mean; pca has name, stride"),
    ],
)
def test_wrong_names_and_settings_of_another_kind_are_named(argv, message):
    with pytest.raises(ConfigError, match="^" + re.escape(message)):
        parsed(*argv)


def test_what_no_kind_has_is_left_to_the_parser(capsys):
    with pytest.raises(SystemExit):
        parsed("--codec.chanels", "3")
    assert "--codec.channels" in capsys.readouterr().err


def test_help_shows_the_fields_of_the_kind_that_is_named():
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), pytest.raises(SystemExit):
        parsed("--codec.name", "mean", "--help")
    assert "--codec.weights.sha256" in shown.getvalue()
    assert "--codec.whiten" not in shown.getvalue()


# ------------------------------------------------------------------------------------------------ presets


def test_a_preset_is_a_size_and_leaves_what_codec_and_encoder_decide():
    demo = load_config(["--config", "demo"])
    config = load_config(["--config", "demo", "--preset", "3b", "--model.depth", "5"])
    assert config.model == dataclasses.replace(PRESETS["3b"], latent_channels=32, text_dim=128, depth=5)
    assert dataclasses.replace(config, model=demo.model) == demo
    assert load_config(["--config", "demo", "--preset=demo"]) == demo


def test_a_preset_keeps_the_patches():
    config = Config(model=MMDiTConfig(patch=(1, 1, 1)))
    assert with_preset(config, "small").model == dataclasses.replace(PRESETS["small"], patch=(1, 1, 1))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--preset", "smal"],
            f"--preset is 'smal'; it must be one of {', '.join(PRESETS)}; did you mean small?",
        ),
        (
            ["--preset", "SMALL"],
            f"--preset is 'SMALL'; it must be one of {', '.join(PRESETS)}; did you mean",
        ),
        (["--preset"], "--preset: expected one argument"),
        (["--preset", "small", "--preset", "base"], "--preset is given 2 times: small, base; give one"),
    ],
)
def test_a_preset_that_is_none_is_named(argv, message):
    with pytest.raises(ConfigError, match="^" + re.escape(message)):
        load_config(["--config", "demo", *argv])
