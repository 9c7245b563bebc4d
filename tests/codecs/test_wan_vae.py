"""Wan's autoencoders: what diffusers computes, streamed and tiled; files in both layouts; what is wrong with them."""

import hashlib
import json
import math
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moc_jax.codecs import CodecMismatch, fit_codec, load_codec
from moc_jax.codecs.wan_vae import streaming
from moc_jax.codecs.wan_vae.names import tensors
from moc_jax.codecs.wan_vae.network import Sizes, decode_piece, encode_piece
from moc_jax.codecs.wan_vae.published import DEVIATIONS, MEANS
from moc_jax.codecs.wan_vae.streaming import tiled, tiles
from moc_jax.config import ConfigError, WanVaeConfig
from moc_jax.weights import WeightsError
from moc_jax.weights.__main__ import main
from tests.parity.numbers import relative
from tests.parity.vae_cases import CASES
from tests.parity.vae_figures import GOLDEN, arrays, codec_in, errors, write

PARITY = 1e-5
FULL_SIZE = {"2.1": (Sizes(16, 96, 96, False), 194, 126_892_531), "2.2": (Sizes(48, 160, 256, True), 196, 704_688_668)}


@pytest.mark.parametrize("name", FULL_SIZE)
def test_names_and_shapes_at_full_size(name):
    sizes, count, parameters = FULL_SIZE[name]
    listed = list(tensors(sizes))
    assert (len(listed), sum(math.prod(tensor.shape) for tensor in listed)) == (count, parameters)
    assert len({tensor.names[1] for tensor in listed}) == count
    lines = sorted(f"{tensor.name} {tensor.shape}" for tensor in listed)
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    assert digest == str(np.load(GOLDEN / f"vae{name}.npz")["listing"])


@pytest.mark.parametrize("name", ["2.1", pytest.param("2.2", marks=pytest.mark.long)])
def test_latents_and_pixels_are_diffusers(name, tmp_path):
    """A latent frame at a time, two clips of 13 frames in odd sizes."""
    codec = codec_in(write(tmp_path, arrays(name)), name)
    (encode, _), (decode, _) = errors(name, codec)
    assert encode < PARITY
    assert decode < PARITY


@pytest.mark.long
@pytest.mark.parametrize("name", CASES)
def test_streamed_is_whole(name, tmp_path):
    """All frames in one piece, and pieces of two latent frames, of which the last is filled."""
    codec, case = codec_in(write(tmp_path, arrays(name)), name, piece=2), CASES[name]
    _, weights = codec._weights(1)
    video, z = case.video(name)[:1], case.latents(name)[:1]
    whole, _ = jax.jit(encode_piece, static_argnums=1)(weights, codec.sizes, None, jnp.asarray(video))
    assert relative(codec.encode(video[0]), (np.asarray(whole)[0] - MEANS[name]) / DEVIATIONS[name]) < PARITY
    given = jnp.asarray(z * DEVIATIONS[name] + MEANS[name])
    pixels, _ = jax.jit(decode_piece, static_argnums=1)(weights, codec.sizes, None, given)
    assert relative(codec.decode(z[0]), np.asarray(pixels)[0]) < PARITY
    # One frame is a clip, too, and the beginning of each. None of these lengths takes another program.
    programs = streaming._encode._cache_size(), streaming._decode._cache_size()
    still = codec.encode(video[0, :1])
    assert relative(still, codec.encode(video[0])[:1]) < PARITY
    assert codec.decode(still).shape == (1, *video.shape[2:])
    long = codec.encode(np.tile(video[0, :4], (6, 1, 1, 1))[:21])
    assert codec.decode(long).shape == (21, *video.shape[2:])
    assert (streaming._encode._cache_size(), streaming._decode._cache_size()) == programs


@pytest.mark.long
def test_bfloat16_is_near(tmp_path):
    folder, case = write(tmp_path, arrays("2.1")), CASES["2.1"]
    near, exact = codec_in(folder, "2.1", dtype="bfloat16"), codec_in(folder, "2.1")
    video = case.video("2.1")[0, :5]
    assert relative(near.encode(video), exact.encode(video)) < 0.05
    assert near.fingerprint != exact.fingerprint


