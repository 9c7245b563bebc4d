"""What adapters' files say beside their numbers, and what is wrong in them, named before anything is read."""

import dataclasses
import json
import math

import numpy as np
import pytest

from moc_jax.config import ConfigError
from moc_jax.tensor_files.safetensors import Written, write_safetensors
from moc_jax.weights import WeightsError, open_weights
from moc_jax.weights.__main__ import main
from moc_jax.weights.adapters import check_adapters, export_adapters, merged, open_adapters
from tests.weights.folders import arrays, write, write_tensors
from tests.weights.test_adapters import adapted, params_of

A, B = np.ones((2, 48), np.float32), np.ones((48, 2), np.float32)
Q = "blocks.0.attn1.to_q"
THEIRS = "diffusion_model.blocks.0.self_attn.q"


def pair(prefix=f"base_model.model.{Q}", a=A, b=B, **more):
    return {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b, **more}


def peft(folder, tensors=None, **settings):
    """As PEFT's save_pretrained writes it."""
    write_tensors(folder / "adapter_model.safetensors", tensors or pair())
    (folder / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 32, **settings}))
    return folder


def alphas(place):
    return {name: adapter.alpha for name, adapter in open_adapters(place).networks["network"].items()}


@pytest.mark.parametrize(
    ("settings", "alpha"),
    [
        ({}, 32),
        ({"use_rslora": True}, 32 * math.sqrt(2)),
        ({"alpha_pattern": {"to_q": 8, Q: 9}}, 8),
        ({"alpha_pattern": {"o_q": 8}}, 32),
        ({"alpha_pattern": {"^blocks.0.attn1.to_q": 8}}, 8),
        ({"alpha_pattern": {r"blocks\.\d\.attn1\.to_[qk]": 8}}, 8),
        ({"r": 7, "rank_pattern": {"attn1.to_q": 2}}, 32),
        ({"lora_alpha": None, "rank_pattern": None}, 2),
    ],
)
def test_settings_of_peft_are_read_beside_the_file(tmp_path, settings, alpha):
    folder = peft(tmp_path, **settings)
    assert alphas(folder) == alphas(folder / "adapter_model.safetensors") == {Q: pytest.approx(alpha)}


def test_patterns_match_the_names_of_the_file(tmp_path):
    folder = peft(tmp_path, pair("base_model.model.blocks.0.self_attn.q"), alpha_pattern={"self_attn.q": 8})
    assert alphas(folder) == {Q: 8}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "adapter_config.json says use_dora true"),
        ({"use_rslora": "no"}, "use_rslora 'no'; it must be true or false"),
        ({"lora_alpha": "16"}, "lora_alpha '16'; it must be a number of at most 1,000,000"),
        ({"lora_alpha": [16]}, r"lora_alpha \[16\]; it must be a number"),
        ({"lora_alpha": True}, "lora_alpha True; it must be a number"),
        ({"lora_alpha": 1e7}, "lora_alpha 10000000.0; it must be a number"),
        ({"alpha_pattern": [1]}, r"alpha_pattern \[1\]; it must be an object"),
        ({"alpha_pattern": {"to_q": None}}, "alpha_pattern 'to_q': None; it must be a number"),
        ({"rank_pattern": {"(": 2}}, r"rank_pattern '\(': the name is not a regular expression"),
        ({"r": 4}, f"{Q} has rank 2, but its settings say 4"),
    ],
)
def test_settings_that_cannot_be_followed_are_refused(tmp_path, settings, message):
    with pytest.raises(WeightsError, match=message):
        open_adapters(peft(tmp_path, **settings))


def test_an_infinite_alpha_is_refused_wherever_it_stands(tmp_path):
    (peft(tmp_path) / "adapter_config.json").write_text('{"lora_alpha": 1e999}')
    with pytest.raises(WeightsError, match="lora_alpha inf; it must be a number"):
        open_adapters(tmp_path)
    for alpha, message in (
        (np.float32("nan"), "alpha is nan"),
        (np.float32("inf"), "alpha is inf"),
        (np.ones(2, np.float32), r"alpha is of shape \(2,\); it must be one number"),
    ):
        write_tensors(tmp_path / "a/lora.safetensors", pair(THEIRS, **{f"{THEIRS}.alpha": np.asarray(alpha)}))
        with pytest.raises(WeightsError, match=f"{Q}: {message}"):
            open_adapters(tmp_path / "a")


