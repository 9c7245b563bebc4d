"""Adapters in and out: every spelling comes back bit for bit, and what is merged computes what is apart."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax import nnx

from moc_jax import models, weights
from moc_jax.config import ConfigError, LoraConfig, MMDiTConfig
from moc_jax.tensor_files.safetensors import read_described
from moc_jax.weights.__main__ import main
from moc_jax.weights.adapters import convert_adapters, export_adapters, load_adapters, merged, open_adapters
from tests.weights.folders import BF16, CFG, arrays, write, write_tensors
from tests.weights.test_weights import EXPERTS, assert_same, contents, mesh_of

LORA = LoraConfig(rank=3, alpha=6.0)
NAMES = ["diffusers", "original", "comfyui"]
FILE = "pytorch_lora_weights.safetensors"


def params_of(cfg, seed=0):
    shapes = nnx.to_pure_dict(models.abstract(cfg)[1])
    leaves, tree = jax.tree.flatten(models.trained(shapes))
    random = np.random.default_rng(seed)
    return jax.tree.unflatten(tree, [random.normal(size=x.shape).astype(np.float32) for x in leaves])


def like_of(cfg):
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = models.trained(nnx.to_pure_dict(models.abstract(cfg)[1]))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes)


def adapted(cfg=CFG, **lora):
    return dataclasses.replace(cfg, lora=dataclasses.replace(LORA, **lora))


def numbers(file):
    tensors, words = read_described(file)
    return {name: np.array(x.array()) for name, x in tensors.items()}, words


@pytest.mark.parametrize("names", NAMES)
def test_adapters_come_back_bit_for_bit(tmp_path, names):
    cfg = adapted(targets=("*",))
    params = params_of(cfg)
    export_adapters(cfg, params, tmp_path / "out", names=names)
    found = open_adapters(tmp_path / "out")
    assert found.names == ("diffusers" if names == "diffusers" else "original")
    assert "of rank 3 and alpha 6" in found.described()
    again = load_adapters(found, cfg, like_of(cfg), "it")
    jax.tree.map(np.testing.assert_array_equal, params, again)


def test_names_change_and_numbers_do_not(tmp_path):
    cfg = adapted()
    export_adapters(cfg, params_of(cfg), tmp_path / "diffusers", names="diffusers", dtype="bfloat16")
    wanted, words = numbers(tmp_path / "diffusers" / FILE)
    assert {"transformer.blocks.0.attn1.to_q.lora_A.weight", "transformer.blocks.1.ffn.net.2.lora_B.weight"} < {*wanted}
    assert len(wanted) == 2 * 2 * 10
    told = json.loads(words["lora_adapter_metadata"])
    assert (told["transformer.r"], told["transformer.lora_alpha"]) == (3, 6)
    main(["convert", str(tmp_path / "diffusers"), str(tmp_path / "comfyui"), "--of", "lora", "--names", "comfyui"])
    there, _ = numbers(tmp_path / "comfyui" / FILE)
    a = "diffusion_model.blocks.0.self_attn.q.lora_down.weight"
    assert there[a].tobytes() == wanted["transformer.blocks.0.attn1.to_q.lora_A.weight"].tobytes()
    assert float(there["diffusion_model.blocks.0.self_attn.q.alpha"]) == 6
    convert_adapters(open_adapters(tmp_path / "comfyui"), tmp_path / "back", names="diffusers")
    back, same_words = numbers(tmp_path / "back" / FILE)
    assert_same(back, wanted)
    assert same_words == words


def test_other_spellings_and_types_are_read(tmp_path):
    a, b = np.ones((2, 48), np.float16), np.ones((48, 2), np.float16)
    flat = {"lora_unet_blocks_1_cross_attn_o.lora_down.weight": a, "lora_unet_blocks_1_cross_attn_o.lora_up.weight": b}
    write_tensors(
        tmp_path / "musubi.safetensors", {**flat, "lora_unet_blocks_1_cross_attn_o.alpha": np.float32(1).reshape(())}
    )
    peft = "base_model.model.blocks.1.attn2.to_out.0.lora_"
    write_tensors(tmp_path / "peft.safetensors", {f"{peft}A.weight": a, f"{peft}B.weight": b})
    for file, alpha in (("musubi", 1), ("peft", 2)):
        ((module, adapter),) = open_adapters(tmp_path / f"{file}.safetensors").networks["network"].items()
        assert (module, adapter.rank, adapter.alpha) == ("blocks.1.attn2.to_out.0", 2, alpha)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merged_weights_are_those_of_the_model(tmp_path, dtype):
    cfg, kind = adapted(targets=("*",)), {"float32": np.dtype(np.float32), "bfloat16": BF16}[dtype]
    base = write(tmp_path / "base", arrays(dtype=kind))
    params = params_of(cfg)
    export_adapters(cfg, params, tmp_path / "lora", names="comfyui")
    main(["merge", str(base), str(tmp_path / "lora"), str(tmp_path / "merged")])
    found = weights.load(weights.open_weights(tmp_path / "merged"), mesh_of(1, 1, 1, 1))
    wanted = models.merged(weights.load(weights.open_weights(base), mesh_of(1, 1, 1, 1)), params, cfg.lora)
    close = 1e-5 if dtype == "float32" else 2**-8
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=close, rtol=close), found, wanted)
    half = merged(weights.open_weights(base), open_adapters(tmp_path / "lora"), 0.0)
    weights.convert(half, tmp_path / "none", names="diffusers")
    assert_same(contents(tmp_path / "none")["network"], contents(base)["network"])


def test_both_experts_have_their_own(tmp_path):
    cfg = adapted(EXPERTS)
    params = params_of(cfg)
    for names, folder in (("diffusers", "transformer_2"), ("original", "low_noise_model")):
        export_adapters(cfg, params, tmp_path / names, names=names)
        assert (tmp_path / names / folder / FILE).is_file()
        again = load_adapters(open_adapters(tmp_path / names), cfg, like_of(cfg), "it")
        jax.tree.map(np.testing.assert_array_equal, params, again)
    with pytest.raises(weights.WeightsError, match=r"adapters of high and low, but .*base is network"):
        merged(weights.open_weights(write(tmp_path / "base", arrays())), open_adapters(tmp_path / "original"))


def test_what_does_not_fit_is_named_at_once(tmp_path):
    a, b = np.ones((2, 48), np.float32), np.ones((48, 2), np.float32)
    of = "transformer.blocks.0.attn1"
    write_tensors(
        tmp_path / "bad.safetensors",
        {
            f"{of}.to_q.lora_A.weight": a,
            f"{of}.to_k.lora_A.weight": a,
            f"{of}.to_k.lora_B.weight": b.T,
            "x.lora_A.weight": a,
        },
    )
    with pytest.raises(
        weights.WeightsError, match=r"(?s)x\.lora_A\.weight is not of an adapter.*to_q has a alone.*to_k: A"
    ):
        open_adapters(tmp_path / "bad.safetensors")
    with pytest.raises(weights.WeightsError, match="is not there"):
        open_adapters(tmp_path / "nowhere")
    base = weights.open_weights(write(tmp_path / "base", arrays()))
    deep = {
        f"transformer.blocks.{i}.ffn.net.0.proj.lora_{x}.weight": y for i in (0, 7) for x, y in (("A", a), ("B", b))
    }
    write_tensors(tmp_path / "deep.safetensors", deep)
    with pytest.raises(
        weights.WeightsError, match=r"(?s)net\.0\.proj\.weight is \(40, 48\), not .*blocks\.7\..* is not a lin"
    ):
        merged(base, open_adapters(tmp_path / "deep.safetensors"))
    cfg = adapted()
    export_adapters(cfg, params_of(cfg), tmp_path / "lora", names="diffusers")
    for other, what in (
        (adapted(targets=("mlp/*",)), "other adapters than"),
        (adapted(rank=4), "rank 3 and alpha 6, here of 4"),
    ):
        with pytest.raises(ConfigError, match=what):
            load_adapters(open_adapters(tmp_path / "lora"), other, like_of(other), "it")
    with pytest.raises(ConfigError, match="has no adapters"):
        export_adapters(CFG, {}, tmp_path / "none", names="diffusers")
    with pytest.raises(ConfigError, match="public files hold weights of wan alone"):
        export_adapters(MMDiTConfig(lora=LORA), {}, tmp_path / "none", names="diffusers")
