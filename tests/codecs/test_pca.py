"""The PCA codec against a direct singular value decomposition, and its settings' meaning."""

import dataclasses

import numpy as np
import pytest
from einops import rearrange

from moc_jax.codecs import CodecMismatch, crop_frames, fit_codec, load_codec, pixels_from_unit, pixels_to_unit
from moc_jax.config import PcaConfig
from tests.data.clips import make_frames

CFG = PcaConfig(stride=(4, 4, 4), channels=12)


@pytest.fixture(scope="module")
def clips():
    """Three clips of different lengths with noise, so that every component has energy."""
    rng = np.random.default_rng(0)
    videos = [pixels_to_unit(make_frames(shots=1, frames_per_shot=n, size=(16, 24), seed=n)) for n in (13, 5, 21)]
    return [np.clip(v + 0.05 * rng.standard_normal(v.shape, np.float32), -1, 1) for v in videos]


@pytest.fixture(scope="module")
def codec(clips):
    return fit_codec(CFG, clips)


def _patches(clips, first):
    if first:
        return np.concatenate([rearrange(c[:1], "f (y h) (x w) c -> (f y x) (h w c)", h=4, w=4) for c in clips])
    pattern = "(f t) (y h) (x w) c -> (f y x) (t h w c)"
    return np.concatenate([rearrange(c[1:], pattern, t=4, h=4, w=4) for c in clips])


def _squared_error(a, b):
    return float(np.sum((a.astype(np.float64) - b) ** 2))


def test_error_is_the_discarded_energy(clips, codec):
    """No linear code of 12 channels does better: the error equals the sum of the singular values left out."""
    error = sum(_squared_error(codec._rest.decode(codec.encode(c)[1:]), _rest_of(c)) for c in clips)
    patches = _patches(clips, first=False).astype(np.float64)
    singular = np.linalg.svd(patches - patches.mean(0), compute_uv=False)
    np.testing.assert_allclose(error, np.sum(singular[12:] ** 2), rtol=1e-4)


def _rest_of(clip):
    return rearrange(clip[1:], "(f t) (y h) (x w) c -> f y x (t h w c)", t=4, h=4, w=4)


def test_first_frame_has_its_own_basis(clips, codec):
    error = sum(_squared_error(codec.decode(codec.encode(c[:1])), c[:1]) for c in clips)
    patches = _patches(clips, first=True).astype(np.float64)
    singular = np.linalg.svd(patches - patches.mean(0), compute_uv=False)
    assert error <= np.sum(singular[12:] ** 2) * (1 + 1e-4)  # clipping to [-1, 1] can only help
    np.testing.assert_array_equal(codec.encode(clips[0])[:1], codec.encode(clips[0][:1]))


def test_streaming_equals_one_pass(clips):
    """Clips one at a time, in any order, give the covariance of all patches together."""
    a, b = fit_codec(CFG, iter(clips)), fit_codec(CFG, clips[::-1])
    np.testing.assert_allclose(a.encode(clips[0]), b.encode(clips[0]), atol=1e-4)


