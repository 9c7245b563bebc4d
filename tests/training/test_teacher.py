"""Teacher forcing in one pass: the loss and gradients of learning shot by shot, each after the others as history."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moc_jax import models
from moc_jax.attention.api import RoutedAttention
from moc_jax.attention.taught import in_pairs, taught
from moc_jax.config import ChunkConfig, Config, ConfigError, DiffusionConfig, MMDiTConfig, MoCConfig, WanConfig
from moc_jax.scene import Scene, SceneLengths
from moc_jax.training import step as step_module
from moc_jax.training.teacher import own_history, teacher_forced
from tests.training.small import CONFIG, blueprint_of, changed, make_scene, mesh_of

MMDIT = MMDiTConfig(dim=32, depth=2, heads=2, latent_channels=4, text_dim=8, dtype="float32", remat="none")
WAN = WanConfig(
    dim=36, depth=2, heads=2, mlp_dim=40, latent_channels=4, text_dim=8, text_rows=6, dtype="float32", remat="none"
)
MOC = MoCConfig(top_k=2, chunk=ChunkConfig(unit="tokens", size=5), visibility="past")
CFG = DiffusionConfig(teacher_forcing=True)
SHOTS, FRAMES = 3, 10
LENGTHS = SceneLengths(jnp.array([(3, 2, 4), (5, 1, 0)]), jnp.array([(2, 3, 0, 2), (1, 1, 4, 0)]))


def scene():
    random = np.random.default_rng(0)
    video = random.normal(size=(2, FRAMES, 4, 4, 4)).astype(np.float32)
    return Scene(jnp.asarray(video), jnp.asarray(random.normal(size=(2, 9, 8)).astype(np.float32)), LENGTHS)


def check(cfg, moc=MOC, backend="reference", close=2e-5):
    graph, state = models.abstract(cfg)
    leaves, tree = jax.tree.flatten(state)
    random = np.random.default_rng(0)
    weights = jax.tree.unflatten(tree, [random.normal(0.02, 0.15, x.shape).astype(np.float32) for x in leaves])
    attention, data = RoutedAttention(backend=backend), scene()
    t = jnp.array([(0.9, 0.5, 0.2), (0.3, 0.7, 0.6)])
    z = jax.random.normal(jax.random.key(1), data.video.shape)
    weigh = jax.random.normal(jax.random.key(2), data.video.shape)
    key = jax.random.key(3)
    seen = {}

    def one_pass(weights):
        def model(video, text, levels, lengths):
            seen.update(history=video[::2], level=levels[::2])
            return nnx.merge(graph, weights)(video, text, levels, lengths, moc, attention=taught(attention))

        velocity = teacher_forced(model, data, key, CFG)(z, t)
        return (jnp.where(inside, velocity, 0) * weigh).sum(), (velocity, seen["history"], seen["level"])

    @jax.jit
    def shot_by_shot(weights, history, level):
        def of_shot(shot):
            mine = shot_of == shot
            video = jnp.where((shot_of < shot)[..., None, None, None], history, z)
            levels = jnp.where(jnp.arange(SHOTS)[None] < shot, level, t)
            found = nnx.merge(graph, weights)(video, data.text, levels, LENGTHS, moc, attention=attention)
            return jnp.where(mine[..., None, None, None], found, 0)

        velocity = sum(of_shot(shot) for shot in range(SHOTS))
        return (velocity * weigh).sum(), velocity

    ends = np.cumsum(LENGTHS.shot_frames, axis=1)
    shot_of = jnp.asarray(np.sum(np.arange(FRAMES)[None, :, None] >= ends[:, None], axis=-1))
    inside = (shot_of < SHOTS)[..., None, None, None]
    (_, (velocity, history, level)), grads = jax.jit(jax.value_and_grad(one_pass, has_aux=True))(weights)
    assert ((level >= 0.1) & (level <= 0.5)).all()
    assert (level == level[:, :1]).all()
    assert level[0, 0] != level[1, 0]
    (_, want), want_grads = jax.jit(jax.value_and_grad(shot_by_shot, has_aux=True))(weights, history, level)
    error = np.abs(jnp.where(inside, velocity, 0) - want).max() / np.abs(want).max()
    assert error < close, error
    for (path, a), b in zip(jax.tree.leaves_with_path(grads), jax.tree.leaves(want_grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=5e-5 * float(np.abs(b).max() + 1e-6), err_msg=str(path))


@pytest.mark.long
@pytest.mark.parametrize("cfg", [MMDIT, WAN], ids=["mmdit", "wan"])
def test_one_pass_is_shot_by_shot(cfg):
    check(cfg)


@pytest.mark.long
@pytest.mark.parametrize(
    "change",
    [
        dict(text_anchor="own+global"),
        dict(mode="dense"),
        pytest.param(dict(sink_chunks=1), marks=pytest.mark.slow),  # minutes
        dict(top_k=0),
    ],
    ids=str,
)
def test_whatever_is_attended_to(change):
    check(MMDIT, dataclasses.replace(MOC, **change), backend="xla")


def test_pairs_lie_side_by_side():
    np.testing.assert_array_equal(in_pairs(jnp.arange(3), jnp.arange(3) + 10), [0, 10, 1, 11, 2, 12])


def test_shots_must_read_nothing_of_each_other_but_history():
    for moc in (MoCConfig(), MoCConfig(visibility="past", self_anchor="chunk")):
        with pytest.raises(ConfigError, match=r"teacher_forcing needs moc\.visibility past and moc\.self_anchor shot"):
            Config(moc=moc, diffusion=CFG)
    Config(moc=MoCConfig(visibility="past"), diffusion=CFG)
    with pytest.raises(ConfigError, match=r"diffusion\.history_noise is 0\.5 to 0\.1"):
        DiffusionConfig(history_noise=(0.5, 0.1))


def seen_by(cfg, model, sampling=None):
    """What a model that shots with noise are given reads as their history, and the history's level."""
    found = []

    def spy(video, text, levels, lengths):
        found.append((video[::2], levels[::2]))
        return model(video, text, levels, lengths)

    data = scene()
    teacher_forced(spy, data, jax.random.key(3), cfg, sampling or model)(data.video, jnp.full((2, SHOTS), 0.5))
    assert len(found) == 1
    return found[0]


