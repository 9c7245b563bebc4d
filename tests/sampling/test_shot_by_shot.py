"""Generations: shot by shot in a folder, what each shot is shown, and what a kill, an extension or a redo leaves."""

import dataclasses
import errno
import gc
import json
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from moc_jax.commands.shots import held
from moc_jax.config import BucketConfig
from moc_jax.data.video import VideoError, join_videos, read_video, write_video
from moc_jax.provenance import read_provenance
from moc_jax.sampling.generate import Sampler
from moc_jax.sampling.generation import Done, GenerationError, begin, check_same, is_generation, resume
from moc_jax.sampling.retrieval import chosen, score
from moc_jax.sampling.shot_by_shot import sample_shots
from moc_jax.sampling.storyboard import Shot, StoryboardError, parse_storyboard
from moc_jax.training.lock import LockError
from tests.sampling.worlds import CONFIG, make_board, make_codec, make_params

WEIGHTS = "ab" * 32
TWO = make_board([("a van", 0.4), ("night", 0.1)])
MORE = make_board([("a van again", 0.4), ("day", 0.1), ("a van", 0.4)], caption="later")


def config_with(retrieve=2, **moc):
    moc = dataclasses.replace(CONFIG.moc, **{"visibility": "past", **moc})
    return dataclasses.replace(
        CONFIG, moc=moc, sample=dataclasses.replace(CONFIG.sample, retrieve_shots=retrieve, steps=2, order="shots")
    )


@pytest.fixture(scope="module")
def sampler():
    return Sampler(config_with(), make_codec())


def new(folder, *boards, config=None):
    generation = begin(folder, config or config_with(), checkpoint="out/run", weights=WEIGHTS, step=3)
    for board in boards:
        generation.extend(board)
    return generation


def run(generation, sampler, say=lambda line: None):
    return dict(sample_shots(generation, sampler, make_params(), say))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, sampler):
    """A generation of two storyboards, and the lines that it said."""
    generation, lines = new(tmp_path_factory.mktemp("whole") / "run", TWO, MORE), []
    frames = run(generation, sampler, lines.append)
    return generation, frames, lines


def test_each_shot_is_a_file_and_says_what_made_it(whole):
    generation, frames, lines = whole
    assert list(frames) == [0, 1, 2, 3, 4]
    for shot, of_shot in frames.items():
        path = generation.file(shot, "mp4")
        assert path.name == f"{shot + 1:04}.mp4"
        assert len(read_video(path, 16, 32, 12.0)) == len(of_shot)
        made = read_provenance(path)
        assert (made.weights, made.step, made.partly_given) == (WEIGHTS, 3, False)
    assert lines[0].startswith("shot 1 of 5: shown no other; ")
    assert lines[1].startswith("shot 2 of 5: shown shot 1; ")
    assert [len(generation.done(shot).read) for shot in range(5)] == [0, 1, 2, 2, 2]


@pytest.mark.long
def test_a_shot_is_that_of_the_scene_of_what_it_was_shown(whole, sampler):
    """M + 1 shots inside the trained window are one scene, and nothing else."""
    generation, _, _ = whole
    done = generation.done(4)
    assert list(done.read) != [2, 3]  # not just the last ones
    shown = [
        Shot(caption=generation.shots[shot].caption, latents=generation.done(shot).latents, seed=seed(generation, shot))
        for shot in done.read
    ]
    last = dataclasses.replace(MORE.shots[2], seed=seed(generation, 4))
    (latents,) = sampler.latents(make_params(), [dataclasses.replace(MORE, shots=(*shown, last))])
    np.testing.assert_allclose(latents[-1], done.latents, atol=2e-5)
    for shot, given in zip(done.read, latents):
        np.testing.assert_array_equal(given, generation.done(shot).latents)


def seed(generation, number):
    return int(np.random.SeedSequence([CONFIG.sample.seed, number, 1]).generate_state(1)[0])


