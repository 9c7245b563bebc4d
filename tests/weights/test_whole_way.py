"""README's commands for Wan and those of docs/lora.md, word for word, on a clip of our own: from weights to adapters,
videos and files."""

import pathlib
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest

from moc_jax.weights.adapters import open_adapters
from tests.data.clips import make_clip
from tests.sampling.test_sample_cli import read
from tests.training.processes import environment
from tests.weights.test_weights import contents

ROOT = pathlib.Path(__file__).parents[2]
PROGRAMS = {"moc-train": "train.py", "moc-sample": "sample.py"}


def commands():
    parts = ("README.md", "## Wan's public weights"), ("docs/lora.md", "## The whole way, small")
    sections = ((ROOT / page).read_text().split(title)[1] for page, title in parts)
    return [line for part in sections for line in re.search(r"```sh\n(.*?)```", part, re.DOTALL)[1].splitlines()]


@pytest.mark.long
def test_the_commands_of_the_docs_run_word_for_word(tmp_path, compilation_cache):
    pytest.importorskip("sentencepiece")
    pytest.importorskip("ftfy")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "cache/demo").mkdir(parents=True)
    make_clip(tmp_path / "cache/demo/bikes.mp4", shots=3, frames_per_shot=9)
    variables = environment(compilation_cache) | {"PYTHONPATH": str(ROOT)}
    for command in commands():
        program, *words = shlex.split(command, comments=True)
        if "demo_clip" in command:  # from the network
            continue
        line = [ROOT / PROGRAMS[program]] if program in PROGRAMS else []
        done = subprocess.run(
            [sys.executable, *map(str, line), *words], cwd=tmp_path, env=variables, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    out = tmp_path / "out"
    routed, dense, public = (read(out / name)[0] for name in ("moc.mp4", "dense.mp4", "lora.mp4"))
    assert routed.shape == dense.shape == public.shape
    assert (routed != dense).any()
    assert len(open_adapters(out / "lora").networks["network"]) == 2 * 10
    before, after, tuned = (contents(out / name)["network"] for name in ("wan", "wan-merged", "wan-tuned"))
    for name, merged in after.items():
        np.testing.assert_array_equal(merged, tuned[name])
    changed = {name for name in before if (before[name] != after[name]).any()}
    assert {name.rpartition(".")[0] for name in changed} == {*open_adapters(out / "lora").networks["network"]}
    assert max(float(np.abs(before[name] - after[name]).max()) for name in changed) < 0.1
