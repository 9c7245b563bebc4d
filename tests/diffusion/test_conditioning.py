"""What the model is shown of known shots, first frames and later shots; and that noise belongs to its own shot."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moc_jax.config import DiffusionConfig, SampleConfig
from moc_jax.diffusion import conditioning, process, samplers
from moc_jax.diffusion.conditioning import Known
from moc_jax.scene import Scene, SceneLengths
from tests.diffusion.in_one import sample_scene

SHOTS = np.array([[3, 1, 2], [2, 4, 0]])  # 6 frames each in a bucket of 8
FRAMES, SIZE = 8, (2, 3, 4)
SHOT_OF = np.array([[0, 0, 0, 1, 2, 2, -1, -1], [0, 0, 1, 1, 1, 1, -1, -1]])
STEPS = 4


def make_lengths(shots=SHOTS):
    return SceneLengths(shot_frames=jnp.asarray(shots), text_lengths=jnp.ones((2, shots.shape[1] + 1), jnp.int32))


def normal(seed):
    return jax.random.normal(jax.random.key(seed), (2, FRAMES, *SIZE))


NOISE, HISTORY, VIDEO = normal(0), normal(1), normal(2)


def make_known(shots=((), ()), first_frames=((), ())):
    def mask(chosen):
        return jnp.array([[s in row for s in range(3)] for row in chosen])

    return Known(video=VIDEO, shots=mask(shots), first_frames=mask(first_frames))


def of_frames(t):
    """[B, S] spread over the frames; 0 on padding."""
    t = jnp.pad(t, ((0, 0), (0, 1)))
    return jnp.take_along_axis(t, jnp.asarray(SHOT_OF) % 4, axis=1)[:, :, None, None, None]


def velocity_fn(z, t):
    """Nonlinear, and frame by frame dependent on the shot's own t and on the whole scene."""
    return jnp.sin(3 * z) + of_frames(t) + 0.1 * z.mean(axis=(1, 2, 3, 4), keepdims=True)


def recorded(function):
    calls = []

    def wrapped(z, t):
        jax.debug.callback(lambda z, t: calls.append((np.asarray(z), np.asarray(t))), z, t, ordered=True)
        return function(z, t)

    return wrapped, calls


def run(known, *, function=velocity_fn, noise=NOISE, history=HISTORY, lengths=None, **settings):
    cfg = SampleConfig(**{"steps": STEPS, "shift": 3.0, "solver": "unipc", "history_noise": 0.3} | settings)
    lengths = make_lengths() if lengths is None else lengths
    wrapped, calls = recorded(function)
    z_0 = np.asarray(sample_scene(wrapped, noise, history, known, lengths, cfg))
    jax.effects_barrier()
    return z_0, calls, samplers.grid_of(cfg)


@pytest.mark.parametrize("solver", ["euler", "heun", "unipc", "dpm++"])
def test_nothing_known_is_the_plain_solver(solver):
    function = lambda z, t: jnp.sin(3 * z) + of_frames(t)  # noqa: E731
    z_0, calls, levels = run(make_known(), function=function, solver=solver)
    plain = samplers.solve(lambda z, s: jnp.sin(3 * z) + s, NOISE, levels, solver)
    want = np.where(SHOT_OF[:, :, None, None, None] >= 0, plain, 0)
    np.testing.assert_allclose(z_0, want, atol=1e-6)
    assert len(calls) == (2 * STEPS - 1 if solver == "heun" else STEPS)


@pytest.mark.parametrize("order", ["joint", "shots"])
@pytest.mark.parametrize("solver", ["euler", "unipc"])
def test_given_shots_are_held_at_t_c(order, solver):
    z_0, calls, _ = run(make_known(shots=[(1,), (0,)]), order=order, solver=solver)
    for b, s in ((0, 1), (1, 0)):
        frames = SHOT_OF[b] == s
        np.testing.assert_array_equal(z_0[b, frames], VIDEO[b, frames])
        for z, t in calls:
            np.testing.assert_array_equal(t[b, s], np.float32(0.3))
            np.testing.assert_allclose(z[b, frames], 0.7 * VIDEO[b, frames] + 0.3 * HISTORY[b, frames], atol=1e-6)
    assert len(calls) == (
        STEPS if order == "joint" else 2 * STEPS
    )  # the first scene has two more shots, the second one


