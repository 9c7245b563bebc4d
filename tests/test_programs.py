"""The programs, as train.py, sample.py and prepare.py: whatever happens ends with a line, never with a traceback."""

import importlib.metadata
import os
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest

import moc_jax
from moc_jax.cli import CORE, TRAIN

ROOT = pathlib.Path(__file__).parents[1]


def python(*arguments, stdout=subprocess.PIPE, **environment):
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
        check=False,
    )


def run_module(folder, source, *arguments, **options):
    """`source`, as the program that `run` runs."""
    (folder / "program_under_test.py").write_text(source)
    code = "import sys; from moc_jax.cli import run; sys.argv[0] = 'x'; run('program_under_test')"
    return python("-c", code, *arguments, PYTHONPATH=f"{folder}:{ROOT}", TMPDIR=str(folder), **options)


def reports(folder):
    return list(folder.glob("moc_jax-*.txt"))


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ("def main(argv, signals): raise KeyError('odd')", "KeyError: 'odd' in "),
        ("import not_there", "ModuleNotFoundError: No module named 'not_there' in "),
        ("def main(argv: x = ", "SyntaxError"),
        ("def main(argv, signals): raise MemoryError", "MemoryError in "),
        ("def main(argv, signals): main(argv, signals)", "RecursionError: maximum recursion depth exceeded"),
        (
            "def main(argv, signals): raise ExceptionGroup('many', [ValueError('a\\nb')])",
            "ExceptionGroup: many (1 sub-exception)",
        ),
        ("import os\ndef main(argv, signals): r, w = os.pipe(); os.close(r); os.write(w, b'x')", "BrokenPipeError"),
        ("def main(argv, signals): raise GeneratorExit", "GeneratorExit in "),
        ("def main(argv, signals): raise OSError('\\udcff')", "OSError: \\udcff in "),
    ],
)
def test_what_nobody_foresaw_is_one_line_and_a_file(tmp_path, source, line):
    done = run_module(tmp_path, source)
    assert done.returncode == 70
    (report,) = reports(tmp_path)
    assert re.fullmatch(r"error: unexpected .*\n", done.stderr)
    assert line in done.stderr
    assert f"the traceback is in {report}" in done.stderr
    written = report.read_text()
    assert written.startswith(f"moc_jax {moc_jax.__version__}, Python 3.")
    assert "Traceback" in written


def test_errors_in_threads_and_destructors_are_lines_too(tmp_path):
    source = """
import threading
class Odd:
    def __del__(self): raise KeyError("gone")
def main(argv, signals):
    Odd()
    thread = threading.Thread(target=lambda: 1 / 0)
    thread.start()
    thread.join()
"""
    done = run_module(tmp_path, source)
    assert done.returncode == 0
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == len(reports(tmp_path)) == 2


@pytest.mark.parametrize(
    ("source", "code", "line"),
    [
        ("def main(argv, signals): print('done \\udcff')", 0, ""),
        ("def main(argv, signals): raise SystemExit(3)", 3, ""),
        ("def main(argv, signals): raise SystemExit('as it is')", 1, "as it is\n"),
        ("def main(argv, signals): raise KeyboardInterrupt", 130, "interrupted; what was completed before is kept\n"),
        ("raise KeyboardInterrupt", 130, "interrupted; what was completed before is kept\n"),
        ("from moc_jax.errors import Failure\ndef main(argv, signals): raise Failure('disk')", 1, "error: disk\n"),
        (
            "from moc_jax.config import Config\ndef main(argv, signals): Config(workdir='')",
            2,
            "error: workdir is empty; name a ",
        ),
    ],
)
def test_what_was_foreseen_ends_as_before(tmp_path, source, code, line):
    done = run_module(tmp_path, source)
    assert done.returncode == code
    assert done.stderr.startswith(line)
    assert bool(done.stderr) == bool(line)
    assert not reports(tmp_path)


