"""Chunks cut by hand: where their tokens lie in memory, and in which order."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from moc_jax import chunk_table_from
from moc_jax.scene import GLOBAL, NO_SHOT, PAD, TEXT, VIDEO
from tests.test_scene import CHUNKS, SHAPE, any_scene, assert_table, cut_compiled, lengths_of

T, V, P = TEXT, VIDEO, PAD
# Tokens of a caption that stands within its shot, of padding, of captions of both shots, and of a prompt at the end.
KINDS = [V, T, V, P, T, T, V, V, P, T]
SHOTS = [0, 0, 0, 9, 1, 0, 1, 1, 9, GLOBAL]
LENGTHS = [3, 2, 4, 1, 2, 1, 5, 3, 2, 2]


def arrays(*lists):
    return [np.array(x) for x in lists]


def test_text_lies_first_by_shots_then_video_as_it_comes():
    table, order = chunk_table_from(*arrays([LENGTHS], KINDS, SHOTS), tokens=30, text_tokens=9)
    rows = [
        *[(V, 0, 9, 3), (T, GLOBAL, 0, 2), (V, 0, 12, 4), (P, NO_SHOT, 0, 0), (T, 0, 2, 2), (T, 0, 4, 1)],
        *[(V, 1, 16, 5), (V, 1, 21, 3), (P, NO_SHOT, 0, 0), (T, 1, 5, 2)],
    ]
    assert_table(table, 0, rows, 30)
    text = [23, 24, 3, 4, 12, 10, 11]  # the prompt, shot 0's captions, shot 1's
    video = [0, 1, 2, 5, 6, 7, 8, *range(13, 21)]
    assert order[0].tolist() == [*text, 9, 21, *video, 22, *range(25, 30)]
    assert (table.text_tokens, table.max_chunk, table.max_shots, table.chunk) == (9, 5, 3, None)


compiled = jax.jit(chunk_table_from, static_argnames=("tokens", "text_tokens", "max_chunk", "max_shots"))


@pytest.mark.parametrize("chunk", CHUNKS, ids=lambda c: f"{c.unit}-{c.remainder}")
@hypothesis.settings(max_examples=20, deadline=None, derandomize=True)
@given(one=any_scene, other=any_scene)
@example(one=([11, 0, 0, 0], [9, 0, 0, 0, 0]), other=([0, 4, 0, 7], [0, 2, 0, 3, 1]))
def test_the_cuts_of_a_config_give_its_table(chunk, one, other):
    want = cut_compiled(lengths_of(one, other), SHAPE, chunk)
    sizes = {"text_tokens": SHAPE.text_tokens, "max_chunk": want.max_chunk, "max_shots": want.max_shots}
    got, order = compiled(want.length, want.kind, want.shot, tokens=SHAPE.tokens, **sizes)
    for name in ("kind", "shot", "start", "length", "chunk_of"):
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name), name)
    assert {name: getattr(got, name) for name in sizes} == sizes
    assert_moves_each_chunk(got, order, *map(np.asarray, (want.length, want.kind)))


def assert_moves_each_chunk(table, order, lengths, kinds):
    """`order` is a permutation that lays each chunk in one piece, video where the row of its number says."""
    np.testing.assert_array_equal(np.sort(order, axis=1), np.broadcast_to(np.arange(order.shape[1]), order.shape))
    lies = np.argsort(order, axis=1)  # where each token went
    ends = np.cumsum(lengths, axis=1)
    for b, c in np.argwhere((lengths > 0) & (kinds != P)):
        places = lies[b, ends[b, c] - lengths[b, c] : ends[b, c]]
        np.testing.assert_array_equal(places, places[0] + np.arange(lengths[b, c]))
        row = table.chunk_of[b, places[0]]
        assert row == c or kinds[b, c] == T
        assert (table.start[b, row], table.length[b, row], table.kind[b, row]) == (places[0], len(places), kinds[b, c])


any_chunk = st.tuples(st.integers(0, 6), st.sampled_from([P, T, V]), st.integers(0, 2))
any_cuts = st.lists(any_chunk, min_size=8, max_size=8)


@hypothesis.settings(max_examples=30, deadline=None, derandomize=True)
@given(one=any_cuts, other=any_cuts)
def test_any_cuts_are_laid_out(one, other):
    lengths, kinds, steps = np.moveaxis(np.array([one, other]), 2, 0)
    shots = np.cumsum(steps, axis=1)  # rising, as video's must
    table, order = chunk_table_from(lengths, kinds, shots, tokens=96)
    assert_moves_each_chunk(table, order, lengths, kinds)
    used = np.where(kinds == P, 0, lengths)
    np.testing.assert_array_equal(table.valid.sum(axis=1), used.sum(axis=1))
    np.testing.assert_array_equal(np.where(kinds == V, table.length, 0), np.where(kinds == V, used, 0))
    for kind in (T, V):
        taken = [np.flatnonzero(row == kind) for row in np.asarray(table.token_kind)]
        assert [len(x) for x in taken] == (lengths * (kinds == kind)).sum(axis=1).tolist()
        if kind == T:
            assert all((x < table.text_tokens).all() for x in taken)
        shot = np.asarray(table.token_shot)
        assert all((np.diff(shot[b, x]) >= 0).all() for b, x in enumerate(taken))


def test_without_kinds_and_shots_each_chunk_is_a_shot_of_video():
    table, order = chunk_table_from(np.array([[4, 4, 2], [1, 0, 3]]))
    assert (table.text_tokens, table.max_chunk, table.max_shots) == (0, 4, 3)
    np.testing.assert_array_equal(table.kind, [[V, V, V], [V, P, V]])
    np.testing.assert_array_equal(table.shot, [[0, 1, 2], [0, NO_SHOT, 1]])
    np.testing.assert_array_equal(order, [range(10)] * 2)
    np.testing.assert_array_equal(table.chunk_of[1], [0, 2, 2, 2] + [-1] * 6)


def test_a_shot_that_text_interrupts_counts_for_each_part():
    """They have anchors of their own to walk."""
    table, _ = chunk_table_from(*arrays([[4] * 5], [V, T, V, V, V], [0, 0, 0, 0, 2]))
    assert table.max_shots == 3


def test_tables_of_other_lengths_share_a_program():
    traces = []

    @jax.jit
    def run(lengths):
        traces.append(1)
        table, order = chunk_table_from(
            lengths, *(jnp.array(x) for x in (KINDS, SHOTS)), tokens=30, text_tokens=9, max_chunk=6
        )
        return table.start, table.chunk_of, order

    for lengths in ([LENGTHS], [[6, *LENGTHS[1:]]], [[0] * 10]):
        table, order = chunk_table_from(*arrays(lengths, KINDS, SHOTS), tokens=30, text_tokens=9)
        for got, want in zip(run(jnp.array(lengths)), (table.start, table.chunk_of, order)):
            np.testing.assert_array_equal(got, want)
    assert len(traces) == 1
    with pytest.raises(ValueError, match=r"inside jit the lengths are not known: give text_tokens, max_chunk too"):
        jax.eval_shape(lambda x: chunk_table_from(x, tokens=30), jnp.array([LENGTHS]))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"lengths": [[1]]}, TypeError, "lengths is a list; give an array"),
        ({"lengths": np.array([[1.5]])}, TypeError, "lengths is an array of float64; it must hold integers"),
        ({"lengths": np.array([1, 2])}, ValueError, r"lengths has shape \(2,\); it must be \[scenes, chunks\]"),
        ({"kinds": np.array([V])}, ValueError, r"kinds has shape \(1,\); .* that of lengths, \(1, 10\), or \(10,\)"),
        ({"lengths": -np.array([LENGTHS])}, ValueError, "chunk 0 of scene 0 has length -3, .*a length is 0 or more"),
        ({"kinds": np.array([7] * 10)}, ValueError, "has length 3, kind 7 .*a kind is PAD .0., TEXT .1. or VIDEO .2."),
        ({"shots": np.array([-1] * 10)}, ValueError, "shot -1: video has a shot, from 0"),
        (
            {"shots": np.array([0, -2, *[0] * 8])},
            ValueError,
            "chunk 1 of scene 0 .*text has a shot, from 0, or is GLOBAL",
        ),
        ({"shots": np.array([1, *[0] * 9])}, ValueError, "chunk 2 of scene 0 .*it comes after video of a later shot"),
        ({"tokens": 24}, ValueError, "scene 0 has 25 tokens but tokens is 24; give 25 or more"),
        ({"text_tokens": 6}, ValueError, "scene 0 has 7 tokens of text but text_tokens is 6"),
        ({"max_chunk": 4}, ValueError, "scene 0 has 5 tokens in a video chunk but max_chunk is 4"),
        ({"max_shots": 2}, ValueError, "scene 0 has 3 shots .or parts .* but max_shots is 2"),
        ({"tokens": 25, "text_tokens": 11}, ValueError, r"scene 0 does not fit.*pad q, k and v to 26 tokens .*now 25"),
    ],
)
def test_what_cannot_be_is_named(changes, error, message):
    lengths, kinds, shots = arrays([LENGTHS], KINDS, SHOTS)
    with pytest.raises(error, match=message):
        chunk_table_from(**({"lengths": lengths, "kinds": kinds, "shots": shots} | changes))


def test_scenes_of_much_text_and_of_much_video_need_more_places_than_either_has():
    lengths, kinds = arrays([[9, 1], [1, 9]], [T, V])
    with pytest.raises(ValueError, match=r"scene 1 does not fit, as text takes 9 places .* to 18 tokens or more"):
        chunk_table_from(lengths, kinds)
    table, order = chunk_table_from(lengths, kinds, tokens=18)
    assert_moves_each_chunk(table, order, lengths, np.array([kinds] * 2))