@pytest.mark.long
def test_tiles_agree_far_from_their_borders(tmp_path):
    folder = write(tmp_path, arrays("2.1"))
    whole, cut = codec_in(folder, "2.1"), codec_in(folder, "2.1", tile=48, overlap=16)
    video = np.tile(CASES["2.1"].video("2.1")[0, :5, :24, :40], (1, 3, 3, 1))
    assert cut.encode(video).shape == whole.encode(video).shape == (2, 9, 15, 16)
    z = whole.encode(video)
    assert cut.decode(z).shape == video.shape
    assert 0.5 > relative(cut.decode(z), whole.decode(z)) > 0
    assert relative(cut.decode(z)[:, :8, :8], whole.decode(z)[:, :8, :8]) < 0.2


def test_tiles_cover_and_fade():
    """What depends on no neighbour comes out as it was, by means of tiles that overlap."""
    assert tiles(10, 0, 2) == tiles(10, 10, 2) == tiles(4, 10, 2) == [0]
    assert tiles(10, 4, 1) == [0, 3, 6]
    assert tiles(11, 4, 1) == [0, 3, 6, 7]
    given = np.random.default_rng(0).normal(size=(1, 3, 11, 7, 2)).astype(np.float32)
    sizes = set()

    def run(part):
        sizes.add(part.shape[2:4])
        doubled = part.repeat(2, axis=2).repeat(2, axis=3)
        yield doubled[:, :1]
        yield doubled[:, 1:]

    out = tiled(run, given, (1, 3, 22, 14, 2), (4, 8), (1, 2))
    np.testing.assert_allclose(out, given.repeat(2, axis=2).repeat(2, axis=3), rtol=1e-5, atol=1e-6)
    assert sizes == {(4, 4)}, "one program for all tiles"


def test_both_layouts_are_one_codec(tmp_path):
    """Names of diffusers and of the Wan team, a file, its folder and a pipeline's."""
    ours = codec_in(write(tmp_path / "pipe" / "vae", arrays("2.2")), "2.2")
    team = codec_in(write(tmp_path / "team", arrays("2.2", 1)), "2.2")
    file = codec_in(tmp_path / "pipe" / "vae" / "diffusion_pytorch_model.safetensors", "2.2")
    pipe = codec_in(tmp_path / "pipe", "2.2", piece=4, batch=2)
    assert len({codec.fingerprint for codec in (ours, team, file, pipe)}) == 1
    assert (ours.stride, ours.channels) == ((4, 16, 16), 48)
    for name, stored in ours._stored.items():
        np.testing.assert_array_equal(stored.array(), team._stored[name].array())


def test_what_files_hold_is_said_with_its_licence(tmp_path, capsys):
    write(tmp_path / "vae", arrays("2.2", 1))
    main(["check", str(tmp_path), "--of", "autoencoder"])
    said = "Wan's autoencoder 2.2: 486,082 parameters with original names; licence: Apache-2.0 for what the Wan team"
    assert said in capsys.readouterr().out


def test_a_checkpoint_knows_its_weights(tmp_path):
    cfg = WanVaeConfig(weights=str(write(tmp_path / "a", arrays("2.1"))))
    state = fit_codec(cfg, ()).state()
    assert load_codec(cfg, state).fingerprint == fit_codec(cfg, ()).fingerprint
    others = arrays("2.1")
    others["decoder.conv_out.bias"] = others["decoder.conv_out.bias"] + 1
    other = WanVaeConfig(weights=str(write(tmp_path / "b", others)))
    with pytest.raises(CodecMismatch, match=r"codec\.weights .*/b holds other numbers \(digest \w{12}\) than the"):
        load_codec(other, state)


def test_all_that_is_wrong_is_named(tmp_path):
    named = arrays("2.1")
    del named["decoder.up_blocks.1.resnets.0.conv_shortcut.weight"]
    del named["quant_conv.bias"]
    named["decoder.conv_out.weight"] = named["decoder.conv_out.weight"][:2]
    named["more"] = np.zeros(3, np.float32)
    with pytest.raises(WeightsError) as caught:
        codec_in(write(tmp_path, named), "2.1")
    missing, extra, shape = str(caught.value).splitlines()
    assert missing.endswith("missing: decoder.up_blocks.1.resnets.0.conv_shortcut.weight, quant_conv.bias")
    assert extra.endswith("not of this model: more")
    assert shape.endswith("decoder.conv_out.weight has shape (2, 6, 3, 3, 3), not (3, 6, 3, 3, 3)")


