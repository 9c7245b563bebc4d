"""Which stream is read, from which packet on, and that nothing is left out without a word."""

import os

import av
import numpy as np
import pytest

from moc_jax.data.video import VideoError, decode, read_video
from tests.data import odd_files
from tests.data.odd_files import GROUPS_OF_12, SIZE, numbers, pictures


def _read(path):
    """(number and start of each frame, in steps of 40 ms; notes)."""
    notes = []
    shown = list(decode(path, *SIZE, notes.append))
    return numbers(frame for *_, frame in shown), [round(start * 25, 3) for start, *_ in shown], notes


@pytest.mark.parametrize("count", [3, 7, 100])
def test_b_frames_in_avi(tmp_path, count):
    path = odd_files.avi_with_b_frames(tmp_path / "a.avi", count)
    assert _read(path) == (list(range(count)), list(range(count)), [])
    assert numbers(read_video(path, *SIZE, 25)) == list(range(count))


def test_decoding_stamps_written_as_presentation_stamps(tmp_path):
    options = {"bf": "3", "x264-params": "b-adapt=0"}
    path = odd_files.restamped(tmp_path / "a.mkv", lambda presented, decoded: (decoded, decoded), 40, options)
    assert _read(path) == (list(range(40)), list(range(40)), [])


@pytest.mark.parametrize("parts", [2, 3])
def test_streams_put_together(tmp_path, parts):
    numbers_, starts, notes = _read(odd_files.restarted_clock(tmp_path / "a.ts", parts))
    assert numbers_ == starts == list(range(20 * parts))
    assert len(notes) == 2
    assert "its transport stream is interrupted" in notes[0]
    assert "left out (0)" in notes[0]
    assert "its time stamps step back: the clock continues from there" in notes[1]


def test_clock_of_33_bits_overflows(tmp_path):
    """A transport stream counts 90 000 a second, up to 2^33."""
    near = 2**33 // 3600 - 25
    path = odd_files.restamped(tmp_path / "a.ts", lambda *stamps: tuple(near + s for s in stamps), 60)
    assert _read(path) == (list(range(60)), list(range(60)), [])


@pytest.mark.parametrize("end", ["mkv", "mp4", "ts", "flv"])
def test_still_in_a_screen_recording(tmp_path, end):
    path = odd_files.stamped(tmp_path / f"a.{end}", [0, 100, 15_000, 15_100])
    numbers_, starts, notes = _read(path)
    assert (numbers_, starts) == ([0, 1, 2, 3], [0, 2.5, 375, 377.5])
    assert notes == ["a frame is shown for more than 10 s (once, at 0.10 s; 14.90 s)"]
    assert numbers(read_video(path, *SIZE, 1)) == [0, *[1] * 14, 2]


def test_jump_past_the_end(tmp_path):
    numbers_, starts, notes = _read(odd_files.jumps_past_its_end(tmp_path / "a.mkv"))
    assert (numbers_, starts) == (list(range(5)), [0, 2.5, 5, 7.5, 10])
    assert "jump ahead" in notes[0]
    # The duration of a transport stream is taken from its last stamp: it proves nothing.
    numbers_, starts, notes = _read(odd_files.stamped(tmp_path / "a.ts", [0, 100, 200, 7_200_000]))
    assert starts == [0, 2.5, 5, 7.5]
    assert "jump ahead" in notes[0]


def test_frames_without_length_are_named(tmp_path):
    _, starts, notes = _read(odd_files.stamped(tmp_path / "a.mkv", [0, 40, 40, 80]))
    assert starts == [0, 1, 1, 2]
    assert notes == ["a frame has the time stamp of the next one and is not shown (once, at 0.04 s)"]


@pytest.mark.parametrize("end", ["mkv", "mp4"])
@pytest.mark.parametrize("flagged", [True, False])
def test_a_cover_is_no_video(tmp_path, end, flagged):
    assert _read(odd_files.cover_first(tmp_path / f"a.{end}", flagged=flagged)) == (
        list(range(20)),
        list(range(20)),
        [],
    )


@pytest.mark.parametrize("end", ["mkv", "mp4"])
def test_the_best_of_two_videos(tmp_path, end):
    numbers_, _, notes = _read(odd_files.two_videos(tmp_path / f"a.{end}"))
    assert numbers_ == list(range(100, 120))
    assert notes == ["it holds 2 videos: stream 1 (h264, 64x32) is used, not stream 0 (h264, 64x32)"]


_CLOSED = {"g": "12", "bf": "2", "x264-params": "b-adapt=0:scenecut=0"}
_OPEN = {"g": "12", "bf": "2", "x264-params": "b-adapt=0:scenecut=0:open-gop=1"}