def test_it_goes_on_bit_for_bit(whole, sampler, tmp_path):
    """As after a kill between any two writes: a shot's file is there, or it isn't."""
    generation, _, _ = whole
    new(tmp_path / "run", TWO)
    other = resume(tmp_path / "run")
    assert other.ends_with([TWO])
    assert not other.ends_with([MORE])
    other.extend(MORE)
    for shot, _ in sample_shots(resume(tmp_path / "run"), sampler, make_params()):
        if shot == 1:
            break
    run(resume(tmp_path / "run"), sampler)
    other.file(3, "npz").unlink()
    other.file(1, "mp4").unlink()
    again = resume(tmp_path / "run")
    assert list(run(again, sampler)) == [1, 3]
    for shot in range(5):
        for field in ("latents", "features", "read", "shares"):
            np.testing.assert_array_equal(getattr(again.done(shot), field), getattr(generation.done(shot), field))
        assert again.file(shot, "mp4").read_bytes() == generation.file(shot, "mp4").read_bytes()


def test_a_shot_again_is_another_and_the_old_one_stays(whole, sampler, tmp_path):
    generation, _, _ = whole
    shutil.copytree(generation.folder, tmp_path / "run")
    other = resume(tmp_path / "run")
    told = other.again([0])
    assert {shot for shot in range(1, 5) if 0 in generation.done(shot).read and generation.done(shot).shares.any()} <= {
        *told
    }
    assert other.again([0]) == told  # as a command does that is run again before all is done
    assert other.take(0) == 2
    assert list(run(other, sampler)) == [0]
    assert other.file(0, "npz").name == "0001-2.npz"
    assert (tmp_path / "run" / "shots" / "0001.mp4").exists()
    assert np.abs(other.done(0).latents - generation.done(0).latents).max() > 0.1
    assert resume(tmp_path / "run").take(0) == 2


def keep(generation, shot, *read):
    shares = np.eye(1, len(read), dtype=np.float32)  # all picks lie in the first
    latents, features = np.zeros((1, 2, 2, 1), np.float32), np.zeros((1, 1, 1), np.float32)
    generation.keep(shot, Done(latents=latents, features=features, read=np.asarray(read, np.int32), shares=shares))


def test_readers_are_those_of_readers_too(tmp_path):
    board = make_board([("a", 0.1), ("b", 0.1), ("c", 0.1), {"seconds": 0.1, "cut": False}, ("e", 0.1), ("f", 0.1)])
    generation = new(tmp_path / "run", board)
    for shot, read in enumerate([(), (0,), (1, 0), (1, 0), (2, 1), ()]):
        keep(generation, shot, *read)
    assert generation.readers([0]) == [1, 2, 3, 4]
    assert generation.readers([2]) == [4]
    assert generation.readers([5]) == []
    assert generation.again([3], readers=True) == [4]  # 2 and 3 are sampled together, and 4 reads 2
    assert [generation.take(shot) for shot in range(6)] == [1, 1, 2, 2, 2, 1]
    keep(generation, 2, 0)
    left = resume(generation.folder)  # stopped there
    assert left.again([3], readers=True) == [4]
    assert [left.take(shot) for shot in range(6)] == [1, 1, 2, 2, 2, 1]
    for shot in (3, 4):
        keep(left, shot)
    assert left.again([3], readers=True) == []  # all was done: this is another wish
    assert [left.take(shot) for shot in range(6)] == [1, 1, 3, 3, 2, 1]
    left.extend(TWO)
    left = resume(left.folder)
    left.again([3], readers=True)  # and so is this: another was there in between
    assert [left.take(shot) for shot in range(8)] == [1, 1, 4, 4, 2, 1, 1, 1]


def test_storyboards_are_asked_for_together_or_not_at_all(tmp_path, monkeypatch):
    bad = make_board([{"caption": "b", "seconds": 0.1, "forget": [3]}])
    with pytest.raises(StoryboardError, match="names shot 3, but this is shot 3"):
        new(tmp_path / "run").extend(TWO, bad)
    assert not (tmp_path / "run").exists()
    Image.new("RGB", (32, 16)).save(tmp_path / "red.png")
    given = make_board([{"caption": "red", "image": str(tmp_path / "red.png"), "seconds": 0.1}])

    def full(*args, **named):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "copyfile", full)
        with pytest.raises(GenerationError, match=r"run cannot be written: .*No space left.*the same command goes on"):
            new(tmp_path / "run").extend(TWO, given)
    assert not list((tmp_path / "run" / "given").iterdir())
    new(tmp_path / "run").extend(TWO, given)
    generation = resume(tmp_path / "run")
    assert len(generation.shots) == 3
    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(GenerationError, match="No space left"):
        keep(generation, 0)
    assert not generation.is_done(0)


