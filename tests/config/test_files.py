"""Config files as they come: broken, half-saved, foreign. Each is an error with the file, the line and the cause."""

import codecs
import os
import pathlib
import re

import pytest

from moc_jax.cli import load_config, read_config_file
from moc_jax.config import AttentionConfig, Config, ConfigError, DataConfig, TrainConfig
from moc_jax.config_json import config_to_json

GOOD = "from moc_jax.config import Config\nconfig = Config()\n"
TEXT_16 = "text in UTF-16 or UTF-32; save it as UTF-8"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (GOOD + "config = (\n", "line 3 of {file}: SyntaxError: '(' was never closed"),
        (GOOD + "  config = 3\n", "line 3 of {file}: IndentationError: unexpected indent"),
        (GOOD + "import not_there\n", "line 3 of {file}: ModuleNotFoundError: No module named 'not_there'"),
        (GOOD + "from os import nothing\n", "line 3 of {file}: ImportError: cannot import name 'nothing'"),
        (GOOD + "\nConfg()\n", "line 4 of {file}: NameError: name 'Confg' is not defined"),
        (GOOD + "import json\njson.loads('{')\n", "line 4 of {file}: JSONDecodeError: Expecting property name"),
        (GOOD + "def f():\n    1 / 0\nf()\n", "line 4 of {file}: ZeroDivisionError: division by zero"),
        (GOOD + "def f(): f()\nf()\n", "line 3 of {file}: RecursionError"),
        (GOOD + "import sys\nsys.exit(3)\n", "line 4 of {file}: SystemExit: 3"),
        (GOOD + "raise MemoryError\n", "line 3 of {file}: MemoryError"),
        (
            GOOD + "class Odd(Exception):\n    def __str__(self): 1 / 0\nraise Odd\n",
            "line 5 of {file}: Odd: <exception",
        ),
        (GOOD + "import warnings; warnings.warn('old')\n", "line 3 of {file}: UserWarning: old"),
        (GOOD + "Config(workdir='')\n", "line 3 of {file}: workdir is empty"),
        (GOOD + "Config(moc={})\n", "line 3 of {file}: moc is {{}}; it must be a MoCConfig"),
        (GOOD + "Config(modl=3)\n", "line 3 of {file}: Config has no setting 'modl'; did you mean 'model'?"),
        ("x = " + "-" * 100_000 + "1", "{file}: MemoryError: Parser stack overflowed"),
        ("x = 1" + "+1" * 200_000, "{file}: RecursionError: maximum recursion depth exceeded"),
        ("x = " + "(" * 1000, "line 1 of {file}: SyntaxError: too many nested parentheses"),
        ("config = 3", "{file}: it must define `config`, a moc_jax.config.Config; found int"),
        ("", "{file}: it must define `config`, a moc_jax.config.Config; found NoneType"),
        ("from moc_jax.config import Config\nconfig = Config\n", "{file}: it must define `config`"),
        (codecs.BOM_UTF16_LE + GOOD.encode("utf-16-le"), "{file}: it is UTF-16; save it as UTF-8"),
        (GOOD.encode("utf-16-be"), "{file}: it is " + TEXT_16),
        (GOOD.encode() + b"x = '\0'\n", "line 3 of {file}: it holds a NUL byte"),
        (
            GOOD.encode() + b"# caf\xe9\n",
            f"line 3 of {{file}}: byte {len(GOOD) + 5} (0xe9) is not UTF-8; save it as UTF-8",
        ),
    ],
)
def test_a_python_file_that_fails_says_where_and_why(tmp_path, source, message):
    file = tmp_path / "wrong.py"
    file.write_bytes(source if isinstance(source, bytes) else source.encode())
    with pytest.raises(ConfigError, match="^--config,? " + re.escape(message.format(file=file))) as caught:
        load_config(["--config", str(file)])
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_a_config_file_may_define_dataclasses_with_delayed_hints(tmp_path):
    source = (
        "from __future__ import annotations\nimport dataclasses\n@dataclasses.dataclass\nclass Mine:\n    x: int = 3\n"
    )
    (tmp_path / "own.py").write_text(source + GOOD)
    assert load_config(["--config", str(tmp_path / "own.py")]) == Config()


