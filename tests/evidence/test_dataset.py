"""Stories as arrays, arms and levels: what is trained on is what was rendered, and arms see no more than they say."""

import dataclasses
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evidence import dataset, recolor
from evidence.arms import arm_of, stages_of
from evidence.cost import cost_of
from evidence.exam import grade, make_exam
from evidence.experiment import Programs, Task, Trainer, _kinds, interval, levels
from evidence.findings import probed
from evidence.probe import Probe, _asked, _by_chance, _gradients
from evidence.recolor import recolored, recolorings
from evidence.spread import Spread
from evidence.watch import apart, watched
from evidence.world import World
from moc_jax.attention.api import RoutedAttention, moc_attention, scene_keys
from moc_jax.codecs import pixels_to_unit
from moc_jax.codecs.pca import PCACodec
from moc_jax.config import HashConfig, MMDiTConfig, PcaConfig, SampleConfig
from moc_jax.scene import GLOBAL, TEXT, VIDEO, SceneShape, chunk_table
from moc_jax.text import build_text_encoder

WORLD = World(shots=4, frames=5, characters=2, places=2)
CODEC, WORDS = PcaConfig(channels=8), HashConfig(dim=16)


@pytest.fixture(scope="module")
def encoded():
    codec = dataset.fit(WORLD, CODEC, 4)
    return codec, dataset.make(WORLD, codec, WORDS, range(5, 8))


def test_scenes_are_the_encoded_stories_with_their_captions(encoded):
    codec, data = encoded
    scene = data.scenes(jnp.array([2, 0]))
    for row, seed in enumerate((7, 5)):
        story = WORLD.story(seed)
        latents = np.concatenate([codec.encode(pixels_to_unit(story.render_shot(shot))) for shot in range(4)])
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
    exam = make_exam(WORLD, codec, WORDS, data.seeds)
    latents = np.array(data.latents, np.float32)
    recalls = grade(exam, latents)
    assert all(recall.correct and recall.of_story for recall in recalls)
    assert min(recall.box_psnr for recall in recalls) > 40  # 8-bit rounding, and latents in float16
    for question in exam.questions:  # the other character in its place
        other = 1 - question.character
        story, seed = WORLD.story(data.seeds[question.row]), question.row
        wrong = codec.encode(pixels_to_unit(story.render_shot(question.shot, story.looks[other])))
        latents[seed, 2 * question.shot : 2 * question.shot + 2] = wrong
    assert not any(recall.correct for recall in grade(exam, latents))
    assert all(recall.of_story for recall in grade(exam, latents))
    assert [q.row for q in exam.first(1).questions] == [0, 0]


def test_characters_and_reveals_are_marked(encoded):
    _, data = encoded
    for row, seed in enumerate(data.seeds):
        story = WORLD.story(seed)
        assert data.reveals[row].tolist() == [-1, -1, *(dict(story.recalls)[shot] for shot in (2, 3))]
        inside = np.stack([shot.box for shot in story.shots])  # [S, F, Y, X]
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
    first = dataset.make(WORLD, codec, WORDS, data.seeds, folder=tmp_path)
    monkeypatch.setattr(dataset, "encode", None)
    again = dataset.make(WORLD, codec, WORDS, data.seeds, folder=tmp_path)
    for kept in (first, again):
        assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all() and a.dtype == b.dtype, kept, data))
    with pytest.raises(TypeError):
        dataset.make(WORLD, codec, WORDS, range(5, 9), folder=tmp_path)


def test_shapes_are_known_before_anything_is_made(encoded):
    """Else what is compiled ahead is compiled in vain."""
    codec, data = encoded
    assert _kinds((dataset.shapes(WORLD, CODEC, WORDS, data.seeds),)) == _kinds((data,))
    assert _kinds((recolor.shapes(8),)) == _kinds((recolorings(codec),))


@pytest.mark.long
def test_several_processes_make_what_one_makes(encoded, tmp_path, capsys):
    codec, data = encoded
    with Spread(2) as spread:
        again = dataset.make(WORLD, codec, WORDS, data.seeds, spread, tmp_path)
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), again, data))
    assert re.match(r"3 stories by 2 processes: [\d.]+ s, [\d.]+ ms of processor time each\n", capsys.readouterr().out)


def test_arms_that_do_not_exist_are_named():
    with pytest.raises(ValueError, match=r"no arm is named 'moc 8'; there are dense, own shot, and moc, random or"):
        arm_of("moc 8")


