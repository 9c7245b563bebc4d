"""What no machine could sample is refused by name before anything is allocated; what is merely long is packed."""

import dataclasses

import jax
import numpy as np
import pytest
from PIL import Image

from moc_jax.data.video import write_video
from moc_jax.sampling import scenes
from moc_jax.sampling.scenes import make_request
from moc_jax.sampling.storyboard import StoryboardError, parse_storyboard
from moc_jax.text import build_text_encoder
from tests.sampling.worlds import CONFIG, canvas_of, make_board, run, with_sample


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


def test_thousands_of_shots_get_their_keys_at_once(monkeypatch):
    made, key = [], jax.random.key
    monkeypatch.setattr("jax.random.key", lambda seed: made.append(seed) or key(seed))
    assert request(make_board([("a dog", 0.1)] * 5000)).lengths.shot_frames.sum() == 5000
    assert len(made) == 2  # the scene's, and all others together


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


class TestFirstFrames:
    """How a model is shown what is given of a video."""

    @pytest.fixture
    def board(self, tmp_path):
        picture = np.random.default_rng(0).integers(0, 255, (16, 32, 3), np.uint8)
        Image.fromarray(picture).save(tmp_path / "a.png")
        write_video(tmp_path / "a.mp4", np.repeat(picture[None], 5, axis=0), 12.0)
        shots = [
            {"caption": "a", "seconds": 0.7, "image": "a.png"},
            {"caption": "b", "video": "a.mp4"},
            {"caption": "c", "seconds": 0.4},
        ]
        return parse_storyboard({"caption": "a street", "shots": shots}, folder=tmp_path)

    def test_as_channels(self, board):
        """Latents of 3, 2 and 2 frames; a mask of 4 channels and 4 of latents."""
        canvas = dataclasses.replace(canvas_of(CONFIG), condition_channels=8)
        made = make_request([board], canvas, CONFIG.sample, build_text_encoder(CONFIG.text))
        mask, latents = made.condition[0, ..., :4], made.condition[0, ..., 4:]
        np.testing.assert_array_equal(mask.all(axis=(1, 2, 3)), [1, 0, 0, 1, 1, 0, 0])
        np.testing.assert_array_equal(mask.any(axis=(1, 2, 3)), [1, 0, 0, 1, 1, 0, 0])
        assert not made.known.first_frames.any()  # they are made again
        assert made.known.shots.tolist() == [[False, True, False]]
        with Image.open(board.shots[0].image) as file:
            video = np.zeros((9, 16, 32, 3), np.float32)
            video[0] = np.asarray(file, np.float32) / 127.5 - 1
        np.testing.assert_allclose(latents[:3], canvas.codec.encode(video), atol=1e-6)
        np.testing.assert_array_equal(latents[3:5], made.known.video[0, 3:5])
        assert not latents[5:].any()
        with pytest.raises(StoryboardError, match="these weights animate pictures, but no shot has an `image` or"):
            make_request([make_board([("a", 0.4)])], canvas, CONFIG.sample, build_text_encoder(CONFIG.text))

    def test_clean(self, board):
        sample = dataclasses.replace(CONFIG.sample, first_frames="clean")
        made = make_request([board], canvas_of(CONFIG), sample, build_text_encoder(CONFIG.text))
        for lengths in (made.lengths, made.negative_lengths):
            assert lengths.clean_first.tolist() == [[True, False, False]]
        assert made.condition is None

    def test_a_clean_one_comes_out_as_it_went_in(self, board):
        """With every solver's step in between; other frames do not."""
        config = with_sample(first_frames="clean")
        (made,) = run(board, config=config)
        given = make_request([board], canvas_of(config), config.sample, build_text_encoder(config.text)).known.video[0]
        np.testing.assert_array_equal(made.latents[0][0], given[0])
        assert (made.latents[0][1] != 0).all()
