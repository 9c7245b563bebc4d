"""Shot by shot with what is kept of finished shots: the samples are those of computing all again at each step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moc_jax.attention import kept as attention_kept
from moc_jax.attention.deal import Deal
from moc_jax.attention.kept import Size
from moc_jax.config import ConfigError, MeshConfig, WanConfig
from moc_jax.sampling import room
from moc_jax.sampling.generate import Sampler
from moc_jax.sampling.in_turn import rounds_of
from moc_jax.sampling.room import RoomError
from moc_jax.scene import SceneLengths, SceneShape
from moc_jax.sharding import make_mesh
from tests.sampling.worlds import BUCKET, CONFIG, make_board, make_codec, make_params, run

CLOSE = 2e-4
PAST = dataclasses.replace(
    CONFIG,
    moc=dataclasses.replace(CONFIG.moc, visibility="past", top_k=2),
    sample=dataclasses.replace(CONFIG.sample, order="shots", cache="on"),
)
THREE = make_board([("a van", 0.4), ("a dog runs", 0.1), ("night", 0.8)])  # 5, 1 and 9 frames
TWO = make_board([("a boat", 0.7), ("rain", 0.4)], caption="the sea", negative_prompt="sun and much wind")


def with_cache(config, cache):
    return dataclasses.replace(config, sample=dataclasses.replace(config.sample, cache=cache))


def check(*boards, config=PAST, params=None):
    """Guidance is on: both captions' keys and values are kept."""
    kept, anew = (run(*boards, config=with_cache(config, cache), params=params) for cache in ("on", "off"))
    for one, other in zip(kept, anew):
        for a, b in zip(one.latents, other.latents, strict=True):
            np.testing.assert_allclose(a, b, atol=CLOSE)


def test_scenes_of_one_size_share_the_program_that_makes_what_is_kept():
    deal = Deal.of(SceneShape(shots=1, frames=4, rows=2, columns=2, text_tokens=8), groups=1, head_groups=1, sharing=1)
    shape = SceneShape(shots=3, frames=12, rows=2, columns=2, text_tokens=8)
    size = Size(batch=1, shape=shape, depth=1, heads=2, head_dim=8, dtype="float32", columns=8, deal=deal)
    kept, again = size.empty(), dataclasses.replace(size).empty()
    assert jax.tree.map(jnp.shape, kept) == jax.tree.map(jnp.shape, again)
    mesh = jax.sharding.get_mesh()
    assert attention_kept._maker(size, mesh) is attention_kept._maker(dataclasses.replace(size), mesh)
    assert attention_kept._maker(size, mesh)._cache_size() == 1


@pytest.mark.long
def test_samples_are_those_of_computing_all_again(monkeypatch):
    """Two scenes of unlike shots, one of which is done before the other."""
    models = []
    original = Sampler._velocity

    def seen(self, moc, params, request, active, past):
        models.append(past is not None)
        return original(self, moc, params, request, active, past)

    monkeypatch.setattr(Sampler, "_velocity", seen)
    check(THREE, TWO)
    assert models == [True, False]  # traced once each


WAN = WanConfig(dim=36, depth=2, heads=2, mlp_dim=40, latent_channels=4, text_dim=8, text_rows=6, dtype="float32")


@pytest.mark.long
@pytest.mark.parametrize("boundary", [0, 0.7])
def test_of_wan(boundary):
    model = dataclasses.replace(WAN, boundary=boundary)
    sample = dataclasses.replace(PAST.sample, guidance_low=3.0)
    check(THREE, TWO, config=dataclasses.replace(PAST, model=model, sample=sample), params=make_params(model))