@pytest.mark.parametrize("solver", ["euler", "heun", "unipc", "dpm++"])
def test_first_frames_follow_their_own_straight_path(solver):
    z_0, calls, _ = run(make_known(first_frames=[(0, 2), (1,)]), solver=solver)
    for b, f in ((0, 0), (0, 4), (1, 2)):
        np.testing.assert_array_equal(z_0[b, f], VIDEO[b, f])
        for z, t in calls:
            sigma = t[b, SHOT_OF[b, f]]
            np.testing.assert_allclose(z[b, f], (1 - sigma) * VIDEO[b, f] + sigma * NOISE[b, f], atol=1e-6)
    assert np.abs(z_0[0, 1] - VIDEO[0, 1]).max() > 0.1  # the frames after it are sampled


def test_a_given_first_frame_reaches_the_other_frames():
    free, _, _ = run(make_known())
    held, _, _ = run(make_known(first_frames=[(0,), ()]))
    assert np.abs(free[0, 1:6] - held[0, 1:6]).max() > 1e-3
    np.testing.assert_array_equal(free[1], held[1])


def test_shots_in_turn_see_the_done_at_t_c_and_the_coming_as_noise():
    z_0, calls, levels = run(make_known(), order="shots")
    assert len(calls) == 3 * STEPS
    for turn in range(3):
        for i, (z, t) in enumerate(calls[turn * STEPS : (turn + 1) * STEPS]):
            for b, shots in enumerate(SHOTS):
                for s in np.flatnonzero(shots):
                    frames = SHOT_OF[b] == s
                    if s < turn:
                        assert t[b, s] == np.float32(0.3)
                        np.testing.assert_allclose(
                            z[b, frames], 0.7 * z_0[b, frames] + 0.3 * HISTORY[b, frames], atol=1e-6
                        )
                    elif s == turn:
                        assert t[b, s] == np.float32(levels[i])
                    else:
                        assert t[b, s] == 1
                        np.testing.assert_array_equal(z[b, frames], NOISE[b, frames])


def test_shots_in_turn_are_exact_when_the_model_sees_only_the_past():
    """A model that looks back only: extending a finished scene by a shot equals sampling both in one go."""

    def past(z, t):
        shown = jnp.cumsum(z.mean(axis=(2, 3, 4)), axis=1)  # frames see frames up to themselves
        ends = jnp.array([[2, 2, 2, 3, 5, 5, 6, 7], [1, 1, 5, 5, 5, 5, 6, 7]])  # ... up to their own shot's last
        return jnp.sin(3 * z) + of_frames(t) + jnp.take_along_axis(shown, ends, axis=1)[:, :, None, None, None]

    whole, _, _ = run(make_known(), function=past, order="shots")
    later = jnp.where(jnp.asarray(SHOT_OF == 2)[:, :, None, None, None], NOISE + 1, NOISE)
    changed, _, _ = run(make_known(), function=past, order="shots", noise=later)
    np.testing.assert_array_equal(whole[0, :4], changed[0, :4])
    assert np.abs(whole[0, 4:6] - changed[0, 4:6]).max() > 1e-3

    given = dataclasses.replace(make_known(shots=[(0, 1), (0, 1)]), video=jnp.asarray(whole))
    extended, calls, _ = run(given, function=past, order="shots")
    np.testing.assert_allclose(extended, whole, atol=1e-6)
    assert len(calls) == STEPS


def test_all_given_calls_no_model():
    z_0, calls, _ = run(make_known(shots=[(0, 1, 2), (0, 1)]))
    np.testing.assert_array_equal(z_0, np.where(SHOT_OF[:, :, None, None, None] >= 0, VIDEO, 0))
    assert calls == []


def test_padding_is_blank_whatever_the_model_says_of_it():
    padding = jnp.asarray(SHOT_OF < 0)[:, :, None, None, None]
    function = lambda z, t: jnp.where(padding, jnp.nan, velocity_fn(jnp.where(padding, 0, z), t))  # noqa: E731
    z_0, _, _ = run(make_known(shots=[(1,), ()]), function=function)
    assert np.isfinite(z_0).all()
    assert (z_0[np.asarray(padding)[..., 0, 0, 0]] == 0).all()


