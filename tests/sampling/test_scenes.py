"""What no machine could sample is refused by name before anything is allocated; what is merely long is packed."""

import dataclasses
import time

import jax
import numpy as np
import pytest

from moc_jax.data.video import write_video
from moc_jax.sampling import scenes
from moc_jax.sampling.scenes import make_request
from moc_jax.sampling.storyboard import StoryboardError
from moc_jax.text import build_text_encoder
from tests.sampling.worlds import CONFIG, canvas_of, make_board


def request(*boards):
    return make_request(boards, canvas_of(CONFIG), CONFIG.sample, build_text_encoder(CONFIG.text))


@pytest.fixture
def nothing_allocated(monkeypatch):
    for name in ("_shot_latents", "_captions", "pack_scene"):
        monkeypatch.setattr(scenes, name, lambda *_: pytest.fail("work began"))


@pytest.mark.usefixtures("nothing_allocated")
class TestRefused:
    def test_days_of_video(self):
        message = r"9,600,040 latent frames, which are 19,200,080 tokens for 1 .*; the limit is 16,777,216: give fewer"
        with pytest.raises(StoryboardError, match=message):
            request(make_board([("a", 80_000.0)] * 40))

    def test_storyboards_that_are_too_long_together(self):
        board = make_board([("a", 80_000.0)])
        with pytest.raises(StoryboardError, match=r"tokens for 40 such scene\(s\).*fewer storyboards"):
            request(*[board] * 40)

    def test_latents_beyond_the_limit(self, monkeypatch):
        monkeypatch.setattr(scenes, "BYTE_LIMIT", 1 << 20)
        with pytest.raises(StoryboardError, match=r"its latents would need .* GiB; the limit is .*: give fewer"):
            request(make_board([("a", 20_000.0)]))

    def test_a_table_of_more_shots_than_fit(self):
        board = make_board([("a", 0.1)] * 100_000)
        with pytest.raises(StoryboardError, match=r"frames and shots would need 9.3 GiB; the limit is 8 GiB"):
            request(board)


def test_text_beyond_the_limit(monkeypatch):
    monkeypatch.setattr(scenes, "BYTE_LIMIT", 1000)
    words = "one two three four five six seven eight nine ten"
    board = make_board([(words, 0.1)] * 5)
    with pytest.raises(StoryboardError, match=r"its text would need .* GiB; the limit is .*shorter captions"):
        request(board)
    with pytest.raises(StoryboardError, match=r"its negative_prompt, once for each shot, would need"):
        request(make_board([("", 0.1)] * 5, negative_prompt=words))


def test_a_given_video_beyond_the_limit(tmp_path, monkeypatch):
    write_video(tmp_path / "a.mp4", np.zeros((9, 16, 32, 3), np.uint8), 12.0)
    monkeypatch.setattr(scenes, "BYTE_LIMIT", 16 * 32 * 3 * 4 * 6)
    shots = [{"caption": "a", "video": str(tmp_path / "a.mp4")}]
    with pytest.raises(StoryboardError, match=r"shots\[0\]: .*a.mp4 has more than 6 frames, which is the limit"):
        request(make_board(shots))
    with pytest.raises(StoryboardError, match=r"shots\[0\]: .*a.mp4 would give 9 frames; the limit at this size is 6"):
        request(make_board([shots[0] | {"seconds": 0.75}]))
    assert request(make_board([shots[0] | {"seconds": 0.4}])).lengths.shot_frames.tolist() == [[2]]


def test_thousands_of_shots_are_packed_at_once():
    board = make_board([("a dog", 0.1)] * 5000)
    assert request(board).lengths.shot_frames.sum() == 5000
    start = time.process_time()
    request(board)  # compiled now
    assert time.process_time() - start < 0.5  # it takes 0.1; with a key at a time 0.9


def test_each_shot_has_its_own_key_or_the_scenes_by_its_place():
    """As JAX makes them one by one, up to the largest seeds."""
    seeds = [None, 0, 2**31, None, 2**32 - 1]
    board = make_board([{"caption": "a", "seconds": 0.1} | ({} if s is None else {"seed": s}) for s in seeds])
    for seed in (0, 2**32 - 1):
        scene = jax.random.key(seed)
        one_by_one = [jax.random.fold_in(scene, k) if s is None else jax.random.key(s) for k, s in enumerate(seeds)]
        made = request(dataclasses.replace(board, seed=seed)).keys
        assert made.dtype == np.uint32
        assert made[0].tolist() == [jax.random.key_data(key).tolist() for key in one_by_one]
