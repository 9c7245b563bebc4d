"""The mesh and the table of rules: sizes match, dimensions never collide, state lies like its weights."""

import dataclasses
import itertools
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from benchmarks.tpu import compiler
from moc_jax.config import ConfigError, MeshConfig
from moc_jax.mesh import device_array, mesh_sizes
from moc_jax.sharding import (
    AXES,
    RULES,
    Rules,
    check_batch,
    factored,
    logical_axes,
    make_mesh,
    own_rows,
    replicated_weights,
    shard_batch,
    tree_shardings,
    weight_sharding,
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


@pytest.mark.parametrize(
    ("asked", "count", "nearest"),
    [
        ((3, 1, 1, 1), 8, "data 8, or data 4 x fsdp 2, or data 4 x context 2;"),
        ((-1, 3, 1, 1), 8, "data 2 x fsdp 4, or data 4 x fsdp 2, or fsdp 8;"),
        ((4, 4, 1, 1), 8, "data 4 x fsdp 2, or data 2 x fsdp 4, or data 8;"),
        ((-1, 1, 1, 16), 24, "data 2 x tensor 12, or tensor 24, or data 3 x tensor 8;"),
    ],
)
def test_mesh_that_does_not_match_names_the_nearest_that_do(asked, count, nearest):
    with pytest.raises(ConfigError) as caught:
        mesh_sizes(asked, count)
    assert f"the product must be {count}. Nearest are {nearest}" in str(caught.value)


def test_every_product_that_is_the_number_of_devices_is_a_mesh():
    divisors = [1, 2, 4, 8]
    meshes = [sizes for sizes in itertools.product(divisors, repeat=4) if np.prod(sizes) == 8]
    assert len(meshes) == 20
    for sizes in meshes:
        assert mesh_sizes(sizes, 8) == sizes
        assert device_array(sizes, jax.devices()).shape == sizes


@dataclasses.dataclass(frozen=True)
class Gpu:
    id: int
    process_index: int
    slice_index: int  # of what NVLink joins
    platform: str = "gpu"
    device_kind: str = "NVIDIA H100 80GB HBM3"


@pytest.mark.parametrize("processes", [4, 32])
@pytest.mark.parametrize(
    ("sizes", "outer"),
    [
        ((32, 1, 1, 1), (4, 1, 1, 1)),
        ((1, 32, 1, 1), (1, 4, 1, 1)),
        ((2, 2, 4, 2), (2, 2, 1, 1)),
        ((4, 1, 4, 2), (4, 1, 1, 1)),
        ((2, 1, 16, 1), (2, 1, 2, 1)),
        ((1, 1, 8, 4), (1, 1, 4, 1)),
    ],
)
def test_between_hosts_of_gpus_lie_the_axes_that_exchange_least(sizes, outer, processes):
    """Whether a host has one process, or one for each of its eight GPUs."""
    devices = [Gpu(id=i, process_index=i * processes // 32, slice_index=i // 8) for i in range(32)]
    placed = device_array(sizes, devices)
    inner = [size // parts for size, parts in zip(sizes, outer)]
    for block in itertools.product(*map(range, outer)):
        part = placed[tuple(slice(b * n, (b + 1) * n) for b, n in zip(block, inner))]
        assert len({device.slice_index for device in part.flat}) == 1


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
    assert RULES.spec("batch", "frames", "rows", "columns") == P(("data", "fsdp"), "context", None, None)
    assert RULES.spec("batch", "stream") == P(("data", "fsdp"), ("context", "tensor"))
    assert RULES.spec("layers", "embed", "mlp") == P(None, ("fsdp", "context"), "tensor")
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
    assert weight_sharding(("layers", "embed", "mlp"), (4, 8, 12), mesh).spec == P(None, "fsdp", None)
    assert weight_sharding(("layers", "embed", "mlp"), (4, 6, 12), mesh).spec == P(None, None, "fsdp")
    assert weight_sharding(("layers", "embed", "mlp"), (4, 2, 3), mesh).spec == P(None, "fsdp1", None)
    assert weight_sharding(("layers", "embed", "mlp"), (4, 5, 3), mesh).spec == P(None, None, None)  # nor the layers
    assert weight_sharding(("layers", "embed"), (4, 8), mesh).spec == P(None, None)  # vectors
    assert weight_sharding(("embed", "mlp"), (8, 8), make_mesh(MeshConfig(data=8))).spec == P(None, None)


CONTEXT = ("context0", "context1")
EMBED = ("fsdp0", "fsdp1", "fsdp2", "fsdp3", "fsdp4", "fsdp5", "fsdp6", "fsdp7")


@pytest.mark.parametrize(
    ("sizes", "names", "shape", "spec"),
    [
        ((1, 32, 1, 1), ("layers", "embed", "mlp"), (26, 1792, 7168), P(None, "fsdp", None)),
        ((1, 64, 1, 1), ("layers", "embed", "mlp"), (26, 1792, 7168), P(None, EMBED[1:6], None)),  # half of all devices
        (
            (4, 64, 1, 1),
            ("layers", "embed", "mlp"),
            (26, 1792, 7168),
            P(None, None, "fsdp"),
        ),  # 112 columns, not 28 rows
        ((4, 64, 1, 1), ("layers", "embed", "embed_out"), (26, 1792, 1792), P(None, EMBED[1:6], None)),  # 56 rows
        ((4, 64, 1, 1), ("layers", "embed", "mlp"), (26, 5120, 13824), P(None, "fsdp", None)),
        ((1, 256, 1, 1), ("layers", "mlp", "embed"), (26, 7168, 1792), P(None, EMBED[1:8], None)),  # rows are tiles
        (
            (1, 16, 4, 1),
            ("layers", "embed", "mlp"),
            (26, 1792, 7168),
            P(None, (*EMBED[1:4], "context0", "context1"), None),
        ),
        ((4, 16, 4, 1), ("layers", "embed", "mlp"), (26, 2048, 8192), P(None, ("fsdp", "context"), None)),
        ((1, 32, 1, 2), ("layers", "embed", "mlp"), (26, 1792, 7168), P(None, "fsdp", "tensor")),
    ],
)
def test_a_weight_is_split_into_tiles_by_less_than_all_devices(sizes, names, shape, spec):
    mesh = jax.sharding.AbstractMesh(sizes, AXES)
    sharding = weight_sharding(names, shape, mesh)
    assert sharding.spec == spec
    assert sharding.mesh.size == mesh.size


def test_factors_are_of_the_same_devices_in_the_same_order():
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    parts = factored(mesh)
    assert parts.axis_names == ("data", "fsdp0", "fsdp1", "tensor")
    assert list(parts.devices.flat) == list(mesh.devices.flat)


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
    params = {"w": jnp.ones((3, 7, 5)), "v": jnp.ones((3, 6, 5)), "b": jnp.ones(5)}
    logical = {("w",): ("layers", "embed", "mlp"), ("v",): ("layers", "embed", "mlp"), ("b",): ("mlp",)}
    assert replicated_weights(params, logical, make_mesh(MeshConfig(data=2, fsdp=4))) == ["w (3, 7, 5)"]
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


@pytest.mark.parametrize("rows", [8, 16])
def test_rows_of_a_batch_lie_where_the_plan_says_on_permuted_devices(rows):
    order = np.random.default_rng(0).permutation(8)
    mesh = make_mesh(MeshConfig(), jax.devices())
    mesh = jax.sharding.Mesh(np.array(jax.devices())[order].reshape(mesh.devices.shape), AXES)
    x = np.arange(rows)
    assert own_rows(rows, mesh) == tuple(x)
    placed = shard_batch(x, mesh)
    np.testing.assert_array_equal(placed, x)
    on = {shard.device: np.asarray(shard.data) for shard in placed.addressable_shards}
    np.testing.assert_array_equal(np.concatenate([on[device] for device in mesh.devices.flat]), x)


TOPOLOGIES = """
import itertools, json
import numpy as np
from jax.experimental import topologies
from moc_jax.mesh import device_array
from moc_jax.planning.compiled import absent_devices
kinds = {
    "v4": ["2x2x1", "2x2x4", "4x4x4"],
    "v5e": ["1x1", "2x2", "2x4", "4x4", "8x8", "8x16", "16x16"],
    "v5p": ["2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "8x8x4"],
    "v6e": ["1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "16x16"],
    "tpu7x": ["2x2x1", "2x2x2", "2x2x4", "4x4x4"],
}
def volume(devices):
    return np.prod(np.ptp([(*device.coords, device.core_on_chip) for device in devices], axis=0) + 1)
def boxes(array, axes):
    others = [axis for axis in range(4) if axis not in axes]
    groups = array.transpose(*others, *axes).reshape(-1, np.prod([array.shape[axis] for axis in axes]))
    return all(volume(group) == len(group) for group in groups)
found = {}
for kind, shapes in kinds.items():
    for shape in shapes:
        devices = absent_devices(f"{kind}:{shape}")
        sizes = [2**i for i in range(10)]
        meshes = [each for each in itertools.product(sizes, repeat=4) if np.prod(each) == len(devices)]
        arrays = [device_array(each, devices) for each in meshes]
        same = all(array.shape == each and len(set(array.flat)) == len(devices) for array, each in zip(arrays, meshes))
        near = all(boxes(array, axes) for array in arrays for axes in ((3,), (2, 3), (1, 2, 3)))
        found[f"{kind}:{shape}"] = [len(meshes), same, near]
two = topologies.get_topology_desc("v5e:4x4", "tpu", num_slices=2).devices
for sizes, across in (((2, 4, 4, 1), 0), ((1, 8, 2, 2), 1), ((1, 1, 8, 4), 2), ((1, 1, 1, 32), 3)):
    parts = np.split(device_array(sizes, two), 2, axis=across)
    found[str(sizes)] = [1, True, [{device.slice_index for device in part.flat} for part in parts] == [{0}, {1}]]
print(json.dumps(found))
"""


@pytest.mark.tpu_compiler
def test_every_topology_takes_every_mesh_of_powers_of_two():
    """Tensor groups, context x tensor and fsdp x context x tensor are boxes of neighbours, and slices lie outside."""
    result = subprocess.run(
        [sys.executable, "-c", TOPOLOGIES], env=compiler.environment(), capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert len(found) == 32
    assert {name: rest for name, (_, *rest) in found.items() if rest != [True, True]} == {}
    assert found["v5p:8x8x4"][0] == 165


POD = """
import json
from jax.experimental import topologies
from moc_jax.config import MeshConfig
from moc_jax.sharding import make_mesh, own_rows
mesh = make_mesh(MeshConfig(data=1, fsdp=-1), topologies.get_topology_desc("v5p:4x4x4", "tpu").devices)
owners = [device.process_index for device in mesh.devices.flat]
print(json.dumps([owners, [own_rows(64, mesh, process) for process in range(16)]]))
"""


@pytest.mark.tpu_compiler
def test_a_process_of_a_pod_reads_the_rows_that_its_chips_hold():
    """On v5p:4x4x4 these are no run of rows: 56 of 64 lie elsewhere than the processes' order would have them."""
    result = subprocess.run([sys.executable, "-c", POD], env=compiler.environment(), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    owners, rows = json.loads(result.stdout.splitlines()[-1])
    assert sorted(itertools.chain(*rows)) == list(range(64))
    assert all(owners[row] == process for process, mine in enumerate(rows) for row in mine)
    assert sum(row // 4 != process for process, mine in enumerate(rows) for row in mine) == 56
