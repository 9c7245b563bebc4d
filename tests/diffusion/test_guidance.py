"""Guidance: its formula, its single model call, and that g = 1 costs nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moc_jax.diffusion.guidance import Scales, guided, guided_velocity
from moc_jax.scene import SceneLengths, noisiest

FRAMES = jnp.array([[2, 1], [3, 0]])
TEXT = jax.random.normal(jax.random.key(0), (2, 4, 3))
NEGATIVE = jax.random.normal(jax.random.key(1), (2, 4, 3))
LENGTHS = SceneLengths(shot_frames=FRAMES, text_lengths=jnp.array([[1, 2, 1], [1, 1, 0]]))
NEGATIVE_LENGTHS = SceneLengths(shot_frames=FRAMES, text_lengths=jnp.array([[1, 1, 1], [2, 1, 0]]))
Z = jax.random.normal(jax.random.key(2), (2, 3, 2, 2, 4))
T = jnp.array([[0.2, 0.6], [0.9, 0.1]])


def model(calls):
    def velocity(video, text, t, lengths):
        calls.append(video.shape[0])
        scene = text.sum(axis=(1, 2)) + (t * lengths.shot_frames).sum(axis=1) + lengths.text_lengths[:, 0]
        return video * scene[:, None, None, None, None]

    return velocity


@pytest.mark.parametrize("scale", [0.0, 2.5, 6.0])
def test_both_branches_in_one_call(scale):
    calls = []
    velocity = guided_velocity(model(calls), TEXT, LENGTHS, NEGATIVE, NEGATIVE_LENGTHS, Scales(scale=scale))
    got = velocity(Z, T)
    assert calls == [4]
    c = model([])(Z, TEXT, T, LENGTHS)
    u = model([])(Z, NEGATIVE, T, NEGATIVE_LENGTHS)
    np.testing.assert_allclose(got, u + scale * (c - u), rtol=1e-5, atol=1e-5)


def test_scale_one_never_evaluates_the_negative_captions():
    calls = []
    velocity = guided_velocity(model(calls), TEXT, LENGTHS, NEGATIVE * jnp.nan, NEGATIVE_LENGTHS, Scales(scale=1.0))
    np.testing.assert_array_equal(velocity(Z, T), model([])(Z, TEXT, T, LENGTHS))
    assert calls == [2]


def test_guidance_extrapolates_from_the_unconditional_velocity():
    c, u = jnp.array([3.0]), jnp.array([1.0])
    assert [float(guided(c, u, g)[0]) for g in (0.0, 1.0, 2.0)] == [1.0, 3.0, 5.0]


def test_each_expert_has_its_own_scale():
    """By the noisiest shot that is there: 0.6 of the first scene, 0.9 of the second."""
    scales = Scales(scale=2.5, low=4.0, boundary=0.7)
    got = guided_velocity(model([]), TEXT, LENGTHS, NEGATIVE, NEGATIVE_LENGTHS, scales)(Z, T)
    c, u = model([])(Z, TEXT, T, LENGTHS), model([])(Z, NEGATIVE, T, NEGATIVE_LENGTHS)
    g = jnp.array([4.0, 2.5])[:, None, None, None, None]
    np.testing.assert_allclose(got, u + g * (c - u), rtol=1e-5, atol=1e-5)
    assert not Scales(scale=1.0, low=2.0, boundary=0.7).off
    active = jnp.array([[True, False], [False, False]])  # a scene without any follows the others
    got = guided_velocity(model([]), TEXT, LENGTHS, NEGATIVE, NEGATIVE_LENGTHS, scales, active)(Z, T)
    np.testing.assert_allclose(got, u + 4 * (c - u), rtol=1e-5, atol=1e-5)


def test_the_noisiest_of_some_shots():
    t = jnp.array([[0.2, 0.6, 1.0], [0.9, 0.1, 1.0]])
    lengths = SceneLengths(jnp.array([[2, 1, 1], [3, 1, 0]]), jnp.zeros((2, 4), jnp.int32))
    for among, wanted in (
        (None, [1.0, 0.9]),
        ([[True, True, False], [False, True, True]], [0.6, 0.1]),
        ([[True, False, False], [False, False, True]], [0.2, 0.2]),  # the latter is not there
    ):
        found = noisiest(t, lengths, None if among is None else jnp.array(among))
        np.testing.assert_allclose(found, wanted)
