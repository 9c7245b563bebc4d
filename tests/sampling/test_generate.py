"""From storyboards to frames with a small model of random weights: the same bytes, and nothing from elsewhere."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from moc_jax.codecs import pixels_from_unit, pixels_to_unit
from moc_jax.config import BucketConfig, ConfigError, MeshConfig, PcaConfig
from moc_jax.cuts import chunk_table_from
from moc_jax.data.manifest import SceneEntry, ShotEntry
from moc_jax.data.video import write_video
from moc_jax.sampling.generate import Sampler, SamplingError, _noises
from moc_jax.sampling.picks import routing_shares
from moc_jax.sampling.scenes import make_request, scene_storyboard
from moc_jax.sampling.storyboard import StoryboardError
from moc_jax.scene import GLOBAL, TEXT, VIDEO
from moc_jax.sharding import make_mesh
from moc_jax.signals import Interrupted
from moc_jax.text import build_text_encoder
from tests.diffusion.in_one import sample_scene
from tests.sampling.worlds import (
    BUCKET,
    CONFIG,
    canvas_of,
    make_board,
    make_codec,
    make_params,
    make_sampler,
    run,
    with_moc,
    with_sample,
)

THREE = make_board([("a van", 0.4), ("a dog runs", 0.1), ("night", 0.8)])  # 5, 1 and 9 frames
TWO = make_board([("a boat", 0.7), ("rain", 0.4)], caption="the sea", negative_prompt="sun")
IN_TURN = with_sample(order="shots")


def change(board, index, **fields):
    shots = list(board.shots)
    shots[index] = dataclasses.replace(shots[index], **fields)
    return dataclasses.replace(board, shots=tuple(shots))


def distance(a, b):
    return np.abs(a - b).max()


def make_picture(path, seed=0):
    """A picture that the codec can hold, with no pixel to be clipped, as a file, and its latent."""
    codec, random = make_codec(), np.random.default_rng(seed)
    coarse = np.kron(random.uniform(-0.4, 0.4, (1, 2, 4, 3)), np.ones((1, 8, 8, 1))).astype(np.float32)
    pixels = pixels_from_unit(codec.decode(codec.encode(coarse)))[0]
    Image.fromarray(pixels).save(path)
    return codec.encode(pixels_to_unit(pixels[None]))[0]


def test_frames_have_the_storyboards_durations():
    (sample,) = run(THREE)
    assert [shot.shape for shot in sample.shots] == [(5, 16, 32, 3), (1, 16, 32, 3), (9, 16, 32, 3)]
    assert sample.video.shape == (15, 16, 32, 3)
    assert sample.video.dtype == np.uint8
    assert sample.video.std() > 10  # it is not blank
    np.testing.assert_array_equal(sample.video[6:], sample.shots[2])
    np.testing.assert_array_equal(sample.shots[2], pixels_from_unit(make_codec().decode(sample.latents[2])))


def test_same_seed_same_bytes_and_other_seed_other_bytes():
    (first,), (other,) = run(THREE), run(dataclasses.replace(THREE, seed=6))
    assert first.video.tobytes() == run(THREE)[0].video.tobytes()
    assert first.video.tobytes() != other.video.tobytes()


def test_every_shot_has_noise_of_its_own_seed():
    encoder = build_text_encoder(CONFIG.text)
    keys = lambda board, config=CONFIG: make_request([board], canvas_of(config), config.sample, encoder).keys[0]  # noqa: E731
    assert len({key.tobytes() for key in keys(THREE)}) == 3
    np.testing.assert_array_equal((keys(THREE) == keys(change(THREE, 1, seed=9))).all(axis=-1), [True, False, True])
    reseeded = dataclasses.replace(THREE, seed=6)
    assert (keys(THREE) != keys(reseeded)).any(axis=-1).all()
    np.testing.assert_array_equal(keys(reseeded), keys(THREE, with_sample(seed=6)))
    np.testing.assert_array_equal(keys(reseeded), keys(reseeded, with_sample(seed=1)))  # the storyboard's comes first


@pytest.mark.long
def test_a_batch_equals_its_storyboards_one_by_one():
    """In turn, where the scenes of a batch take different numbers of turns."""
    for board, sample in zip((THREE, TWO), run(THREE, TWO, config=IN_TURN)):
        (alone,) = run(board, config=IN_TURN)
        assert [len(shot) for shot in sample.latents] == [len(shot) for shot in alone.latents]
        assert distance(np.concatenate(sample.latents), np.concatenate(alone.latents)) < 2e-4


@pytest.mark.long
def test_eight_devices_sample_what_one_does():
    boards = [THREE, TWO, *[make_board([(f"shot {n}", 0.4)]) for n in range(6)]]
    with jax.set_mesh(make_mesh(MeshConfig(data=4, fsdp=2))):
        sampler = Sampler(CONFIG, make_codec())
        together = sampler(make_params(), boards, bucket=BUCKET)
        (single,) = sampler(make_params(), [THREE], bucket=BUCKET)  # does not divide over the mesh
    for board, sample in zip([*boards, THREE], [*together, single]):
        (alone,) = run(board)
        assert distance(np.concatenate(sample.latents), np.concatenate(alone.latents)) < 2e-4


def test_one_compilation_for_all_lengths_in_a_bucket():
    sampler, traces = Sampler(CONFIG, make_codec()), []
    velocity = sampler._velocity
    sampler._velocity = lambda *args: traces.append(1) or velocity(*args)
    for board in (THREE, TWO, make_board([("x", 1.0)])):
        (padded,) = sampler(make_params(), [board], bucket=BUCKET)
        assert len(padded.shots) == len(board.shots)
    assert len(traces) == 1


def test_padding_changes_nothing():
    (exact,) = Sampler(CONFIG, make_codec())(make_params(), [THREE])
    (padded,) = run(THREE)
    assert distance(np.concatenate(exact.latents), np.concatenate(padded.latents)) < 2e-4


@pytest.mark.long
def test_settings_reach_the_model():
    base = run(THREE)[0].latents[2]
    unguided = with_sample(guidance=1.0)
    for config in (with_moc(mode="dense"), with_moc(top_k=0), with_sample(solver="dpm++"), unguided):
        assert distance(run(THREE, config=config)[0].latents[2], base) > 1e-4
    negative = dataclasses.replace(THREE, negative_prompt="sun")
    assert distance(run(negative)[0].latents[2], base) > 1e-4
    with pytest.warns(UserWarning, match="no effect"):
        (ignored,) = run(negative, config=unguided)
    np.testing.assert_array_equal(ignored.video, run(THREE, config=unguided)[0].video)


def test_negative_prompt_stands_in_for_every_caption():
    encoder = build_text_encoder(CONFIG.text)
    request = make_request([TWO, THREE], canvas_of(CONFIG), with_sample(negative_prompt="fog, rain").sample, encoder)
    for b, (prompt, captions) in enumerate((("sun", 3), ("fog, rain", 4))):  # the storyboard's comes first
        rows = np.concatenate([encoder(prompt)] * captions)
        np.testing.assert_array_equal(request.negative_text[b, : len(rows)], rows)
        assert (request.negative_text[b, len(rows) :] == 0).all()
        np.testing.assert_array_equal(request.negative_lengths.text_lengths[b, :captions], len(encoder(prompt)))


def test_warnings_of_what_will_not_work_as_hoped():
    data = dataclasses.replace(CONFIG.data, buckets=(BucketConfig(shots=2, frames=5, text_tokens=64),))
    config = dataclasses.replace(with_sample(guidance=1.0), data=data)
    with pytest.warns(UserWarning, match="more than the") as caught:
        run(THREE, config=config)
    messages = "\n".join(str(warning.message) for warning in caught)
    assert "storyboard has 6 latent frames, more than the 5 of the longest training scene" in messages
    assert "storyboard has 3 shots, more than the 2 of the longest training scene" in messages
    with pytest.warns(UserWarning, match="storyboard: negative_prompt has no effect at guidance 1"):
        run(TWO, config=config)


def test_the_storyboard_of_a_training_scene_has_its_durations():
    shots = tuple(ShotEntry(caption=f"shot {n}", frames=n, start=0, continues=False) for n in (1, 7, 3))
    entry = SceneEntry(name="a#0", source="a", split="train", caption="all", shots=shots, shard=0, record=0)
    board = scene_storyboard(entry, stride=CONFIG.codec.stride[0], fps=CONFIG.data.fps)
    request = make_request([board], canvas_of(CONFIG), CONFIG.sample, build_text_encoder(CONFIG.text))
    np.testing.assert_array_equal(request.lengths.shot_frames, [[1, 7, 3]])
    assert (board.caption, [shot.caption for shot in board.shots]) == ("all", ["shot 1", "shot 7", "shot 3"])


@pytest.mark.long
def test_later_shots_change_no_earlier_one_when_the_model_sees_the_past():
    config = dataclasses.replace(with_moc(visibility="past"), sample=IN_TURN.sample)
    (a,), (b,) = run(THREE, config=config), run(change(THREE, 2, caption="a day"), config=config)
    np.testing.assert_array_equal(a.latents[0], b.latents[0])
    np.testing.assert_array_equal(a.latents[1], b.latents[1])
    assert distance(a.latents[2], b.latents[2]) > 1e-4


def test_an_image_is_the_first_frame_of_its_shot(tmp_path):
    latent = make_picture(tmp_path / "first.png")
    shot = {"caption": "a dog runs", "seconds": 0.7, "image": str(tmp_path / "first.png")}
    (sample,), (free,) = run(make_board([("a van", 0.4), shot])), run(make_board([("a van", 0.4), ("a dog runs", 0.7)]))
    np.testing.assert_allclose(sample.latents[1][0], latent, atol=1e-5)
    assert distance(sample.latents[1][1:], free.latents[1][1:]) > 1e-4
    with Image.open(tmp_path / "first.png") as picture:
        assert distance(sample.shots[1][0].astype(int), np.asarray(picture, int)) <= 2


def test_a_reference_picture_steers_but_is_not_shown(tmp_path):
    make_picture(tmp_path / "still.png")
    reference = {"caption": "the van", "image": str(tmp_path / "still.png")}
    (sample,) = run(make_board([reference, ("a van", 0.4)]))
    assert [len(shot) for shot in sample.shots] == [1, 5]
    assert len(sample.video) == 5
    make_picture(tmp_path / "still.png", seed=1)
    (other,) = run(make_board([reference, ("a van", 0.4)]))
    assert distance(sample.latents[1], other.latents[1]) > 1e-4


def test_a_given_video_comes_back_and_is_continued(tmp_path):
    (made,) = run(THREE)
    write_video(tmp_path / "given.mp4", np.concatenate([made.shots[2]] * 2)[:11], 12.0)
    shot = {"caption": "night", "video": str(tmp_path / "given.mp4")}
    (sample,) = run(make_board([shot, ("day", 0.4)]))
    assert [len(s) for s in sample.shots] == [9, 5]  # of 11 frames, 9 can be encoded
    assert len(sample.video) == 14
    (cut,) = run(make_board([shot | {"seconds": 0.4}, ("day", 0.4)]))
    assert [len(s) for s in cut.shots] == [5, 5]
    np.testing.assert_array_equal(cut.latents[0], sample.latents[0][:2])
    with pytest.raises(StoryboardError, match=r"shots\[0\].*has 11 frames at 12 .* seconds = 2 asks for 25"):
        run(make_board([shot | {"seconds": 2}]))


@pytest.mark.parametrize(
    ("board", "message"),
    [
        (make_board([("a", 1), ("b " * 12, 1)]), r"storyboard: shots\[1\].caption: .*13 tokens.*max_tokens is 12"),
        (make_board([("a", 1)], caption="b " * 12), r"storyboard: caption: .*13 tokens"),
        (make_board([("a", 1)], negative_prompt="b " * 12), r"storyboard: negative_prompt: .*13 tokens"),
        (
            make_board([("a", 1), ("b", 0.01)]),
            r"shots\[1\]: seconds = 0.01 is less than a frame at 12 frames per second",
        ),
        (make_board([("a", 3)]), r"storyboard does not fit its bucket: 10 frames for a bucket of 8"),
    ],
    ids=["shot caption", "caption", "negative prompt", "too short", "too long"],
)
def test_impossible_storyboards(board, message):
    with pytest.raises(StoryboardError, match=message):
        run(board)


def test_a_picture_that_is_none(tmp_path):
    (tmp_path / "first.png").write_bytes(b"not a picture")
    board = make_board([{"caption": "a", "seconds": 1, "image": str(tmp_path / "first.png")}])
    with pytest.raises(StoryboardError, match=r"storyboard: shots\[0\]: .*first.png: it cannot be decoded"):
        run(board)


def test_a_codec_of_another_model():
    with pytest.raises(ConfigError, match=r"codec has stride \(4, 8, 8\) and 3 channels, but the model .* 4 channels"):
        Sampler(CONFIG, make_codec(PcaConfig(channels=3)))


def test_nan_is_no_video():
    broken = jax.tree.map(np.copy, make_params())
    jax.tree.leaves(broken)[0][...] = np.nan
    with pytest.raises(SamplingError, match=r"storyboard: .* NaN or infinity in shots\[0\], shots\[1\]: the weights"):
        run(TWO, params=broken)
    huge = jax.tree.map(lambda w: w * np.float32(1e30), make_params())
    with pytest.raises(SamplingError, match=r"the weights do not; try model.dtype float32"):
        run(TWO, params=huge)


def test_too_little_memory_for_the_weights_names_what_needs_less(monkeypatch):
    def hungry(*_):
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 68719476736 bytes."
        )

    monkeypatch.setattr(jax, "device_put", hungry)
    with jax.set_mesh(make_mesh(MeshConfig())), pytest.raises(SamplingError) as caught:
        Sampler(CONFIG, make_codec()).placed(make_params())
    assert str(caught.value).startswith("the devices' memory is too small for the weights: 64 GiB were asked for")
    assert "model.dtype bfloat16 (now float32)" in str(caught.value)


def test_progress_counts_every_call_of_the_model(monkeypatch, capfd):
    monkeypatch.setattr("moc_jax.progress.EVERY", 0.01)
    sampler = Sampler(IN_TURN, make_codec(), progress=True)
    sampler(make_params(), [TWO], bucket=BUCKET)
    shown = capfd.readouterr().err
    assert re.search(r"^sampling: 6 of 6 steps in \d\d:\d\d$", shown, re.MULTILINE)
    assert "\r" not in shown


@pytest.mark.parametrize("causal", [True, False])
def test_routing_shares(causal):
    (sample,) = run(THREE)
    shares = Sampler(with_moc(causal_routing=causal), make_codec()).routing(make_params(), sample)
    assert shares.shape == (2, 3, 3)
    np.testing.assert_allclose(shares.sum(axis=2), [[not causal, 1, 1]] * 2, atol=1e-6)
    assert (np.diagonal(shares, axis1=1, axis2=2) == 0).all()  # the own shot is the anchor
    if causal:
        assert (np.triu(shares) == 0).all()
        np.testing.assert_allclose(shares[:, 1, 0], 1)


def test_picks_are_those_that_the_shares_count():
    (sample,) = run(THREE)
    sampler, params = Sampler(with_moc(causal_routing=True), make_codec()), make_params()
    picks = sampler.picks(params, sample, (0.9, 0.5))
    assert picks.routes.shape[:2] == (2, 2)
    assert picks.routes.shape[3] == np.prod(picks.grid) == picks.length.sum()
    tokens = np.repeat(picks.shot, picks.length)  # chunks are in the video's order
    np.testing.assert_array_equal(picks.start[picks.length > 0], np.cumsum([0, *picks.length[picks.length > 0]])[:-1])
    read = np.where(picks.routes >= 0, picks.shot[picks.routes], -1)[1]  # [depth, H, V, K]
    for shot in range(3):
        of = read[:, :, tokens == shot].reshape(2, -1)
        shares = [(of == other).sum(1) / np.maximum((of >= 0).sum(1), 1) for other in range(3)]
        np.testing.assert_allclose(sampler.routing(params, sample, t=0.5)[:, shot], np.array(shares).T, atol=1e-6)


def test_dense_attention_has_no_routes():
    (sample,) = run(THREE)
    sampler = Sampler(with_moc(mode="dense"), make_codec())
    for show in (sampler.routing, lambda *of: sampler.picks(*of, (0.5,))):
        with pytest.raises(ConfigError, match="nothing is routed"):
            show(make_params(), sample)


def test_routing_shares_count_picks_by_shot():
    kinds, shots = [TEXT, VIDEO, VIDEO, TEXT, VIDEO, VIDEO], [GLOBAL, 0, 0, 1, 1, 2]
    lengths = np.array([[2, 2, 1, 1, 2, 1]])  # and a token each of text and video that is padding
    table, _ = chunk_table_from(lengths, np.array(kinds), np.array(shots), tokens=11, text_tokens=4)
    first, second, third = 1, 2, 4  # video chunks: shot 0 has two, shot 1 one, shot 2 one
    picks = [[-1, -1], [-1, -1], [second, -1], [first, -1], [first, second], [third, first], [third, third]]
    routes = jnp.array([[[picks, picks]]])  # one layer, one scene, two heads
    want = np.array([[1, 0, 0], [1, 0, 0], [0.5, 0.5, 0]])
    np.testing.assert_allclose(routing_shares(routes, table, 3), want[None, None])


# ------------------------------------------------------------------------------------------------ call by call


class StopAfter:
    """Asks to stop at the last of so many questions."""

    def __init__(self, calls):
        self.left = calls

    def check(self):
        self.left -= 1
        if not self.left:
            raise Interrupted

    def unless_asked(self, action):
        return action()


def test_sampling_stops_between_two_calls_of_the_model(monkeypatch):
    sampler, called = make_sampler(IN_TURN), []
    program = sampler._program
    monkeypatch.setattr(sampler, "_program", lambda name, *args: called.append(name) or program(name, *args))
    monkeypatch.setattr(sampler, "_stop", StopAfter(5))  # of 6: two turns of three calls
    with pytest.raises(Interrupted):
        sampler(make_params(), [TWO], bucket=BUCKET)
    assert called == ["begin", "call", "call", "call", "end", "call"]


def test_a_compilation_is_left_when_stop_is_asked():
    stop = StopAfter(0)
    stop.unless_asked = lambda action: StopAfter(1).check()
    sampler = Sampler(CONFIG, make_codec(), None, stop)
    with pytest.raises(Interrupted):
        sampler(make_params(), [TWO], bucket=BUCKET)


@pytest.mark.long
def test_call_by_call_is_the_same_as_in_one_program():
    config = with_sample(order="shots", solver="heun")
    sampler = Sampler(config, make_codec())
    request = make_request([THREE, TWO], canvas_of(config), config.sample, build_text_encoder(config.text), BUCKET)

    @jax.jit
    def whole(params, request):
        velocity_fn = sampler._velocity(config.moc, params, request)
        return sample_scene(velocity_fn, *_noises(request), request.known, request.lengths, config.sample)

    np.testing.assert_allclose(
        sampler._run(make_params(), request), whole(make_params(), jax.tree.map(jnp.asarray, request)), atol=2e-5
    )


def test_no_program_of_sampling_calls_back_into_python():
    """Such a program is never kept, and would be compiled at every start."""
    run(TWO)
    programs = make_sampler(CONFIG)._programs
    assert {name for name, *_ in programs} == {"begin", "call", "end"}
    assert not any("callback" in program.as_text() for program in programs.values())
