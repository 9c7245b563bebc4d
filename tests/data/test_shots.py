"""Cuts found where they were made, at any frame rate, and shots that together are the whole video."""

import tempfile
import weakref

import numpy as np
import pytest

from moc_jax.data.film import Film
from moc_jax.data.shots import CutDetector, GivenCuts, find_shots
from moc_jax.data.video import decode, read_video, write_video
from tests.data.clips import make_clip, make_frames


def split_shots(path, height, width, fps, is_cut):
    """The shots of a file."""
    with tempfile.TemporaryFile() as file:
        film = Film(file, height, width)
        yield from map(np.array, find_shots(decode(path, height, width), fps, is_cut, film))


@pytest.mark.parametrize(("fps", "expected"), [(24.0, [14, 30, 9, 21]), (12.0, [7, 15, 5, 10]), (8.0, [5, 10, 3, 7])])
def test_cuts_are_found_at_the_files_own_rate(tmp_path, fps, expected):
    """Cuts after frames 14, 44 and 53 of 24 per second: a new frame k belongs to the shot that is on at k / fps."""
    make_clip(tmp_path / "a.mp4", shots=4, frames_per_shot=(14, 30, 9, 21), fps=24.0)
    # The third shot is shorter than half a second, so the cut behind it is no shot's beginning.
    merged = [*expected[:2], expected[2] + expected[3]]
    shots = list(split_shots(tmp_path / "a.mp4", 32, 48, fps, CutDetector(27.0)))
    assert [len(shot) for shot in shots] == merged
    np.testing.assert_array_equal(np.concatenate(shots), read_video(tmp_path / "a.mp4", 32, 48, fps))
    cuts = [14 / 24, 44 / 24, 53 / 24]
    assert [len(s) for s in split_shots(tmp_path / "a.mp4", 32, 48, fps, GivenCuts(cuts))] == expected


def test_motion_is_no_cut(tmp_path):
    make_clip(tmp_path / "a.mp4", shots=1, frames_per_shot=40)
    assert [len(s) for s in split_shots(tmp_path / "a.mp4", 32, 48, 12.0, CutDetector(27.0))] == [40]


def test_threshold(tmp_path):
    """A step in brightness of 40 scores 40 / 3: hue and saturation stay."""
    frames = np.full((24, 32, 32, 3), 100, np.uint8)
    frames[12:] = 140
    write_video(tmp_path / "a.mp4", frames, 12)
    assert [len(s) for s in split_shots(tmp_path / "a.mp4", 32, 32, 12.0, CutDetector(12.0))] == [12, 12]
    assert [len(s) for s in split_shots(tmp_path / "a.mp4", 32, 32, 12.0, CutDetector(15.0))] == [24]


def test_given_cuts_win_over_what_is_seen(tmp_path):
    make_clip(tmp_path / "a.mp4", shots=2, frames_per_shot=12)
    assert [len(s) for s in split_shots(tmp_path / "a.mp4", 32, 48, 12.0, GivenCuts([]))] == [24]
    # A cut between two frames takes effect at the next one; one past the end never does.
    assert [len(s) for s in split_shots(tmp_path / "a.mp4", 32, 48, 12.0, GivenCuts([0.26, 99.0]))] == [4, 20]


def test_a_shot_between_two_frames_keeps_its_number(tmp_path):
    """At 2 frames per second a shot of 4 frames of 24 has none left; it still counts, so that captions stay aligned."""
    make_clip(tmp_path / "a.mp4", shots=3, frames_per_shot=(26, 4, 30), fps=24.0)
    cuts = GivenCuts([26 / 24, 30 / 24])
    assert [len(s) for s in split_shots(tmp_path / "a.mp4", 32, 48, 2.0, cuts)] == [3, 0, 2]


def test_large_frames_are_looked_at_coarsely():
    """The score of a cut does not depend on the size."""
    small, large = CutDetector(27.0), CutDetector(27.0)
    frames = make_frames(shots=2, frames_per_shot=8, size=(32, 48))
    for k, frame in enumerate(frames):
        wide = frame.repeat(16, axis=0).repeat(16, axis=1)
        assert small(k / 12, frame) == large(k / 12, wide) == (k == 8)


@pytest.mark.parametrize("times", [1, 400])
def test_no_shot_is_held_in_memory(tmp_path, times):
    """1000 frames, and frames that stand still, each shown 400 times; and the disk has its room back."""
    made, held = [], []

    def frames():
        for k in range(1000):
            frame = np.full((4, 4, 3), k % 256, np.uint8)
            made.append(weakref.ref(frame))
            held.append(sum(ref() is not None for ref in made[-100:]))
            yield k * times / 24, (k + 1) * times / 24, frame

    with (tmp_path / "film").open("w+b") as file:
        film = Film(file, 4, 4)
        lengths = []
        for shot in find_shots(frames(), 24.0, GivenCuts([times * 400 / 24]), film):
            begin = sum(lengths)
            assert [int(frame[0, 0, 0]) for frame in shot[::times]] == [
                (begin // times + k) % 256 for k in range(len(shot) // times)
            ]
            lengths.append(len(shot))
            film.forget()
            assert (tmp_path / "film").stat().st_size == 0
    assert lengths == [400 * times, 600 * times]
    assert max(held) <= 3