@pytest.mark.parametrize(
    ("program", "words", "code"),
    [
        ("train", ["--no-such"], 2),
        ("train", ["--config", "nope"], 2),
        ("train", ["--config", "demo", "--no-such"], 2),
        ("train", ["--config", "demo", "--model.dim", "x"], 2),
        ("sample", ["--no-such"], 2),
        ("sample", ["--checkpoint", "nowhere", "--training-scene", "0", "--out", "out/x.mp4"], 1),
        ("sample", ["--checkpoint", "nowhere", "--storyboard", "no.yaml", "--out", "out/x.mp4"], 2),
    ],
)
def test_mistakes_are_reported_before_jax_is_loaded(program, words, code):
    source = f"""
import sys
sys.argv[1:] = {words}
from moc_jax.cli import {program}
try:
    {program}()
except SystemExit as end:
    print(end.code, sorted({{"jax", "flax", "orbax", "grain", "av", "matplotlib"}} & set(sys.modules)))
"""
    assert python("-c", source).stdout.endswith(f"{code} []\n")


def test_without_a_place_for_the_traceback_the_line_still_comes(tmp_path):
    source = "import tempfile\ntempfile.tempdir = '/not/there'\ndef main(argv, signals): raise KeyError('odd')"
    done = run_module(tmp_path, source)
    assert done.returncode == 70
    assert re.search(r"KeyError: 'odd' in .*; its traceback could not be written: .*not/there", done.stderr)


@pytest.mark.parametrize(
    "words", [["train.py", "--help"], ["-c", "import sys; from moc_jax.cli import train; train()", "-h"]]
)
def test_a_reader_that_is_gone_is_no_traceback(words):
    """As behind `| head`, for help too; the pipe is broken before the first byte."""
    reading, writing = os.pipe()
    os.close(reading)
    done = python(*words, stdout=writing)
    os.close(writing)
    assert done.returncode == 141
    assert done.stderr == "stopped: the reader of the output is gone\n"


MODULES = ["moc_jax.attention.accounting", "moc_jax.data.demo_clip", "moc_jax.models.presets"]
PROGRAMS = [["-S", f"{name}.py"] for name in ("train", "sample", "prepare")]
PROGRAMS += [["-IS", "train.py"], *(["-S", "-m", module] for module in MODULES)]


@pytest.mark.parametrize("words", PROGRAMS, ids=" ".join)
def test_outside_the_environment_a_line_says_which_command_sets_up(words):
    """-S: without installed packages; -I: without the folder of the script either."""
    done = python(*words, PYTHONPATH="")
    again = re.escape("-m ..." if "-m" in words else words[-1])
    assert done.returncode == 2
    assert re.fullmatch(
        rf"error: this Python \(.*\) lacks jax, flax, .*: run `make setup` once, then \.venv/bin/python {again}.*\n",
        done.stderr,
    )


def test_the_installed_program_is_named_as_it_was_called():
    code = "import sys; sys.argv[0] = '/somewhere/bin/moc-train'; from moc_jax.cli import train; train()"
    done = python("-S", "-c", code, PYTHONPATH=str(ROOT))
    assert done.returncode == 2
    assert "run `make setup` once, then .venv/bin/moc-train; or `pip install -e '.[train]'` with this" in done.stderr


def test_modules_that_are_programs_end_with_a_line_too(tmp_path):
    done = python("-m", "moc_jax.models.presets", JAX_PLATFORMS="odd", TMPDIR=str(tmp_path))
    assert done.returncode == 70, done.stderr
    assert re.fullmatch(r"error: unexpected .*\n", done.stderr)
    assert len(reports(tmp_path)) == 1


def test_the_packages_looked_for_are_those_that_the_project_asks_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = importlib.metadata.packages_distributions()
    for packages, lines in ((CORE, project["dependencies"]), (TRAIN, project["optional-dependencies"]["train"])):
        asked = {re.match(r"[\w.-]+", line)[0].lower().replace("_", "-") for line in lines}
        imported = [{name.lower().replace("_", "-") for name in found[package]} for package in packages.split()]
        assert len(imported) == len(asked)
        assert all(names & asked for names in imported)


def test_the_version_has_one_source():
    """pyproject.toml takes it from the package, and nothing asks for the metadata of an installation."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" not in project["project"]
    assert project["tool"]["hatch"]["version"] == {"path": "moc_jax/__init__.py"}
    assert re.fullmatch(r"\d+\.\d+\.\d+", moc_jax.__version__)
    for path in [*ROOT.glob("*.py"), *(ROOT / "moc_jax").rglob("*.py")]:
        assert not re.search(r"version\([\"']moc_jax|\(\"moc_jax\",", path.read_text()), path
