"""The means of queries and keys that outer retrieval goes by, beside those of what attention is really given."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moc_jax.attention.api import RoutedAttention
from moc_jax.config import MeshConfig
from moc_jax.scene import SceneLengths, frame_shot
from moc_jax.sharding import make_mesh
from tests.models import test_mmdit, test_wan


@pytest.mark.long
@pytest.mark.parametrize("family", [test_mmdit, test_wan], ids=["mmdit", "wan"])
def test_features_are_means_over_each_shots_tokens(family):
    cfg, moc = family.CFG, family.MOC
    video, text, t = family._inputs() if family is test_mmdit else family.inputs()
    lengths = family._lengths() if family is test_mmdit else family.lengths_of()
    model, seen, routed = nnx.merge(family.GRAPH, family.WEIGHTS), [], RoutedAttention(backend="xla")

    def attention(q, k, v, table, cfg, *, key=None):
        jax.debug.callback(lambda q, k: seen.append((np.asarray(q), np.asarray(k))), q, k, ordered=True)
        return routed(q, k, v, table, cfg, key=key)

    features = np.asarray(model.features(video, text, t, lengths, moc, attention=attention))
    jax.effects_barrier()
    assert len(seen) == cfg.depth
    assert features.shape == (cfg.depth, 2, 2, 3, cfg.heads, cfg.head_dim)
    shot = np.repeat(np.asarray(frame_shot(lengths.shot_frames, video.shape[1])), 6, axis=1)  # 2x3 patches a frame
    for layer, pair in enumerate(seen):
        for which, vectors in enumerate(pair):
            of_video = vectors[:, -shot.shape[1] :]
            for scene in range(2):
                for s in range(3):
                    mine = of_video[scene, shot[scene] == s]
                    wanted = mine.mean(axis=0) if len(mine) else np.zeros(mine.shape[1:])
                    np.testing.assert_allclose(features[layer, scene, which, s], wanted, atol=2e-6)
    velocity = jax.jit(lambda: model(video, text, t, lengths, moc, attention=routed))()
    assert jnp.isfinite(velocity).all()


@pytest.mark.long
@pytest.mark.parametrize("family", [test_mmdit, test_wan], ids=["mmdit", "wan"])
def test_first_frames_that_are_clean_count_as_their_shots(family):
    """A shot of one frame at t = 0 is that frame given clean."""
    video, text, t = family._inputs() if family is test_mmdit else family.inputs()
    lengths = family._lengths(shots=(1, 3, 2)) if family is test_mmdit else family.lengths_of(shots=(1, 3, 2))
    clean = dataclasses.replace(lengths, clean_first=jnp.array([(True, False, False), (True, False, False)]))
    t = t.at[:, 0].set(0)
    found, wanted = (features_of(family, video, text, t, each) for each in (clean, lengths))
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    assert np.abs(found[:, :, :, 0]).max() > 0.1


@pytest.mark.long
@pytest.mark.parametrize("family", [test_mmdit, test_wan], ids=["mmdit", "wan"])
def test_over_a_mesh_each_token_counts_once(family):
    """Four groups of tokens don't divide frames of 6 tokens, and have frames behind the last."""
    video, text, t = family._inputs() if family is test_mmdit else family.inputs()
    lengths = SceneLengths(jnp.array([(4, 3, 3), (1, 0, 9)]), jnp.array([(2, 3, 2, 1), (0, 1, 4, 2)]))
    alone = features_of(family, video, text, t, lengths)
    with jax.set_mesh(make_mesh(MeshConfig(data=1, context=4), jax.devices()[:4])):
        np.testing.assert_allclose(features_of(family, video, text, t, lengths), alone, atol=1e-5)


def features_of(family, video, text, t, lengths):
    @jax.jit
    def run(video, text, t, lengths):
        attention = RoutedAttention(backend="xla", head_groups=1)
        return nnx.merge(family.GRAPH, family.WEIGHTS).features(
            video, text, t, lengths, family.MOC, attention=attention
        )

    return np.asarray(run(video, text, t, lengths))
