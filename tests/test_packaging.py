"""What installing rests on: locks that agree, the GPU that is found, versions that are one."""

import importlib.metadata
import os
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest
import yaml
from packaging.requirements import Requirement

import moc_jax

ROOT = pathlib.Path(__file__).parents[1]


def lock(name=""):
    lines = (ROOT / f"requirements{name}.lock").read_text().split()
    return {name.lower().replace("_", "-"): version for name, version in (line.split("==") for line in lines)}


def make(folder, *arguments, nvidia_smi=None):
    """What `make` would run where `nvidia_smi` is the command of that name."""
    if nvidia_smi is not None:
        (folder / "nvidia-smi").write_text(f"#!/bin/sh\n{nvidia_smi}\n")
        (folder / "nvidia-smi").chmod(0o755)
    path = f"{folder}:{os.environ['PATH']}" if nvidia_smi is not None else os.environ["PATH"]
    words = ["make", "-n", f"VENV={folder}/venv", f"PYTHON={sys.executable}", *arguments]
    environment = {k: v for k, v in os.environ.items() if k not in ("ACCELERATOR", "MAKEFLAGS")} | {"PATH": path}
    return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("nvidia_smi", "arguments", "taken"),
    [
        ("printf '580.159.04\\n580.159.04\\n'", (), "cuda"),
        ("echo 590.1", (), "cuda"),
        ("echo 535.183.01", (), "cuda12"),
        ("echo 'NVIDIA-SMI has failed'; exit 9", (), None),
        ("echo 580.159.04", ("ACCELERATOR=cpu",), None),
        ("exit 9", ("ACCELERATOR=tpu",), "tpu"),
    ],
)
@pytest.mark.parametrize("target", ["setup", "demo"])
def test_setup_and_demo_take_the_gpu_that_works(tmp_path, target, nvidia_smi, arguments, taken):
    done = make(tmp_path, target, *arguments, nvidia_smi=nvidia_smi)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"-r requirements-(\w+)\.lock", done.stdout) == ([taken] if taken else [])


def test_an_accelerator_that_is_unknown_is_named():
    done = make(ROOT, "setup", "ACCELERATOR=gpu")
    assert done.returncode == 2
    assert "ACCELERATOR is gpu; it must be cpu, cuda, cuda12 or tpu" in done.stderr


@pytest.mark.parametrize(("extra", "name"), [("cuda13", "-cuda"), ("cuda12", "-cuda12"), ("tpu", "-tpu")])
def test_locks_for_accelerators_are_for_the_jax_that_is_locked(extra, name):
    """Of what `jax[extra]` asks for, each package in a version that it allows."""
    main, more = lock(), lock(name)
    assert importlib.metadata.version("jax") == main["jax"]
    assert not main.keys() & more.keys()
    for line in importlib.metadata.requires("jax"):
        asked = Requirement(line)
        if asked.marker and asked.marker.evaluate({"extra": extra}) and asked.name != "requests":
            assert asked.specifier.contains((main | more)[asked.name]), line


def test_what_programs_need_is_in_one_lock_and_what_else_tests_need_in_another():
    """`make demo` installs the first alone."""
    main, dev = lock(), lock("-dev")
    assert not main.keys() & dev.keys()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for locked, lines in (
        (main, project["dependencies"] + extras["train"]),
        (main | dev, extras["dev"] + extras["wan"]),
    ):
        for asked in map(Requirement, lines):
            if asked.name != "moc_jax":
                assert asked.specifier.contains(locked[asked.name.lower().replace("_", "-")]), asked


def test_the_version_is_the_same_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == moc_jax.__version__
    assert f"\n## {moc_jax.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_ci_on_github_runs_what_the_project_runs():
    steps = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]["ci"]["steps"]
    assert [step["run"] for step in steps if "run" in step] == [".ci/run"]
    targets = set(re.findall(r"^make ([\w-]+)", (ROOT / ".ci/run").read_text(), re.MULTILINE))
    assert targets >= {"lint", "types", "test", "test-long", "test-tpu", "test-wheel"}
