"""Weights are named by what they are, so that heads are split over the mesh's tensor axis and nothing moves for it."""

import collections
import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from moc_jax.config import MMDiTConfig
from moc_jax.models import weight_parts
from moc_jax.models.layers import Mlp, stacked
from moc_jax.models.linear import Linear, cast_once
from moc_jax.models.mmdit import MMDiT
from moc_jax.models.mmdit.block import BlockModulation, StreamBlock
from moc_jax.planning.collectives import collectives as exchanged
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
    assert logical["modulation", "text", "linear", "kernel"] == ("layers", "embed_in", "modulation", "embed")
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


# ------------------------------------------------------------------------------------------------ sums over devices


@pytest.mark.parametrize(("gradient_dtype", "short"), [("float32", "f32"), ("bfloat16", "bf16")])
def test_gradients_leave_their_products_in_what_they_are_summed_in(gradient_dtype, short):
    """In float32 no device rounds its part of a sum to bfloat16; nor do other products become wider."""
    cfg = dataclasses.replace(CFG, dtype="bfloat16", gradient_dtype=gradient_dtype)
    graph, shapes, shardings = split(lambda: Mlp(cfg, rngs=nnx.Rngs(0)), mesh := mesh_of(data=2, fsdp=4))

    def loss(params, x):
        return (nnx.merge(graph, params)(x).astype(jnp.float32) ** 2).sum()

    x = jax.ShapeDtypeStruct((8, 16, 48), jnp.bfloat16, sharding=NamedSharding(mesh, BATCH))
    with jax.set_mesh(mesh):
        program = jax.jit(jax.grad(loss), in_shardings=(shardings, x.sharding), out_shardings=shardings)
        lowered = program.lower(shapes, x)
    made = re.findall(r"dot_general.*-> tensor<(\w+)>", lowered.as_text())
    products = ["128x192xbf16", "128x48xbf16", "128x192xbf16", f"48x192x{short}", f"192x48x{short}"]
    assert sorted(made) == sorted(products)
    sums = [each for each in exchanged(lowered.compile().as_text()) if each.kind == "all-reduce"]
    assert {each.element for each in sums} == {"f32"}  # on CPUs, whatever goes in


@pytest.mark.parametrize(
    ("sizes", "gradient_dtype", "read"),
    [({}, "float32", "bfloat16"), ({"fsdp": 2}, "float32", "float32"), ({"fsdp": 2}, "bfloat16", "bfloat16")],
)
def test_layers_read_what_was_cast_once_unless_devices_sum_more_exactly(sizes, gradient_dtype, read):
    cfg = dataclasses.replace(CFG, dtype="bfloat16", gradient_dtype=gradient_dtype)
    stack = nnx.eval_shape(lambda: stacked(lambda cfg, rngs: Mlp(cfg, rngs=rngs), cfg, nnx.Rngs(0)))
    with jax.set_mesh(mesh_of(**sizes)):
        found = nnx.to_pure_dict(jax.eval_shape(lambda stack: cast_once(stack, cfg), nnx.state(stack, nnx.Param)))
    assert {found[name]["kernel"].dtype.name for name in ("up", "down")} == {read}


def test_float32_sums_over_devices_are_those_of_one():
    """Of bfloat16 tokens whose sum has more digits than bfloat16 holds."""
    linear = Linear({"embed": 8}, {"mlp": 8}, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    graph, params = nnx.split(linear, nnx.Param)
    x = jax.random.normal(jax.random.key(0), (8, 512, 8), jnp.bfloat16)
    d = jax.random.normal(jax.random.key(1), (8, 512, 8), jnp.bfloat16)

    def gradient(params, x, d):
        gradients = jax.grad(lambda params: (nnx.merge(graph, params)(x) * d).sum(dtype=jnp.float32))
        return nnx.to_pure_dict(gradients(params))

    exact = np.einsum("bti,bto->io", *(np.asarray(each, np.float64) for each in (x, d)))
    mesh = mesh_of(fsdp=8)
    with jax.set_mesh(mesh):
        split_rows = NamedSharding(mesh, BATCH)
        found = jax.jit(gradient, in_shardings=(None, split_rows, split_rows))(params, x, d)
    np.testing.assert_allclose(found["kernel"], exact, rtol=0, atol=2e-6 * np.abs(exact).max() + 1e-4)
    np.testing.assert_allclose(found["bias"], np.asarray(d, np.float64).sum((0, 1)), atol=1e-4)


def test_groups_of_devices_sum_gradients_by_themselves_and_then_over_groups(monkeypatch):
    """As TPU7x is told to: the sums are those of one group."""
    linear = Linear({"embed": 8}, {"heads": 4, "head_dim": 4}, dtype=jnp.float32, rngs=nnx.Rngs(0))
    graph, params = nnx.split(linear, nnx.Param)
    params = nnx.to_pure_dict(params)
    x, d = jax.random.normal(jax.random.key(0), (8, 6, 8)), jax.random.normal(jax.random.key(1), (8, 6, 4, 4))
    monkeypatch.setattr(weight_parts, "_is_tpu7x", lambda mesh: True)

    def gradient(params):
        return jax.grad(lambda params: (nnx.merge(graph, params)(x) * d).sum())(params)

    expected = jax.jit(gradient)(params)
    for sizes in ({"data": 2, "fsdp": 4}, {"data": 2, "fsdp": 2, "context": 2}):
        with jax.set_mesh(mesh := mesh_of(**sizes)):
            assert weight_parts.copies(("embed", "heads", "head_dim"), (8, 4, 4), 8)[0] == 2
            found = jax.jit(gradient)(params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected)
        assert mesh.size == 8


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"data": 2, "fsdp": 2, "context": 2}], ids=str)
def test_modulation_stays_where_its_weights_are(sizes):
    """Gathered are vectors, not weights; and neither are the weights' gradients summed but over copies."""
    cfg = dataclasses.replace(CFG, dim=64, depth=3)
    graph, shapes, places = split(lambda: stacked(BlockModulation, cfg, nnx.Rngs(0)), mesh := mesh_of(**sizes))
    keys = iter(jax.random.split(jax.random.key(0), 4))
    params = jax.tree.map(lambda x: 0.1 * jax.random.normal(next(keys), x.shape), shapes)
    time, d = jax.random.normal(jax.random.key(1), (8, 2, 64)), jax.random.normal(jax.random.key(2), (3, 8, 2, 6, 64))

    def loss(params, time):
        return sum((each * d).sum() for each in nnx.merge(graph, params)(time))

    def equation(params, time):
        of = (jnp.einsum("bpi,lico->lbpco", nnx.silu(time), each["linear"]["kernel"]) for each in params.values())
        biases = (each["linear"]["bias"][:, None, None] for each in params.values())
        return sum(((each + bias) * d).sum() for each, bias in zip(of, biases))

    expected = jax.value_and_grad(equation, argnums=(0, 1))(params, time)
    batch = NamedSharding(mesh, BATCH)
    with jax.set_mesh(mesh):
        program = jax.jit(
            jax.value_and_grad(loss, argnums=(0, 1)),
            in_shardings=(places, batch),
            out_shardings=(None, (places, batch)),
        )
        moved = exchanged(program.lower(params, time).compile().as_text())
        found = program(params, time)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, expected)
    copies, kernel = sizes.get("data", 1), 6 * 64 * 64
    assert moved
    assert max(each.bytes for each in moved) <= 4 * 3 * max(kernel * copies // 8, 8 * 2 * 6 * 64)
    assert not any(each.bytes >= 4 * kernel for each in moved if each.kind == "all-gather")
