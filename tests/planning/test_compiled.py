"""A step compiled for a pod that isn't there, and what its text says of collectives."""

import os
import time

import pytest

from benchmarks import plan_h200
from moc_jax.chips import CHIPS
from moc_jax.cli import load_config
from moc_jax.config import ConfigError
from moc_jax.planning import absent_gpus, compiled
from moc_jax.planning.collectives import by_kind, collectives
from moc_jax.planning.compiled import (
    CompilationError,
    Optimized,
    compile_step,
    installed,
    optimized,
)
from moc_jax.planning.plan import plan_training
from moc_jax.planning.topology import topology
from moc_jax.sharding import AXES


def test_collectives_of_a_program():
    text = """
  %a = (bf16[8,128]{1,0}, f32[4]{0}) all-gather-start(%x), dimensions={0}
  %b = f32[16,2]{1,0:T(8,128)} all-reduce(%y), to_apply=%add
  %c = bf16[3]{0} all-reduce(%z), to_apply=%add
  ROOT %d = f32[2]{0} add(%b, %c), metadata={op_name="all-to-all"}
"""
    assert by_kind(collectives(text)) == {"all-gather": (1, 16), "all-reduce": (2, 16 * 2 * 4 + 3 * 2)}


@pytest.mark.parametrize(
    ("name", "what", "package"),
    [("h200:4", absent_gpus, "jax-cuda13-plugin jax-cuda13-pjrt"), ("v5p:2x2x1", compiled, r"'moc_jax\[tpu\]'")],
)
def test_a_compiler_that_is_missing_is_named(name, what, package, monkeypatch):
    monkeypatch.setattr(what, "installed", lambda: False)
    with pytest.raises(ConfigError, match=rf"the compiler for {name[:3]}.* is missing: pip install {package}$"):
        compile_step(load_config(["--config", "demo"]), topology(name), {})


def test_every_gpu_has_what_its_compiler_asks_for():
    gpus = [chip for chip in CHIPS if not chip.torus]
    assert {chip.name for chip in gpus} == set(absent_gpus.DIES)
    for chip in gpus:
        text = absent_gpus.target_config(chip)
        assert text.count("{") == text.count("}")
        assert f'name: "{chip.kinds[0]}"' in text
    assert "cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }" in absent_gpus.target_config(
        topology("h100:8").chip
    )


@pytest.mark.slow
@pytest.mark.skipif(not absent_gpus.installed(), reason=f"pip install {absent_gpus.PACKAGES}")
@pytest.mark.parametrize(("context", "on_the_card"), [(2, 60.3), (4, 30.8)])
def test_gpus_are_compiled_for_without_one(context, on_the_card):
    """XLA lays out as much as it did on H200s, where it tries products first: benchmarks/results/scaling."""
    sizes = {axis: context if axis == "context" else 1 for axis in AXES}
    made = compile_step(plan_h200.config("attention+mlp", 1), topology(f"h200:{context}"), sizes)
    assert made.total / 2**30 == pytest.approx(on_the_card, rel=0.03)
    assert made.collectives["all-to-all"][0] == 30 * 6


WRITES = """
import os, pathlib, re, time
folder = pathlib.Path(re.search(r"--xla_dump_to=([^ ]+)", os.environ["XLA_FLAGS"])[1])
(folder / "module_1.jit_of_seed.after_optimizations.txt").write_text("a program")
report = folder / "module_1.jit_of_seed.after_optimizations-memory-usage-report.txt"
report.write_text("Total bytes: 12 (12B)")
time.sleep(60)
"""


def test_a_compilation_ends_with_what_was_written_an_error_or_in_time():
    begin = time.monotonic()
    assert optimized(["-c", WRITES], "a step", os.environ) == Optimized("a program", 12)
    with pytest.raises(CompilationError, match=r"^a step does not compile: ValueError: why"):
        optimized(["-c", "raise ValueError('why')"], "a step", os.environ)
    with pytest.raises(CompilationError, match="in time"):
        optimized(["-c", "import time; time.sleep(60)"], "a step", os.environ, timeout=0.1)
    assert time.monotonic() - begin < 50  # none of them sleeps to its end


@pytest.mark.tpu_compiler
def test_a_pod_is_compiled_for_in_a_minute():
    """And its memory is within 5 % of the plan's."""
    if not installed():
        pytest.skip("needs libtpu")
    where = "--config multi_shot --preset base --data.buckets 8:200:504"
    how = "--train.batch-size 16 --model.remat full --train.ema-decay 0"
    config = load_config(f"{where} {how}".split())
    plan = plan_training(config, topology("v6e:4x4"))
    made = compile_step(config, plan.topology, dict(plan.sizes))
    assert plan.held.total == pytest.approx(made.total, rel=0.05)
    assert "all-gather" in made.collectives
    assert made.seconds < 600