def test_chunks_shrink_while_an_arm_is_trained():
    arm = "moc 8x6, all captions, shrinking chunks"
    assert stages_of(arm) == [(0, "moc 32x6, all captions"), (1 / 3, "moc 16x6, all captions"), (2 / 3, arm)]
    assert stages_of("dense") == [(0, "dense")]
    assert arm_of(arm).moc == arm_of("moc 8x6, all captions").moc  # once it is trained
    for wrong in ("own shot, shrinking chunks", "moc 4x1, shrinking chunks4"):
        with pytest.raises(ValueError, match=f"no arm is named '{wrong}'"):
            arm_of(wrong)


def test_reveals_are_shown_at_their_level_and_the_others_share_one(encoded):
    task = Task(model=MMDiTConfig(), sample=SampleConfig(history_noise=0.03))
    t, known = map(np.asarray, levels(jax.random.key(0), encoded[1].scenes(jnp.array([0, 1, 2])), 2, task))
    assert (known == [True, True, False, False]).all()
    assert (t[:, :2] == np.float32(0.03)).all()
    assert (t[:, 2] == t[:, 3]).all()
    assert len(set(t[:, 2])) == 3


def table_of(data, arm):
    scene = data.scenes(jnp.array([0]))
    shape = SceneShape(shots=4, frames=8, rows=2, columns=2, text_tokens=scene.text.shape[1])
    return chunk_table(scene.lengths, shape, arm.moc.chunk)


@pytest.mark.long
@pytest.mark.parametrize("backend", ["reference", "xla"])
def test_dense_is_every_chunk_picked(encoded, backend):
    """The arm's attention and its gradients are MoC's with as many picks as there are chunks, to float32's rounding."""
    arm = arm_of("dense", backend)
    table = table_of(encoded[1], arm)
    q, k, v, d_out = jax.random.normal(jax.random.key(0), (4, 1, table.chunk_of.shape[1], 2, 16))
    real = (table.token_kind == VIDEO)[..., None, None]

    def of_video(attend):
        out, vjp = jax.vjp(lambda q, k, v: jnp.where(real, attend(q, k, v), 0), q, k, v)
        return out, *vjp(d_out)

    wanted = of_video(lambda q, k, v: moc_attention(q, k, v, table, arm.moc, backend="reference"))
    found = of_video(lambda q, k, v: arm.attention(q, k, v, table, arm.moc)[0])
    for name, a, b in zip(("out", "dq", "dk", "dv"), found, wanted):
        np.testing.assert_allclose(a, b, atol=2e-5, err_msg=name)


@pytest.mark.long
@pytest.mark.parametrize("name", ["dense", "moc 4x2", "random 4x2", "own shot", "moc 4x2, all captions"])
def test_small_scenes_are_attended_to_as_by_the_library(encoded, name):
    """Outputs and gradients, under a mask and by the oracle, with drop-off and drop-in."""
    small, wanted = arm_of(name), arm_of(name, "reference")
    table = table_of(encoded[1], small)
    q, k, v, d_out = jax.random.normal(jax.random.key(0), (4, 1, table.chunk_of.shape[1], 2, 16))
    key = scene_keys(jax.random.key(1), 1, 2)

    def both(arm):
        out, vjp = jax.vjp(lambda *qkv: arm.attention(*qkv, table, arm.moc, key=key)[0], q, k, v)
        real = table.valid[..., None, None]
        return jnp.where(real, out, 0), *vjp(jnp.where(real, d_out, 0))

    for what, a, b in zip(("out", "dq", "dk", "dv"), both(small), both(wanted)):
        np.testing.assert_allclose(a, b, atol=2e-5, err_msg=what)


@pytest.mark.long
def test_costs_are_those_of_the_pairs(encoded):
    """Counted one by one: 4 shots of 8 tokens, each with its caption, and the global caption."""
    table = table_of(encoded[1], arm_of("dense"))
    shot, kind = np.asarray(table.token_shot[0]), np.asarray(table.token_kind[0])
    text, video = shot[kind == TEXT], shot[kind == VIDEO]
    tokens, captions = len(text) + len(video), ((text[:, None] == text) | (text == GLOBAL)).sum()
    own = captions + ((video[:, None] == text) | (text == GLOBAL)).sum()
    for name, pairs, per_pair in (
        ("dense", own + 32**2, 0),
        ("own shot", own + 4 * 8**2, 0),
        ("moc 4x1", own + 4 * 8**2 + 24 * 4, 32 + 2 * 32 * 8),
        ("recent 4x1", own + 4 * 8**2 + 24 * 4, 0),
    ):
        arm = arm_of(name)
        cost = cost_of(table_of(encoded[1], arm), arm, 16)
        assert cost.skipped == pytest.approx(1 - pairs / tokens**2), name
        assert (cost.attention_flops, cost.dense_flops) == (16 * (4 * pairs + per_pair), 64 * tokens**2), name


