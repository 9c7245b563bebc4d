"""Reading and writing real files: rates, sizes, orientation, damage, and a disk that is full."""

import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from moc_jax.data.video import VideoError, decode, read_video, write_video
from tests.data.clips import make_clip, make_frames
from tests.data.odd_files import stamped


def _gray_clip(path: Path, levels, stamps, size=(32, 32), clock=1000):
    """A file whose frame k is a plain gray of levels[k], shown from stamps[k] / clock seconds on."""
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(clock), options={"crf": "4", "bf": "0"})
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        stream.codec_context.time_base = Fraction(1, clock)
        for level, stamp in zip(levels, stamps):
            frame = av.VideoFrame.from_ndarray(np.full((*size, 3), level, np.uint8), format="rgb24")
            frame.pts, frame.time_base = stamp, Fraction(1, clock)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def _levels(frames, step=20):
    """Which of the grays 0, step, 2 step ... each frame shows."""
    return np.rint(frames.reshape(len(frames), -1).mean(1) / step).astype(int).tolist()


def test_round_trip(tmp_path):
    frames = make_frames(shots=2, frames_per_shot=6, size=(48, 64))
    write_video(tmp_path / "new" / "a.mp4", frames, 12)
    again = read_video(tmp_path / "new" / "a.mp4", 48, 64, 12.0)
    assert again.shape == frames.shape
    psnr = 10 * np.log10(255**2 / np.mean((again.astype(float) - frames) ** 2))
    assert psnr > 28  # the squares' edges lose colour to 4:2:0, nothing else is lost
    np.testing.assert_allclose(again[:, 2, 2], frames[:, 2, 2], atol=4)  # colours come back as they were


@pytest.mark.parametrize("fps", [12, 23.976, 25.0, 30000 / 1001])
def test_frame_rate_is_written(tmp_path, fps):
    write_video(tmp_path / "a.mp4", make_frames(shots=1, frames_per_shot=6), fps)
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.frames == 6
        assert float(stream.average_rate) == pytest.approx(fps, rel=1e-4)
        assert stream.codec_context.name == "h264"
        assert stream.codec_context.pix_fmt == "yuv420p"


def test_same_frames_same_bytes(tmp_path):
    frames = make_frames(shots=4, frames_per_shot=12)
    for name in ("a", "b", "c"):
        write_video(tmp_path / f"{name}.mp4", frames, 12)
    assert len({(tmp_path / f"{name}.mp4").read_bytes() for name in ("a", "b", "c")}) == 1


@pytest.mark.parametrize(
    ("fps", "shown"),
    [
        (10, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
        (5, [0, 2, 4, 6, 8]),
        (20, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8, 9, 9]),
        (4, [0, 2, 5, 7]),  # at 0, 0.25, 0.5 and 0.75 s
        (3, [0, 3, 6]),
    ],
)
def test_resampling_shows_what_the_file_shows(tmp_path, fps, shown):
    _gray_clip(tmp_path / "a.mp4", [20 * k for k in range(10)], range(0, 1000, 100))
    assert _levels(read_video(tmp_path / "a.mp4", 32, 32, float(fps))) == shown


def test_uneven_time_stamps_and_late_start(tmp_path):
    """Frames at 0, 0.1, 0.5 and 0.6 s after a start at 2 s."""
    _gray_clip(tmp_path / "a.mp4", [0, 20, 40, 60], [2000, 2100, 2500, 2600])
    shown = _levels(read_video(tmp_path / "a.mp4", 32, 32, 10.0))
    assert _levels(read_video(tmp_path / "a.mp4", 32, 32, 10.0, 3)) == shown[:3]
    assert shown[:7] == [0, 1, 1, 1, 1, 2, 3]


