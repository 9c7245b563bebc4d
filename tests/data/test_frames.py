"""What a player shows: fields, transparency, orientation, colours and shapes."""

import numpy as np
import pytest

from moc_jax.data.video import decode, read_video
from tests.data import odd_files
from tests.data.odd_files import SIZE, numbers


def _read(path, size=SIZE):
    notes = []
    return np.stack([frame for *_, frame in decode(path, *size, notes.append)]), notes


def _comb(frames):
    """How much neighbouring rows differ."""
    return np.abs(np.diff(frames.astype(int), axis=1)).mean()


class TestInterlaced:
    def test_fields_become_frames(self, tmp_path):
        frames, notes = _read(odd_files.interlaced(tmp_path / "a.mp4"))
        assert (len(frames), notes) == (10, [])
        assert _comb(frames) < 1 < 10 < _comb(odd_files.fields(10))
        # The bar is where it is in the first field of each frame.
        assert [int(frame[..., 0].mean(axis=0).argmax()) // 6 for frame in frames] == list(range(10))

    def test_time_stamps_survive(self, tmp_path):
        path = odd_files.interlaced(tmp_path / "a.mp4", [0, 1, 2, 10, 11])
        shown = list(decode(path, *SIZE))
        assert [round(start * 25, 3) for start, *_ in shown] == [0, 1, 2, 10, 11]

    def test_progressive_frames_are_not_touched(self, tmp_path):
        """Fine detail that a deinterlacer would blur."""
        detail = np.tile(np.array([16, 235], np.uint8)[None, :, None, None], (3, SIZE[0] // 2, SIZE[1], 3))
        frames, _ = _read(odd_files.write(tmp_path / "a.mp4", detail))
        assert _comb(frames) > 180


@pytest.mark.parametrize(
    ("name", "codec", "pixels"),
    [
        ("a.mov", "qtrle", "argb"),
        ("a.mov", "png", "rgba"),
        ("a.mkv", "ffv1", "bgra"),
        ("a.mov", "prores_ks", "yuva444p10le"),
        ("a.webm", "libvpx-vp9", "yuva420p"),
        ("a.apng", "apng", "rgba"),
    ],
)
def test_transparent_lies_over_black(tmp_path, name, codec, pixels):
    frames, notes = _read(odd_files.transparent(tmp_path / name, codec, pixels))
    quarter = SIZE[1] // 4
    assert frames[:, :, : quarter - 2].max() < 12
    assert frames[:, :, quarter + 2 : -quarter - 2].min() > 240
    assert notes == []


@pytest.mark.parametrize("codec", ["libvpx", "libvpx-vp9"])
def test_transparent_webm_is_turned_too(tmp_path, codec):
    """Its decoder is not the one to which the container's display matrix and colours are handed."""
    frames = np.zeros((2, *SIZE, 4), np.uint8)
    frames[:, :6, :12] = frames[..., 3:] = 255
    options = {"auto-alt-ref": "0", "deadline": "realtime"}
    marks = {"pixels": "yuva420p", "metadata": {"alpha_mode": "1"}, "rotation": (90, False, False), "color_trc": 18}
    seen, notes = _read(odd_files.write(tmp_path / "a.webm", frames, codec=codec, options=options, **marks), SIZE[::-1])
    assert seen[0, -12:, :6].min() > 200
    assert seen[0, :-16].max() < 40
    assert [note.partition(" and are")[0] for note in notes] == ["its colours are HDR (HLG, arib-std-b67)"]


def test_half_transparent_is_half_as_bright(tmp_path):
    frames = np.full((2, *SIZE, 4), (200, 100, 40, 128), np.uint8)
    seen, _ = _read(odd_files.write(tmp_path / "a.mov", frames, codec="png", pixels="rgba", options={}), (16, 32))
    np.testing.assert_allclose(seen, np.broadcast_to([100, 50, 20], seen.shape), atol=2)


@pytest.mark.parametrize(
    ("turn", "corner"),
    [
        ((0, False, False), "top left"),
        ((90, False, False), "bottom left"),
        ((180, False, False), "bottom right"),
        ((-90, False, False), "top right"),
        ((0, True, False), "top right"),
        ((0, False, True), "bottom left"),
        ((90, True, False), "bottom right"),
        ((-90, True, False), "top left"),
    ],
)
def test_turned_and_mirrored(tmp_path, turn, corner):
    """All eight orientations, each with a long and a short side, so that none passes for another."""
    path = odd_files.turned(tmp_path / "a.mp4", *turn)
    upright = turn[0] in (90, -90)
    seen, notes = _read(path, SIZE[::-1] if upright else SIZE)
    dark = seen[0].mean(-1)
    corners = {"top left": dark[:8, :8], "top right": dark[:8, -8:]}
    corners |= {"bottom left": dark[-8:, :8], "bottom right": dark[-8:, -8:]}
    assert max(corners, key=lambda name: corners[name].mean()) == corner
    # The mark is 12 by 6 as stored: which way it lies tells a turn from a mirror image.
    assert bool((dark > 128).any(axis=0).sum() > (dark > 128).any(axis=1).sum()) != upright
    assert notes == []


def test_other_angles_are_said(tmp_path):
    _, notes = _read(odd_files.turned(tmp_path / "a.mp4", 30))
    assert notes == ["it should be shown turned by 30 degrees: only quarter turns are applied"]


@pytest.mark.parametrize(("number", "name"), [(16, "PQ, smpte2084"), (18, "HLG, arib-std-b67")])
def test_hdr_is_named(tmp_path, number, name):
    _, notes = _read(odd_files.write(tmp_path / "a.mp4", odd_files.pictures(3), color_trc=number))
    assert notes == [f"its colours are HDR ({name}) and are used without tone mapping: they look flat and gray"]


@pytest.mark.parametrize(
    "pixels", ["yuv420p", "yuv444p", "yuvj420p", "gray", "yuv422p10le", "gray16le", "bgr0", "rgb48le"]
)
def test_pixels_of_any_kind(tmp_path, pixels):
    codec = "mjpeg" if pixels.startswith("yuvj") else "ffv1"
    frames, notes = _read(
        odd_files.write(tmp_path / "a.mkv", odd_files.pictures(9), codec=codec, pixels=pixels, options={})
    )
    assert (numbers(frames), notes) == (list(range(9)), [])
    np.testing.assert_allclose(frames, odd_files.pictures(9), atol=6)


@pytest.mark.parametrize("size", [(2, 2), (1, 700), (33, 47)])
def test_sizes_of_any_kind(tmp_path, size):
    frames = np.full((2, *size, 3), 90, np.uint8)
    seen, _ = _read(odd_files.write(tmp_path / "a.mkv", frames, codec="ffv1", pixels="bgr0", options={}))
    np.testing.assert_allclose(seen, np.full((2, *SIZE, 3), 90), atol=2)


def test_a_strip_is_cropped_before_it_is_scaled(tmp_path):
    """2 rows of 700 pixels, to cover 32 of 64: scaled as a whole, they would be 11 200 columns."""
    frames = np.zeros((1, 2, 700, 3), np.uint8)
    frames[:, :, 340:360] = 255
    path = odd_files.write(tmp_path / "a.mkv", frames, codec="ffv1", pixels="bgr0", options={})
    assert _read(path)[0].min() > 250


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.apng"])
def test_moving_pictures(tmp_path, name):
    codec, pixels = {"a.gif": ("gif", "gray"), "a.webp": ("libwebp_anim", "bgra"), "a.apng": ("apng", "rgb24")}[name]
    path = odd_files.write(tmp_path / name, odd_files.pictures(9), codec=codec, pixels=pixels, options={})
    assert numbers(read_video(path, *SIZE, 25)) == list(range(9))


@pytest.mark.parametrize("codec", ["mjpeg", "libwebp", "bmp", "tiff"])
def test_single_pictures(tmp_path, codec):
    end, pixels = {
        "mjpeg": ("jpg", "yuvj420p"),
        "libwebp": ("webp", "yuv420p"),
        "bmp": ("bmp", "bgr24"),
        "tiff": ("tiff", "rgb24"),
    }[codec]
    path = odd_files.write(tmp_path / f"a.{end}", odd_files.pictures(1, 77), codec=codec, pixels=pixels, options={})
    assert numbers(_read(path)[0]) == [77]


def test_size_changes_on_the_way(tmp_path):
    """As when a phone call switches its resolution: every frame covers the same size."""
    path = odd_files.changes_size(tmp_path / "a.ts")
    assert numbers(read_video(path, *SIZE, 25)) == list(range(20))
