"""Latents <-> tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange

from moc_jax.models.patches import tokens_of, video_of
from moc_jax.scene import SceneShape


@pytest.mark.parametrize("patch", [(1, 2, 2), (2, 1, 3)])
def test_tokens_are_patches_in_raster_order(patch):
    video = jax.random.normal(jax.random.key(0), (2, 4, 4, 6, 5), jnp.bfloat16)
    sizes = dict(zip(("pt", "ph", "pw"), patch, strict=True))
    expected = rearrange(video, "b (f pt) (y ph) (x pw) z -> b (f y x) (pt ph pw z)", **sizes)
    tokens = tokens_of(video, patch)
    np.testing.assert_array_equal(tokens, expected)
    frames, rows, columns = (n // size for n, size in zip(video.shape[1:4], patch, strict=True))
    shape = SceneShape(shots=1, frames=frames, rows=rows, columns=columns, text_tokens=0)
    np.testing.assert_array_equal(video_of(tokens, shape, patch), video)
    gradient = jax.grad(lambda x: (video_of(x, shape, patch).astype(jnp.float32) * video).sum())(tokens)
    np.testing.assert_array_equal(gradient, expected)