def test_scaled_to_cover_then_cropped_around_the_centre(tmp_path):
    """A wide frame loses its sides, a tall one its top and bottom; what is left keeps its shape."""
    wide = np.zeros((3, 32, 128, 3), np.uint8)
    wide[:, :, 48:80] = 255  # the middle quarter
    write_video(tmp_path / "wide.mp4", wide, 12)
    assert read_video(tmp_path / "wide.mp4", 16, 16, 12.0).mean() > 230
    both = read_video(tmp_path / "wide.mp4", 16, 32, 12.0).mean(axis=(0, 1, 3))
    assert both[9:23].min() > 230
    assert both[:7].max() < 25
    write_video(tmp_path / "tall.mp4", np.ascontiguousarray(wide.transpose(0, 2, 1, 3)), 12)
    assert read_video(tmp_path / "tall.mp4", 16, 16, 12.0).mean() > 230
    assert read_video(tmp_path / "wide.mp4", 64, 64, 12.0).shape == (3, 64, 64, 3)  # enlarged


@pytest.mark.parametrize(("matrix", "corner"), [((0, 1, -1, 0), "top right"), ((0, -1, 1, 0), "bottom left")])
def test_phone_video_is_turned_upright(tmp_path, matrix, corner):
    """The stored top-left corner lands where the display matrix in the file's header says."""
    frames = np.zeros((3, 32, 64, 3), np.uint8)
    frames[:, :12, :12] = 255
    write_video(tmp_path / "a.mp4", frames, 12)
    content = bytearray((tmp_path / "a.mp4").read_bytes())
    at = content.index(b"tkhd") + 4 + 4 + 5 * 4 + 4 * 4  # past version, times, ids, duration, layer, volume
    a, b, c, d = (value * 65536 for value in matrix)
    content[at : at + 36] = np.array([a, b, 0, c, d, 0, 0, 0, 1 << 30], ">i4").tobytes()
    (tmp_path / "a.mp4").write_bytes(content)
    upright = read_video(tmp_path / "a.mp4", 64, 32, 12.0)[0].mean(-1)
    corners = {"top left": upright[:8, :8], "top right": upright[:8, -8:]}
    corners |= {"bottom left": upright[-8:, :8], "bottom right": upright[-8:, -8:]}
    assert max(corners, key=lambda name: corners[name].mean()) == corner


def test_wide_pixels_are_stretched(tmp_path):
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=12)
        stream.height, stream.width, stream.pix_fmt = 32, 32, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(2, 1)
        picture = np.zeros((32, 32, 3), np.uint8)
        picture[:, 8:24] = 255
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    assert read_video(tmp_path / "a.mp4", 32, 32, 12.0).mean() > 230  # the middle half fills the square


class TestDamage:
    def _reason(self, path):
        with pytest.raises(VideoError) as caught:
            read_video(path, 32, 32, 12.0)
        assert caught.value.path == str(path)
        assert str(path) in str(caught.value)
        return caught.value.reason

    def test_not_a_video(self, tmp_path):
        (tmp_path / "a.mp4").write_bytes(b"once upon a time" * 100)
        assert "cannot be decoded" in self._reason(tmp_path / "a.mp4")

    def test_empty_file(self, tmp_path):
        (tmp_path / "a.mp4").touch()
        assert self._reason(tmp_path / "a.mp4") == "it is empty (0 bytes); copy or download it again"

    def test_missing(self, tmp_path):
        assert "No such file" in self._reason(tmp_path / "a.mp4")

    def test_sound_only(self, tmp_path):
        with av.open(str(tmp_path / "a.mp4"), "w") as container:
            stream = container.add_stream("aac", rate=8000)
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate = 8000
            container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        assert self._reason(tmp_path / "a.mp4") == "it has no video stream"

    def test_no_frames(self, tmp_path):
        """A stream that is announced but empty."""
        make_clip(tmp_path / "full.mp4")
        with av.open(str(tmp_path / "full.mp4")) as full, av.open(str(tmp_path / "a.avi"), "w") as container:
            container.add_stream_from_template(full.streams.video[0])
            container.start_encoding()
        assert self._reason(tmp_path / "a.avi") == "it has no frames"

    @pytest.fixture
    def content(self, tmp_path):
        frames = np.random.default_rng(0).integers(0, 255, (24, 64, 64, 3), np.uint8)
        write_video(tmp_path / "a.mp4", frames, 12)
        return (tmp_path / "a.mp4").read_bytes()

    def test_damaged_middle(self, tmp_path, content):
        """Forty random bytes in a picture are found as often as they break the code: in about half of the places."""
        found = 0
        for place in range(12):
            at = len(content) // 4 + place * len(content) // 20
            noise = np.random.default_rng(place).bytes(40)
            (tmp_path / "a.mp4").write_bytes(content[:at] + noise + content[at + 40 :])
            try:
                read_video(tmp_path / "a.mp4", 32, 32, 12.0)
            except VideoError as error:
                found += "Invalid data" in error.reason or "damaged" in error.reason
        assert found >= 4

    @pytest.mark.parametrize("left", [0.4, 0.667, 0.95])
    def test_cut_off(self, tmp_path, content, left):
        """As a download that broke: the header promises frames that are not there."""
        (tmp_path / "a.mp4").write_bytes(content[: int(len(content) * left)])
        assert "it is cut off or damaged after frame" in self._reason(tmp_path / "a.mp4")