def test_an_error_without_words_ends_with_its_name(tmp_path):
    (tmp_path / "own.py").write_text("assert 1 == 2\n")
    with pytest.raises(ConfigError, match=r"AssertionError$"):
        load_config(["--config", str(tmp_path / "own.py")])


def test_a_folder_that_is_not_there_is_named_with_where_it_was_looked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=rf"nor is there a folder 'configs', seen from {tmp_path}$"):
        load_config(["--config", "configs/demo.py"])


def test_the_configs_that_the_package_comes_with_have_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config(["--config", "demo"]).workdir == "out/demo"
    with pytest.raises(ConfigError, match=r"--config demmo: there is no config of that name; there are: demo, .*"):
        load_config(["--config", "demmo"])
    with pytest.raises(
        ConfigError, match=r"there is no such file \(`--config demo` is the one that moc_jax comes with\)"
    ):
        load_config(["--config", "configs/demo.py"])


def test_an_error_in_an_imported_file_names_both(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "base_of_all.py").write_text("\n\nsteps = ten\n")
    (tmp_path / "broken_base.py").write_text("x = [\n")
    (tmp_path / "own.py").write_text("import base_of_all\n")
    with pytest.raises(ConfigError, match=r"line 1 of .*own\.py: NameError.*\(line 3 of .*base_of_all\.py\)$"):
        load_config(["--config", str(tmp_path / "own.py")])
    (tmp_path / "own.py").write_text("\nimport broken_base\n")
    with pytest.raises(ConfigError, match=r"line 2 of .*own\.py: SyntaxError.*\(line 1 of .*broken_base\.py\)$"):
        load_config(["--config", str(tmp_path / "own.py")])


def test_a_file_edited_within_a_second_is_read_anew(tmp_path):
    file = tmp_path / "own.py"
    for steps in (3, 4, 5):
        file.write_text(
            f"from moc_jax.config import Config, TrainConfig\nconfig = Config(train=TrainConfig(steps={steps}))"
        )
        os.utime(file, (10**9, 10**9))
        assert read_config_file(str(file))[0].train.steps == steps


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (config_to_json(Config()).encode("utf-16"), "it is UTF-16; save it as UTF-8"),
        (b'{"moc": "\xff"}', "byte 9 (0xff) is not UTF-8; save it as UTF-8"),
        (b"\0\0", "is " + TEXT_16),
        (b'{"workdir"', "is not JSON"),
    ],
)
def test_a_json_file_that_is_no_text_or_no_json_is_named(tmp_path, data, message):
    (tmp_path / "config.json").write_bytes(data)
    with pytest.raises(ConfigError, match=re.escape(f"{tmp_path / 'config.json'}") + ".*" + re.escape(message)):
        load_config(["--config", str(tmp_path / "config.json")])


def test_byte_order_marks_are_no_matter(tmp_path):
    (tmp_path / "config.json").write_text(config_to_json(Config()), encoding="utf-8-sig")
    (tmp_path / "own.py").write_text(GOOD, encoding="utf-8-sig")
    for name in ("config.json", "own.py"):
        assert load_config(["--config", str(tmp_path / name)]) == Config()


def test_what_is_no_file_is_named(tmp_path, monkeypatch):
    (tmp_path / "folder.py").mkdir()
    (tmp_path / "own.py").write_text(GOOD)
    (tmp_path / "text.txt").write_text(GOOD)
    os.mkfifo(tmp_path / "pipe.py")
    for name, message in [
        ("folder.py", "that is a folder"),
        ("pipe.py", "that is not a file"),
        ("owm.py", r"there is no such file; did you mean .*own\.py\?"),
        ("text.txt", r"give a \.py file"),
        ("x" * 300 + ".py", "can't be read: File name too long"),
        ("a\0.py", "a path can't contain that character"),
        ("~nobody-of-that-name/own.py", "there is no such file"),
    ]:
        with pytest.raises(ConfigError, match=message):
            load_config(["--config", f"{tmp_path}/{name}"])
    with pytest.raises(ConfigError, match="that is a folder"):
        load_config(["--config", ""])

    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(pathlib.Path, "read_bytes", refuse)
    with pytest.raises(ConfigError, match=r"own\.py can't be read: Permission denied"):
        load_config(["--config", str(tmp_path / "own.py")])


