"""PSNR, and a scene's own reconstruction."""

import numpy as np
import pytest

from moc_jax.codecs import pixels_from_unit
from moc_jax.config import BucketConfig
from moc_jax.data.pack import pack_scene, stack_scenes
from moc_jax.sampling.compare import mean_psnr, psnr, reconstruct_scene
from tests.sampling.worlds import make_codec


def test_psnr_of_bytes_and_of_floats():
    random = np.random.default_rng(0)
    a = random.integers(10, 240, size=(3, 8, 8, 3)).astype(np.uint8)
    assert psnr(a, a) == np.inf
    assert psnr(a, a + np.uint8(5)) == pytest.approx(20 * np.log10(255 / 5))
    as_float = lambda x: x.astype(np.float32) / 127.5 - 1  # noqa: E731
    assert psnr(as_float(a), as_float(a + np.uint8(5))) == pytest.approx(20 * np.log10(255 / 5), abs=1e-4)
    assert psnr(np.zeros((1,), np.uint8), np.full((1,), 255, np.uint8)) == 0
    with pytest.raises(ValueError, match="uint8 with float32"):
        psnr(a, as_float(a))


def test_mean_psnr_weighs_shots_alike():
    a = [np.zeros((1, 2, 2, 3), np.uint8), np.zeros((9, 2, 2, 3), np.uint8)]
    b = [a[0] + np.uint8(1), a[1] + np.uint8(10)]
    mean, per_shot = mean_psnr(a, b)
    assert per_shot == pytest.approx([20 * np.log10(255), 20 * np.log10(25.5)])
    assert mean == pytest.approx(np.mean(per_shot))
    with pytest.raises(ValueError, match="cannot compare shots"):
        mean_psnr(a, a[:1])


def test_reconstruction_is_shot_by_shot():
    codec, random = make_codec(), np.random.default_rng(1)
    shots = [[random.normal(size=(n, 2, 4, 4)).astype(np.float32) for n in row] for row in ([3], [2, 1])]
    texts = [[np.zeros((1, 8), np.float32)] * (len(row) + 1) for row in shots]
    bucket = BucketConfig(shots=3, frames=5, text_tokens=8)
    batch = stack_scenes([pack_scene(s, t, bucket) for s, t in zip(shots, texts)])
    for index, row in enumerate(shots):
        got = reconstruct_scene(batch, codec, index)
        assert len(got) == len(row)
        for ours, latents in zip(got, row):
            np.testing.assert_array_equal(ours, pixels_from_unit(codec.decode(latents)))
