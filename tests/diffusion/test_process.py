"""The process against plain numpy, on scenes of unequal shots."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moc_jax.config import DiffusionConfig
from moc_jax.diffusion import process
from moc_jax.scene import Scene, SceneLengths, clean_frames

SHOTS = [[3, 1, 2], [4, 0, 0]]  # two scenes of 6 and 4 frames in a bucket of 8
FRAMES = 8


def make_scene(frames=FRAMES, padding=0.0):
    video = np.random.default_rng(0).normal(size=(2, FRAMES, 2, 3, 4)).astype(np.float32)
    video = np.pad(video, [(0, 0), (0, frames - FRAMES), (0, 0), (0, 0), (0, 0)])
    for b, shots in enumerate(SHOTS):
        video[b, sum(shots) :] = padding
    lengths = SceneLengths(shot_frames=jnp.array(SHOTS), text_lengths=jnp.ones((2, 4), jnp.int32))
    return Scene(video=jnp.asarray(video), text=jnp.zeros((2, 4, 5)), lengths=lengths)


def linear(z, t):
    """A velocity that depends on the latents and, frame by frame, on their own shot's t."""
    return 0.3 * z + t.sum(axis=1)[:, None, None, None, None]


def test_timesteps_are_independent_per_shot():
    lengths = SceneLengths(shot_frames=jnp.ones((4000, 3), jnp.int32), text_lengths=jnp.ones((4000, 4), jnp.int32))
    t = np.asarray(process.sample_timesteps(jax.random.key(0), lengths, DiffusionConfig()))
    assert ((t > 0) & (t < 1)).all()
    correlation = np.corrcoef(t.T) - np.eye(3)
    assert np.abs(correlation).max() < 4 / np.sqrt(4000)


@pytest.mark.parametrize(("mean", "std", "amount"), [(0.0, 1.0, 1.0), (0.5, 0.7, 3.0), (-1.0, 1.5, 0.5)])
def test_timesteps_are_logit_normal_then_shifted(mean, std, amount):
    lengths = SceneLengths(shot_frames=jnp.ones((20000, 1), jnp.int32), text_lengths=jnp.ones((20000, 2), jnp.int32))
    cfg = DiffusionConfig(t_mean=mean, t_std=std, t_shift=amount)
    t = np.asarray(process.sample_timesteps(jax.random.key(1), lengths, cfg), np.float64)[:, 0]
    unshifted = t / (amount - (amount - 1) * t)  # the inverse of the shift
    n = (np.log(unshifted / (1 - unshifted)) - mean) / std
    assert abs(n.mean()) < 4 / np.sqrt(20000)
    assert abs(n.std() - 1) < 4 / np.sqrt(2 * 20000)
    for sigmas, share in ((0, 0.5), (1, 0.8413), (2, 0.9772), (-1, 0.1587)):
        assert abs((n < sigmas).mean() - share) < 0.015


def test_joint_probability_shares_t_within_a_scene():
    lengths = SceneLengths(shot_frames=jnp.ones((2000, 3), jnp.int32), text_lengths=jnp.ones((2000, 4), jnp.int32))
    t = np.asarray(process.sample_timesteps(jax.random.key(2), lengths, DiffusionConfig(joint_probability=0.3)))
    shared = (t == t[:, :1]).all(axis=1)
    assert abs(shared.mean() - 0.3) < 4 * np.sqrt(0.21 / 2000)
    assert len(np.unique(t[shared, 0])) == shared.sum()  # shared within a scene, not across scenes


