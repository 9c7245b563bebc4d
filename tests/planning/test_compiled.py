"""A step compiled for a pod that isn't there, and what its text says of collectives."""

import os
import time

import pytest

from moc_jax.cli import load_config
from moc_jax.config import ConfigError
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


def test_collectives_of_a_program():
    text = """
  %a = (bf16[8,128]{1,0}, f32[4]{0}) all-gather-start(%x), dimensions={0}
  %b = f32[16,2]{1,0:T(8,128)} all-reduce(%y), to_apply=%add
  %c = bf16[3]{0} all-reduce(%z), to_apply=%add
  ROOT %d = f32[2]{0} add(%b, %c), metadata={op_name="all-to-all"}
"""
    assert by_kind(collectives(text)) == {"all-gather": (1, 16), "all-reduce": (2, 16 * 2 * 4 + 3 * 2)}


def test_gpus_are_not_compiled_for():
    with pytest.raises(ConfigError, match="TPUs alone"):
        compile_step(load_config(["--config", "demo"]), topology("h200:4"), {})


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