def test_what_is_said_twice_must_be_the_same(tmp_path):
    folder = peft(tmp_path / "tensor", pair(THEIRS, **{f"{THEIRS}.alpha": np.array(4, np.float32)}))
    with pytest.raises(WeightsError, match=f"{Q} has alpha 4, but its settings say 32; keep one"):
        open_adapters(folder)
    folder = peft(tmp_path / "words")
    listed = [Written(name, x.dtype, x.shape) for name, x in pair().items()]
    for alpha in (32, 5):
        words = {"lora_adapter_metadata": json.dumps({"transformer.r": 2, "transformer.lora_alpha": alpha})}
        write_safetensors(folder / "adapter_model.safetensors", listed, iter(pair().values()), words)
        if alpha == 32:
            assert alphas(folder) == {Q: 32}
    with pytest.raises(WeightsError, match=r"lora_adapter_metadata and .*adapter_config\.json differ in lora_alpha"):
        open_adapters(folder)


def test_two_adapters_of_one_map_are_both_named(tmp_path):
    up_down = {f"{THEIRS}.lora_down.weight": A, f"{THEIRS}.lora_up.weight": B}
    write_tensors(tmp_path / "two.safetensors", pair(f"transformer.{Q}") | up_down)
    with pytest.raises(
        WeightsError, match=rf"transformer\.{Q}\.lora_A\.weight and {THEIRS}\.lora_down\.weight are the"
    ):
        open_adapters(tmp_path / "two.safetensors")
    write_tensors(tmp_path / "one.safetensors", pair(THEIRS) | up_down)
    with pytest.raises(WeightsError, match=rf"{THEIRS}\.lora_A\.weight and {THEIRS}\.lora_down\.weight are the same"):
        open_adapters(tmp_path / "one.safetensors")


@pytest.mark.parametrize(
    ("a", "b"), [((2, 48), (48, 2, 3)), ((0, 48), (48, 0)), ((2, 48), (48,)), ((2, 48), (0, 2, 2))]
)
def test_shapes_are_looked_at_as_a_whole(tmp_path, a, b):
    write_tensors(tmp_path / "lora.safetensors", pair(a=np.ones(a, np.float32), b=np.ones(b, np.float32)))
    with pytest.raises(WeightsError, match=r"don't go together; they are \[rank, inputs\] and \[outputs, rank\], with"):
        main(["check", str(tmp_path / "lora.safetensors"), "--of", "lora"])


def test_whole_weights_are_no_adapters_which_is_said_once(tmp_path):
    base = write(tmp_path / "base", arrays())
    with pytest.raises(WeightsError, match=r"holds whole weights \(\d+ tensors, such as .* and no adapters") as caught:
        open_adapters(base)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("scale", ["nan", "inf", "1e7"])
def test_scales_are_numbers(tmp_path, scale):
    write_tensors(tmp_path / "lora.safetensors", pair())
    base = write(tmp_path / "base", arrays())
    with pytest.raises(ConfigError, match=r"the scale of adapters is .*; it must lie in -1000000\.\.1000000"):
        main(["merge", str(base), str(tmp_path / "lora.safetensors"), str(tmp_path / "out"), "--scale", scale])
    assert not (tmp_path / "out").exists()
    assert merged(open_weights(base), open_adapters(tmp_path / "lora.safetensors"), -2.0).tensors


def test_all_adapters_that_differ_from_a_runs_are_named(tmp_path):
    cfg = adapted()
    export_adapters(cfg, params_of(cfg), tmp_path / "lora", names="comfyui")
    found = open_adapters(tmp_path / "lora")
    check_adapters(found, cfg, "it")
    with pytest.raises(
        ConfigError, match=r"blocks\.\{0-1\}\.attn1\.to_q, .* of rank 3 and alpha 6, here of 3 and 6\.25"
    ):
        check_adapters(found, adapted(alpha=6.25), "it")
    with pytest.raises(ConfigError, match=r"attn1\.to_q, .*: there, but not by .* proj_out: by model\.lora\.targets"):
        check_adapters(found, adapted(targets=("mlp/*", "head")), "it")
    with pytest.raises(ConfigError, match=r"ffn\.net\.0\.proj: of shapes .* and \(40, 3\), here of .* \(32, 3\)"):
        check_adapters(found, dataclasses.replace(cfg, mlp_dim=32), "it")
    odd = adapted(alpha=0.1)  # float32 has no 0.1
    export_adapters(odd, params_of(odd), tmp_path / "odd", names="comfyui")
    check_adapters(open_adapters(tmp_path / "odd"), odd, "it")