def test_what_its_config_json_says_must_be_so(tmp_path):
    place = write(tmp_path / "vae", arrays("2.1"))

    def opened(**settings):
        (place / "config.json").write_text(json.dumps(settings))
        return codec_in(place, "2.1")

    means, deviations = ([round(float(x), 4) for x in of["2.1"]] for of in (MEANS, DEVIATIONS))
    published = {"_class_name": "AutoencoderKLWan", "base_dim": 4, "z_dim": 16, "decoder_base_dim": 6}
    opened(**published, latents_mean=means, latents_std=deviations)
    opened(z_dim=16)
    for kind in ("AutoencoderKLQwenImage", "AutoencoderKLHunyuanVideo"):
        with pytest.raises(ConfigError, match=f"it is a '{kind}'; supported is AutoencoderKLWan alone"):
            opened(_class_name=kind)
    with pytest.raises(WeightsError) as caught:
        opened(**published | {"z_dim": 48}, latents_mean=[0.0, *means[1:]], latents_std="one")
    width, mean, deviation = str(caught.value).splitlines()
    assert width.endswith("its config.json says z_dim 48, but by its tensors it is 16")
    assert "says latents_mean [0.0, -0.7089, -0.9113, 0.1075, ...]; that of Wan's 2.1 is [-0.7571, -0.7089" in mean
    assert "says latents_std 'one'; that of Wan's 2.1 is [2.8184" in deviation
    # Beside the Wan team's file lies the transformer's.
    shutil.rmtree(place)
    write(place, arrays("2.1", 1))
    opened(_class_name="WanModel", num_layers=30)


def test_what_is_no_autoencoder_is_refused(tmp_path):
    with pytest.raises(WeightsError, match=r"codec\.weights is empty; name a file or a folder"):
        fit_codec(WanVaeConfig(), ())
    with pytest.raises(WeightsError, match="gone is not there; name a file or a folder with the weights of Wan's auto"):
        fit_codec(WanVaeConfig(weights=str(tmp_path / "gone")), ())
    (tmp_path / "Wan2.1").mkdir()
    shutil.copy(GOLDEN / "tensors.pth", tmp_path / "Wan2.1" / "Wan2.1_VAE.pth")
    (tmp_path / "Wan2.1" / "diffusion_pytorch_model.safetensors").write_bytes(b"the transformer's")
    with pytest.raises(ConfigError, match=r"isn't an autoencoder of Wan: its 6 tensors are others \(it has half"):
        fit_codec(WanVaeConfig(weights=str(tmp_path / "Wan2.1")), ())
    with pytest.raises(ConfigError, match=r"is Wan's autoencoder 2\.2, but codec\.version is 2\.1"):
        codec_in(write(tmp_path / "b", arrays("2.2")), "2.1")


def test_wrong_sizes_are_named(tmp_path):
    codec = codec_in(write(tmp_path, arrays("2.1")), "2.1")
    with pytest.raises(
        ValueError, match=r"a frame has 20 columns, but Wan's autoencoder 2\.1 takes multiples of 8; the"
    ):
        codec.encode(np.zeros((5, 16, 20, 3), np.float32))
    with pytest.raises(ValueError, match="6 frames cannot be encoded"):
        codec.encode(np.zeros((6, 16, 16, 3), np.float32))
    with pytest.raises(ValueError, match="latents have 4 channels, but the codec has 16"):
        codec.decode(np.zeros((1, 2, 2, 4), np.float32))
    for wrong, message in (
        ({"tile": 100}, "codec.tile = 100 is not a multiple of 8, the pixels of a latent's side; the nearest are 96"),
        ({"tile": 64}, "codec.overlap = 64 must be less than codec.tile = 64"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            WanVaeConfig(**wrong)
