"""umT5's encoder and tokenizer: what transformers computes; what is wrong with files and captions."""

import hashlib
import json
import math
import shutil

import numpy as np
import pytest

from moc_jax.config import ConfigError, Umt5Config
from moc_jax.data.caption_store import CaptionStore, fill_store, store_folder
from moc_jax.data.captions import CaptionError
from moc_jax.text import encoder_fingerprint
from moc_jax.text.umt5.encoder import buckets
from moc_jax.text.umt5.names import Sizes, public_name, shapes_of
from moc_jax.text.umt5.tokens import Tokenizer, cleaned
from moc_jax.weights import WeightsError
from moc_jax.weights.__main__ import main
from tests.parity.umt5_figures import GOLDEN, arrays, differing, encoder_in, error, write, write_tokenizer

PARITY = 1e-5
XXL = Sizes(256384, 4096, 64, 4096, 10240, 24)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """As the Wan team has it: weights with its names, and the tokenizer where it keeps it."""
    pytest.importorskip("sentencepiece")
    pytest.importorskip("ftfy")
    folder = write(tmp_path_factory.mktemp("team"), arrays(1))
    write_tokenizer(folder / "google" / "umt5-xxl")
    return folder


def test_names_and_shapes_at_full_size():
    shapes = shapes_of(XXL)
    assert (len(shapes), sum(map(math.prod, shapes.values()))) == (242, 5_680_910_336)
    assert len({public_name(name, 1) for name in shapes}) == 242
    lines = sorted(f"{public_name(name, 0)} {shape}" for name, shape in shapes.items())
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == str(np.load(GOLDEN / "umt5.npz")["listing"])


@pytest.mark.parametrize("hold", ["devices", "layers"])
def test_rows_are_those_of_transformers(folder, hold):
    """Four devices share the heads; captions of 170 and 23 tokens."""
    encoder = encoder_in(folder, hold=hold)
    relative, _ = error(encoder)
    assert relative < PARITY
    mesh, kept = encoder._devices
    assert mesh.size == 4
    assert (kept is None) == (hold == "layers")
    if kept:
        assert kept[0]["q"].sharding.shard_shape(kept[0]["q"].shape) == (5, 24)
        assert kept[0]["o"].sharding.shard_shape(kept[0]["o"].shape) == (24, 5)


@pytest.mark.parametrize("by_bytes", [True, False])
def test_ids_are_those_of_transformers(folder, by_bytes):
    """Of 200 prompts in ten scripts, with what no piece covers in bytes and as unknown."""
    wrong, texts = differing(by_bytes)
    assert len(texts) == 200
    assert not wrong


def test_prompts_are_cleaned_as_wan_does(folder):
    assert cleaned(" a\n b\t c ") == "a b c"
    assert cleaned("schÃ¶n &amp;amp; gut") == "schön & gut"
    assert Tokenizer(folder / "google/umt5-xxl/spiece.model")(" ") == [1]


def test_a_batch_is_each_caption_alone(folder):
    encoder = encoder_in(folder)
    captions = ["", "A bicycle in the rain", "自行车"]
    for together, caption in zip(encoder.batch(captions), captions, strict=True):
        alone = encoder(caption)
        assert together.shape == alone.shape
        np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-5)
    assert encoder("").shape == (1, 24)
    half = encoder_in(folder, dtype="bfloat16")("A bicycle in the rain")
    assert half.dtype.name == "bfloat16"
    exact = encoder("A bicycle in the rain")
    assert np.linalg.norm(half.astype(np.float32) - exact) < 0.05 * np.linalg.norm(exact)


def test_captions_in_a_store(folder, tmp_path):
    cfg = Umt5Config(weights=str(folder), dim=24, dtype="float32", max_tokens=12, batch=2)
    store, captions = store_folder(tmp_path, cfg), {"": "scene 1", "a bicycle": "scene 1", "il pleut": "scene 2"}
    fill_store(store, cfg, captions)
    read = CaptionStore(store)
    assert read.dim == 24
    np.testing.assert_allclose(read.read("il pleut"), encoder_in(folder)("il pleut"), rtol=1e-4, atol=1e-5)
    long = "long " * 30
    with pytest.raises(
        CaptionError, match=r"scene 3: the caption 'long .* has \d+ tokens with the end's, but text\.max"
    ):
        fill_store(store, cfg, {long: "scene 3"})


def test_fingerprints_know_numbers_types_and_tokenizers(folder, tmp_path):
    other = write(tmp_path / "text_encoder", arrays(0))
    write_tokenizer(tmp_path / "tokenizer")
    ours, same = Umt5Config(weights=str(folder), dim=24), Umt5Config(weights=str(tmp_path), dim=24)
    inside = Umt5Config(weights=str(other), dim=24, hold="layers", max_tokens=5)
    assert len({encoder_fingerprint(cfg) for cfg in (ours, same, inside)}) == 1
    assert encoder_fingerprint(ours) != encoder_fingerprint(Umt5Config(weights=str(folder), dtype="float32"))
    shutil.copytree(tmp_path / "tokenizer", tmp_path / "unknown")
    write_tokenizer(tmp_path / "unknown", by_bytes=False)
    unknown = Umt5Config(weights=str(other), tokenizer=str(tmp_path / "unknown"))
    assert encoder_fingerprint(ours) != encoder_fingerprint(unknown)
    changed = arrays(0)
    changed["encoder.final_layer_norm.weight"] = changed["encoder.final_layer_norm.weight"] * 2
    write(other, changed)
    assert encoder_fingerprint(same) != encoder_fingerprint(ours)