@pytest.mark.long
def test_takes_and_pins(sampler, tmp_path):
    """A continuation is sampled with what it continues; what is remembered is shown, what is forgotten isn't."""
    board = make_board([("a", 0.1), ("b", 0.1), ("c", 0.1), {"caption": "d", "seconds": 0.1, "forget": [1, 2, 3]}])
    generation = new(tmp_path / "run", board)
    more = {"shots": [{"cut": False, "seconds": 0.1}, {"cut": False, "seconds": 0.1}], "caption": "e"}
    last = {"caption": "f", "seconds": 0.1, "remember": [2]}
    generation.extend(parse_storyboard({**more, "shots": [*more["shots"], last]}, before=generation.shots[-1]))
    assert [tuple(take.shots) for take in generation.takes()] == [(0,), (1,), (2,), (3,), (4, 5), (6,)]
    run(generation, sampler)
    read = [set(generation.done(shot).read.tolist()) for shot in range(7)]
    assert read[3] == set()
    assert 3 in read[4]
    assert len(read[4]) == 2
    assert read[5] == read[4]
    assert 1 in read[6]
    assert len(read[6]) == 2


@pytest.mark.parametrize(
    ("shot", "message"),
    [
        ({"remember": [3]}, r"shots\[1\].remember names shot 3, but this is shot 2"),
        ({"forget": [2]}, r"shots\[1\].forget names shot 2, but this is shot 2"),
        ({"remember": [0]}, "it must be a list of shots, counted from 1"),
        ({"remember": [1], "forget": [1]}, "it names shot 1, as `remember` does"),
    ],
)
def test_pins_that_cannot_be(tmp_path, shot, message):
    with pytest.raises(StoryboardError, match=message):
        new(tmp_path / "run", make_board([("a", 0.1), {"caption": "b", "seconds": 0.1, **shot}]))


@pytest.mark.long
def test_given_shots_are_kept_with_it(sampler, tmp_path):
    Image.new("RGB", (32, 16), (200, 30, 30)).save(tmp_path / "red.png")
    board = make_board([("red", 0.1), {"caption": "look", "image": str(tmp_path / "red.png")}, ("again", 0.1)])
    generation = new(tmp_path / "run", board)
    (tmp_path / "red.png").unlink()
    frames = run(resume(generation.folder), sampler)
    assert list(frames) == [0, 2]  # a reference is not shown
    assert 1 in generation.done(2).read
    assert read_provenance(generation.file(2, "mp4")).partly_given is False


def test_outer_routing():
    queries, keys = np.ones((2, 3, 4), np.float32), np.full((2, 3, 4), 0.5, np.float32)
    assert score(queries, keys) == pytest.approx(4 * 0.5 / 2)
    scores = {0: 1.0, 1: 3.0, 2: 2.0, 3: 2.0}
    assert chosen(scores, 2) == [1, 3]
    assert chosen(scores, 0) == [0, 1, 2, 3]
    assert chosen(scores, 2, remember={0}) == [0, 1]
    assert chosen(scores, 3, remember={0}, forget={1}) == [0, 2, 3]
    assert chosen(scores, 9, forget={0, 1, 2, 3}) == []
    assert chosen({}, 3) == []


@pytest.mark.long
def test_features_are_means_of_what_attention_reads(sampler):
    """Of each shot's own tokens, whatever pads the scene."""
    board = make_board([("a van", 0.4)])
    alone = sampler.features(make_params(), board, t=1.0)
    padded = sampler.features(make_params(), board, t=1.0, bucket=dataclasses.replace(bucket_of(2), shots=2))
    np.testing.assert_allclose(padded, alone, atol=1e-5)
    assert alone.shape == (2, 2, 1, 2, 16)
    assert np.abs(alone[0] - alone[1]).max() > 0.01


def bucket_of(shots):
    return BucketConfig(shots=shots, frames=8, text_tokens=40)