@pytest.mark.parametrize(
    "name",
    [
        "dense",
        "own shot",
        "moc 8x6",
        *(
            pytest.param(name, marks=pytest.mark.long)
            for name in (
                "random 8x6",
                "recent 8x6",
                "moc 8x12, no self anchor",
                "moc 8x6, first frame",
                "moc 8x6, two descriptors",
            )
        ),
    ],
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
    task = Task(model=model, warmup=1, batch=4, sample=SampleConfig(solver="euler", steps=2))
    programs = Programs(task, arm_of("moc 8x6"), WORLD)
    trainer, beside = (Trainer(programs, data, seed=0, rate=rate) for rate in (1e-2, 0.0))
    losses = [trainer.run(count) for count in (5, 10, 5)]
    assert losses[-1] < 0.95 * losses[0]
    before = jax.tree.map(np.asarray, beside.state.params)
    assert beside.run(5) == pytest.approx(losses[0], rel=0.2)
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), before, beside.state.params))
    held_out = dataclasses.replace(WORLD, split=1)
    exam = make_exam(held_out, codec, WORDS, range(3))
    latents = programs.sample(trainer.weights, exam.data, jax.random.key(0))  # the batch is not full
    np.testing.assert_array_equal(latents[:, :4], exam.data.latents[:, :4].astype(np.float32))
    blind = dataclasses.replace(exam.data, latents=exam.data.latents.at[:, 4:].set(0))
    np.testing.assert_array_equal(latents, programs.sample(trainer.weights, blind, jax.random.key(0)))
    recalls = grade(exam, latents)
    assert [(recall.story, recall.gap) for recall in recalls] == [
        (seed, a - b) for seed in range(3) for a, b in held_out.story(seed).recalls
    ]
    probe = programs.probe(trainer.weights, exam.data, 0.9, jax.random.key(0))
    assert probe.error.shape == (3, 4)
    assert np.isfinite(probe.box_error).all()
    asked = probe.into_reveal[:, :, :, 2:]  # [n, depth, heads, S]
    assert ((asked >= 0) & (asked <= 1)).all()
    earlier, reveal, entropy = np.moveaxis(probe.read[:, :, :, 2:], -1, 0)
    assert ((reveal >= 0) & (reveal <= earlier) & (earlier <= 1)).all()
    assert ((entropy >= 0) & (entropy <= np.log(3 * 8))).all()  # of at most 3 shots of 8 tokens


@pytest.mark.long
@pytest.mark.parametrize("name", ["dense", "moc 4x1", "own shot"])
def test_what_queries_read_is_what_their_softmax_weighs(encoded, name):
    """With values that name shots, outputs are the shares of each."""
    arm = arm_of(name)
    table = table_of(encoded[1], arm)
    shot, text = table.token_shot[0], table.text_tokens
    q, k = jax.random.normal(jax.random.key(0), (2, 1, len(shot), 2, 16))
    v = jnp.broadcast_to(jax.nn.one_hot(jnp.where(jnp.arange(len(shot)) < text, -1, shot), 16)[None, :, None], q.shape)
    reveals = jnp.array([[-1, -1, 0, 1]])
    out, routes = watched(arm, reveals)(q, k, v, table, arm.moc)
    picks, read = apart(routes[None])
    assert picks.shape[-1] == (1 if name == "moc 4x1" else 0)
    out = np.asarray(out[0]).swapaxes(0, 1)[:, text:]  # [H, V, shot]
    for s, reveal in ((2, 0), (3, 1)):
        mine = np.asarray(shot[text:]) == s
        np.testing.assert_allclose(read[0, 0, :, text:, 0][:, mine], out[:, mine, :s].sum(-1), atol=1e-5)
        np.testing.assert_allclose(read[0, 0, :, text:, 1][:, mine], out[:, mine, reveal], atol=1e-5)
    if name == "own shot":
        assert not read[..., 0].any()