def test_the_table_may_have_either_name(folder, tmp_path):
    named = arrays(0)
    named["encoder.embed_tokens.weight"] = named["shared.weight"]
    both = encoder_in(write(tmp_path / "both", named), tokenizer=str(folder / "google/umt5-xxl"))
    del named["shared.weight"]
    one = encoder_in(write(tmp_path / "one", named), tokenizer=str(folder / "google/umt5-xxl/spiece.model"))
    np.testing.assert_array_equal(both("hm"), one("hm"))


def test_all_that_is_wrong_is_named(folder, tmp_path):
    named = arrays(0)
    del named["encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"]
    del named["encoder.block.2.layer.0.SelfAttention.relative_attention_bias.weight"]
    named["encoder.block.0.layer.1.DenseReluDense.wo.weight"] = np.zeros((3, 3), np.float32)
    named["lm_head.weight"] = np.zeros(2, np.float32)
    with pytest.raises(WeightsError) as caught:
        encoder_in(write(tmp_path / "a", named))
    missing, extra, shape = str(caught.value).splitlines()
    assert missing.endswith("missing: encoder.block.{1-2}.layer.0.SelfAttention.relative_attention_bias.weight")
    assert extra.endswith("not of this model: lm_head.weight")
    assert shape.endswith("DenseReluDense.wo.weight has shape (3, 3), not (24, 40)")
    with pytest.raises(ConfigError, match=r"text\.dim is 4096, but .* has a width of 24"):
        encoder_in(folder, dim=4096)
    alone = write(tmp_path / "b", arrays(0))
    with pytest.raises(
        ConfigError, match=r"b has no spiece\.model of umT5's tokenizer; name the file with text\.token"
    ):
        encoder_in(alone)
    (alone / "spiece.model").write_bytes(b"damaged")
    with pytest.raises(ConfigError, match=r"spiece\.model isn't a SentencePiece model"):
        encoder_in(alone)
    write_tokenizer(alone)
    (alone / "tokenizer.json").write_text(json.dumps([]))
    with pytest.raises(ConfigError, match=r"tokenizer\.json isn't a tokenizer's: it has no model"):
        encoder_in(alone)
    small = arrays(0, Sizes(50, 24, 4, 20, 40, 1))
    with pytest.raises(ConfigError, match=r"the tokenizer has 8000 pieces, but .* embeds 50"):
        encoder_in(write(tmp_path / "c", small), tokenizer=str(folder / "google/umt5-xxl"))
    with pytest.raises(WeightsError, match=r"text\.weights is empty"):
        encoder_in("")
    with pytest.raises(ConfigError, match="isn't an encoder of umT5: its 1 tensors are others"):
        encoder_in(write(tmp_path / "d", {"x": np.zeros(2, np.float32)}))


def test_what_its_config_json_says_must_be_so(folder, tmp_path):
    def opened(place, **settings):
        (place / "config.json").write_text(json.dumps(settings))
        return encoder_in(place, tokenizer=str(folder / "google/umt5-xxl"))

    place = write(tmp_path / "a", arrays(0))
    sizes = {"num_layers": 3, "d_model": 24, "num_heads": 4, "d_kv": 5, "d_ff": 40, "vocab_size": 8000}
    opened(place, **sizes, model_type="umt5", relative_attention_num_buckets=32)
    with pytest.raises(WeightsError) as caught:
        opened(place, **sizes | {"num_layers": 5, "num_heads": 5, "d_kv": 64})
    *said, missing = str(caught.value).splitlines()
    assert [line.partition("says ")[2] for line in said] == [
        "num_layers 5, but by its tensors it is 3",
        "num_heads 5, but by its tensors it is 4",
        "d_kv 64, but by its tensors it is 5",
    ]
    assert "missing: encoder.block.{3-4}.layer.0.SelfAttention.k.weight" in missing
    # Beside the Wan team's file lies the transformer's.
    opened(write(tmp_path / "b", arrays(1)), dim=48, num_layers=30, num_heads=12)


def test_what_files_hold_is_said_with_its_licence(folder, capsys):
    main(["check", str(folder), "--of", "text-encoder"])
    out = capsys.readouterr().out
    assert "umT5's encoder: 206,952 parameters, 3 layers of width 24; its tokenizer: " in out
    assert "licence: Apache-2.0 for what Google" in out


def test_buckets():
    table = buckets(300)
    assert table.min() == 0
    assert table.max() == 31
    np.testing.assert_array_equal(
        table[200, 200 - np.array([0, 1, 7, 8, 11, 12, 127, 128, 200])], [0, 1, 7, 8, 8, 9, 15, 15, 15]
    )
    np.testing.assert_array_equal(table[0, [1, 7, 8, 128, 299]], [17, 23, 24, 31, 31])
