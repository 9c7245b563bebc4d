"""Weights in and out: every name, type and layout comes back bit for bit, and each device reads its own part alone."""

import dataclasses
import errno
import json
import os
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

from moc_jax import checkpoint, models, public_weights, weights
from moc_jax.config import ConfigError, MMDiTConfig
from moc_jax.models.rope import halves
from moc_jax.models.wan.names import COMFYUI
from moc_jax.sharding import AXES, key_path, logical_axes, tree_shardings
from moc_jax.tensor_files.places import networks_in
from moc_jax.weights import WeightsError
from moc_jax.weights.__main__ import main
from tests.weights.folders import BF16, CFG, arrays, write

NAMES = ["diffusers", "original", "comfyui"]
EXPERTS = dataclasses.replace(CFG, boundary=0.9, condition_channels=3)


def mesh_of(*sizes):
    devices = jax.devices()[: int(np.prod(sizes))]
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def contents(place):
    """The numbers of all networks."""
    return {
        part: {name: np.array(x.array()) for name, x in of.tensors.items()}
        for part, of in networks_in(place)[0].items()
    }


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, x in wanted.items():
        assert (found[name].dtype, found[name].shape) == (x.dtype, x.shape), name
        assert found[name].tobytes() == x.tobytes(), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("names", NAMES)
def test_a_model_comes_back_bit_for_bit(tmp_path, names, dtype):
    kind = {"float32": np.dtype(np.float32), "bfloat16": BF16}[dtype]
    wanted = arrays(names=names, dtype=kind)
    found = weights.open_weights(write(tmp_path / "in", wanted, names=names))
    assert (found.names, found.parameters) == (names, sum(x.size for x in wanted.values()))
    assert dataclasses.replace(found.config, text_rows=CFG.text_rows) == CFG
    params = weights.load(found, mesh_of(1, 1, 1, 1))
    weights.export(found.config, params, tmp_path / "out", names=names, dtype=dtype, shard_bytes=20_000)
    assert_same(contents(tmp_path / "out")["network"], wanted)
    files = {"float32": 15, "bfloat16": 10}[dtype]
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == (1 if names == "comfyui" else files)


def test_names_change_and_numbers_do_not(tmp_path):
    wanted = arrays(dtype="mixed")
    place = write(tmp_path / "diffusers", wanted)
    for names in ("original", "comfyui", "diffusers"):
        weights.convert(weights.open_weights(place), tmp_path / f"to-{names}", names=names, shard_bytes=30_000)
        place = tmp_path / f"to-{names}"
    assert_same(contents(place)["network"], wanted)
    low = tmp_path / "low"
    weights.convert(weights.open_weights(place), low, names="diffusers", dtype="bfloat16")
    assert_same(contents(low)["network"], {name: x.astype(BF16) for name, x in wanted.items()})


def test_both_experts_come_back(tmp_path):
    for names, folders in (
        ("diffusers", ("transformer", "transformer_2")),
        ("original", ("high_noise_model", "low_noise_model")),
    ):
        wanted = {part: arrays(EXPERTS, names, part) for part in ("high", "low")}
        for part, folder in zip(wanted, folders):
            write(tmp_path / names / folder, wanted[part], EXPERTS, names)
        found = weights.open_weights(tmp_path / names)
        assert found.config == EXPERTS  # 0.9 as Wan 2.2's I2V has it, where nothing says otherwise
        params = weights.load(found, mesh_of(1, 1, 1, 1))
        weights.export(dataclasses.replace(EXPERTS, boundary=0.7), params, tmp_path / "out" / names, names=names)
        for part, tensors in contents(tmp_path / "out" / names).items():
            assert_same(tensors, wanted[part])
        assert weights.open_weights(tmp_path / "out" / names).config.boundary == 0.7


