"""Scenes become chunks and positions exactly as a plain loop over shots makes them."""

import dataclasses
import itertools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from moc_jax.config import ChunkConfig
from moc_jax.scene import (
    GLOBAL,
    NO_SHOT,
    PAD,
    TEXT,
    VIDEO,
    ChunkTable,
    SceneLengths,
    SceneShape,
    chunk_table,
    frame_shot,
    max_chunks,
    max_video_chunks,
    positions,
)

SHAPE = SceneShape(shots=4, frames=11, rows=2, columns=3, text_tokens=9)
CHUNKS = [ChunkConfig(unit=u, size=n, remainder=r) for u, n in [("frames", 3), ("tokens", 7)] for r in ("even", "tail")]

cut_compiled = jax.jit(chunk_table, static_argnames=("shape", "chunk"))
positions_compiled = jax.jit(positions, static_argnames="shape")


def lengths_of(*scenes) -> SceneLengths:
    """Scenes given as (frames of each shot, tokens of each caption)."""
    return SceneLengths(*(jnp.asarray(x, jnp.int32) for x in zip(*scenes)))


def partitions(total: int, parts: int):
    """Lists of `parts` numbers from 0 that add up to at most `total`."""
    ends = st.lists(st.integers(0, total), min_size=parts, max_size=parts)
    return ends.map(lambda x: np.diff([0, *sorted(x)]).tolist())


any_scene = st.tuples(partitions(SHAPE.frames, SHAPE.shots), partitions(SHAPE.text_tokens, SHAPE.shots + 1))