@pytest.mark.long
@pytest.mark.parametrize("cache", ["on", "off"])
def test_shots_that_wait_at_pure_noise_do_not_choose_the_expert(cache):
    """Nor the scale of guidance: the first shot is what it is in a scene of its own."""
    config = dataclasses.replace(with_cache(PAST, cache), model=dataclasses.replace(WAN, boundary=0.7))
    config = dataclasses.replace(config, sample=dataclasses.replace(config.sample, guidance_low=3.0))
    shots = [("a van", 0.4), ("a dog runs", 0.1)]
    scene, alone = run(make_board(shots), make_board(shots[:1]), config=config, params=make_params(config.model))
    np.testing.assert_allclose(scene.latents[0], alone.latents[0], atol=CLOSE)


@pytest.mark.long
def test_takes_and_given_shots(tmp_path):
    from moc_jax.data.video import write_video

    (made,) = run(THREE, config=with_cache(PAST, "off"))
    write_video(tmp_path / "given.mp4", np.concatenate([made.shots[2]] * 2)[:9], 12.0)
    given = {"caption": "night", "video": str(tmp_path / "given.mp4")}
    onward = {"caption": "the van drives on", "seconds": 0.4, "cut": False}
    check(make_board([("a van", 0.4), onward, given, ("day", 0.1)]), make_board([given, ("day", 0.4)]))


def test_turns_follow_the_shots_of_each_scene():
    lengths = SceneLengths(
        np.array([(2, 1, 4, 3), (5, 1, 0, 0)]), np.array([(1, 2, 0, 3, 1), (2, 0, 7, 0, 0)]), np.zeros((2, 4), bool)
    )
    rounds = rounds_of(np.array([(0, 0, -1, 1), (-1, 0, -1, -1)]), lengths, [lengths.text_lengths])
    assert [each.turn.first.tolist() for each in rounds] == [[0, 0], [2, 1], [3, 0]]
    assert [each.turn.count.tolist() for each in rounds] == [[2, 1], [1, 1], [1, 0]]
    assert [each.now.ravel().tolist() for each in rounds] == [[0, -2], [-2, 0], [1, -2]]
    assert all(each.samples for each in rounds)
    turn = rounds[0].turn
    assert (turn.shots, turn.frames, turn.text_tokens) == (2, 5, 32)


def test_nothing_is_kept_that_would_change():
    for change, what in (
        (dict(moc=dataclasses.replace(PAST.moc, visibility="scene")), "sample.cache is on: with moc.visibility scene"),
        (dict(sample=dataclasses.replace(PAST.sample, order="joint")), "sample.order is joint"),
        (dict(moc=dataclasses.replace(PAST.moc, dense_first_steps=1)), "changes with the steps"),
    ):
        with pytest.raises(ConfigError, match=what):
            Sampler(dataclasses.replace(PAST, **change), make_codec())


def test_too_little_memory_is_refused_before_sampling(monkeypatch, capsys):
    monkeypatch.setattr(room, "free_memory", lambda: 40_000)
    sampler = Sampler(PAST, make_codec())
    monkeypatch.setattr(sampler, "_velocity", None)
    with pytest.raises(RoomError) as refused:
        sampler(make_params(), [THREE], bucket=BUCKET)
    for part in ("on each device, and 90% of the", "% of the video", "sample.guidance 1", "float8", "sample.cache off"):
        assert part in str(refused.value)


@pytest.mark.long
@pytest.mark.parametrize("sizes", [dict(data=1, context=4), dict(data=2, context=2, tensor=2)], ids=str)
def test_devices_keep_a_part_each(sizes):
    """Of one scene, in two groups of tokens and of heads; and of two scenes, with heads split twice."""
    boards = [THREE, TWO] if sizes["data"] == 2 else [THREE]
    count = int(np.prod(list(sizes.values())))
    with jax.set_mesh(make_mesh(MeshConfig(**sizes), jax.devices()[:count])):
        kept = Sampler(PAST, make_codec())(make_params(), boards, bucket=BUCKET)
    for one, board in zip(kept, boards):
        (alone,) = run(board, config=with_cache(PAST, "off"))
        for a, b in zip(one.latents, alone.latents, strict=True):
            np.testing.assert_allclose(a, b, atol=CLOSE)