def test_config_is_given_once(tmp_path):
    (tmp_path / "own.py").write_text(GOOD)
    file = str(tmp_path / "own.py")
    assert load_config([f"--config={file}"]) == Config()
    with pytest.raises(ConfigError, match=r"--config is given 2 times: .*own\.py, .*own\.py; give one$"):
        load_config(["--config", file, "--train.steps", "3", f"--config={file}"])
    with pytest.raises(ConfigError, match="--config: expected one argument"):
        load_config(["--config"])


# ------------------------------------------------------------------------------------------------ paths in settings


def test_the_home_folder_is_put_in_wherever_a_setting_is_a_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = Config(
        workdir="~/run",
        data=DataConfig(source=("~/a", "b~"), validation_source=("~",), cache="~/cache"),
        train=TrainConfig(init_from="~/other", preview_storyboard="~/board.yaml"),
    )
    assert config.workdir == f"{tmp_path}/run"
    assert (config.data.source, config.data.validation_source) == ((f"{tmp_path}/a", "b~"), (str(tmp_path),))
    assert config.data.cache == f"{tmp_path}/cache"
    assert (config.train.init_from, config.train.preview_storyboard) == (f"{tmp_path}/other", f"{tmp_path}/board.yaml")
    (tmp_path / "own.py").write_text(GOOD)
    assert load_config(["--config=~/own.py", "--workdir=~/x"]).workdir == f"{tmp_path}/x"


@pytest.mark.parametrize("path", ["gs://bucket/~run", "./~", "run/~/x", "x~", "out/é"])
def test_other_paths_and_addresses_stay_as_they_are(path):
    assert Config(workdir=path).workdir == path
    data = DataConfig(source=(path,), validation_source=(path,), cache=path)
    assert (data.source, data.validation_source, data.cache) == ((path,), (path,), path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Config(workdir="s3://b/run"), r"workdir .*s3://b/run.* of s3:// can't .* a path or a gs:// address"),
        (lambda: Config(compilation_cache="az://b"), r"compilation_cache .* of az:// can't .* or a gs:// address"),
        (lambda: TrainConfig(init_from="s3://b/run"), r"train\.init_from .* of s3:// can't .* or a gs:// address"),
        (lambda: DataConfig(source=("a", "s3://b/c")), r"data\.source.* of s3:// can't .* or a gs:// address"),
        (lambda: DataConfig(validation_source=("s3://b",)), r"data\.validation_source.* of s3:// can't"),
        (
            lambda: DataConfig(cache="s3://b/cache"),
            r"data\.cache .*s3://b/cache.* of s3:// can't .* gs:// address",
        ),
        (lambda: TrainConfig(preview_storyboard="gs://b/s.yaml"), r"train\.preview_storyboard .* of gs:// can't"),
        (lambda: AttentionConfig(tilings="file:///tmp/t"), r"attention\.tilings .* of file:// can't .* give a path"),
    ],
)
def test_addresses_are_refused_where_they_cannot_be_used(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_videos_may_lie_anywhere_but_folders_that_are_written_need_utf8():
    assert DataConfig(source=("\udcff",)).source == ("\udcff",)
    for make in (lambda: Config(workdir="runs/\udcff"), lambda: DataConfig(cache="\udcff")):
        with pytest.raises(ConfigError, match=r"(workdir|data\.cache) is '.*udcff', which is not UTF-8"):
            make()


def test_the_home_of_nobody_is_refused():
    with pytest.raises(
        ConfigError, match=r"workdir is '~nobody-here/x', but ~nobody-here has no home folder here; write"
    ):
        Config(workdir="~nobody-here/x")
