"""One scene over four chips: the kernels compile inside of the exchanges, which are those that are counted."""

import json
import subprocess
import sys

import pytest

from benchmarks.tpu import compiler

PROGRAM = """
import collections, json, sys
import jax
import jax.numpy as jnp
from jax.experimental import topologies
from moc_jax.attention.accounting import chosen_exchange
from moc_jax.attention.api import RoutedAttention
from moc_jax.attention.pallas_tpu.device import Tpu
from moc_jax.attention.sharded import OverMesh, deal_of
from moc_jax.config import ChunkConfig, MeshConfig, MoCConfig
from moc_jax.planning.collectives import collectives
from moc_jax.scene import SceneLengths, SceneShape, chunk_table
from moc_jax.sharding import RULES, make_mesh

shape = SceneShape(shots=4, frames=32, rows=16, columns=24, text_tokens=256)
cfg = MoCConfig(chunk=ChunkConfig(size=512), top_k=4)
lengths = SceneLengths(*(jax.ShapeDtypeStruct((1, n), jnp.int32) for n in (4, 5)))
mesh = make_mesh(MeshConfig(data=1, context=4), topologies.get_topology_desc("v5p:2x2x1", "tpu").devices)
attention = RoutedAttention(backend=Tpu(chip="v5p"), head_groups=int(sys.argv[1]), exchange=sys.argv[2])
with jax.set_mesh(mesh):
    deal = deal_of(shape, 8, attention)
    place = jax.NamedSharding(mesh, RULES.spec("batch", "tokens", "heads", "head_dim"))
    streams = [
        (jax.ShapeDtypeStruct((1, rows, 8, 128), jnp.bfloat16, sharding=place),) * 3
        for rows in (deal.text_rows, deal.video_rows)
    ]

    def gradients(text, video, lengths):
        table = chunk_table(lengths, shape, cfg.chunk)
        out, vjp = jax.vjp(lambda *x: OverMesh(attention, table, cfg, deal, False)(*x, None)[0], text, video)
        return vjp(out)

    program = jax.jit(gradients).trace(*streams, lengths).lower(lowering_platforms=("tpu",)).compile()
table = jax.eval_shape(lambda lengths: chunk_table(lengths, shape, cfg.chunk), lengths)
counted = chosen_exchange(deal, table, cfg, sys.argv[2], 8, 128)
moved = collections.Counter()
for each in collectives(program.as_text()):
    if each.element != "s32":  # how many rounds there are
        loop = next((name for name in ("moc_around", "moc_served") if name in each.loop), "always")
        devices = 2 if deal.groups == 2 else 4  # that speak with each other
        others = devices if each.kind == "collective-permute" else devices - 1
        moved[f"{loop}, {each.kind}"] += each.bytes * others // devices
assert "moc_gradients_anchors" in program.as_text()
keys = [counted.keys, counted.keys_backward]
print(json.dumps([moved, counted.heads, keys, counted.of_round, counted.of_round_backward]))
"""


def compiled(groups, exchange):
    """Bytes of collectives by their kind, and those that are counted: of heads, keys, rounds, and rounds backward."""
    command = [sys.executable, "-c", PROGRAM, str(groups), exchange]
    result = subprocess.run(command, env=compiler.environment(), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.tpu_compiler
@pytest.mark.parametrize(
    "groups", [2, pytest.param(4, marks=pytest.mark.slow), pytest.param(1, marks=pytest.mark.slow)]
)
def test_kernels_compile_between_exchanges_that_are_counted(groups):
    moved, heads, (keys, _), *_ = compiled(groups, "gather")
    assert set(moved) == {"always, all-to-all", *(["always, all-gather"] if groups < 4 else [])}
    assert moved.get("always, all-gather", 0) == keys  # of keys; their gradients are exchanged
    assert moved["always, all-to-all"] == 2 * heads + keys


@pytest.mark.tpu_compiler
@pytest.mark.slow
@pytest.mark.parametrize("groups", [2, 1])
def test_kernels_compile_in_rounds_that_are_counted(groups):
    moved, heads, keys, of_round, of_round_backward = compiled(groups, "dispatch")
    always = sum(size for name, size in moved.items() if name.startswith("always"))
    assert always == 2 * heads + sum(keys)
    (around, served), (around_back, served_back) = of_round, of_round_backward
    assert moved["moc_served, all-to-all"] == served + served_back
    distances = 2 // groups  # that keys may go back by, of which a round takes one
    assert moved["moc_around, collective-permute"] == around + around_back // 2 * (1 + distances)
