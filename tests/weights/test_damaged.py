"""Weights that are damaged, foreign or of something else: each is an error that says what it is, and runs nothing."""

import io
import json
import pathlib
import pickle
import re
import resource
import shutil
import zipfile

import ml_dtypes
import numpy as np
import pytest

from moc_jax.codecs import public_autoencoder
from moc_jax.config import ConfigError
from moc_jax.tensor_files.pickled import read_pickled
from moc_jax.tensor_files.safetensors import read_safetensors
from moc_jax.text import public_encoder
from moc_jax.weights import WeightsError, open_weights
from tests.parity.numbers import numbers
from tests.weights.folders import arrays, index, write
from tests.weights.pipelines import write_pipeline, write_pth

GOLDEN = pathlib.Path(__file__).parents[1] / "parity" / "golden"
FILE = "diffusion_pytorch_model.safetensors"


def opened(place):
    with pytest.raises((WeightsError, ConfigError)) as caught:
        open_weights(place)
    return str(caught.value)


def test_all_that_is_wrong_with_the_tensors_is_named_at_once(tmp_path):
    tensors = arrays()
    for layer in (0, 1):
        del tensors[f"blocks.{layer}.attn1.to_q.bias"]
    del tensors["proj_out.bias"]
    tensors["blocks.1.attn1.to_w.bias"] = np.zeros(3, np.float32)
    tensors["blocks.0.norm2.weight"] = np.zeros(47, np.float32)
    tensors["blocks.1.ffn.net.2.weight"] = np.zeros((40, 48), np.float32)
    message = opened(write(tmp_path / "w", tensors))
    for part in (
        "missing: blocks.{0-1}.attn1.to_q.bias, proj_out.bias",
        "not of this model: blocks.1.attn1.to_w.bias",
        "blocks.0.norm2.weight has shape (47,), not (48,)",
        "blocks.1.ffn.net.2.weight has shape (40, 48), not (48, 40)",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("condition_embedder.image_embedder.norm1.weight", "is Wan 2.1 I2V or FLF2V, which read an image by CLIP"),
        ("vace_blocks.0.proj_in.weight", "is Wan VACE; supported are Wan 2.1 T2V"),
        ("blocks.0.attn1.to_q.lora_A.weight", "is a LoRA, which belongs to a model"),
    ],
)
def test_other_models_of_the_family_are_refused_by_name(tmp_path, name, message):
    assert message in opened(write(tmp_path / "w", arrays() | {name: np.zeros(1, np.float32)}))


def test_other_models_are_refused(tmp_path):
    write(tmp_path / "w", arrays(), _class_name="FluxTransformer2DModel")
    assert "it is a 'FluxTransformer2DModel', not a WanTransformer3DModel" in opened(tmp_path / "w")
    write(tmp_path / "w", arrays(), _class_name="WanModel", model_type="s2v")
    assert "model_type 's2v'; supported are t2v, i2v, ti2v" in opened(tmp_path / "w")
    write(tmp_path / "w", arrays(), qk_norm="layer_norm")
    assert "qk_norm 'layer_norm'; supported is True" in opened(tmp_path / "w")
    write(tmp_path / "w", arrays(), num_attention_heads=7)
    assert "isn't a model of Wan: model.dim = 48 is not a multiple of model.heads = 7" in opened(tmp_path / "w")
    write(tmp_path / "w", arrays(), num_attention_heads="4")
    assert "num_attention_heads '4'; it must be a whole number" in opened(tmp_path / "w")
    write(tmp_path / "w", {"bert.embeddings": np.zeros(3, np.float32)})
    assert "isn't a transformer of Wan: none of its 1 tensors is its head (it has bert.embeddings)" in opened(
        tmp_path / "w"
    )
    (tmp_path / "w" / "config.json").unlink()
    write(tmp_path / "v", arrays())
    (tmp_path / "v" / "config.json").unlink()
    assert "no config.json says how many heads of a width of 48 there are" in opened(tmp_path / "v" / FILE)


SIZES = {
    "diffusers": {
        "num_layers": (40, 2),
        "ffn_dim": (999, 40),
        "in_channels": (36, 2),
        "out_channels": (48, 2),
        "text_dim": (4096, 8),
        "patch_size": ([1, 4, 4], [1, 2, 2]),
        "attention_head_dim": (128, 12),
    },
    "original": {"num_layers": (1, 2), "dim": (5120, 48), "ffn_dim": (999, 40), "in_dim": (36, 2), "out_dim": (16, 2)},
}


