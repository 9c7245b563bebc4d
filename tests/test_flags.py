"""Flags of the TPU compiler: the user's win, and it knows all of ours."""

import subprocess
import sys

import pytest

from benchmarks.tpu import compiler
from moc_jax.flags import OVERLAP, set_flags


def test_flags_are_added_to_those_that_are_there():
    environment = {"LIBTPU_INIT_ARGS": "--xla_tpu_scoped_vmem_limit_kib=98304"}
    set_flags(environment)
    first, *rest = environment["LIBTPU_INIT_ARGS"].split()
    assert first == "--xla_tpu_scoped_vmem_limit_kib=98304"
    assert rest == [f"--{name}={value}" for name, value in OVERLAP.items()]
    set_flags(environment)
    assert environment["LIBTPU_INIT_ARGS"].split() == [first, *rest]


@pytest.mark.parametrize("where", ["LIBTPU_INIT_ARGS", "XLA_FLAGS"])
@pytest.mark.parametrize("given", ["--xla_enable_async_all_gather=false", "--xla_enable_async_all_gather"])
def test_a_flag_that_the_user_gives_is_the_users(where, given):
    environment = {where: given}
    set_flags(environment)
    args = environment["LIBTPU_INIT_ARGS"].split()
    assert [arg for arg in args if "async_all_gather" in arg] == ([given] if where == "LIBTPU_INIT_ARGS" else [])
    assert len(args) == len(OVERLAP) - (where == "XLA_FLAGS")


def test_training_sets_them_before_jax_is_loaded():
    script = (
        "import sys\nfrom moc_jax import flags\nfrom moc_jax.commands import train\n"
        "def seen():\n    print('jax' in sys.modules)\n    raise SystemExit(7)\n"
        "flags.set_flags = seen\ntrain.main(['--config', 'demo'])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout.splitlines()) == (7, ["False"]), done.stderr


COMPILE = """
import jax, numpy as np
from jax.experimental import topologies
devices = topologies.get_topology_desc("v5e:2x2", "tpu").devices
sharding = jax.sharding.NamedSharding(jax.sharding.Mesh(np.array(devices), "x"), jax.P("x"))
x = jax.ShapeDtypeStruct((64, 64), "float32", sharding=sharding)
jax.jit(lambda x: (x @ x.T).sum(0)).lower(x).compile()
"""


@pytest.mark.tpu_compiler
@pytest.mark.parametrize(("more", "accepted"), [("", True), ("--xla_tpu_no_such_flag=true", False)])
def test_the_compiler_knows_every_flag(more, accepted):
    environment = compiler.environment()
    environment["LIBTPU_INIT_ARGS"] = f"{environment.get('LIBTPU_INIT_ARGS', '')} {more}"
    set_flags(environment)
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert (done.returncode == 0) == accepted, done.stderr