@pytest.mark.parametrize(
    "name",
    [
        "moc 8x6, all captions",
        pytest.param("own shot, all captions", marks=pytest.mark.long),
        pytest.param("dense, all captions", marks=pytest.mark.long),
    ],
)
def test_where_all_captions_are_read_they_read_video(encoded, name):
    arm = arm_of(name)
    table = table_of(encoded[1], arm)
    q, k, v = jax.random.normal(jax.random.key(0), (3, 1, table.chunk_of.shape[1], 2, 16))
    out, _ = arm.attention(q, k, v, table, arm.moc)
    np.testing.assert_allclose(out, RoutedAttention()(q, k, v, table, arm.moc)[0], atol=2e-5)
    assert (arm.moc.text_anchor, arm.moc.mode) == ("all", "dense" if name.startswith("dense") else "moc")


@pytest.mark.parametrize(("name", "chance"), [("moc 4x2", (1 / 2, 1 / 3)), ("moc 4x2, no self anchor", (1 / 4, 1 / 4))])
def test_chance_is_the_share_of_what_may_be_picked(encoded, name, chance):
    """Of 4 shots of equal length, the last two of which recall: one is right, of the earlier ones or of all."""
    data, arm = encoded[1], arm_of(name)
    scene, table = data.scenes(jnp.array([0])), table_of(data, arm)
    found = _by_chance(table, arm.moc, scene, _asked(table, scene, (1, 4, 4)))
    np.testing.assert_allclose(found[0, 2:], chance, rtol=1e-6)


def test_gradients_are_counted_by_the_shots_that_they_reach(encoded):
    """Of a model whose velocity in each shot is a weighted sum of all shots' first latent frames."""
    scene = encoded[1].scenes(jnp.array([0, 1]))
    weights = jax.random.normal(jax.random.key(0), (4, 4))  # of the shot that reads, and the one that is read

    def model(z, *_, **__):
        return jnp.repeat(jnp.einsum("sr,brxyz->bsxyz", weights, z[:, ::2]), 2, axis=1)

    found = _gradients(model, arm_of("dense"), 2, scene, jnp.full((2, 4), 0.5), jax.random.key(1))
    square = np.square(weights)
    for story in range(2):
        for later, shot in enumerate((2, 3)):
            reveal = int(scene.reveals[story, shot])
            earlier = square[shot, :shot].sum() / square[shot].sum()
            np.testing.assert_allclose(found[story, later, 0], earlier, rtol=1e-4)
            np.testing.assert_allclose(found[story, later, 1], square[shot, reveal] / square[shot, :2].sum(), rtol=1e-4)


def test_what_the_own_shot_alone_reads_has_no_right_one():
    """Nothing is divided by nothing there: no warning, and no number."""
    nothing = np.full((1, 1, 1, 3), np.nan)
    gradient = np.array([[[np.nan, np.nan], [np.nan, np.nan], [0.0, np.nan]]])
    shown = Probe(np.ones((1, 3)), np.ones((1, 3)), nothing, nothing[0, 0], np.stack([nothing] * 3, -1), gradient)
    exam = SimpleNamespace(data=None, questions=[SimpleNamespace(row=0, shot=2, reveal=0)])
    found = probed(SimpleNamespace(probe=lambda *_: shown), {}, exam, 0.5)
    assert found["gradient"] == {"to_earlier": 0.0}
    assert not {"read", "into_reveal"} & set(found)


def test_wilsons_interval():
    """Newcombe 1998, table I: 81 of 263 and 15 of 148."""
    np.testing.assert_allclose(interval(81, 263), (0.2553, 0.3662), atol=5e-4)
    for trials in range(1, 100):  # a share lies in its interval, rounding or not
        assert interval(0, trials)[0] == 0
        assert interval(trials, trials)[1] == 1
    np.testing.assert_allclose(interval(15, 148), (0.0624, 0.1605), atol=5e-4)


def test_an_arm_that_keeps_first_frames_keeps_whole_ones():
    """Of 16 tokens, in chunks of any size; and it picks as many chunks as without."""
    for name, sinks in (("moc 8x6, first frame", 2), ("moc 16x3, first frame", 1), ("moc 4x6, first frame", 4)):
        moc = arm_of(name).moc
        assert moc.sink_chunks == sinks
        assert dataclasses.replace(moc, sink_chunks=0) == arm_of(name.split(",")[0]).moc
    assert arm_of("moc 8x6, two descriptors").moc.descriptors == 2