@pytest.mark.parametrize("names", SIZES)
def test_all_that_config_json_says_otherwise_is_named_at_once(tmp_path, names):
    sizes = SIZES[names]
    message = opened(
        write(tmp_path / "w", arrays(names=names), names=names, **{x: said for x, (said, _) in sizes.items()})
    )
    for name, (said, is_) in sizes.items():
        assert f"its config.json says {name} {said}, but by its tensors it is {is_}" in message
    assert len(message.splitlines()) == len(sizes) + (names == "diffusers")
    assert ("missing: blocks.{2-39}.attn1.norm_k.weight" in message) == (names == "diffusers")


@pytest.mark.parametrize("names", ["diffusers", "original", "comfyui"])
def test_blocks_that_are_missing_are_named(tmp_path, names):
    left = {name: x for name, x in arrays(names=names).items() if "blocks.1." not in name}
    message = opened(write(tmp_path / "w", left, names=names))
    assert "its config.json says num_layers 2, but by its tensors it is 1" in message
    assert "blocks.1.ffn." in message.partition("missing: ")[2]


def test_heads_that_make_another_width_are_named(tmp_path):
    message = opened(write(tmp_path / "w", arrays(), num_attention_heads=2, attention_head_dim=12))
    assert message.endswith("its config.json says attention_head_dim 12, but by its tensors it is 24")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (
            {"_class_name": "HunyuanVideoPipeline"},
            "is of a 'HunyuanVideoPipeline'; supported are WanPipeline and WanIm",
        ),
        ({"_class_name": "WanVACEPipeline"}, "is of a 'WanVACEPipeline'"),
        ({"transformer": ["diffusers", "FluxTransformer2DModel"]}, "says that its transformer is a 'FluxTransformer2D"),
        ({"vae": ["diffusers", "AutoencoderKLHunyuanVideo"]}, "says that its vae is a 'AutoencoderKLHunyuanVideo'"),
        *(
            ({"boundary_ratio": x}, f"says boundary_ratio {x!r}; it must be a noise level between 0 and 1")
            for x in (0.0, 1.0, 5.0, -0.5, 1, "x", True)
        ),
    ],
)
def test_indices_of_others_are_refused_by_name(tmp_path, index, message):
    for folder in ("transformer", "transformer_2"):
        write(tmp_path / folder, arrays())
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert f"model_index.json {message}" in opened(tmp_path)


