"""Stories as arrays, arms and levels: what is trained on is what was rendered, and arms see no more than they say."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evidence import dataset
from evidence.arms import arm_of, every_chunk
from evidence.exam import grade, make_exam
from evidence.experiment import Task, Trainer, interval, levels
from evidence.recolor import recolored, recolorings
from evidence.world import World, boxes, render_shot
from moc_jax.attention.api import moc_attention
from moc_jax.codecs import pixels_to_unit
from moc_jax.codecs.pca import PCACodec
from moc_jax.config import HashConfig, MMDiTConfig, OptimizerConfig, PcaConfig, SampleConfig
from moc_jax.scene import VIDEO, SceneShape, chunk_table
from moc_jax.text import build_text_encoder

WORLD = World(shots=4, frames=5, characters=2, places=2)
CODEC, WORDS = PcaConfig(channels=8), HashConfig(dim=16)


@pytest.fixture(scope="module")
def encoded():
    codec = dataset.fit(WORLD, CODEC, 4)
    return codec, dataset.make(WORLD, codec, WORDS, range(5, 8), 1)


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


def test_the_truth_passes_the_exam(encoded):
    codec, data = encoded
    exam = make_exam(WORLD, codec, WORDS, data.seeds, 1)
    latents = np.array(data.latents, np.float32)
    recalls = grade(exam, latents)
    assert all(recall.correct and recall.of_story for recall in recalls)
    assert min(recall.box_psnr for recall in recalls) > 40  # 8-bit rounding, and latents in float16
    for question in exam.questions:  # the other character in its place
        other = 1 - question.character
        story, seed = WORLD.story(data.seeds[question.row]), question.row
        wrong = codec.encode(pixels_to_unit(render_shot(story, question.shot, story.looks[other])))
        latents[seed, 2 * question.shot : 2 * question.shot + 2] = wrong
    assert not any(recall.correct for recall in grade(exam, latents))
    assert all(recall.of_story for recall in grade(exam, latents))
    assert [q.row for q in exam.first(1).questions] == [0, 0]


def test_characters_and_reveals_are_marked(encoded):
    _, data = encoded
    for row, seed in enumerate(data.seeds):
        story = WORLD.story(seed)
        assert data.reveals[row].tolist() == [-1, -1, *(dict(story.recalls)[shot] for shot in (2, 3))]
        inside = np.stack([boxes(shot) for shot in story.shots])  # [S, F, Y, X]
        rows, columns = (inside.any(axis=(1, 5 - axis)) for axis in (2, 3))
        for found, exact in (
            (np.asarray(data.characters[row]).any(2), rows),
            (np.asarray(data.characters[row]).any(1), columns),
        ):
            touched = exact.reshape(4, 8, 8).any(-1)
            np.testing.assert_array_equal(found.reshape(4, 2, 8).any(1), touched)


def test_other_colors_are_those_of_the_frames(encoded):
    """To what the codec's basis leaves of a story whose pixels are permuted and inverted."""
    codec, data = encoded
    state = codec.state()
    alone = {name: np.zeros_like(state[name]) for name in ("first_missing", "rest_missing")}
    codec = PCACodec.load(CODEC, {**state, **alone})  # decodes by the basis alone
    colors = recolorings(codec)
    assert colors.matrix.shape == (48, 2, 8, 8)
    scene = data.scenes(jnp.array([0, 1]))
    scene = dataclasses.replace(scene, video=0.3 * scene.video)  # so that no pixel is clipped
    found = recolored(scene, colors, jnp.array([0, 6 + 1]))  # none; and green and blue exchanged, then blue inverted
    np.testing.assert_allclose(found.video[0], scene.video[0], atol=2e-3)
    kept = codec.decode(np.asarray(scene.video[1][6:8]))[..., [0, 2, 1]]
    assert np.abs(kept).max() < 1
    want = codec.encode(kept * np.array([1, 1, -1], np.float32))
    np.testing.assert_allclose(found.video[1][6:8], want, atol=5e-3)


def test_what_was_encoded_is_found_again(encoded, tmp_path, monkeypatch):
    codec, data = encoded
    first = dataset.make(WORLD, codec, WORDS, data.seeds, 1, tmp_path)
    monkeypatch.setattr(dataset, "_encode", None)
    again = dataset.make(WORLD, codec, WORDS, data.seeds, 1, tmp_path)
    for kept in (first, again):
        assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all() and a.dtype == b.dtype, kept, data))
    with pytest.raises(TypeError):
        dataset.make(WORLD, codec, WORDS, range(5, 9), 1, tmp_path)


def test_arms_that_do_not_exist_are_named():
    with pytest.raises(ValueError, match=r"no arm is named 'moc 8'; there are dense, own shot, and moc, random or"):
        arm_of("moc 8")