def test_an_hour_on_one_frame_is_shown_as_such(tmp_path):
    """The header's duration says so, too; see test_timestamps.py for jumps that it does not bear out."""
    _gray_clip(tmp_path / "a.mp4", [0, 20, 40], [0, 100, 3_600_000])
    notes = []
    starts = [start for start, *_ in decode(tmp_path / "a.mp4", 32, 32, notes.append)]
    assert starts == pytest.approx([0, 0.1, 3600])
    assert notes == ["a frame is shown for more than 10 s (once, at 0.10 s; 3599.90 s)"]


def test_notes_are_logged_where_nobody_takes_them(tmp_path, caplog):
    path = stamped(tmp_path / "a.mkv", [0, 40, 40, 80])
    read_video(path, 32, 32, 12.0)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert (
        record.getMessage() == f"{path}: a frame has the time stamp of the next one and is not shown (once, at 0.04 s)"
    )


def test_error_survives_pickling():
    import pickle

    error = pickle.loads(pickle.dumps(VideoError("a.mp4", "it is damaged")))
    assert (error.path, error.reason, str(error)) == ("a.mp4", "it is damaged", "a.mp4: it is damaged")


def test_decoding_is_one_frame_at_a_time(tmp_path):
    make_clip(tmp_path / "a.mp4", shots=2, frames_per_shot=30)
    frames = decode(tmp_path / "a.mp4", 32, 48)
    start, end, frame = next(frames)
    assert (start, round(end * 12, 3), frame.shape) == (0.0, 1.0, (32, 48, 3))
    frames.close()


def test_impossible_output_is_named(tmp_path):
    with pytest.raises(VideoError, match=r"a\.mp4: frames of 33x48 .*even"):
        write_video(tmp_path / "a.mp4", np.zeros((2, 33, 48, 3), np.uint8), 12)
    with pytest.raises(VideoError, match="no frames"):
        write_video(tmp_path / "a.mp4", np.zeros((0, 32, 48, 3), np.uint8), 12)
    (tmp_path / "file").touch()
    with pytest.raises(VideoError, match=r"a\.mp4: it cannot be written"):
        write_video(tmp_path / "file" / "a.mp4", np.zeros((2, 32, 48, 3), np.uint8), 12)


def test_full_disk_leaves_the_old_file(tmp_path):
    """Past a limit on the file's size, writing fails as on a full disk; what lay under the name stays whole."""
    make_clip(tmp_path / "a.mp4")
    before = (tmp_path / "a.mp4").read_bytes()
    script = (
        "import resource, sys, numpy as np; from moc_jax.data.video import write_video;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000));"
        "write_video(sys.argv[1], np.random.default_rng(0).integers(0, 255, (20, 64, 64, 3), np.uint8), 12)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "a.mp4")], capture_output=True, text=True)
    assert done.returncode == 1
    assert f"VideoError: {tmp_path / 'a.mp4'}: it cannot be written (File too large)" in done.stderr
    assert (tmp_path / "a.mp4").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]