@pytest.mark.parametrize(("codec", "options"), [("libx264", _CLOSED), ("libx264", _OPEN), ("mpeg2video", {"g": "12"})])
def test_a_recording_that_begins_in_the_middle(tmp_path, codec, options):
    path = odd_files.begins_mid_group(tmp_path / "a.ts", codec=codec, options=options)
    numbers_, starts, notes = _read(path)
    assert numbers_ == list(range(numbers_[0], 36))
    assert numbers_[0] <= 13
    assert starts == list(range(len(numbers_)))
    (note,) = notes
    assert note.startswith(
        "it begins in the middle of a group of pictures: frames that cannot be decoded are left out ("
    )


@pytest.mark.parametrize(
    ("end", "codec"), [("ts", "libx264"), ("ts", "mpeg2video"), ("vob", "mpeg2video"), ("m2v", "mpeg2video")]
)
def test_a_recording_that_ends_in_the_middle_of_a_frame(tmp_path, end, codec):
    """Wherever it is cut, what comes before is read. Decoders do not notice every frame that is torn, the last one."""
    options = GROUPS_OF_12 if codec == "libx264" else {"g": "12", "bf": "2", "b": "4M"}
    rng = np.random.default_rng(0)
    frames = [np.clip(frame + rng.normal(0, 20, frame.shape), 0, 255).astype(np.uint8) for frame in pictures(24)]
    content = odd_files.write(tmp_path / f"whole.{end}", frames, codec=codec, options=options).read_bytes()
    for left in range(len(content) // 2, len(content), len(content) // 24):
        (tmp_path / f"a.{end}").write_bytes(content[:left])
        numbers_, _, notes = _read(tmp_path / f"a.{end}")
        assert numbers_[:8] == list(range(8))
        whole = numbers_ if codec == "libx264" else numbers_[:-1]
        assert whole == sorted(set(whole))
        assert set(notes) <= {"it ends in the middle of a frame, which is left out"}


def test_without_any_key_frame_it_is_refused(tmp_path):
    path = odd_files.write(tmp_path / "a.ts", odd_files.pictures(12), codec="mpeg2video", options={"g": "100"})
    with av.open(str(path)) as container:
        positions = [packet.pos for packet in container.demux(video=0) if packet.size]
    path.write_bytes(path.read_bytes()[positions[2] :])
    with pytest.raises(VideoError, match="cannot be decoded"):
        _read(path)


def test_lost_packets_cost_the_rest_of_their_group(tmp_path):
    numbers_, starts, notes = _read(odd_files.lost_packets(tmp_path / "a.ts"))
    assert starts == numbers_  # a gap in time, not a shorter video
    assert numbers_ == [*range(numbers_.index(12)), *range(12, 36)]
    assert 2 <= numbers_.index(12) <= 6
    (note,) = notes
    head, _, lost = note.removesuffix(")").rpartition(" (")
    assert head == "its transport stream is interrupted once: frames that cannot be decoded are left out"
    assert 12 - numbers_.index(12) - int(lost) in (0, 1)  # a packet that is missing altogether cannot be counted


def test_gradual_refresh_has_no_key_frame_at_first(tmp_path):
    """What the decoder withholds until the picture is whole is counted, too."""
    options = {"g": "12", "bf": "0", "x264-params": "intra-refresh=1"}
    numbers_, _, notes = _read(odd_files.begins_mid_group(tmp_path / "a.ts", options=options))
    assert numbers_ == list(range(numbers_[0], 36))
    withheld = int(notes[0].removeprefix("frames ahead of the first one that can be decoded are left out (")[:-1])
    early = int(notes[1].removesuffix(")").rpartition("(")[2])
    assert 5 + early + withheld == numbers_[0]


@pytest.mark.parametrize("name", [b"take:1.mp4", b"caf\xe9.mp4", b"%03d.mp4", b"-.mp4"])
def test_names_of_any_kind(tmp_path, monkeypatch, name):
    """One that looks like an address, one that is no UTF-8, one that looks like a pattern, one that means a pipe."""
    monkeypatch.chdir(tmp_path)
    odd_files.write(tmp_path / "a.mp4", odd_files.pictures(3)).rename(os.fsdecode(name))
    assert numbers(read_video(os.fsdecode(name), *SIZE, 25)) == [0, 1, 2]


def test_unknown_codec(tmp_path):
    path = odd_files.write(tmp_path / "a.avi", odd_files.pictures(3))
    path.write_bytes(path.read_bytes().replace(b"H264", b"Zz9z"))
    with pytest.raises(VideoError, match="no video stream that can be decoded"):
        next(decode(path, *SIZE))
