"""Command line and saved configs: every field reachable and explained, every mistake named."""

import ast
import dataclasses
import json
import pathlib
import subprocess
import sys

import jax
import pytest

from moc_jax import config as config_module
from moc_jax.cli import clean_exit, load_config, parse, show_warning
from moc_jax.config import BucketConfig, ChunkStage, Config, ConfigError, DataConfig, MoCConfig, TrainConfig
from moc_jax.config.base import kinds_of
from moc_jax.config_json import config_from_json, config_to_json, differences

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "tiny.py"
    path.write_text(
        '"""What tiny trains."""\n'
        "from moc_jax.config import Config, TrainConfig\n"
        "config = Config(train=TrainConfig(steps=7))\n"
    )
    return str(path)


def test_overrides_reach_nested_fields_and_keep_the_rest(file):
    config = load_config(
        [
            "--config",
            file,
            "--moc.chunk.size",
            "5",
            "--model.patch",
            "1",
            "2",
            "4",
            "--data.source",
            "a",
            "b",
            "--moc.causal-routing",
            "False",
        ]
    )
    assert config.train.steps == 7
    assert config.moc.chunk.size == 5
    assert config.model.patch == (1, 2, 4)
    assert config.data.source == ("a", "b")
    assert config.moc.causal_routing is False


def test_records_are_written_with_colons(file):
    config = load_config(["--config", file, "--train.chunk-schedule", "0:10", "500:5", "--data.buckets", "2:16:64"])
    assert config.train.chunk_schedule == (ChunkStage(step=0, size=10), ChunkStage(step=500, size=5))
    assert config.data.buckets == (BucketConfig(shots=2, frames=16, text_tokens=64),)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--moc.topk", "3"], "--moc.top-k"),  # the near one is suggested
        (["--train.stepz", "3"], "--train.steps"),
        (["--moc.top-k", "-1"], "moc.top_k is -1"),
        (["--model.dim", "30"], "try dim 32"),
        (["--moc.mode", "spars"], "'dense'"),
        (["--train.steps", "many"], "--train.steps"),
        (["--train.chunk-schedule", "0-10"], "step:size"),
        (["--data.buckets", "1:2"], "shots:frames:text_tokens"),
        (["--train.chunk-schedule", "5:1", "2:1"], "steps must rise"),
    ],
)
def test_a_wrong_option_is_named_and_exits_with_2(file, capsys, monkeypatch, arguments, message):
    monkeypatch.setenv("COLUMNS", "500")
    with pytest.raises(SystemExit) as exit:
        load_config(["--config", file, *arguments])
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def test_help_shows_every_field_with_its_comment(file, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "500")
    with pytest.raises(SystemExit) as exit:
        load_config(["--config", file, "--help"])
    assert exit.value.code == 0
    shown = capsys.readouterr().out
    assert "What tiny trains." in shown
    assert "(default: 7)" in shown

    def check(kind, prefix):
        for field in dataclasses.fields(kind):
            name = f"{prefix}{field.name.replace('_', '-')}"
            default = next(iter(kinds_of(field.type).values()), field.type)
            if dataclasses.is_dataclass(default):
                check(default, f"{name}.")
            else:
                assert f"--{name} " in shown or f"--{name}," in shown, name

    check(Config, "")


# Settings that say all by their names, and records that the fields holding them explain.
PLAIN = {"heads", "seed", "learning_rate", "warmup_steps", "final_fraction", "b1", "b2", "eps", "steps", "log_every"}
PLAIN |= {"num_processes", "process_id", "checkpoint_every"}


def test_every_setting_has_a_comment():
    files = sorted(pathlib.Path(config_module.__file__).parent.glob("*.py"))
    seen = 0
    for node in (node for file in files for node in ast.parse(file.read_text()).body):
        if not isinstance(node, ast.ClassDef) or node.name == "ChunkStage":
            continue
        for field, after in zip(node.body, [*node.body[1:], None]):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                nested = isinstance(field.annotation, ast.Name) and field.annotation.id.endswith("Config")
                told = nested or field.target.id in PLAIN or isinstance(after, ast.Expr)
                assert told, f"{node.name}.{field.target.id}"
                seen += 1
    assert seen > 90


def test_an_unknown_setting_in_a_config_file_is_named_with_the_near_one(tmp_path):
    wrong = tmp_path / "wrong.py"
    wrong.write_text("from moc_jax.config import Config, MoCConfig\nconfig = Config(moc=MoCConfig(topk=3))\n")
    with pytest.raises(ConfigError, match=r"wrong\.py: MoCConfig has no setting 'topk'; did you mean 'top_k'"):
        load_config(["--config", str(wrong)])
    wrong.write_text("config = len(1)\n")
    with pytest.raises(ConfigError, match=r"line 1 of .*wrong\.py: TypeError: object of type 'int' has no len"):
        load_config(["--config", str(wrong)])


def test_the_file_must_exist_and_define_a_config(file, tmp_path):
    with pytest.raises(ConfigError, match=r"did you mean .*tiny\.py"):
        load_config(["--config", str(tmp_path / "tyny.py")])
    (tmp_path / "empty.py").write_text("settings = 3\n")
    with pytest.raises(ConfigError, match="must define `config`"):
        load_config(["--config", str(tmp_path / "empty.py")])
    with pytest.raises(ConfigError, match="no --config given"):
        load_config(["--train.steps", "3"])


