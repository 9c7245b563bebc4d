"""What a training step exchanges on pods, in the programs that their compiler makes: gathers stay gathers."""

import math

import pytest

from moc_jax.planning import compiled
from moc_jax.planning.collectives import collectives, summed

FORWARD, BACKWARD = "jit(of_seed)/jvp()/while", "jit(of_seed)/transpose(jvp())/while"
DIM = 1792
LAYER = 2 * (3 + 1 + 4 + 4) * DIM**2  # numbers in the matrices of one layer's two streams
MODULATION = 6 * DIM**2  # numbers in the weight of one stream and layer
SMALL = 2**16  # bytes, of biases and norms

STEP = """
import dataclasses, math, sys
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh
from moc_jax.config import Config, HashConfig, TrainConfig
from moc_jax.config.presets import PRESETS
from moc_jax.scene import Scene, SceneLengths
from moc_jax.mesh import device_array
from moc_jax.sharding import AXES
from moc_jax.training.state import make_blueprint
from moc_jax.training.step import make_train_step

def stand_in(q, k, v, table, moc, key=None):  # attention exchanges nothing
    return q + k * v, None

topology, gradient_dtype, *sizes = sys.argv[1:]
sizes = [int(size) for size in sizes]
devices = topologies.get_topology_desc(topology, "tpu").devices
mesh = Mesh(device_array(sizes, devices), AXES, axis_types=(AxisType.Auto,) * 4)
model = dataclasses.replace(PRESETS["3b"], depth=2, remat="full", gradient_dtype=gradient_dtype)
config = Config(model=model, text=HashConfig(dim=model.text_dim), train=TrainConfig(ema_decay=0.0))
of = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct((sizes[0] * sizes[1], *shape), dtype)
lengths = SceneLengths(of(2, dtype=jnp.int32), of(3, dtype=jnp.int32))
scene = Scene(of(8, 60, 60, 16), of(168, model.text_dim), lengths)
with jax.set_mesh(mesh):
    blueprint = make_blueprint(config.model, config.optimizer, config.train, mesh)
    step = make_train_step(config.train, config.optimizer, config.diffusion, blueprint, mesh, stand_in)
    step.trace(blueprint.abstract, scene, config.moc).lower(lowering_platforms=("tpu",)).compile()
"""


@pytest.mark.tpu_compiler
@pytest.mark.parametrize(
    ("topology", "gradient_dtype", "sizes"),
    [
        ("v5p:4x4x4", "float32", (1, 64, 1, 1)),
        ("v5p:4x4x4", "bfloat16", (2, 32, 1, 1)),
        ("v5p:8x8x4", "float32", (1, 256, 1, 1)),
        ("v5p:4x4x4", "float32", (1, 32, 2, 1)),
        ("v6e:8x8", "float32", (1, 64, 1, 1)),
    ],
)
def test_a_layer_gathers_its_weights_once_each_way_and_sums_gradients_into_parts(topology, gradient_dtype, sizes):
    """The 3B model's layers, 28 rows of whose matrices would be on each of 64 devices."""
    found = exchanged(topology, gradient_dtype, sizes)
    moved = summed([each for each in found if each.kind != "all-to-all"])  # heads'
    assert {key: n for key, n in moved.items() if key[0] == FORWARD} == {(FORWARD, "all-gather", "bf16"): 2 * LAYER}
    assert moved[BACKWARD, "all-gather", "bf16"] == 2 * LAYER
    short, width = {"float32": ("f32", 4), "bfloat16": ("bf16", 2)}[gradient_dtype]
    sums = {kind: n for (loop, kind, _), n in moved.items() if loop == BACKWARD and kind != "all-gather"}
    assert {element for loop, kind, element in moved if loop == BACKWARD and kind in sums} == {short}
    # Some parts are padded and put right; and what is summed of them over copies is little.
    into_parts = sums.pop("reduce-scatter")
    assert (0.6 if short == "bf16" else 1) * width * LAYER <= into_parts <= 1.2 * width * LAYER
    assert sum(sums.values()) < (0.4 if short == "bf16" else 0.25) * width * LAYER, sums
    # Modulation's weights, a third of all, stay where they are: captions' vectors go to them.
    assert max(math.prod(each.shape) for each in found if not each.loop) < MODULATION


@pytest.mark.tpu_compiler
@pytest.mark.parametrize("sizes", [(1, 64, 1, 1), (1, 32, 2, 1)])
def test_tpu7x_sums_gradients_into_parts(sizes):
    """In rings beside their products; what two groups of devices sum after that are parts."""
    moved = summed(exchanged("tpu7x:2x4x4", "float32", sizes))
    assert moved[BACKWARD, "all-reduce", "f32"] < 0.25 * 4 * LAYER  # one matrix of the short stream, text, is left
    assert moved[BACKWARD, "collective-permute", "f32"] > 0


def exchanged(topology, gradient_dtype, sizes):
    command = ["-c", STEP, topology, gradient_dtype, *map(str, sizes)]
    text = compiled.optimized(command, f"a step for {topology}", compiled.environment()).text
    return collectives(text, SMALL)
