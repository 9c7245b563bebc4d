"""Weights are named by what they are, so that heads are split over the mesh's tensor axis and nothing moves for it."""

import collections
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from moc_jax.config import MMDiTConfig
from moc_jax.models.layers import Linear
from moc_jax.models.mmdit import MMDiT
from moc_jax.models.mmdit.block import StreamBlock
from moc_jax.sharding import AXES, logical_axes, tree_shardings

CFG = MMDiTConfig(dim=48, depth=2, heads=4, latent_channels=4, text_dim=8, dtype="float32")
COLLECTIVES = re.compile(r"\b(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")
BATCH, HEADS = P(("data", "fsdp")), P(("data", "fsdp"), None, "tensor", None)
TOKENS = 4096  # many: the compiler moves whatever is smaller, and it should be the weights
TENSOR = [{"tensor": 2}, {"fsdp": 2, "tensor": 2}]


def mesh_of(**sizes):
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    devices = jax.devices()[: np.prod(shape)]
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def split(module, mesh):
    """The module's graph, the shapes of its weights, and where they lie."""
    graph, weights = nnx.split(nnx.eval_shape(module), nnx.Param)
    shapes = nnx.to_pure_dict(weights)
    return graph, shapes, tree_shardings(shapes, logical_axes(weights), mesh)


def collectives(function, shapes, shardings, out, mesh):
    with jax.set_mesh(mesh):
        program = jax.jit(function, in_shardings=shardings, out_shardings=out).lower(*shapes).compile()
    return collections.Counter(COLLECTIVES.findall(program.as_text()))


def test_weights_are_named_by_what_they_are():
    logical = logical_axes(nnx.split(nnx.eval_shape(lambda: MMDiT(CFG, rngs=nnx.Rngs(0))), nnx.Param)[1])
    assert logical["blocks", "video", "qkv", "kernel"] == ("layers", "embed", "heads", "qkv", "head_dim")
    assert logical["blocks", "video", "qkv", "bias"] == ("layers", "heads", "qkv", "head_dim")
    assert logical["blocks", "video", "out", "kernel"] == ("layers", "heads", "head_dim", "embed")
    assert logical["modulation", "text", "linear", "kernel"] == ("layers", "embed", "modulation", "embed_out")
    block = nnx.eval_shape(lambda: StreamBlock(CFG, rngs=nnx.Rngs(0)))
    assert block.qkv.kernel.shape == (48, 4, 3, 12)
    assert block.out.kernel.shape == (4, 12, 48)


def test_fresh_weights_are_those_of_the_whole_matrix():
    """Glorot's limit counts all inputs and all outputs, however many axes they have."""
    embed, heads = {"embed": 48}, {"qkv": 3, "heads": 4, "head_dim": 12}
    kernel = Linear(embed, heads, dtype=jnp.float32, rngs=nnx.Rngs(0)).kernel[...]
    matrix = nnx.Linear(48, 144, kernel_init=nnx.initializers.xavier_uniform(), rngs=nnx.Rngs(0)).kernel[...]
    np.testing.assert_array_equal(kernel.reshape(48, 144), matrix)
    assert float(jnp.abs(kernel).max()) == pytest.approx(np.sqrt(6 / (48 + 144)), rel=1e-2)


@pytest.mark.parametrize("sizes", TENSOR, ids=str)
def test_projections_move_nothing_between_the_heads_devices(sizes):
    """q, k and v need nothing of another device but weights that fsdp split; the output is summed over heads."""
    mesh = mesh_of(**sizes)
    graph, weights, places = split(lambda: StreamBlock(CFG, rngs=nnx.Rngs(0)), mesh)
    batch, heads = NamedSharding(mesh, BATCH), NamedSharding(mesh, HEADS)
    h, attended = (jax.ShapeDtypeStruct((4, TOKENS, *shape), jnp.float32) for shape in ((48,), (4, 12)))

    turns = jnp.ones((4, TOKENS, 12)), jnp.zeros((4, TOKENS, 12))

    def project(weights, h):
        return nnx.merge(graph, weights).project(h, turns)

    def loss(weights, h, attended):
        block = nnx.merge(graph, weights)
        return sum(jnp.sum(each * attended) for each in block.project(h, turns)) + jnp.sum(block.out(attended) ** 2)

    forward = collectives(project, (weights, h), (places, batch), (heads,) * 3, mesh)
    assert set(forward) == ({"all-gather"} if "fsdp" in sizes else set()), forward
    gradient = jax.grad(loss, argnums=(0, 1, 2))
    backward = collectives(gradient, (weights, h, attended), (places, batch, heads), (places, batch, heads), mesh)
    assert not {"all-to-all", "collective-permute"} & set(backward), backward
    assert backward["all-reduce"] > 0
