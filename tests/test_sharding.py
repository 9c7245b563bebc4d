"""The mesh and the table of rules: sizes match, dimensions never collide, state lies like its weights."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from moc_jax.config import ConfigError, MeshConfig
from moc_jax.sharding import (
    AXES,
    RULES,
    Rules,
    batch_sharded,
    check_batch,
    logical_axes,
    make_mesh,
    replicated_weights,
    shard_batch,
    tree_shardings,
    weight_spec,
)


@pytest.mark.parametrize(
    ("cfg", "shape"),
    [
        (MeshConfig(), (8, 1, 1, 1)),
        (MeshConfig(data=2, fsdp=-1), (2, 4, 1, 1)),
        (MeshConfig(data=1, fsdp=8), (1, 8, 1, 1)),
    ],
)
def test_mesh_fills_what_is_left(cfg, shape):
    mesh = make_mesh(cfg)
    assert mesh.axis_names == AXES
    assert mesh.devices.shape == shape
    assert all(kind == jax.sharding.AxisType.Auto for kind in mesh.axis_types)


@pytest.mark.parametrize("cfg", [MeshConfig(data=3), MeshConfig(data=-1, fsdp=3), MeshConfig(data=4, fsdp=4)])
def test_mesh_that_does_not_match_says_what_divides(cfg):
    with pytest.raises(ConfigError, match=r"8 devices: the product must be 8, so each size is one of \[1, 2, 4, 8\]"):
        make_mesh(cfg)


def test_mesh_over_given_devices():
    assert make_mesh(MeshConfig(), jax.devices()[:1]).devices.shape == (1, 1, 1, 1)


def test_batch_must_divide():
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    check_batch(16, mesh)
    with pytest.raises(
        ConfigError, match=r"batch_size = 12 .* data 2 x fsdp 4 = 8 devices; the nearest that do: 8 and 16"
    ):
        check_batch(12, mesh)
    with pytest.raises(ConfigError, match=r"the nearest that do: 8$"):
        check_batch(1, mesh)


def test_rules_give_specs_and_refuse_collisions_and_unknown_names():
    assert RULES.spec("batch", "frames", "rows", "columns", "channels") == P(("data", "fsdp"), None, None, None, None)
    assert RULES.spec("layers", "embed", "mlp") == P(None, "fsdp", "tensor")
    with pytest.raises(ValueError, match="mesh axis fsdp"):
        RULES.spec("batch", "embed")
    with pytest.raises(ValueError, match="no sharding rule for the dimension 'emded'"):
        RULES.spec("emded")
    assert Rules((("a", ("data",)),)).spec("a") == P("data")


def test_every_rule_names_mesh_axes():
    assert all(axis in AXES for _, axes in RULES.table for axis in axes)
    assert len(dict(RULES.table)) == len(RULES.table)


def test_weight_takes_another_dimension_where_the_first_does_not_divide():
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    assert weight_spec(("layers", "embed", "mlp"), (4, 8, 12), mesh) == P(None, "fsdp", None)
    assert weight_spec(("layers", "embed", "mlp"), (4, 6, 12), mesh) == P(None, None, "fsdp")
    assert weight_spec(("layers", "embed"), (4, 6), mesh) == P(None, None)  # never along the layers
    assert weight_spec(("embed",), (8,), make_mesh(MeshConfig(data=8))) == P(None)


class Net(nnx.Module):
    def __init__(self):
        self.w = nnx.Param(jnp.ones((3, 8, 6)), logical=("layers", "embed", "mlp"))
        self.inner = nnx.Dict(b=nnx.Param(jnp.ones(6), logical=("mlp",)))


def test_optimizer_state_lies_like_its_weights():
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    state = nnx.state(Net(), nnx.Param)
    logical = logical_axes(state)
    assert logical == {("w",): ("layers", "embed", "mlp"), ("inner", "b"): ("mlp",)}
    params = nnx.to_pure_dict(state)
    optimizer = optax.MultiSteps(
        optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.constant_schedule(1e-3))), 2
    )
    tree = {"params": params, "optimizer": optimizer.init(params), "step": jnp.zeros((), int)}
    shardings = tree_shardings(tree, logical, mesh)
    placed = jax.device_put(tree, shardings)
    moments = placed["optimizer"].inner_opt_state[1][0]
    for weights in (placed["params"], moments.mu, moments.nu, placed["optimizer"].acc_grads):
        assert weights["w"].sharding.spec == P(None, "fsdp", None)
        assert weights["inner"]["b"].sharding.spec == P(None)
    assert placed["step"].sharding.spec == P()


def test_weights_that_nothing_divides_are_listed():
    params = {"w": jnp.ones((3, 6, 5)), "b": jnp.ones(5)}
    logical = {("w",): ("layers", "embed", "mlp"), ("b",): ("mlp",)}
    assert replicated_weights(params, logical, make_mesh(MeshConfig(data=2, fsdp=4))) == ["w (3, 6, 5)"]
    assert replicated_weights(params, logical, make_mesh(MeshConfig(data=4, fsdp=2))) == []
    assert replicated_weights(params, logical, make_mesh(MeshConfig())) == []


def test_state_that_belongs_to_no_weight_is_an_error():
    mesh = make_mesh(MeshConfig())
    with pytest.raises(ValueError, match=r"stray of shape \(3,\) belongs to no weight"):
        tree_shardings({"stray": jnp.ones(3)}, {("w",): ("embed",)}, mesh)


def test_a_weight_must_name_its_dimensions():
    net = Net()
    net.w = nnx.Param(jnp.ones((2, 2)), logical=("embed",))
    with pytest.raises(ValueError, match=r"parameter w of shape \(2, 2\) has logical = \('embed',\)"):
        logical_axes(nnx.state(net, nnx.Param))


def test_batches_are_split_over_data_and_fsdp():
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    x = np.arange(16.0).reshape(8, 2)
    placed = shard_batch({"x": x}, mesh)["x"]
    assert placed.sharding.spec == P(("data", "fsdp"))
    assert [s.data.shape for s in placed.addressable_shards] == [(1, 2)] * 8
    np.testing.assert_array_equal(placed, x)


@pytest.mark.parametrize("scenes", [16, 3])
def test_scenes_are_handled_apart_under_a_mesh(scenes):
    x = jnp.arange(3.0 * scenes).reshape(scenes, 3)
    local = []

    def function(x, nothing):
        local.append(x.shape)
        return {"sum": x.sum(axis=1), "nothing": nothing}

    alone = batch_sharded(function)(x, None)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=4))):
        together = jax.jit(lambda *arguments: batch_sharded(function)(*arguments))(x, None)
    assert local == [(scenes, 3), (2, 3) if scenes == 16 else (3, 3)]
    np.testing.assert_array_equal(alone["sum"], together["sum"])
