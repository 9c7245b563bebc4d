"""Cross-attention over scenes, by every backend, against a softmax over all rows that Wan would have."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moc_jax.attention.api import RoutedAttention
from moc_jax.attention.pallas_tpu.device import Tpu
from moc_jax.models.wan.captions import captions_of, read_captions
from moc_jax.scene import SceneLengths, SceneShape
from tests.attention.compiled import SMALL_TPU
from tests.attention.interpreter import interpreted

SHAPE = SceneShape(shots=3, frames=9, rows=2, columns=3, text_tokens=0)
FRAMES, TEXT = [[4, 3, 2], [5, 0, 1]], [[2, 3, 0, 1], [0, 4, 0, 2]]
ROWS, PADDED = 8, 7  # rows of text, the last of zeros; what each caption is padded to
LENGTHS = SceneLengths(jnp.array(FRAMES), jnp.array(TEXT))


def arrays(seed):
    keys = jax.random.split(jax.random.key(seed), 4)
    sizes = (2, 54, 2, 16), (2, ROWS, 2, 16), (2, ROWS, 2, 16), (2, 54, 2, 16)
    return [jax.random.normal(key, size) for key, size in zip(keys, sizes)]


def written_out(q, k, v):
    """Each frame's captions with their padding, one after another."""
    scenes = []
    for b, (frames, text) in enumerate(zip(FRAMES, TEXT, strict=True)):
        begin = np.cumsum([0, *text])
        out, first = [], 0
        for shot, count in enumerate(frames):
            rows = []
            for caption in (0, shot + 1):
                size = text[caption]
                rows += [*range(begin[caption], begin[caption] + size), *[ROWS - 1] * (PADDED - size if size else 0)]
            of_shot = q[b, first * 6 : (first + count) * 6]
            if rows:
                weights = jax.nn.softmax(jnp.einsum("nhd,jhd->hnj", of_shot, k[b, np.array(rows)]) / 4, axis=-1)
                out.append(jnp.einsum("hnj,jhd->nhd", weights, v[b, np.array(rows)]))
            else:
                out.append(jnp.zeros_like(of_shot))
            first += count
        out.append(jnp.zeros((54 - 6 * first, 2, 16)))
        scenes.append(jnp.concatenate(out))
    return jnp.stack(scenes)


_LONG = pytest.mark.long


@pytest.mark.long
@pytest.mark.parametrize("backend", ["reference", *(pytest.param(x, marks=_LONG) for x in ("xla", "pallas_tpu"))])
def test_captions_are_read_with_their_padding(backend):
    *inputs, d_out = arrays(0)
    value = Tpu(chip="v5e", blocks=SMALL_TPU) if backend == "pallas_tpu" else backend
    captions = captions_of(LENGTHS, SHAPE, ROWS, PADDED)

    def read(q, k, v):
        return read_captions(q, k, v, captions, RoutedAttention(backend=value))

    with interpreted() if backend == "pallas_tpu" else contextlib.nullcontext():
        out, vjp = jax.vjp(jax.jit(read), *inputs)
        gradients = vjp(d_out)
    want, vjp = jax.vjp(written_out, *inputs)
    np.testing.assert_allclose(out, want, atol=2e-6)
    for name, x, y in zip("qkv", gradients, vjp(d_out), strict=True):
        np.testing.assert_allclose(x, y, atol=5e-6, err_msg=name)


def test_of_a_single_shot_all_captions_are_read_and_none_gives_nothing():
    q, k, v, _ = arrays(1)
    shape = SceneShape(shots=1, frames=9, rows=2, columns=3, text_tokens=0)
    for text, some in (([[0, 0], [3, 2]], [False, True]), ([[0, 4], [2, 0]], [True, True])):
        captions = captions_of(SceneLengths(jnp.array([[9], [9]]), jnp.array(text)), shape, ROWS, PADDED)
        out = read_captions(q, k, v, captions, RoutedAttention(backend="xla"))
        assert [bool(jnp.any(scene != 0)) for scene in out] == some
        assert bool(jnp.all(jnp.isfinite(out)))