def cut_by_hand(shot_frames, text_lengths, shape, chunk):
    """The rows (kind, shot, start, length) of a scene's chunks, without padding."""
    rows, text, video = [(TEXT, GLOBAL, 0, text_lengths[0])], text_lengths[0], shape.text_tokens
    frame = shape.rows * shape.columns
    unit = frame if chunk.unit == "frames" else 1
    for shot, (frames, caption) in enumerate(zip(shot_frames, text_lengths[1:])):
        if frames or caption:
            rows.append((TEXT, shot, text, caption))
        text, left = text + caption, frames * frame // unit
        parts = -(-left // chunk.size)
        while left:
            size = min(chunk.size, left) if chunk.remainder == "tail" else -(-left // parts)
            rows.append((VIDEO, shot, video, size * unit))
            video, left, parts = video + size * unit, left - size, parts - 1
    return rows


def assert_table(table: ChunkTable, b: int, rows, tokens: int):
    """Scene b of the table holds these rows, then padding; and every token knows its chunk, kind and shot."""
    got = np.stack([table.kind[b], table.shot[b], table.start[b], table.length[b]], axis=-1)
    padding = [(PAD, NO_SHOT, 0, 0)] * (len(got) - len(rows))
    np.testing.assert_array_equal(got, rows + padding)
    of_token = np.tile([-1, PAD, NO_SHOT], (tokens, 1))
    for c, (kind, shot, start, length) in enumerate(rows):
        of_token[start : start + length] = c, kind, shot
    np.testing.assert_array_equal(
        np.stack([table.chunk_of[b], table.token_kind[b], table.token_shot[b]], axis=-1), of_token
    )
    np.testing.assert_array_equal(table.valid[b], of_token[:, 0] >= 0)


# ------------------------------------------------------------------------------------------------ chunks


@pytest.mark.parametrize("chunk", CHUNKS, ids=lambda c: f"{c.unit}-{c.remainder}")
@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@given(one=any_scene, other=any_scene)
@example(one=([11, 0, 0, 0], [9, 0, 0, 0, 0]), other=([0, 0, 0, 0], [0, 0, 0, 0, 0]))
@example(one=([0, 4, 0, 7], [0, 2, 0, 3, 1]), other=([1, 1, 1, 8], [1, 0, 0, 0, 8]))
def test_chunks_are_those_of_a_plain_loop(chunk, one, other):
    table = cut_compiled(lengths_of(one, other), SHAPE, chunk)
    for b, scene in enumerate((one, other)):
        rows = cut_by_hand(*scene, SHAPE, chunk)
        assert_table(table, b, rows, SHAPE.tokens)
        assert all(length <= table.max_chunk for kind, _, _, length in rows if kind == VIDEO)
    assert table.kind.shape[1] == max_chunks(SHAPE, chunk)
    assert table.text_tokens == SHAPE.text_tokens


def test_chunks_by_hand():
    """Two shots of 5 and 2 frames of 6 tokens, one empty between them; captions of 2, 1, 0 and 3 tokens."""
    lengths = lengths_of(([5, 0, 2, 0], [2, 1, 0, 3, 0]))
    text = [(TEXT, GLOBAL, 0, 2), (TEXT, 0, 2, 1), (TEXT, 2, 3, 3)]
    frames = {
        "even": [[(VIDEO, 0, 9, 18), (VIDEO, 0, 27, 12)], [(VIDEO, 2, 39, 12)]],
        "tail": [[(VIDEO, 0, 9, 18), (VIDEO, 0, 27, 12)], [(VIDEO, 2, 39, 12)]],
    }
    tokens = {
        "even": [[(VIDEO, 0, 9, 15), (VIDEO, 0, 24, 15)], [(VIDEO, 2, 39, 12)]],
        "tail": [[(VIDEO, 0, 9, 16), (VIDEO, 0, 25, 14)], [(VIDEO, 2, 39, 12)]],
    }
    for unit, size, want in [("frames", 3, frames), ("tokens", 16, tokens)]:
        for remainder, (first, last) in want.items():
            chunk = ChunkConfig(unit=unit, size=size, remainder=remainder)
            table = cut_compiled(lengths, SHAPE, chunk)
            assert_table(table, 0, [*text[:2], *first, text[2], *last], SHAPE.tokens)


def test_even_parts_differ_by_one_at_most():
    shape = SceneShape(shots=1, frames=100, rows=1, columns=1, text_tokens=0)
    for chunk in (ChunkConfig(size=7), ChunkConfig(size=49), ChunkConfig(size=99), ChunkConfig(size=500)):
        table = cut_compiled(lengths_of(([100], [0, 0])), shape, chunk)
        sizes = np.asarray(table.length)[np.asarray(table.kind) == VIDEO]
        assert len(sizes) == -(-100 // chunk.size)
        assert sizes.sum() == 100
        assert np.ptp(sizes) <= 1
        assert table.max_chunk == min(chunk.size, 100)


def test_scenes_of_any_lengths_share_one_compilation():
    traces = []

    @jax.jit
    def run(lengths):
        traces.append(1)
        table = chunk_table(lengths, SHAPE, CHUNKS[0])
        return table, positions(lengths, SHAPE), table.token_shot

    scenes = [([5, 0, 2, 0], [2, 1, 0, 3, 0]), ([1, 2, 3, 4], [1, 1, 1, 1, 1]), ([11, 0, 0, 0], [0, 0, 0, 0, 0])]
    for scene in scenes:
        table, _, _ = run(lengths_of(scene))
        assert_table(table, 0, cut_by_hand(*scene, SHAPE, CHUNKS[0]), SHAPE.tokens)
    assert len(traces) == 1


@pytest.mark.parametrize("unit", ["frames", "tokens"])
def test_bound_on_chunks_is_reached_and_never_passed(unit):
    """Over all ways to fill up to eight frames of two tokens with up to three shots."""
    for shots, frames, size in itertools.product((1, 2, 3), range(1, 9), (1, 2, 3, 5, 40)):
        shape = SceneShape(shots=shots, frames=frames, rows=1, columns=2, text_tokens=4)
        chunk = ChunkConfig(unit=unit, size=size)
        per_frame = 1 if unit == "frames" else 2
        most = max(
            sum(-(-n * per_frame // size) for n in scene)
            for scene in itertools.product(range(frames + 1), repeat=shots)
            if sum(scene) <= frames
        )
        assert most <= max_video_chunks(shape, chunk), (shots, frames, size)
        assert max_chunks(shape, chunk) == 1 + shots + max_video_chunks(shape, chunk)
        if unit == "frames":
            assert most == max_video_chunks(shape, chunk), (shots, frames, size)


def test_lengths_must_fit_the_shape():
    with pytest.raises(ValueError, match=r"3 shots and 4 captions.*4 shots and needs 5"):
        chunk_table(lengths_of(([1, 1, 1], [0, 0, 0, 0])), SHAPE, CHUNKS[0])
    with pytest.raises(ValueError, match=r"4 shots and 4 captions.*needs 5"):
        chunk_table(lengths_of(([1, 1, 1, 1], [0, 0, 0, 0])), SHAPE, CHUNKS[0])


@pytest.mark.parametrize(
    ("frames", "text", "error", "message"),
    [
        ([[3, 3, 3, 3]], [[0] * 5], ValueError, r"shot_frames of scene 0 are \[3, 3, 3, 3\], 12 frames .*at most 11"),
        ([[2**31 - 1, 1, 1, 1]], [[0] * 5], ValueError, "2147483650 frames in all"),
        ([[0] * 4] * 2, [[0] * 5, [5, 0, 5, 0, 0]], ValueError, "text_lengths of scene 1 .*10 tokens .*at most 9"),
        ([[4, -1, 4, 0]], [[0] * 5], ValueError, r"shot_frames of scene 0 are \[4, -1, 4, 0\]; a length is 0 or more"),
        ([[1.5, 1, 1, 1]], [[0] * 5], TypeError, "shot_frames is an array of float.*integers"),
        ([1, 1, 1, 1], [[0] * 5], ValueError, r"shot_frames has shape \(4,\) and text_lengths \(1, 5\)"),
        ([[1] * 4] * 2, [[0] * 5], ValueError, "of as many scenes"),
    ],
)
def test_lengths_beyond_the_shape_are_refused(frames, text, error, message):
    lengths = SceneLengths(np.array(frames), np.array(text))
    for function in (lambda: chunk_table(lengths, SHAPE, CHUNKS[0]), lambda: positions(lengths, SHAPE)):
        with pytest.raises(error, match=message):
            function()


def test_lists_are_no_lengths():
    with pytest.raises(TypeError, match="shot_frames is a list; give an array"):
        chunk_table(SceneLengths([[1, 1, 1, 1]], [[0] * 5]), SHAPE, CHUNKS[0])
    with pytest.raises(TypeError, match="lengths is a tuple; give SceneLengths"):
        positions(([1], [0, 0]), SHAPE)
    with pytest.raises(ValueError, match=r"12 frames in all.*at most 11"):
        frame_shot(jnp.array([[6, 6]]), 11)


# ------------------------------------------------------------------------------------------------ positions


def positions_by_hand(shot_frames, text_lengths, shape):
    """Positions of the text tokens, then of the video tokens, of one scene; without padding."""
    at, text, video = 0, [], []
    for frames, caption in zip([0, *shot_frames], text_lengths):
        text += [(at + i,) * 3 for i in range(caption)]
        at += caption
        extent = range(frames), range(shape.rows), range(shape.columns)
        video += [(at + t, at + y, at + x) for t, y, x in itertools.product(*extent)]
        at += max(frames, shape.rows, shape.columns) if frames else 0
    return text, video


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@given(one=any_scene, other=any_scene)
@example(one=([11, 0, 0, 0], [9, 0, 0, 0, 0]), other=([0, 4, 0, 7], [0, 2, 0, 3, 1]))
def test_positions_follow_the_diagonal_and_are_distinct(one, other):
    got = np.asarray(positions_compiled(lengths_of(one, other), SHAPE))
    for b, scene in enumerate((one, other)):
        text, video = positions_by_hand(*scene, SHAPE)
        np.testing.assert_array_equal(got[b, : len(text)], np.reshape(text, (-1, 3)))
        np.testing.assert_array_equal(got[b, SHAPE.text_tokens :][: len(video)], np.reshape(video, (-1, 3)))
        assert len({*text, *video}) == len(text) + len(video)


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@given(scene=any_scene, continues=st.lists(st.booleans(), min_size=SHAPE.shots, max_size=SHAPE.shots))
@example(scene=([2, 3, 1, 0], [1, 2, 0, 0, 0]), continues=[False, True, True, False])
@example(scene=([2, 0, 1, 2], [1, 2, 0, 0, 0]), continues=[False, True, False, True])
def test_a_shot_that_continues_another_runs_on_where_it_has_no_caption(scene, continues):
    shot_frames, text_lengths = scene
    lengths = dataclasses.replace(lengths_of(scene), continues=jnp.asarray([continues]))
    got = np.asarray(positions_compiled(lengths, SHAPE))[0]
    tokens = sum(shot_frames) * SHAPE.rows * SHAPE.columns
    assert len(np.unique(got[: sum(text_lengths)], axis=0)) == sum(text_lengths)
    video = got[SHAPE.text_tokens :][:tokens].reshape(-1, SHAPE.rows * SHAPE.columns, 3)
    assert len(np.unique(np.concatenate([got[: sum(text_lengths)], video.reshape(-1, 3)]), axis=0)) == (
        sum(text_lengths) + tokens
    )
    starts = np.cumsum([0, *shot_frames])
    for shot in range(1, SHAPE.shots):
        alone = text_lengths[1 + shot] == 0 and shot_frames[shot] and shot_frames[shot - 1]
        if continues[shot] and alone:
            last, first = video[starts[shot] - 1, 0], video[starts[shot], 0]
            assert first[0] == last[0] + 1
    plain = dataclasses.replace(lengths, continues=jnp.zeros((1, SHAPE.shots), bool))
    np.testing.assert_array_equal(positions_compiled(plain, SHAPE), positions_compiled(lengths_of(scene), SHAPE))


def test_a_single_shot_is_the_single_shot_model():
    """Text counts up, and the video's block starts where it ends: no trace of the shots that are not there."""
    alone = SceneShape(shots=1, frames=5, rows=2, columns=3, text_tokens=4)
    short = positions_compiled(lengths_of(([5], [1, 3])), alone)[0]
    long = positions_compiled(lengths_of(([5, 0, 0, 0], [1, 3, 0, 0, 0])), SHAPE)[0]
    np.testing.assert_array_equal(short[:4], np.repeat(np.arange(4), 3).reshape(4, 3))
    np.testing.assert_array_equal(short[4:], 4 + np.stack(np.indices((5, 2, 3)), axis=-1).reshape(-1, 3))
    np.testing.assert_array_equal(long[:4], short[:4])
    np.testing.assert_array_equal(long[SHAPE.text_tokens :][:30], short[4:])


def test_later_shots_do_not_move_earlier_ones():
    """Positions of a shot depend on what precedes it alone, so a scene can be continued shot by shot."""
    first = positions_compiled(lengths_of(([3, 4, 0, 0], [1, 2, 2, 0, 0])), SHAPE)[0]
    longer = positions_compiled(lengths_of(([3, 4, 2, 2], [1, 2, 2, 1, 3])), SHAPE)[0]
    np.testing.assert_array_equal(first[:5], longer[:5])
    np.testing.assert_array_equal(first[SHAPE.text_tokens :][:42], longer[SHAPE.text_tokens :][:42])


# ------------------------------------------------------------------------------------------------ frames


@hypothesis.settings(max_examples=40, deadline=None, derandomize=True)
@given(shot_frames=partitions(SHAPE.frames, SHAPE.shots))
def test_frame_shot(shot_frames):
    want = [shot for shot, n in enumerate(shot_frames) for _ in range(n)]
    want += [NO_SHOT] * (SHAPE.frames - len(want))
    got = frame_shot(jnp.asarray([shot_frames, shot_frames[::-1]]), SHAPE.frames)
    np.testing.assert_array_equal(got[0], want)
    assert got.shape == (2, SHAPE.frames)