def test_long_clips_are_sampled(monkeypatch):
    """A quarter of the patches, spread over the clip, gives nearly the best basis; those of its beginning do not."""
    clip = pixels_to_unit(make_frames(shots=5, frames_per_shot=16, size=(32, 48)))[:77]

    def error(codec):
        return _squared_error(codec.decode(codec.encode(clip)), clip)

    full, beginning = error(fit_codec(CFG, [clip])), error(fit_codec(CFG, [clip[:21]]))
    monkeypatch.setattr("moc_jax.codecs.pca._MOST", 19 * 96 // 4)
    sampled = error(fit_codec(CFG, [clip]))
    assert full < sampled < 1.5 * full < 0.5 * beginning


def test_all_channels_are_lossless(clips):
    cfg = PcaConfig(stride=(1, 4, 4), channels=48)
    codec = fit_codec(cfg, clips)
    np.testing.assert_allclose(codec.decode(codec.encode(clips[0])), clips[0], atol=2e-5)


@pytest.mark.parametrize("whiten", [0.0, 0.5, 1.0])
def test_whiten(clips, whiten):
    """Channel c's deviation is proportional to s_c^(1 - w); all channels together have unit variance."""
    codec = fit_codec(dataclasses.replace(CFG, whiten=whiten), clips)
    latents = np.concatenate([codec.encode(c)[1:].reshape(-1, 12) for c in clips])
    patches = _patches(clips, first=False).astype(np.float64)
    std = np.linalg.svd(patches - patches.mean(0), compute_uv=False)[:12] / np.sqrt(len(patches))
    expected = std ** (1 - whiten) / np.sqrt(np.mean(std ** (2 - 2 * whiten)))
    np.testing.assert_allclose(latents.std(0), expected, rtol=1e-3)
    np.testing.assert_allclose(np.mean(latents.std(0) ** 2), 1, rtol=1e-3)
    np.testing.assert_allclose(latents.mean(0), 0, atol=1e-3)


def test_whiten_leaves_the_picture_alone(clips):
    plain, white = (fit_codec(dataclasses.replace(CFG, whiten=w), clips) for w in (0.0, 1.0))
    np.testing.assert_allclose(plain.decode(plain.encode(clips[2])), white.decode(white.encode(clips[2])), atol=1e-4)


def test_flat_clip_has_finite_latents():
    """Components without energy are not blown up."""
    flat = np.full((9, 8, 8, 3), 0.25, np.float32)
    for whiten in (0.0, 1.0):
        codec = fit_codec(dataclasses.replace(CFG, whiten=whiten), [flat])
        latents = codec.encode(flat)
        assert np.isfinite(latents).all()
        assert np.abs(latents).max() < 1e-2
        np.testing.assert_allclose(codec.decode(latents), flat, atol=1e-6)


def test_channels_mean_the_same_in_first_and_further_frames():
    """A still clip gives its brightest patches latents of one sign in all frames."""
    ramp = np.broadcast_to(np.linspace(-0.9, 0.9, 24, dtype=np.float32)[None, None, :, None], (9, 16, 24, 3))
    rng = np.random.default_rng(1)
    codec = fit_codec(dataclasses.replace(CFG, channels=1), [ramp + 0.01 * rng.standard_normal(ramp.shape, np.float32)])
    first, rest = codec.encode(np.ascontiguousarray(ramp))[:2]
    assert np.corrcoef(first.ravel(), rest.ravel())[0, 1] > 0.99


def test_shapes_and_lengths(clips, codec):
    assert codec.encode(clips[0]).shape == (4, 4, 6, 12)
    assert codec.encode(clips[0]).dtype == np.float32
    assert codec.decode(codec.encode(clips[0])).shape == clips[0].shape
    assert [codec.latent_frames(n) for n in (1, 5, 9)] == [1, 2, 3]
    wild = codec.decode(np.full((2, 4, 6, 12), 50, np.float32))
    assert wild.min() >= -1
    assert wild.max() <= 1


@pytest.mark.parametrize(("frames", "nearest"), [(0, "1 and 5"), (2, "1 and 5"), (8, "5 and 9"), (12, "9 and 13")])
def test_impossible_frame_counts_name_the_nearest(clips, codec, frames, nearest):
    with pytest.raises(ValueError, match=rf"{frames} frames .* nearest counts are {nearest}"):
        codec.latent_frames(frames)


def test_impossible_sizes_name_the_nearest(clips, codec):
    with pytest.raises(ValueError, match=r"22 columns.*multiple of 4.*20 and 24"):
        codec.encode(np.zeros((5, 16, 22, 3), np.float32))
    with pytest.raises(ValueError, match="11 channels, but the codec has 12"):
        codec.decode(np.zeros((2, 4, 4, 11), np.float32))


def test_fit_errors(clips):
    with pytest.raises(ValueError, match="no clip"):
        fit_codec(CFG, [])
    with pytest.raises(ValueError, match=r"5 frames or more.*single frames only"):
        fit_codec(CFG, [clips[0][:1]])
    broken = clips[1].copy()
    broken[2, 3, 4, 1] = np.nan
    with pytest.raises(ValueError, match=r"clip 1 .*NaN"):
        fit_codec(CFG, [clips[0], broken])


def test_state_round_trip(clips, codec):
    again = load_codec(CFG, codec.state())
    np.testing.assert_array_equal(again.encode(clips[1]), codec.encode(clips[1]))
    assert again.fingerprint == codec.fingerprint
    assert fit_codec(CFG, clips[:2]).fingerprint != codec.fingerprint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channels": 8}, "codec.channels = 8, but the saved codec was fitted with 12"),
        ({"stride": (4, 4, 8)}, r"codec.stride = \(4, 4, 8\), but .* \(4, 4, 4\)"),
        ({"whiten": 1.0}, "codec.whiten = 1.0, but .* 0.5"),
    ],
)
def test_another_configuration_is_named(codec, change, message):
    state = codec.state()
    with pytest.raises(CodecMismatch, match=message):
        load_codec(dataclasses.replace(CFG, **change), state)


def test_damaged_state_is_named(codec):
    state = codec.state()
    with pytest.raises(CodecMismatch, match="lacks rest_scale"):
        load_codec(CFG, {k: v for k, v in state.items() if k != "rest_scale"})
    state["first_mean"] = state["first_mean"].copy()
    state["first_mean"][3] = np.nan
    with pytest.raises(CodecMismatch, match="first_mean is damaged"):
        load_codec(CFG, state)


def test_crop_frames():
    assert [crop_frames(n, 4) for n in (0, 1, 4, 5, 8, 9, 12)] == [0, 1, 1, 5, 5, 9, 9]
    # Two latent frames per token: 1, 2, 3, 4 latent frames -> 0, 2, 2, 4.
    assert [crop_frames(n, 4, 2) for n in (1, 5, 9, 13, 16)] == [0, 5, 5, 13, 13]


def test_pixels_survive_the_codecs_range():
    pixels = np.arange(256, dtype=np.uint8)
    unit = pixels_to_unit(pixels)
    assert (unit[0], unit[-1]) == (-1, 1)
    np.testing.assert_array_equal(pixels_from_unit(unit), pixels)
    np.testing.assert_array_equal(pixels_from_unit(np.array([-1.5, 1.5], np.float32)), [0, 255])
