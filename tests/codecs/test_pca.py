"""The PCA codec against direct decompositions and regressions, and its settings' meaning."""

import dataclasses
import tracemalloc

import numpy as np
import pytest
import scipy.fft
from einops import rearrange

from moc_jax.codecs import CodecMismatch, crop_frames, fit_codec, load_codec, pca, pixels_from_unit, pixels_to_unit
from moc_jax.codecs.pca import PCACodec
from moc_jax.config import PcaConfig
from moc_jax.data.quality import psnr
from tests.data.clips import make_frames

CFG = PcaConfig(stride=(4, 4, 4), channels=12)
WHOLE = PcaConfig(stride=(4, 4, 4), channels=48)  # so many that all 192 waves of neighbors are looked at


@pytest.fixture(scope="module")
def clips():
    """Three clips of different lengths with noise, so that every component has energy."""
    rng = np.random.default_rng(0)
    videos = [pixels_to_unit(make_frames(shots=1, frames_per_shot=n, size=(16, 24), seed=n)) for n in (13, 5, 21)]
    return [np.clip(v + 0.05 * rng.standard_normal(v.shape, np.float32), -1, 1) for v in videos]


@pytest.fixture(scope="module")
def codec(clips):
    return fit_codec(CFG, clips)


@pytest.fixture(scope="module")
def whole(clips):
    return fit_codec(WHOLE, clips)


def _lapped(clips):
    """Every clip with its rows and columns multiplied by the matrix of a lapped orthogonal transform."""
    return [np.einsum("fyxc,ty,sx->ftsc", c.astype(np.float64), _lapping(16), _lapping(24)) for c in clips]


def _lapping(size, stride=4):
    """Around a border, (b - a) / sqrt 2 of pixels a before and b behind it, nearest first, is multiplied by V."""
    matrix, half = np.eye(size), stride // 2
    for border in range(stride, size, stride):
        split = np.zeros((2 * half, size))  # even parts, then odd ones
        for i in range(half):
            split[[i, half + i], border + i] = np.sqrt(0.5)
            split[[i, half + i], border - 1 - i] = np.sqrt(0.5), -np.sqrt(0.5)
        turned = np.concatenate([split[:half], _odd(half) @ split[half:]])
        matrix[border - half : border + half] = (split.T @ turned)[border - half : border + half]
    return matrix


def _odd(half):
    """V = J C_II^T C_IV J."""
    two, four, reverse = (
        scipy.fft.dct(np.eye(half), 2, axis=0, norm="ortho"),
        scipy.fft.dct(np.eye(half), 4, axis=0, norm="ortho"),
        np.eye(half)[::-1],
    )
    return reverse @ two.T @ four @ reverse


def _patches(clips, first):
    """Of lapped clips: f y x d each."""
    if first:
        return [rearrange(c[::4], "f (y h) (x w) c -> f y x (h w c)", h=4, w=4) for c in _lapped(clips)]
    pattern = "(f t) (y h) (x w) c -> f y x (t h w c)"
    return [rearrange(c[1:], pattern, t=4, h=4, w=4) for c in _lapped(clips)]


def _flat(patches):
    return np.concatenate([p.reshape(-1, p.shape[-1]) for p in patches])


def _squared_error(a, b):
    return float(np.sum((a.astype(np.float64) - b) ** 2))


def _discarded(patches, channels):
    flat = _flat(patches)
    return np.sum(np.linalg.svd(flat - flat.mean(0), compute_uv=False)[channels:] ** 2)


def _without_neighbors(codec):
    bases = (dataclasses.replace(b, missing=0 * b.missing) for b in (codec._first, codec._rest))
    return PCACodec(codec._cfg, *bases)


def _components_of(codec, clip):
    """Patches of the further frames as the components alone make them."""
    latents = codec.encode(clip)[1:]
    return latents @ (codec._rest.basis / codec._rest.scale[:, None]) + codec._rest.mean


def test_lapping_is_orthogonal():
    for stride in (2, 4, 5, 8):
        matrix = _lapping(6 * stride, stride)
        np.testing.assert_allclose(matrix @ matrix.T, np.eye(6 * stride), atol=1e-12)
        rows = np.eye(6 * stride, dtype=np.float32)[:, :, None, None].repeat(3, axis=3)
        for turned, cfg in ((rows, (1, stride, 1)), (rows.transpose(0, 2, 1, 3), (1, 1, stride))):
            cfg = PcaConfig(stride=cfg, channels=3)
            lapped = pca._lapped(cfg, turned)
            np.testing.assert_allclose(lapped[..., 0].reshape(rows.shape[:2]).T, matrix, atol=1e-6)
            np.testing.assert_allclose(pca._lapped(cfg, lapped, inverse=True), turned, atol=1e-6)


