"""moc-plan."""

import json

import pytest

from moc_jax.commands.plan import main, options
from moc_jax.config import ConfigError


def test_a_plan_is_printed_or_json(capsys):
    words = ["--config", "multi_shot", "--topology", "h200:8", "--price", "3"]
    main(words)
    out = capsys.readouterr().out
    assert "parameters; 8 scene(s) of 8 shots and 180,504 tokens" in out
    main([*words, "--json"])
    assert json.loads(capsys.readouterr().out)["memory"]["fits"]
    main([*words, "--sample"])
    assert "a scene: 30 steps with unipc" in capsys.readouterr().out


def test_unknown_topologies_are_refused_with_the_list(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--config", "multi_shot", "--topology", "v9:2x2"])
    assert end.value.code == 2
    assert "v5p: 1x1x1" in capsys.readouterr().err


def test_options_that_do_not_go_together():
    with pytest.raises(ConfigError, match="training steps"):
        options(["--config", "demo", "--sample", "--compile"])
    with pytest.raises(ConfigError, match="--price"):
        options(["--config", "demo", "--price", "much"])