def test_a_saved_config_can_be_given_too(file, tmp_path):
    saved = tmp_path / "config.json"
    saved.write_text(config_to_json(Config(train=TrainConfig(steps=9))))
    assert load_config(["--config", str(saved), "--train.seed", "4"]) == Config(train=TrainConfig(steps=9, seed=4))


def test_clean_exit_prints_the_message_only(capsys):
    with pytest.raises(SystemExit) as exit, clean_exit(OSError):
        raise ConfigError("a.b is 3")
    assert (exit.value.code, capsys.readouterr().err) == (2, "error: a.b is 3\n")
    with pytest.raises(SystemExit) as exit, clean_exit(OSError):
        raise OSError("disk")
    assert (exit.value.code, capsys.readouterr().err) == (1, "error: disk\n")
    with pytest.raises(KeyError), clean_exit(OSError):
        raise KeyError("a bug keeps its traceback")


def test_what_jax_says_of_tracebacks_is_not_shown(capsys):
    def fails(x):
        raise ConfigError("a.b is 3")

    with pytest.raises(ConfigError) as caught:
        jax.jit(fails)(1)
    assert "JAX has removed its internal frames" in "".join(caught.value.__notes__)
    caught.value.add_note("--codec names where it lies")
    with pytest.raises(SystemExit), clean_exit():
        raise caught.value
    assert capsys.readouterr().err == "error: a.b is 3\n  --codec names where it lies\n"


def test_other_dataclasses_parse_alike():
    @dataclasses.dataclass(frozen=True)
    class Options:
        out: str
        dense: bool = False

    assert parse(Options, ["--out", "x.mp4", "--dense"]) == Options("x.mp4", True)


def test_settings_are_read_without_jax(file):
    code = (
        "import sys; from moc_jax.cli import load_config; "
        f"load_config(['--config', {file!r}]); sys.exit('jax' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=60)


# ------------------------------------------------------------------------------------------------ JSON

FULL = Config(
    workdir="gs://bucket/run é",
    moc=MoCConfig(mode="dense", drop_in_rate=0.1 + 0.2),
    data=DataConfig(source=("a", "b"), buckets=(BucketConfig(shots=1), BucketConfig(shots=2))),
    train=TrainConfig(chunk_schedule=(ChunkStage(step=0, size=4), ChunkStage(step=9, size=2))),
)


def test_json_round_trip_is_exact():
    assert config_from_json(config_to_json(FULL)) == FULL
    assert config_from_json(config_to_json(Config())) == Config()


def _edited(edit) -> str:
    tree = json.loads(config_to_json(FULL))
    edit(tree)
    return json.dumps(tree)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t["moc"].update(topk=3), r"old\.json: unknown key moc\.topk; did you mean moc\.top_k\?"),
        (lambda t: t.update(modl={}), r"unknown key modl; did you mean model\?"),
        (lambda t: t["moc"].update(top_k="3"), r"moc\.top_k is '3'; it must be of type int"),
        (lambda t: t["moc"].update(top_k=True), r"moc\.top_k is True; it must be of type int"),
        (lambda t: t["moc"].update(mode="densse"), r"moc\.mode is 'densse'.*did you mean dense"),
        (lambda t: t["model"].update(patch=[1, 2]), r"model\.patch has 2 entries; it must have 3"),
        (lambda t: t["data"].update(source="a"), r"data\.source is 'a'; it must be a list"),
        (lambda t: t["data"]["buckets"][1].update(shots=1.5), r"data\.buckets\[1\]\.shots is 1\.5"),
        (lambda t: t["moc"].update(top_k=-2), r"moc\.top_k is -2"),
        (lambda t: t.update(moc=3), r"moc is 3; it must be an object"),
    ],
)
def test_json_mistakes_are_named(edit, message):
    with pytest.raises(ConfigError, match=message):
        config_from_json(_edited(edit), name="old.json")


def test_json_that_is_cut_off_is_named():
    with pytest.raises(ConfigError, match=r"old\.json: it is not JSON"):
        config_from_json(config_to_json(FULL)[:-9], name="old.json")


def test_json_older_than_a_field_takes_its_default_and_says_so():
    text = _edited(lambda t: (t["moc"].pop("window"), t["moc"].pop("top_k")))
    with pytest.warns(UserWarning, match=r"lacks moc\.top_k, moc\.window: the defaults are used"):
        assert config_from_json(text) == FULL


def test_differences_names_fields():
    other = dataclasses.replace(FULL, moc=dataclasses.replace(FULL.moc, top_k=1), workdir="x")
    assert differences(FULL, other) == {"workdir": (FULL.workdir, "x"), "moc.top_k": (5, 1)}
    assert differences(FULL, FULL) == {}


@pytest.mark.parametrize(
    ("kind", "line"),
    [(UserWarning, "warning: odd\n"), (RuntimeWarning, "warning: odd (RuntimeWarning in /a/b.py, line 3)\n")],
)
def test_a_warning_is_a_line(capsys, kind, line):
    show_warning("odd", kind, "/a/b.py", 3)
    assert capsys.readouterr().err == line