def test_waves_are_orthonormal_and_the_slowest_come_first():
    waves = pca._slow_waves((4, 8, 8), 768)
    np.testing.assert_allclose(waves @ waves.T, np.eye(768), atol=1e-5)
    np.testing.assert_allclose(waves[0], 768**-0.5, rtol=1e-5)  # all of one brightness
    np.testing.assert_array_equal(waves[:20], pca._slow_waves((4, 8, 8), 20))
    turns = [np.sum(np.diff(np.sign(wave.reshape(4, 8, 8, 3)), axis=2) != 0) for wave in waves]
    assert np.mean(turns[:64]) < 0.5 * np.mean(turns)


def test_error_of_the_components_is_the_discarded_energy(clips, codec):
    """No linear code of a window by 12 channels does better: their error is the sum of the singular values left out."""
    patches = _patches(clips, first=False)
    error = sum(_squared_error(_components_of(codec, c), p) for c, p in zip(clips, patches))
    np.testing.assert_allclose(error, _discarded(patches, 12), rtol=1e-4)


def test_what_neighbors_add_is_a_ridge_regression(clips, whole):
    """Of what the components leave, on the latents of a patch and its neighbors, gathered patch by patch."""
    inputs, targets = [], []
    for clip, patches in zip(clips, _patches(clips, first=False)):
        still = np.tile(_patches([clip[:1]], first=True)[0], 4)
        with_first = whole._rest.encode(np.concatenate([still, patches]))
        frames, rows, columns, _ = with_first.shape
        for f, y, x in np.ndindex(frames - 1, rows, columns):
            places = [(f + 1, y, x), (f + 1, max(y - 1, 0), x), (f + 1, min(y + 1, rows - 1), x)]
            places += [(f + 1, y, max(x - 1, 0)), (f + 1, y, min(x + 1, columns - 1))]
            places += [(f, y, x), (min(f + 2, frames - 1), y, x)]
            inputs.append(np.concatenate([with_first[place] for place in places]))
            targets.append(patches[f, y, x] - _components_of(whole, clip)[f, y, x])
    inputs, targets = np.stack(inputs), np.stack(targets)
    ridge = np.diag(0.1 * np.linalg.norm(inputs, axis=0))
    expected = np.linalg.lstsq(
        np.concatenate([inputs, ridge]), np.concatenate([targets, np.zeros((len(ridge), 192))]), rcond=None
    )[0]
    np.testing.assert_allclose(whole._rest.missing, expected, atol=5e-3 * np.abs(expected).max())


def test_neighbors_make_the_reconstruction_better(clips, codec):
    """Beyond what the components of a window leave out; of clips that the codec was not fitted on, too."""
    unseen = [pixels_to_unit(make_frames(shots=1, frames_per_shot=9, size=(16, 24), seed=n)) for n in (50, 51)]
    for group in (clips, unseen):
        errors = [
            sum(_squared_error(c.decode(c.encode(v)), v) for v in group) for c in (codec, _without_neighbors(codec))
        ]
        assert errors[0] < 0.95 * errors[1]


@pytest.fixture(scope="module")
def clouds():
    """Clouds that drift, and a codec for them."""
    rng = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(96)[:, None], np.fft.rfftfreq(128))
    spectrum = np.fft.rfft2(rng.standard_normal((3, 96, 128))) / (0.02 + frequency) ** 2
    sky = np.fft.irfft2(spectrum).transpose(1, 2, 0)
    sky *= 0.3 / sky.std()
    clip = np.stack([np.roll(sky, (f, 2 * f), axis=(0, 1))[:64, :96] for f in range(25)])
    clip = np.ascontiguousarray(clip.clip(-1, 1), np.float32)
    return clip, fit_codec(PcaConfig(stride=(4, 8, 8), channels=16), [clip])


def test_overlapping_windows_gain_a_decibel_over_separate_patches(clouds):
    """Against the best linear code of patches that do not overlap."""
    clip, codec = clouds
    patches = rearrange(clip[1:], "(f t) (y h) (x w) c -> (f y x) (t h w c)", t=4, h=8, w=8).astype(np.float64)
    error = np.sum(np.linalg.svd(patches - patches.mean(0), compute_uv=False)[16:] ** 2) / patches.size
    assert psnr(codec.decode(codec.encode(clip))[1:], clip[1:]) > 10 * np.log10(4 / error) + 1


def test_patches_have_no_visible_edges(clouds):
    """Errors of neighbors across a border differ no more than those of neighbors inside a patch."""
    clip, codec = clouds
    error = codec.decode(codec.encode(clip)) - clip
    for axis in (1, 2):
        steps = np.square(np.diff(np.moveaxis(error[1:], axis, 0), axis=0)).mean(axis=(1, 2, 3))
        assert steps[7::8].mean() < 1.1 * np.delete(steps, np.s_[7::8]).mean()