def test_boundary_and_rows_of_text_stay_whatever_the_names(tmp_path):
    cfg = dataclasses.replace(EXPERTS, boundary=0.7, text_rows=226)
    place = tmp_path / "in"
    for part, folder in (("high", "high_noise_model"), ("low", "low_noise_model")):
        write(place / folder, arrays(cfg, "original", part), cfg, "original")
    (place / "model_index.json").write_text('{"boundary_ratio": 0.7}')
    for names in ("diffusers", "comfyui", "original", "diffusers"):
        assert weights.open_weights(place).config == cfg
        out = tmp_path / f"{place.name}-{names}"
        weights.convert(weights.open_weights(place), out, names=names)
        place = out
    assert weights.open_weights(place).config == cfg
    index = json.loads((place / "model_index.json").read_text())
    assert index["_class_name"] == "WanImageToVideoPipeline"
    assert index["transformer"] == index["transformer_2"] == ["diffusers", "WanTransformer3DModel"]
    assert models.public_index(dataclasses.replace(CFG, boundary=0.7), "diffusers")["_class_name"] == "WanPipeline"


def test_names_are_those_that_others_use():
    """The norm of cross-attention is norm2 to diffusers, and norm3 to the Wan team."""
    pairs = {tensor.names for tensor in models.public_tensors(CFG)["network"]}
    for diffusers, original in [
        ("blocks.0.norm2.weight", "blocks.0.norm3.weight"),
        ("blocks.1.norm2.bias", "blocks.1.norm3.bias"),
        ("blocks.0.attn1.to_q.weight", "blocks.0.self_attn.q.weight"),
        ("blocks.0.attn2.to_out.0.bias", "blocks.0.cross_attn.o.bias"),
        ("blocks.0.attn1.norm_k.weight", "blocks.0.self_attn.norm_k.weight"),
        ("blocks.1.ffn.net.0.proj.weight", "blocks.1.ffn.0.weight"),
        ("blocks.1.ffn.net.2.bias", "blocks.1.ffn.2.bias"),
        ("blocks.1.scale_shift_table", "blocks.1.modulation"),
        ("scale_shift_table", "head.modulation"),
        ("proj_out.weight", "head.head.weight"),
        ("patch_embedding.weight", "patch_embedding.weight"),
        ("condition_embedder.time_embedder.linear_1.weight", "time_embedding.0.weight"),
        ("condition_embedder.text_embedder.linear_2.bias", "text_embedding.2.bias"),
        ("condition_embedder.time_proj.weight", "time_projection.1.weight"),
    ]:
        assert (diffusers, original) in pairs
    assert not any("norm3" in diffusers or "norm2" in original for diffusers, original in pairs)
    assert COMFYUI == "model.diffusion_model."


def test_turned_components_are_halves_here(tmp_path):
    found = weights.open_weights(write(tmp_path / "in", arrays()))
    params = weights.load(found, mesh_of(1, 1, 1, 1))["network"]["blocks"]
    matrix = arrays()["blocks.1.attn1.to_q.weight"].reshape(4, 12, 48)  # heads, their components, inputs
    np.testing.assert_array_equal(params["attention"]["q"]["kernel"][1], matrix[:, halves(12)].transpose(2, 0, 1))
    matrix = arrays()["blocks.1.attn2.to_q.weight"].reshape(4, 12, 48)  # nothing turns where there are no positions
    np.testing.assert_array_equal(params["cross"]["q"]["kernel"][1], matrix.transpose(2, 0, 1))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "mixed"])
