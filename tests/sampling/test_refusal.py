"""Filters of captions: what they are shown, and what they answer."""

import json
import sys

import pytest

from moc_jax.config import ConfigError
from moc_jax.sampling.generate import Sampler
from moc_jax.sampling.refusal import FilterError, check_by_command, check_captions
from moc_jax.sampling.storyboard import StoryboardError
from tests.sampling.worlds import CONFIG, make_board, make_codec

SCRIPT = """
import json, sys
for line in sys.stdin:
    asked = json.loads(line)
    with open({log!r}, "a") as log:
        log.write(line)
    {answer}
"""
ANSWER = """
    refused = "face" in asked["caption"]
    print(json.dumps({"allowed": not refused, **({"reason": "no  real people"} if refused else {})}), flush=True)
"""
BOARD = make_board([("a van", 0.4), ("a known face", 0.4)], negative_prompt="faces")


@pytest.fixture
def command(tmp_path):
    def make(answer):
        script = tmp_path / "my filter.py"
        script.write_text(SCRIPT.format(log=str(tmp_path / "log"), answer=answer.strip()))
        return f"{sys.executable} '{script}'"

    return make


def test_a_command_is_shown_every_caption_and_may_refuse_one(command, tmp_path):
    calm = make_board([("a van", 0.4), ("a street", 0.4)])
    message = r"^storyboard: shots\[1\].caption is refused: no real people; give another one$"
    with pytest.raises(StoryboardError, match=message):
        check_by_command([calm, BOARD], command(ANSWER))
    asked = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [(line["place"], line["caption"]) for line in asked] == [
        ("caption", "a street"),
        ("shots[0].caption", "a van"),
        ("shots[1].caption", "a street"),
        ("caption", "a street"),
        ("shots[0].caption", "a van"),
        ("shots[1].caption", "a known face"),
    ]
    check_by_command([calm], command(ANSWER))
    check_by_command([BOARD], "")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("sys.exit('no model')", r"it ended without an answer \(no model\)"),
        ("print('yes', flush=True)", "it is not JSON"),
        ("print('{\"allowed\": 1}', flush=True)", 'it must print {"allowed": true} or'),
        ("print('{\"allowed\": false}', flush=True)", 'it must print {"allowed": true} or'),
        ('print(\'{"allowed": false, "reason": " "}\', flush=True)', 'it must print {"allowed": true} or'),
    ],
)
def test_a_command_that_does_not_answer_refuses_all(command, answer, message):
    with pytest.raises(FilterError, match=message) as raised:
        check_by_command([BOARD], command(answer))
    assert "--caption-filter, asked about caption of storyboard" in str(raised.value)


@pytest.mark.parametrize(
    ("words", "kind", "message"),
    [
        ("no-such-program --fast", FilterError, "--caption-filter 'no-such-program' cannot be run: No such file"),
        ("'open", ConfigError, "cannot be split into words"),
        ("  ", ConfigError, "names no command"),
    ],
)
def test_commands_that_cannot_be_run_are_named(words, kind, message):
    with pytest.raises(kind, match=message):
        check_by_command([BOARD], words)


def test_in_python_a_filter_is_a_function():
    def refused(caption):
        return "no real people" if "face" in caption else None

    with pytest.raises(StoryboardError, match=r"shots\[1\].caption is refused"):
        check_captions([BOARD], refused)
    with pytest.raises(StoryboardError, match=r"shots\[1\].caption is refused"):
        Sampler(CONFIG, make_codec(), caption_filter=refused)({}, [BOARD])  # before weights are looked at