def test_one_compilation_for_all_lengths_and_all_that_is_known():
    traces = []

    @jax.jit
    def sample(known, lengths):
        def function(z, t):
            traces.append(1)
            return velocity_fn(z, t)

        cfg = SampleConfig(steps=3, order="shots")
        return sample_scene(function, NOISE, HISTORY, known, lengths, cfg)

    sample(make_known(), make_lengths())
    sample(make_known(shots=[(0,), (1,)], first_frames=[(1,), ()]), make_lengths(np.array([[1, 5, 2], [8, 0, 0]])))
    assert len(traces) == 1


def keys(seeds):
    return jax.vmap(jax.random.key)(jnp.asarray(seeds).ravel()).reshape(np.shape(seeds))


def test_noise_depends_on_the_shots_own_seed_alone():
    noise = np.asarray(conditioning.shot_noise(keys([[1, 2, 3], [4, 5, 6]]), make_lengths(), (FRAMES, *SIZE)))
    changed = np.asarray(conditioning.shot_noise(keys([[1, 9, 3], [4, 5, 6]]), make_lengths(), (FRAMES, *SIZE)))
    same = (noise == changed).all(axis=(2, 3, 4))
    np.testing.assert_array_equal(same[0], SHOT_OF[0] != 1)
    assert same[1].all()

    # Shot of seed 3 elsewhere: another scene, another place, longer, in a larger bucket.
    moved = SceneLengths(shot_frames=jnp.array([[4, 3]]), text_lengths=jnp.ones((1, 3), jnp.int32))
    elsewhere = np.asarray(conditioning.shot_noise(keys([[7, 3]]), moved, (16, *SIZE)))
    np.testing.assert_array_equal(elsewhere[0, 4:6], noise[0, 4:6])


def test_noise_is_standard_normal_and_frames_are_independent():
    lengths = SceneLengths(shot_frames=jnp.array([[32, 32]]), text_lengths=jnp.ones((1, 3), jnp.int32))
    noise = np.asarray(conditioning.shot_noise(keys([[0, 1]]), lengths, (64, 8, 8, 8))).reshape(64, -1)
    assert abs(noise.mean()) < 4 / np.sqrt(noise.size)
    assert abs(noise.std() - 1) < 4 / np.sqrt(2 * noise.size)
    correlation = np.corrcoef(noise) - np.eye(64)
    assert np.abs(correlation).max() < 5 / np.sqrt(512)


def test_turns():
    lengths = make_lengths()
    known = make_known(shots=[(1,), (0,)]).shots
    np.testing.assert_array_equal(conditioning.turns(known, lengths, "joint"), [[0, -1, 0], [-1, 0, -1]])
    np.testing.assert_array_equal(conditioning.turns(known, lengths, "shots"), [[0, -1, 1], [-1, 0, -1]])


def test_a_shot_that_continues_another_has_its_turn():
    """Unless that one is given; then it has one of its own."""
    lengths = SceneLengths(jnp.ones((2, 5), jnp.int32), jnp.ones((2, 6), jnp.int32), jnp.zeros((2, 5), bool))
    lengths = dataclasses.replace(lengths, continues=lengths.continues.at[:, [1, 3, 4]].set(True))
    known = jnp.zeros((2, 5), bool).at[1, 2].set(True)
    np.testing.assert_array_equal(conditioning.turns(known, lengths, "shots"), [[0, 0, 1, 1, 1], [0, 0, -1, 1, 1]])
    np.testing.assert_array_equal(conditioning.turns(known, lengths, "joint"), [[0] * 5, [0, 0, -1, 0, 0]])


@pytest.mark.parametrize("solver", ["euler", "heun", "unipc", "dpm++"])
def test_sampling_undoes_what_training_does(solver):
    """One scene, learned perfectly: no loss at any noise level, and sampled back from any noise."""
    padding = jnp.asarray(SHOT_OF < 0)[:, :, None, None, None]
    video = jnp.where(padding, 0, VIDEO)
    perfect = lambda z, t: (z - video) / jnp.where(padding, 1, of_frames(t))  # noqa: E731
    scene = Scene(video=video, text=jnp.zeros((2, 1, 1)), lengths=make_lengths())
    loss, _ = process.flow_loss(perfect, scene, jax.random.key(0), DiffusionConfig())
    assert loss < 1e-8
    for order in ("joint", "shots"):
        z_0, _, _ = run(make_known(), function=perfect, solver=solver, order=order)
        np.testing.assert_allclose(z_0, video, atol=1e-5)