def test_each_device_reads_its_part_and_nothing_is_read_whole(tmp_path, monkeypatch, dtype):
    found = weights.open_weights(write(tmp_path / "in", arrays()))
    mesh = mesh_of(1, 2, 1, 4)
    asked, make = [], jax.make_array_from_callback

    def watched(shape, sharding, read):
        def reading(index):
            out = read(index)
            asked.append(
                (
                    np.prod(shape),
                    out.size,
                    sharding.num_devices // len(set(sharding.devices_indices_map(shape).values())),
                )
            )
            return out

        return make(shape, sharding, reading)

    monkeypatch.setattr(jax, "make_array_from_callback", watched)
    params = weights.load(found, mesh, dtype=dtype)
    assert all(size * (8 // copies) == whole for whole, size, copies in asked)
    axes = models.abstract(found.config)[1]
    places = tree_shardings(nnx.to_pure_dict(axes), logical_axes(axes), mesh)
    alone = weights.load(found, mesh_of(1, 1, 1, 1), dtype=dtype)
    for (path, x), place, one in zip(
        jax.tree.leaves_with_path(params), jax.tree.leaves(places), jax.tree.leaves(alone)
    ):
        assert x.sharding == place, path
        np.testing.assert_array_equal(x, one)
        matrix = {"blocks", "kernel"} <= set(key_path(path))
        assert x.dtype == (dtype if dtype != "mixed" else "bfloat16" if matrix else "float32"), path


def test_there_are_no_public_names_for_other_models(tmp_path):
    with pytest.raises(ConfigError, match=r"model\.name is mmdit; public files hold weights of wan alone"):
        weights.export(MMDiTConfig(), {}, tmp_path / "out", names="diffusers")
    with pytest.raises(ConfigError, match="exists; give the name of a new folder"):
        weights.export(CFG, {}, tmp_path, names="diffusers")


def test_the_command_line_needs_no_device(tmp_path):
    """On a platform that is not there, whatever touched a device would fail."""
    write(tmp_path / "in", arrays())
    calls = [["check", "in"], ["convert", "in", "out", "--names", "original", "--dtype", "bfloat16"], ["check", "out"]]
    run = "import sys; from moc_jax.weights.__main__ import main; [main(call) for call in eval(sys.argv[1])]"
    environment = os.environ | {"JAX_PLATFORMS": "tpu", "PYTHONPATH": os.getcwd()}
    done = subprocess.run(
        [sys.executable, "-c", run, repr(calls)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert not done.returncode, done.stderr
    assert "in: 79,144 parameters (network) with diffusers names; tensors: 69 of F32" in done.stdout
    assert "out: 79,144 parameters (network) with original names; tensors: 69 of BF16" in done.stdout
    assert "licence: Apache-2.0" in done.stdout


@pytest.mark.parametrize("call", [["convert", "in", "out"], ["merge", "in", "lora", "out"], ["export", "run", "out"]])
def test_the_folder_is_looked_at_before_anything_is_read(tmp_path, monkeypatch, call):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").symlink_to("nowhere")
    with pytest.raises(ConfigError, match="the folder out exists; give the name of a new folder"):
        main(call)


def test_room_is_asked_for_before_a_checkpoint_is_loaded(tmp_path, monkeypatch):
    config = types.SimpleNamespace(model=CFG)
    monkeypatch.setattr(checkpoint, "saved_config", lambda *_: (config, 1))
    monkeypatch.setattr(checkpoint, "load_for_sampling", lambda *_, **__: pytest.fail("it was loaded"))
    monkeypatch.setattr("shutil.disk_usage", lambda _: types.SimpleNamespace(free=1000))
    with pytest.raises(ConfigError, match="out will hold 316,576 bytes, but 1,000 are free there"):
        main(["export", "run", str(tmp_path / "out")])
    with pytest.raises(ConfigError, match="out will hold 158,288 bytes, but 1,000 are free there"):
        main(["convert", str(write(tmp_path / "in", arrays())), str(tmp_path / "out"), "--dtype", "bfloat16"])
    assert os.listdir(tmp_path) == ["in"]


def test_a_disk_that_fills_up_is_said_with_the_place(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    found = weights.open_weights(write(tmp_path / "in", arrays()))
    monkeypatch.setattr(public_weights, "write_safetensors", full)
    with pytest.raises(WeightsError, match=r"the folder \S+out cannot be written: the disk is full; free some space"):
        weights.convert(found, tmp_path / "out", names="original")
    assert os.listdir(tmp_path) == ["in"]


def test_two_at_once_leave_each_other_alone(tmp_path):
    (tmp_path / ".other.partial").mkdir()
    weights.convert(weights.open_weights(write(tmp_path / "in", arrays())), tmp_path / "out", names="original")
    assert sorted(os.listdir(tmp_path)) == [".other.partial", "in", "out"]