def test_reveals_are_shown_at_their_level_and_the_others_share_one(encoded):
    task = Task(model=MMDiTConfig(), optimizer=OptimizerConfig(), updates=1, sample=SampleConfig(history_noise=0.03))
    t = np.asarray(levels(jax.random.key(0), encoded[1].scenes(jnp.array([0, 1, 2])), 2, task))
    assert (t[:, :2] == np.float32(0.03)).all()
    assert (t[:, 2] == t[:, 3]).all()
    assert len(set(t[:, 2])) == 3


def table_of(data, arm):
    scene = data.scenes(jnp.array([0]))
    shape = SceneShape(shots=4, frames=8, rows=2, columns=2, text_tokens=scene.text.shape[1])
    return chunk_table(scene.lengths, shape, arm.moc.chunk)


@pytest.mark.long
def test_dense_is_every_chunk_picked(encoded):
    """The arm's attention is MoC's with as many picks as there are chunks, to float32's rounding."""
    arm = arm_of("dense")
    table = table_of(encoded[1], arm)
    q, k, v = jax.random.normal(jax.random.key(0), (3, 1, table.chunk_of.shape[1], 2, 16))
    every = dataclasses.replace(arm.moc, top_k=table.kind.shape[1], causal_routing=False)
    out, _ = every_chunk(q, k, v, table, arm.moc)
    real = np.asarray(table.token_kind[0]) == VIDEO
    np.testing.assert_allclose(
        out[:, real], moc_attention(q, k, v, table, every, backend="reference")[:, real], atol=2e-5
    )


@pytest.mark.parametrize(
    "name", ["dense", "own shot", "moc 8x6", "random 8x6", "recent 8x6", "moc 8x12, no self anchor"]
)
def test_looks_pass_from_shot_to_shot_through_video_alone(encoded, name):
    """What each token reads, by values that name its caption or shot: no other caption, and captions no video."""
    arm = arm_of(name)
    table = table_of(encoded[1], arm)
    text, shot = np.asarray(table.token_kind[0]) != VIDEO, np.asarray(table.token_shot[0])
    q, k = jax.random.normal(jax.random.key(0), (2, 1, len(shot), 2, 16))
    names = jnp.where(text, shot + 2, shot + 6)  # padding 0, captions 1 to 5, video 6 to 9
    v = jnp.broadcast_to(jax.nn.one_hot(names, 16)[None, :, None], q.shape)
    out, _ = arm.attention(q, k, v, table, arm.moc)
    read = np.asarray(out[0] > 0)  # [N, H, 16]
    for s in range(4):
        captions = np.isin(np.arange(6), (1, s + 2))
        assert (read[~text & (shot == s), :, :6] == captions).all()
        assert (read[text & (shot == s), :, :6] == captions).all()
    assert not read[text & (shot >= -1), :, 6:].any()
    seen = read[~text].any(1)[:, 6:10]
    if name == "own shot":
        assert (seen == np.eye(4, dtype=bool)[shot[~text]]).all()
    else:
        assert seen[shot[~text] == 3, :3].any(0).all()


@pytest.mark.long
def test_arms_are_trained_and_tested_on_other_stories(encoded):
    codec, data = encoded
    model = MMDiTConfig(
        depth=1, dim=32, heads=2, patch=(1, 4, 4), latent_channels=8, text_dim=16, mlp_ratio=1, dtype="float32"
    )
    task = Task(
        model=model,
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=1),
        updates=20,
        batch=4,
        sample=SampleConfig(solver="euler", steps=2),
    )
    trainer = Trainer(task, arm_of("moc 8x6"), 0, data)
    losses = trainer.run(20)
    assert losses[-5:].mean() < 0.95 * losses[:5].mean()
    held_out = dataclasses.replace(WORLD, split=1)
    exam = make_exam(held_out, codec, WORDS, range(3), 1)
    latents = trainer.sample(exam.data, jax.random.key(0))  # the batch is not full
    np.testing.assert_array_equal(latents[:, :4], exam.data.latents[:, :4].astype(np.float32))
    blind = dataclasses.replace(exam.data, latents=exam.data.latents.at[:, 4:].set(0))
    np.testing.assert_array_equal(latents, trainer.sample(blind, jax.random.key(0)))
    recalls = grade(exam, latents)
    assert [(recall.story, recall.gap) for recall in recalls] == [
        (seed, a - b) for seed in range(3) for a, b in held_out.story(seed).recalls
    ]
    probe = trainer.probe(exam.data, 0.9, jax.random.key(0))
    assert probe.error.shape == (3, 4)
    assert np.isfinite(probe.box_error).all()
    asked = probe.into_reveal[:, :, :, 2:]  # [n, depth, heads, S]
    assert ((asked >= 0) & (asked <= 1)).all()


def test_wilsons_interval():
    """Newcombe 1998, table I: 81 of 263 and 15 of 148."""
    np.testing.assert_allclose(interval(81, 263), (0.2553, 0.3662), atol=5e-4)
    np.testing.assert_allclose(interval(15, 148), (0.0624, 0.1605), atol=5e-4)
