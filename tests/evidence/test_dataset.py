"""Stories as arrays, arms and levels: what is trained on is what was rendered, and arms see no more than they say."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evidence import dataset
from evidence.arms import ARMS, every_chunk
from evidence.experiment import Task, interval, levels
from evidence.world import World, render_shot
from moc_jax.attention.api import moc_attention
from moc_jax.attention.routing import anchor_chunks, candidate_chunks
from moc_jax.codecs import pixels_to_unit
from moc_jax.config import HashConfig, MMDiTConfig, OptimizerConfig, PcaConfig
from moc_jax.scene import GLOBAL, TEXT, VIDEO, SceneShape, chunk_table
from moc_jax.text import build_text_encoder

WORLD = World(shots=4, frames=5, characters=2, places=2)
CODEC, WORDS = PcaConfig(channels=8), HashConfig(dim=16)


@pytest.fixture(scope="module")
def encoded():
    codec = dataset.fit(WORLD, CODEC, 4)
    return codec, dataset.make(WORLD, CODEC, codec, WORDS, range(5, 8), 1)


def test_scenes_are_the_encoded_stories_with_their_captions(encoded):
    codec, data = encoded
    scene = data.scenes(jnp.array([2, 0]))
    for row, seed in enumerate((7, 5)):
        story = WORLD.story(seed)
        latents = np.concatenate([codec.encode(pixels_to_unit(render_shot(story, shot))) for shot in range(4)])
        np.testing.assert_allclose(scene.video[row], latents, atol=2e-3, rtol=1e-3)  # float16
        words = np.concatenate(
            [build_text_encoder(WORDS)(c) for c in (story.caption, *(s.caption for s in story.shots))]
        )
        assert scene.lengths.text_lengths[row].sum() == len(words)
        np.testing.assert_array_equal(scene.text[row, : len(words)], words)
        assert not np.asarray(scene.text[row, len(words) :]).any()
    assert scene.lengths.shot_frames.tolist() == [[2] * 4] * 2


def test_reveals_are_shown_at_their_level_and_the_others_share_one(encoded):
    task = Task(world=WORLD, model=MMDiTConfig(), optimizer=OptimizerConfig(), updates=1, history_noise=0.03)
    t = np.asarray(levels(jax.random.key(0), encoded[1].scenes(jnp.array([0, 1, 2])), task))
    assert (t[:, :2] == np.float32(0.03)).all()
    assert (t[:, 2] == t[:, 3]).all()
    assert len(set(t[:, 2])) == 3


def table_of(data, arm):
    scene = data.scenes(jnp.array([0]))
    shape = SceneShape(shots=4, frames=8, rows=2, columns=2, text_tokens=scene.text.shape[1])
    return chunk_table(scene.lengths, shape, arm.moc.chunk)


def test_dense_is_every_chunk_picked(encoded):
    """The arm's attention is MoC's with as many picks as there are chunks, to float32's rounding."""
    arm = ARMS["dense"]
    table = table_of(encoded[1], arm)
    q, k, v = jax.random.normal(jax.random.key(0), (3, 1, table.chunk_of.shape[1], 2, 16))
    every = dataclasses.replace(arm.moc, top_k=table.kind.shape[1], causal_routing=False)
    out, _ = every_chunk(q, k, v, table, arm.moc)
    real = np.asarray(table.token_kind[0]) == VIDEO
    np.testing.assert_allclose(
        out[:, real], moc_attention(q, k, v, table, every, backend="reference")[:, real], atol=2e-5
    )


@pytest.mark.parametrize("name", ARMS)
def test_no_arm_reads_captions_of_other_shots(encoded, name):
    """What another shot's caption says is no path of memory: only the own one and the global one are read."""
    table = table_of(encoded[1], ARMS[name])
    readable = np.asarray(anchor_chunks(table, ARMS[name].moc) | candidate_chunks(table, ARMS[name].moc))[0]
    shot, text = np.asarray(table.shot[0]), np.asarray(table.kind[0]) == TEXT
    for s in range(4):
        rows = readable[(shot == s) & ~text]
        assert rows[:, text & ((shot == s) | (shot == GLOBAL))].all()
        assert not rows[:, text & (shot != s) & (shot != GLOBAL)].any()


def test_wilsons_interval():
    """Newcombe 1998, table I: 81 of 263 and 15 of 148."""
    np.testing.assert_allclose(interval(81, 263), (0.2553, 0.3662), atol=5e-4)
    np.testing.assert_allclose(interval(15, 148), (0.0624, 0.1605), atol=5e-4)