def test_a_shot_that_continues_another_shares_its_t():
    continues = jnp.tile(jnp.array([False, True, True, False, True, False]), (2000, 1))
    lengths = SceneLengths(jnp.ones((2000, 6), jnp.int32), jnp.ones((2000, 7), jnp.int32), continues)
    t = np.asarray(process.sample_timesteps(jax.random.key(3), lengths, DiffusionConfig()))
    np.testing.assert_array_equal(t, t[:, [0, 0, 0, 3, 3, 5]])
    assert np.abs(np.corrcoef(t[:, [0, 3, 5]].T) - np.eye(3)).max() < 4 / np.sqrt(2000)
    plain = SceneLengths(lengths.shot_frames, lengths.text_lengths)
    np.testing.assert_array_equal(
        t[:, [0, 3, 5]],
        process.sample_timesteps(jax.random.key(3), plain, DiffusionConfig())[:, [0, 3, 5]],
    )


def test_shift_by_one_is_the_identity_and_fixes_the_ends():
    t = jnp.linspace(0, 1, 11)
    np.testing.assert_array_equal(process.shift(t, 1.0), t)
    shifted = np.asarray(process.shift(t, 5.0))
    assert shifted[0] == 0
    assert shifted[-1] == 1
    assert (np.diff(shifted) > 0).all()
    np.testing.assert_allclose(shifted[5], 2.5 / 3, rtol=1e-6)


def test_noise_levels_reach_the_frames_of_their_shots():
    scene = make_scene()
    t = jnp.array([[0.1, 0.5, 0.9], [0.4, 0.7, 0.8]])
    noise = jax.random.normal(jax.random.key(3), scene.video.shape)
    z_t = np.asarray(process.add_noise(scene.video, noise, t, scene.lengths))
    levels = [[0.1] * 3 + [0.5] + [0.9] * 2, [0.4] * 4]
    for b, of_frames in enumerate(levels):
        for f, level in enumerate(of_frames):
            want = (1 - level) * np.asarray(scene.video[b, f]) + level * np.asarray(noise[b, f])
            np.testing.assert_allclose(z_t[b, f], want, rtol=1e-6, atol=1e-7)
        np.testing.assert_array_equal(z_t[b, len(of_frames) :], 0)  # padding stays blank


def test_loss_is_the_mean_of_the_shots_losses():
    scene, key = make_scene(), jax.random.key(4)
    t = jnp.array([[0.1, 0.5, 0.9], [0.4, 0.7, 0.8]])
    seen = []

    def velocity_fn(z, t):
        seen.append((z, t))
        return linear(z, t)

    loss, per_shot = process.flow_loss(velocity_fn, scene, key, DiffusionConfig(), t=t)
    z_t, t_seen = seen[0]
    np.testing.assert_array_equal(t_seen, t)

    noise = np.asarray(jax.random.normal(jax.random.split(key)[1], scene.video.shape), np.float64)
    z_0, want = np.asarray(scene.video, np.float64), np.zeros((2, 3))
    velocity = np.asarray(linear(z_t, t), np.float64)
    for b, shots in enumerate(SHOTS):
        first = 0
        for s, frames in enumerate(shots):
            if frames:
                own = slice(first, first + frames)
                np.testing.assert_allclose(
                    z_t[b, own],
                    (1 - float(t[b, s])) * z_0[b, own] + float(t[b, s]) * noise[b, own],
                    rtol=1e-5,
                    atol=1e-6,
                )
                want[b, s] = np.mean((velocity[b, own] - (noise[b, own] - z_0[b, own])) ** 2)
            first += frames
    np.testing.assert_allclose(per_shot, want, rtol=1e-5)
    np.testing.assert_allclose(loss, want.sum() / 4, rtol=1e-5)  # four shots in the batch
    assert (np.asarray(per_shot)[1, 1:] == 0).all()


def test_loss_draws_its_own_timesteps():
    scene, key, cfg = make_scene(), jax.random.key(5), DiffusionConfig(t_shift=2.0)
    drawn = process.sample_timesteps(jax.random.split(key)[0], scene.lengths, cfg)
    loss, per_shot = process.flow_loss(linear, scene, key, cfg)
    fixed, fixed_per_shot = process.flow_loss(linear, scene, key, cfg, t=drawn)
    np.testing.assert_array_equal(per_shot, fixed_per_shot)
    assert loss == fixed


