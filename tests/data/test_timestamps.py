"""Every frame keeps its place in time, whatever its stamps are; what had to be repaired is said."""

import itertools

import pytest

from moc_jax.data.timestamps import Stamp, show_times

STEP = 0.04


def _shown(presented, decoded=None, *, ends=None, lasts=None):
    """(starts in steps, end in steps, notes); stamps are in steps, too."""
    notes = []
    decoded = decoded or [None] * len(presented)
    seconds = [[None if s is None else s * STEP for s in stamps] for stamps in (presented, decoded)]
    stamps = [Stamp(presented=p, decoded=d, lasts=lasts) for p, d in zip(*seconds)]
    shown = list(show_times(zip(stamps, range(len(stamps))), STEP, ends and ends * STEP, notes.append))
    assert [frame for *_, frame in shown] == list(range(len(stamps)))
    assert all(end == start for (_, end, _), (start, _, _) in itertools.pairwise(shown))
    return [round(start / STEP, 3) for start, *_ in shown], round(shown[-1][1] / STEP, 3), notes


@pytest.mark.parametrize(
    ("presented", "starts"),
    [
        ([0, 1, 2, 3], [0, 1, 2, 3]),
        ([-2, -1, 0, 1], [0, 1, 2, 3]),
        ([500, 501, 504, 505], [0, 1, 4, 5]),  # starts late, varies
        ([0, 0.1, 5, 5.1, 25], [0, 0.1, 5, 5.1, 25]),
        ([None, None, None], [0, 1, 2]),
        ([None, None, 8, 9], [0, 1, 2, 3]),
        ([0, None, None, 3, 5], [0, 1, 2, 3, 5]),
        ([3], [0]),
    ],
)
def test_what_is_plausible_is_kept(presented, starts):
    assert _shown(presented)[::2] == (starts, [])


def test_decoding_stamps_where_presentation_stamps_step_back():
    """As FFmpeg gives them for three B-frames in AVI; the frames that the decoder holds to the end have none."""
    presented = [1]
    while len(presented) < 41:
        at = presented[-1] if len(presented) == 1 else presented[0] + len(presented) - 1
        presented += [at + 3, at + 2, at + 4, at + 1]
    decoded = [*range(2, 40), None, None, None]
    assert _shown(presented, decoded) == (list(range(41)), 41, [])
    assert _shown(decoded, presented)[0] == list(range(41))  # only when they step back less often


def test_presentation_stamps_where_decoding_stamps_are_no_better():
    assert _shown([0, 1, 2, 8, 9], [0, 1, 2, 3, 4])[0] == [0, 1, 2, 8, 9]
    assert _shown([0, 1, 2, 8, 9], [5] * 5)[0] == [0, 1, 2, 8, 9]


@pytest.mark.parametrize("there", [-5, -0.5, -4e6])
def test_a_clock_that_restarts_goes_on(there):
    starts, end, notes = _shown([*range(10), *(there + k for k in range(10))])
    assert (starts, end) == (list(range(20)), 20)
    assert notes == ["its time stamps step back: the clock continues from there (once, at 0.36 s)"]


def test_restarts_are_counted():
    _, end, notes = _shown([*range(5)] * 4)
    assert end == 20
    assert notes == ["its time stamps step back: the clock continues from there (3 times, first at 0.16 s)"]


class TestJumps:
    def test_a_still_that_the_duration_covers(self):
        starts, end, notes = _shown([0, 1, 2, 900, 901], ends=902)
        assert (starts, end) == ([0, 1, 2, 900, 901], 902)
        assert notes == ["a frame is shown for more than 10 s (once, at 0.08 s; 35.92 s)"]
        assert _shown([0, 1, 2, 200, 201], ends=202)[2] == []

    def test_past_the_duration_the_clock_goes_on(self):
        starts, end, notes = _shown([0, 1, 2, 90_000, 90_001], ends=5)
        assert (starts, end) == ([0, 1, 2, 3, 4], 5)
        assert "jump ahead, farther than its duration allows: the clock continues at the usual rate" in notes[0]
        assert "once, at 0.08 s; 3599.92 s" in notes[0]

    @pytest.mark.parametrize(("gap", "believed"), [(1000, True), (90_000, False), (1e9, False)])
    def test_without_a_duration_a_minute_is_the_limit(self, gap, believed):
        starts, *_ = _shown([0, 1, 2 + gap, 3 + gap])
        assert starts == ([0, 1, 2 + gap, 3 + gap] if believed else [0, 1, 2, 3])

    def test_there_and_back(self):
        """One wrong stamp moves nothing else."""
        for wrong in (90_000, -90_000):
            assert _shown([0, 1, 2, wrong, 4, 5, 6])[:2] == (list(range(7)), 7)
            assert _shown([0, 1, 2, wrong, 4, 5, 6], list(range(7)))[::2] == (list(range(7)), [])

    def test_the_duration_may_be_that_of_a_wrong_stamp(self):
        """As Matroska writes it: the largest stamp."""
        for wrong in ([90_000], [90_000, 90_001]):
            stamps = [0, 1, 2, *wrong, *range(3 + len(wrong), 10)]
            starts, end, notes = _shown(stamps, ends=90_002)
            assert (starts, end) == (list(range(10)), 10)
            (note,) = notes
            assert note.startswith("a time stamp is far ahead of those after it: the frame is shown at the usual rate")

    def test_slides_put_together_are_no_wrong_stamps(self):
        """A step of unknown length, where the clock restarts, is of a second at most."""
        assert _shown([0, 100, 200, 0, 100, 200])[0] == [0, 100, 200, 225, 325, 425]

    def test_a_last_frame_as_long_as_it_says_if_that_can_be(self):
        assert _shown([0, 1], lasts=3.0, ends=76)[1] == 1 + 3 / STEP
        assert _shown([0, 1], lasts=3600.0, ends=76)[1] == 2
        assert _shown([0, 1], lasts=0.0)[1] == 2


def test_frames_without_length_are_counted():
    starts, end, notes = _shown([0, 1, 1, 1, 2, 3, 3, 4])
    assert (starts, end) == ([0, 1, 1, 1, 2, 3, 3, 4], 5)
    assert notes == ["a frame has the time stamp of the next one and is not shown (3 times, first at 0.04 s)"]


@pytest.mark.parametrize(
    "stamps", [[0] * 3, [7] * 50, [*range(10), *[9] * 40], [*range(10), *[9] * 40, *range(10, 20)]]
)
def test_a_clock_that_stands_still_goes_on(stamps):
    starts, end, notes = _shown(stamps)
    assert (starts, end) == (list(range(len(stamps))), len(stamps))
    assert len(notes) == 1
    assert "stand still" in notes[0]


def test_frames_are_not_held_longer_than_needed():
    """A stream without end is shown as it comes."""
    taken = []

    def frames():
        for k in range(10**9):
            taken.append(k)
            yield Stamp(presented=k * STEP), k

    shown = show_times(frames(), STEP)
    assert [next(shown)[2] for _ in range(50)] == list(range(50))
    assert len(taken) < 80