def test_published_indices_are_taken(tmp_path):
    for folder in ("transformer", "transformer_2"):
        write(tmp_path / folder, arrays())
    index = {
        "_class_name": "WanImageToVideoPipeline",
        "_diffusers_version": "0.35.0.dev0",
        "boundary_ratio": 0.9,
        "expand_timesteps": False,
        "image_encoder": [None, None],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "transformer_2": ["diffusers", "WanTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert open_weights(tmp_path).config.boundary == 0.9
    shutil.rmtree(tmp_path / "transformer_2")
    (tmp_path / "model_index.json").write_text(
        json.dumps(index | {"boundary_ratio": None, "transformer_2": [None] * 2})
    )
    assert open_weights(tmp_path).config.boundary == 0


def test_files_that_are_not_whole(tmp_path):
    file = write(tmp_path / "w", arrays()) / FILE
    whole = file.read_bytes()
    for size, message in (
        (len(whole) - 1, "bytes of numbers, but its header 316,576; it was cut off: 1 bytes are missing"),
        (300, "or was cut off in its header"),
        (5, "or was cut off in its header"),
        (0, "or was cut off in its header"),
    ):
        file.write_bytes(whole[:size])
        assert message in opened(tmp_path / "w"), size
    file.write_bytes(whole + b"x")
    assert "1 bytes too many" in opened(tmp_path / "w")


def header(tree, numbers=b""):
    text = tree if isinstance(tree, bytes) else json.dumps(tree).encode()
    return len(text).to_bytes(8, "little") + text + numbers


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (header(b"[1]"), "its header is [1]"),
        (header(b'{"a": 1, "a": 2}'), "the key 'a' appears twice"),
        (header(b"{" * 50), "its header can't be read"),
        (header({"a": 3}), "what its header says of 'a' does not add up: 3"),
        (header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, b"1234"), "does not add up"),
        (header({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"1234"), "does not add up"),
        (header({"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}, b"1234"), "does not add up"),
        (header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, b"12345678"), "begins at byte 4"),
        (
            header(
                {
                    "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
                    "b": {"dtype": "F32", "shape": [1], "data_offsets": [2, 6]},
                },
                b"123456",
            ),
            "'b' begins at byte 2 of its numbers, not at 4",
        ),
        (b"\xff" * 8 + b"{}", "or was cut off in its header"),
    ],
)
def test_headers_that_do_not_add_up(tmp_path, content, message):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(WeightsError) as caught:
        read_safetensors(tmp_path / "x.safetensors")
    assert message in str(caught.value)


def test_other_types_are_named(tmp_path):
    tree = {"a": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}
    (tmp_path / "x.safetensors").write_bytes(header(tree, b"1234"))
    assert "holds tensors of types other than F32 and BF16: 1 of F8_E4M3, such as a" in opened(tmp_path)


def test_folders_that_lack_something(tmp_path):
    assert "is not there; name a file, or a folder of weights" in opened(tmp_path / "nothing")
    assert "no .safetensors and no .pth file" in opened(tmp_path)
    half = dict(list(arrays().items())[:30])
    rest = {name: x for name, x in arrays().items() if name not in half}
    first, second = "m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors"
    write(tmp_path / "w", half, file=first)
    assert f"has {first}, one file of several, but no index m.safetensors.index.json" in opened(tmp_path / "w")
    index(tmp_path / "w", **{first: half, second: rest})
    assert f"names files that are not there: {second}" in opened(tmp_path / "w")
    write(tmp_path / "w", rest, file=second)
    assert open_weights(tmp_path / "w").parameters == 79_144
    index(tmp_path / "w", **{first: half, second: list(rest)[1:]})
    assert f"does not know where these lie: {next(iter(rest))}" in opened(tmp_path / "w")
    (tmp_path / "w" / "m.safetensors.index.json").write_text('{"weight_map": {"a": "../x"}}')
    assert "has no weight_map of names of files" in opened(tmp_path / "w")
    for name in ("a.safetensors", "b.safetensors"):
        write(tmp_path / "two", arrays(), file=name)
    message = "has several files: a.safetensors, b.safetensors; name the file of the transformer, or the folder of its"
    assert message in opened(tmp_path / "two")
    write(tmp_path / "one" / "high_noise_model", arrays())
    assert "its other expert, high_noise_model or low_noise_model, is missing" in opened(tmp_path / "one")
    write(tmp_path / "pipe" / "transformer", arrays())
    assert open_weights(tmp_path / "pipe").config.boundary == 0
    (tmp_path / "pipe" / "model_index.json").write_text('{"boundary_ratio": 0.875}')
    assert "has two experts by its model_index.json, but no transformer_2" in opened(tmp_path / "pipe")
    (tmp_path / "pipe" / "model_index.json").write_text("{")
    assert "model_index.json can't be read: it is not JSON" in opened(tmp_path / "pipe")


# ------------------------------------------------------------------------------------------------ pickles


def test_what_torch_saved_is_read():
    found = {name: np.array(x.array()) for name, x in read_pickled(GOLDEN / "tensors.pth").items()}
    base = numbers("pickled", 4, 6)
    wanted = {"whole": base, "part": base[1:3], "half": base.astype(ml_dtypes.bfloat16), "parameter": base[0]}
    wanted |= {"none": np.zeros((0, 3), np.float32), "one": np.float32(0.5).reshape(())}
    assert found.keys() == wanted.keys()
    for name, x in wanted.items():
        assert found[name].dtype == x.dtype
        np.testing.assert_array_equal(found[name], x)


def test_pickles_of_something_else(tmp_path):
    for name, message in (
        ("columns", "'columns' is not stored row by row: (1, 6) for (6, 4)"),
        ("nested", "holds something else than named tensors"),
    ):
        with pytest.raises(WeightsError) as caught:
            read_pickled(GOLDEN / f"{name}.pth")
        assert message in str(caught.value)
    shutil.copy(GOLDEN / "other-types.pth", tmp_path)
    assert "1 of F16, such as half; 1 of I64, such as counts" in opened(tmp_path / "other-types.pth")
    (tmp_path / "cut.pth").write_bytes((GOLDEN / "tensors.pth").read_bytes()[:-200])
    assert "isn't a zip file: it was cut off, or is of PyTorch's format before 1.6" in opened(tmp_path / "cut.pth")
    (tmp_path / "empty.pth").write_bytes(b"")
    assert "isn't a zip file" in opened(tmp_path / "empty.pth")


class _Call:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def zipped(tmp_path, data):
    with zipfile.ZipFile(tmp_path / "x.pth", "w") as archive:
        archive.writestr("x/data.pkl", data)
    return tmp_path / "x.pth"


def test_a_pickle_can_call_nothing(tmp_path):
    touched = tmp_path / "touched"
    for call in (_Call(touched.touch), _Call(eval, f"open({str(touched)!r}, 'w')"), _Call(io.open, str(touched), "w")):
        with pytest.raises(WeightsError, match="which weights have no need of; it is not run"):
            read_pickled(zipped(tmp_path, pickle.dumps({"a": call})))
    assert not touched.exists()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not a pickle",
        pickle.dumps([1, 2]),
        pickle.dumps({"a": 3}),
        b"(lp0\n",
        b"\x80\x02ctorch\nFloatStorage\n)R.",  # calls the name of a type
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(K\x01K\x02(t(ttR.",  # a tensor of a number
        b"\x80\x02(X\x07\x00\x00\x00storageX\x03\x00\x00\x00F32X\x04\x00\x00\x00../aX\x03\x00\x00\x00cpuK\x01tQ.",
    ],
)
def test_damaged_pickles_are_named(tmp_path, data):
    with pytest.raises(WeightsError, match=r"x\.pth(: its pickle is damaged| holds something else| refers to)"):
        read_pickled(zipped(tmp_path, data))


@pytest.mark.parametrize(
    "data", [b"\x80\x02Nr\xff\xff\xff\x7f.", b"\x80\x04\x8e" + (2**60).to_bytes(8, "little") + b"."]
)
def test_pickles_that_claim_more_than_they_hold_take_no_memory(tmp_path, data):
    """An object with the number 2^31, for which 32 GiB would be filled, and 2^60 bytes."""
    file = zipped(tmp_path, data)
    limit, before = 2**30, resource.getrlimit(resource.RLIMIT_DATA)
    used = int(re.search(r"VmData:\s+(\d+)", pathlib.Path("/proc/self/status").read_text())[1]) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (used + limit, before[1]))
    try:
        with pytest.raises(WeightsError, match=r"x\.pth: its pickle is damaged: .*bytes"):
            read_pickled(file)
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def test_numbers_of_the_other_byte_order_are_refused(tmp_path):
    write_pth(tmp_path / "x.pth", {"a": np.ones(2, np.float32)})
    for order, message in (("little", ""), ("big", "x.pth has the byte order 'big'; only little can be read")):
        shutil.copy(tmp_path / "x.pth", tmp_path / f"{order}-x.pth")
        with zipfile.ZipFile(tmp_path / f"{order}-x.pth", "a") as archive:
            archive.writestr("archive/byteorder", order)
        if not message:
            assert list(read_pickled(tmp_path / f"{order}-x.pth")) == ["a"]
        else:
            with pytest.raises(WeightsError, match=message):
                read_pickled(tmp_path / f"{order}-x.pth")


# ------------------------------------------------------------------------------------------------ beside transformers


def test_what_the_teams_folders_lack_is_named(tmp_path):
    place = str(write_pipeline(tmp_path / "team", names="original"))
    vae, encoder = tmp_path / "team/Wan2.1_VAE.pth", tmp_path / "team/models_t5_umt5-xxl-enc-bf16.pth"
    assert public_autoencoder(place)
    assert public_encoder(place)
    shutil.copy(vae, tmp_path / "team/Wan2.2_VAE.pth")
    message = r"team has several \*vae\*\.pth: Wan2\.1_VAE\.pth, Wan2\.2_VAE\.pth; name the file of Wan's autoencoder"
    with pytest.raises(WeightsError, match=message):
        public_autoencoder(place)
    for file in (vae, tmp_path / "team/Wan2.2_VAE.pth", encoder):
        file.unlink()
    with pytest.raises(ConfigError, match=r"team has no \*vae\*\.pth \(add it, or name its file\), and what lies"):
        public_autoencoder(place)
    with pytest.raises(ConfigError, match=r"team has no models_t5\*\.pth \(add it, or name its file\)"):
        public_encoder(place)


def test_a_damaged_tokenizer_is_found_by_the_check(tmp_path):
    place = write_pipeline(tmp_path / "w")
    file = place / "tokenizer" / "spiece.model"
    whole = file.read_bytes()
    for size in (0, len(whole) // 2):
        file.write_bytes(whole[:size])
        with pytest.raises(ConfigError, match=r"spiece\.model isn't a SentencePiece model"):
            public_encoder(str(place))