def test_first_frame_has_its_own_basis(clips, codec):
    stills = [c[n : n + 1] for c in clips for n in range(0, len(c), 4)]
    error = sum(_squared_error(codec.decode(codec.encode(c)), c) for c in stills)
    assert error <= _discarded(_patches(clips, first=True), 12) * (1 + 1e-4)  # neighbors and clipping can only help
    latents = codec.encode(clips[0])
    np.testing.assert_array_equal(latents[:1], codec.encode(clips[0][:1]))
    np.testing.assert_array_equal(codec.decode(latents)[:1], codec.decode(latents[:1]))


def test_latents_know_no_later_frame(clips, codec):
    np.testing.assert_allclose(codec.encode(clips[2])[:3], codec.encode(clips[2][:9]), atol=1e-6)


def test_frames_know_one_later_latent(clips, codec):
    """A shot that is decoded while it comes: all but its last latent's frames are what they will stay."""
    latents = codec.encode(clips[2])
    decoded = codec.decode(latents)
    for known in range(2, len(latents)):
        final = 4 * (known - 2) + 1
        beginning = codec.decode(latents[:known])
        np.testing.assert_allclose(beginning[:final], decoded[:final], atol=1e-6)
        assert np.abs(beginning[final:] - decoded[final : len(beginning)]).max() > 1e-4


def test_what_was_decoded_has_the_same_latents(clips, codec):
    """What neighbors add is no part of what the latents hold, so that pictures can be encoded again and again."""
    latents = codec.encode(0.4 * clips[0])
    np.testing.assert_allclose(codec.encode(codec.decode(latents)), latents, atol=1e-4)


def test_memory_of_a_fit_does_not_grow_with_the_clips(clips):
    def peak(count):
        tracemalloc.start()
        fit_codec(CFG, (clips[0].copy() for _ in range(count)))
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(1)
    assert peak(40) < 1.01 * peak(2)


def test_streaming_equals_one_pass(clips):
    """Clips one at a time, in any order, give the moments of all patches together."""
    a, b = fit_codec(CFG, iter(clips)), fit_codec(CFG, clips[::-1])
    np.testing.assert_allclose(a.encode(clips[0]), b.encode(clips[0]), atol=1e-4)
    np.testing.assert_allclose(a.decode(a.encode(clips[0])), b.decode(b.encode(clips[0])), atol=1e-4)
    assert fit_codec(CFG, clips).fingerprint == a.fingerprint


def test_long_clips_are_sampled(monkeypatch):
    """A quarter of the patches, spread over the clip, gives nearly the best basis; those of its beginning do not."""
    clip = pixels_to_unit(make_frames(shots=5, frames_per_shot=16, size=(32, 48)))[:77]

    def error(codec):
        return _squared_error(_without_neighbors(codec).decode(codec.encode(clip)), clip)

    full, beginning = error(fit_codec(CFG, [clip])), error(fit_codec(CFG, [clip[:21]]))
    monkeypatch.setattr("moc_jax.codecs.pca._MOST", 19 * 96 // 4)
    sampled = error(fit_codec(CFG, [clip]))
    assert full < sampled < 1.5 * full < 0.5 * beginning


@pytest.mark.parametrize("stride", [(1, 4, 4), (1, 2, 3), (1, 1, 1), (1, 16, 3)])
def test_all_channels_are_lossless(clips, stride):
    cfg = PcaConfig(stride=stride, channels=3 * stride[1] * stride[2])
    codec = fit_codec(cfg, clips)
    np.testing.assert_allclose(codec.decode(codec.encode(clips[0])), clips[0], atol=2e-5)


@pytest.mark.parametrize("whiten", [0.0, 0.5, 1.0])
def test_whiten(clips, whiten):
    """Channel c's deviation is proportional to s_c^(1 - w); all channels together have unit variance."""
    codec = fit_codec(dataclasses.replace(CFG, whiten=whiten), clips)
    latents = np.concatenate([codec.encode(c)[1:].reshape(-1, 12) for c in clips])
    patches = _flat(_patches(clips, first=False))
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


def test_another_format_is_refused_in_words(codec):
    state = codec.state()
    old = {k: v for k, v in state.items() if k != "version" and not k.endswith("missing")}
    with pytest.raises(CodecMismatch, match=r"of format 1, without windows that overlap, but .* 2: .* train again"):
        load_codec(CFG, old)
    with pytest.raises(CodecMismatch, match=r"of format 3, but .* reads format 2: use a newer version"):
        load_codec(CFG, state | {"version": np.array(3)})


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
