"""Rotary embedding: the published split, the halves' order, and scores that depend on relative positions only."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moc_jax.models.rope import axis_sizes, halves, rope_angles, rotate, turns_of


@pytest.mark.parametrize(("size", "split"), [(128, (44, 42, 42)), (64, (24, 20, 20)), (16, (8, 4, 4)), (6, (2, 2, 2))])
def test_the_head_is_split_as_in_wan(size, split):
    assert axis_sizes(size) == split
    assert sum(split) == size


def test_rotation_is_complex_multiplication_of_neighbouring_pairs_in_the_order_of_halves():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 5, 2, 16)).astype(np.float32)
    position = rng.integers(0, 50, (1, 5, 3))
    frequency = np.concatenate([100.0 ** -(np.arange(0, size, 2) / size) for size in (8, 4, 4)])
    axis = np.repeat([0, 1, 2], [4, 2, 2])
    angle = position[..., axis] * frequency
    expected = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angle)[:, :, None]
    turns = turns_of(rope_angles(jnp.asarray(position), 16, 100.0))
    turned = np.empty_like(x)
    turned[..., halves(16)] = rotate(jnp.asarray(x[..., halves(16)]), turns)
    np.testing.assert_allclose(turned[..., 0::2], expected.real, atol=1e-5)
    np.testing.assert_allclose(turned[..., 1::2], expected.imag, atol=1e-5)


def test_scores_depend_on_relative_positions_only():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 7, 2, 16))
    position = jax.random.randint(jax.random.key(1), (1, 7, 3), 0, 30)

    def scores(offset):
        turns = turns_of(rope_angles(position + offset, 16, 10_000.0))
        return jnp.einsum("bnhd,bmhd->bhnm", rotate(q, turns), rotate(k, turns))

    offset = jnp.array([11, 5, 40])[None, None]
    np.testing.assert_allclose(scores(0 * offset), scores(offset), atol=1e-4)
    assert float(jnp.abs(scores(0) - jnp.einsum("bnhd,bmhd->bhnm", q, k)).max()) > 0.1