def test_what_cannot_be_gone_on_with_is_named(tmp_path):
    with pytest.raises(GenerationError, match=r"holds no generation: generation.json is missing"):
        resume(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(GenerationError, match="exists and is not a generation"):
        begin(tmp_path, CONFIG, checkpoint="a", weights=WEIGHTS, step=1)
    generation = new(tmp_path / "run", TWO)
    assert is_generation(tmp_path / "run")
    with pytest.raises(GenerationError, match="begun with other weights"):
        check_same(generation, "cd" * 32, {})
    with pytest.raises(GenerationError, match=r"begun with sample.steps 2, not 30"):
        check_same(generation, WEIGHTS, {"sample.steps": (2, 30)})
    (tmp_path / "run" / "shots").mkdir()
    generation.file(0, "npz").write_bytes(b"PK not a zip")
    with pytest.raises(GenerationError, match=r"0001.npz is damaged .*: remove it to have shot 1 sampled again"):
        generation.done(0)
    path = tmp_path / "run" / "generation.json"
    tree = json.loads(path.read_text())
    for change, message in (
        ({"format": 2}, "is of format 2, by moc_jax"),
        ({"takes": []}, "is damaged"),
        ({"storyboards": [{"caption": "a"}]}, r"storyboards\[0\]: shots is missing"),
    ):
        path.write_text(json.dumps({**tree, **change}))
        with pytest.raises((GenerationError, StoryboardError), match=message):
            resume(tmp_path / "run")
    path.write_text("{")
    with pytest.raises(GenerationError, match="is damaged: it is not JSON"):
        resume(tmp_path / "run")


def test_one_process_at_a_time(tmp_path):
    folder = tmp_path / "run"
    generation = new(folder, TWO)
    in_use = pytest.raises(LockError, match=r"run is in use by process .* or give another --extend")
    with held(folder, resume(folder)), in_use, held(folder, None):
        pass
    assert not (folder / "run.lock").exists()
    before = resume(folder)
    generation.extend(MORE)
    with pytest.raises(GenerationError, match="was changed by another process meanwhile"), held(folder, before):
        pass
    with pytest.raises(GenerationError, match="was begun by another process meanwhile"):
        begin(folder, CONFIG, checkpoint="a", weights=WEIGHTS, step=1)
    with held(tmp_path / "new", None):
        pass
    assert not (tmp_path / "new").exists()


def test_who_lost_the_folder_writes_nothing_more(sampler, tmp_path):
    """Another process took it, as after a machine that slept."""
    folder = tmp_path / "run"
    new(folder, TWO)
    with held(folder, None) as still_held:
        shots = sample_shots(resume(folder), sampler, make_params(), check=still_held)
        next(shots)
        still_held()
        lock = folder / "run.lock"
        theirs = lock.read_text().replace(str(os.getpid()), str(os.getppid()))
        lock.write_text(theirs)
        before = {path.name for path in (folder / "shots").iterdir()}
        with pytest.raises(LockError, match=r"run\.lock was taken over by"):
            list(shots)
        assert {path.name for path in (folder / "shots").iterdir()} == before
    assert lock.read_text() == theirs  # which is not ours to remove


def test_joined_videos_hold_the_same_frames(whole, tmp_path):
    generation, _, _ = whole
    parts = [generation.file(shot, "mp4") for shot in range(5)]
    join_videos(parts, tmp_path / "all.mp4")
    with av.open(str(tmp_path / "all.mp4")) as video:
        joined = np.stack([frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)])
        assert float(video.streams.video[0].average_rate) == pytest.approx(12, rel=1e-3)
    single = []
    for part in parts:
        with av.open(str(part)) as video:
            single += [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    np.testing.assert_array_equal(joined, np.stack(single))
    assert len(read_video(tmp_path / "all.mp4", 16, 32, 12.0)) == len(single)
    with pytest.raises(VideoError, match="there is nothing to join"):
        join_videos([], tmp_path / "none.mp4")
    with pytest.raises(VideoError, match="it cannot be joined"):
        join_videos([tmp_path / "none.mp4"], tmp_path / "all.mp4")
    assert (tmp_path / "all.mp4").exists()


def test_joined_frames_are_as_long_apart_as_they_were(tmp_path):
    """A file says of itself how long it is in milliseconds: 8 of 12 frames a second are 667 in some orders."""
    parts, rounded = [tmp_path / f"{number}.mp4" for number in range(14)], 0
    for number, part in enumerate(parts):
        random = np.random.default_rng(number)
        count, picture = int(random.integers(2, 16)), random.integers(0, 255, (32, 32, 3))
        moved = [np.roll(picture, (i * int(random.integers(0, 4)), 0), (0, 1)) for i in range(count)]
        noise = [random.normal(0, 60, picture.shape) * (random.random() < 0.4) for _ in range(count)]
        write_video(part, np.clip(np.add(moved, noise), 0, 255).astype(np.uint8), 12)
        with av.open(str(part)) as video:
            stream = video.streams.video[0]
            rounded += stream.duration * stream.time_base != Fraction(count, 12)
    assert rounded, "no part has a rounded duration"
    join_videos(parts, tmp_path / "all.mp4")
    with av.open(str(tmp_path / "all.mp4")) as video:
        times = [frame.pts * frame.time_base for frame in video.decode(video=0)]
    assert times == [Fraction(i, 12) for i in range(len(times))]
    assert len(times) == sum(len(read_video(part, 32, 32, 12)) for part in parts)


@pytest.mark.long
def test_256_shots_need_no_more_than_a_few(sampler, tmp_path):
    """One program of each kind, and as much work and memory for the last shot as for the tenth."""
    count, lines = 256, []
    generation = new(tmp_path / "run", make_board([(f"scene {shot % 7}", 0.1) for shot in range(count)]))
    fresh = Sampler(sampler.config, make_codec())
    calls = []
    run_once = fresh.latents
    fresh.latents = lambda params, boards, *, bucket=None, turn=None: (
        calls.append((len(boards[0].shots), bucket)) or run_once(params, boards, bucket=bucket, turn=turn)
    )
    memory = []
    for shot, _ in sample_shots(generation, fresh, make_params(), lines.append):
        if shot in (16, count - 1):
            gc.collect()
            memory.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    assert len(lines) == count
    assert {bucket for _, bucket in calls} == {calls[0][1]}
    assert [shots for shots, _ in calls] == [1, 2, *[3] * (count - 2)]
    # One that begins; the first shot's call and end; the others', beside what is kept, which is one more.
    assert len(fresh._programs) == 1 + 2 + 2 + 1
    assert memory[1] - memory[0] < 64  # MiB; what is kept of each shot is half a kilobyte here
    assert len({int(r) for shot in range(8, count) for r in generation.done(shot).read}) > 8


@pytest.mark.long
def test_killed_in_a_shot_it_resumes_with_the_same_bits(whole, tmp_path):
    """The process is gone without a word, as by the kernel when memory is full."""
    generation, _, _ = whole
    script = tmp_path / "run.py"
    script.write_text(
        f"""
import os, signal, sys
from pathlib import Path
from moc_jax.sampling.generation import is_generation, resume
from moc_jax.sampling.generate import Sampler
from moc_jax.sampling.shot_by_shot import sample_shots
from tests.sampling.test_shot_by_shot import MORE, TWO, config_with, make_codec, make_params, new
folder = Path({str(tmp_path / "run")!r})
generation = resume(folder) if is_generation(folder) else new(folder, TWO, MORE)
last = len(generation.shots) - 1
sampler = Sampler(config_with(), make_codec())
def say(line):
    if generation.is_done(2) and not generation.is_done(last) and "stop" in sys.argv:
        os.kill(os.getpid(), signal.SIGKILL)
list(sample_shots(generation, sampler, make_params(), say))
"""
    )
    where = {**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parents[2])}
    first = subprocess.run([sys.executable, script, "stop"], env=where, timeout=300)
    assert first.returncode == -signal.SIGKILL
    left = resume(tmp_path / "run")
    assert [left.is_done(shot) for shot in range(5)] == [True, True, True, False, False]
    (tmp_path / "run" / "shots" / ".0004.npz.99999999.tmp").write_bytes(b"half")
    subprocess.run([sys.executable, script], env=where, timeout=300, check=True)
    done = resume(tmp_path / "run")
    for shot in range(5):
        np.testing.assert_array_equal(done.done(shot).latents, generation.done(shot).latents)
    assert not list((tmp_path / "run" / "shots").glob(".*"))