def test_the_true_velocity_has_no_loss():
    scene, key = make_scene(), jax.random.key(6)
    noise = jax.random.normal(jax.random.split(key)[1], scene.video.shape)
    loss, _ = process.flow_loss(lambda z, t: process.velocity_target(scene.video, noise), scene, key, DiffusionConfig())
    assert loss == 0


@pytest.mark.parametrize("padding", [1e3, np.nan])
def test_padding_has_no_influence_on_loss_or_gradient(padding):
    key, cfg = jax.random.key(7), DiffusionConfig()

    def loss(scale, scene):
        return process.flow_loss(lambda z, t: scale * linear(z, t), scene, key, cfg)[0]

    clean = jax.value_and_grad(loss)(1.5, make_scene())
    dirty = jax.value_and_grad(loss)(1.5, make_scene(padding=padding))
    np.testing.assert_array_equal(clean[0], dirty[0])
    if np.isfinite(padding):  # NaN latents make NaN velocities, whose own gradient is the model's affair
        np.testing.assert_array_equal(clean[1], dirty[1])


def test_nan_that_a_model_says_of_padding_reaches_no_gradient():
    scene, key = make_scene(), jax.random.key(8)
    blank = process.of_frames(jnp.ones((2, 3)), scene.lengths, FRAMES)[:, :, None, None, None] == 0

    def loss(scale, fill):
        velocity_fn = lambda z, t: scale * z + jnp.where(blank, fill, 0)  # noqa: E731
        return process.flow_loss(velocity_fn, scene, key, DiffusionConfig())[0]

    np.testing.assert_array_equal(jax.grad(loss)(1.5, jnp.nan), jax.grad(loss)(1.5, 0.0))


def test_one_compilation_for_all_lengths():
    traces = []

    @jax.jit
    def loss(scene):
        traces.append(1)
        return process.flow_loss(linear, scene, jax.random.key(9), DiffusionConfig())[0]

    first = make_scene()
    other = SceneLengths(shot_frames=jnp.array([[1, 1, 1], [2, 3, 3]]), text_lengths=first.lengths.text_lengths)
    assert loss(first) != loss(Scene(video=first.video, text=first.text, lengths=other))
    assert len(traces) == 1


def test_given_first_frames_stay_clean_and_are_not_learned():
    """Of the first scene's shots of 3, 1 and 2 frames the last one's; of the second, its only shot's."""
    scene = make_scene()
    given = jnp.array([[False, False, True], [True, True, False]])  # the second scene has no second shot
    lengths = dataclasses.replace(scene.lengths, clean_first=given)
    is_clean = np.zeros((2, FRAMES), bool)
    is_clean[0, 4] = is_clean[1, 0] = True
    np.testing.assert_array_equal(clean_frames(lengths, FRAMES), is_clean)
    t, noise = jnp.full((2, 3), 0.5), jnp.ones_like(scene.video)
    z = process.add_noise(scene.video, noise, t, lengths)
    wanted = process.add_noise(scene.video, noise, t, scene.lengths)
    np.testing.assert_array_equal(z, jnp.where(is_clean[:, :, None, None, None], scene.video, wanted))

    def velocity(z, t):
        return jnp.where(is_clean[:, :, None, None, None], jnp.nan, 0.3 * z)

    scene = dataclasses.replace(scene, lengths=lengths)
    loss, per_shot = process.flow_loss(velocity, scene, jax.random.key(0), DiffusionConfig(), t=t)
    _, plain = process.flow_loss(lambda z, t: 0.3 * z, scene, jax.random.key(0), DiffusionConfig(), t=t)
    np.testing.assert_array_equal(per_shot, plain)
    assert np.isfinite(loss)
    assert (np.asarray(per_shot) > 0).tolist() == [[True, True, True], [True, False, False]]