def of_level(velocity):
    """A model that gives each shot's latents one number, by their level."""

    def model(video, text, levels, lengths):
        t = jnp.repeat(levels[1::2, :1], FRAMES, axis=1)[..., None, None, None]
        return in_pairs(jnp.zeros_like(video[1::2]), jnp.broadcast_to(velocity(t), video[1::2].shape))

    return model


def oracle(video, text, levels, lengths):
    """Knows the data: the velocity from where the shots with noise are to where they came from, at any level."""
    z, t = video[1::2], jnp.repeat(levels[1::2, :1], FRAMES, axis=1)[..., None, None, None]
    return in_pairs(jnp.zeros_like(z), (z - scene().video) / t)


OWN = DiffusionConfig(teacher_forcing=True, own_history=1.0, own_history_steps=3)


def test_who_makes_no_mistakes_makes_the_data():
    histories = [seen_by(cfg, oracle) for cfg in (CFG, OWN)]
    for theirs, own in zip(*histories, strict=True):
        np.testing.assert_allclose(theirs, own, atol=2e-6)


def test_a_history_of_its_own_is_what_shots_with_noise_are_denoised_to():
    """In Euler steps from one level for each scene down to 0."""
    still, one, level = (seen_by(OWN, of_level(v)) for v in (jnp.zeros_like, jnp.ones_like, lambda t: t))
    inside = np.arange(FRAMES)[None] < np.array([9, 6])[:, None]
    seen = (1 - still[1][:, :1])[..., None, None, None]  # at level t_c
    begin, area = ((still[0] - other[0]) / seen for other in (one, level))
    for of_scene, area_of_scene, frames in zip(begin, area, inside, strict=True):
        t = of_scene[0, 0, 0, 0]
        assert 0.3 <= t <= 0.9
        np.testing.assert_allclose(of_scene[frames], t, atol=1e-5)
        np.testing.assert_allclose(area_of_scene[frames], t / 3 * (t + 2 * t / 3 + t / 3), atol=1e-5)
    assert (still[0] == one[0])[~inside].all()  # padding is left alone


def test_no_gradient_flows_to_what_made_a_history():
    def loss(factor):
        def model(video, text, levels, lengths):
            return in_pairs(video[1::2], factor * video[::2])  # what a shot's history is

        data = scene()
        velocity = teacher_forced(lambda *of: of[0][in_pairs(rows, rows - 1)], data, jax.random.key(3), OWN, model)
        return velocity(data.video, jnp.full((2, SHOTS), 0.5)).sum()

    rows = jnp.arange(1, 4, 2)
    assert loss(1.0) != loss(2.0)
    assert jax.grad(loss)(1.0) == 0


def test_histories_are_made_as_samples_are(monkeypatch):
    """With nothing dropped, whatever is dropped while shots are learned."""
    asked, make = [], step_module._model
    monkeypatch.setattr(step_module, "_model", lambda *of: asked.append(of[-1]) or make(*of))
    config = changed(CONFIG, moc={"visibility": "past"}, diffusion={"teacher_forcing": True, "own_history": 1.0})
    blueprint = blueprint_of(config, mesh_of(1))
    of = config.train, config.optimizer, config.diffusion, blueprint
    step = step_module.train_step(*of, RoutedAttention(backend="reference"))
    given = blueprint.abstract, make_scene(batch=2)
    jax.eval_shape(lambda state, scene: step(state, scene, config.moc, jax.random.key(0)), *given)
    learning, sampling = asked
    assert learning is not None
    assert sampling is None


def test_some_histories_are_the_models_own():
    half, data = dataclasses.replace(OWN, own_history=0.5), scene()
    many = jax.tree.map(lambda x: jnp.repeat(x, 32, axis=0), data)
    made = own_history(lambda z, t: jnp.ones_like(z), many, jax.random.key(0), half)
    share = np.mean(np.any(made != many.video, axis=(1, 2, 3, 4)))
    assert 0.3 < share < 0.7


def test_a_history_of_its_own_needs_teacher_forcing():
    with pytest.raises(ConfigError, match=r"diffusion\.own_history 0\.5 needs diffusion\.teacher_forcing"):
        DiffusionConfig(own_history=0.5)
    with pytest.raises(ConfigError, match=r"diffusion\.own_history_from is 0\.9 to 0\.1"):
        DiffusionConfig(own_history_from=(0.9, 0.1))
