"""Packing: what goes where, and what does not fit."""

import numpy as np
import pytest

from moc_jax.config import BucketConfig, MoCConfig
from moc_jax.data.pack import blank_scene, own_texts, pack_scene, stack_scenes

BUCKET = BucketConfig(shots=3, frames=8, text_tokens=10)


def _parts(frames, words):
    rng = np.random.default_rng(0)
    shots = [rng.standard_normal((n, 2, 3, 4), np.float32) for n in frames]
    return shots, [rng.standard_normal((n, 5), np.float32) for n in words]


def test_layout():
    shots, texts = _parts((3, 2), (2, 1, 4))
    scene = pack_scene(shots, texts, BUCKET)
    np.testing.assert_array_equal(scene.video, np.concatenate([*shots, np.zeros((3, 2, 3, 4))]))
    np.testing.assert_array_equal(scene.text, np.concatenate([*texts, np.zeros((3, 5))]))
    assert scene.lengths.shot_frames.tolist() == [3, 2, 0]
    assert scene.lengths.text_lengths.tolist() == [2, 1, 4, 0]
    assert {scene.video.dtype, scene.text.dtype} == {np.dtype(np.float32)}
    assert scene.lengths.shot_frames.dtype == np.int32


def test_exactly_full():
    scene = pack_scene(*_parts((3, 4, 1), (4, 3, 2, 1)), BUCKET)
    assert scene.lengths.shot_frames.sum() == 8
    assert scene.lengths.text_lengths.sum() == 10


@pytest.mark.parametrize(
    ("frames", "words", "message"),
    [
        ((9,), (1, 1), "clip does not fit its bucket: 9 frames for a bucket of 8"),
        ((1,) * 4, (1,) * 5, "4 shots for a bucket of 3"),
        ((1,), (6, 5), "11 text tokens for a bucket of 10"),
        ((5, 4), (6, 5, 1), "9 frames for a bucket of 8, 12 text tokens for a bucket of 10"),
        ((), (1,), "clip has 0 shots and 1 captions; it needs at least one shot"),
        ((2, 2), (1, 1), "clip has 2 shots and 2 captions"),
    ],
)
def test_what_does_not_fit_is_named(frames, words, message):
    with pytest.raises(ValueError, match=message):
        pack_scene(*_parts(frames, words), BUCKET, name="clip")


def test_a_shot_under_the_caption_that_it_continues_has_no_second_one():
    """Under another caption it has it; and where queries see no other captions than their own, too."""
    shots, texts = _parts((1, 2, 2), (2, 3, 3, 1))
    captions, continues = ("all", "a", "a", "b"), [False, True, True]
    own = own_texts(texts, captions, continues, MoCConfig())
    assert [len(text) for text in own] == [2, 3, 0, 1]
    scene = pack_scene(shots, own, BUCKET, continues=continues)
    assert scene.lengths.text_lengths.tolist() == [2, 3, 0, 1]
    assert scene.lengths.continues.tolist() == continues
    assert pack_scene(shots[:1], texts[:2], BUCKET).lengths.continues.tolist() == [False] * 3
    assert blank_scene(BUCKET, (2, 3, 4), 5).lengths.continues.tolist() == [False] * 3
    again = own_texts(texts, captions, continues, MoCConfig(text_anchor="own+global"))
    assert [len(text) for text in again] == [2, 3, 3, 1]
    assert [len(text) for text in own_texts(texts, ("", "", "", ""), [False, False, True], MoCConfig())] == [2, 3, 3, 0]


def test_batch_and_blank():
    scene = pack_scene(*_parts((3,), (1, 1)), BUCKET)
    batch = stack_scenes([scene, blank_scene(BUCKET, (2, 3, 4), 5)])
    assert batch.video.shape == (2, 8, 2, 3, 4)
    np.testing.assert_array_equal(batch.video[0], scene.video)
    assert not batch.video[1].any()
    assert not batch.text[1].any()
    assert batch.lengths.shot_frames.tolist() == [[3, 0, 0], [0, 0, 0]]
    assert batch.lengths.text_lengths[1].tolist() == [0, 0, 0, 0]
