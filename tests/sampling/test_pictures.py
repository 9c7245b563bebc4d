"""Pictures: everything in its column and row, and nothing half-written."""

import errno

import numpy as np
import pytest
from PIL import Image, ImageDraw

from moc_jax.sampling.generate import SamplingError
from moc_jax.sampling.pictures import contact_sheet, routing_picture, save_picture

COLOURS = np.array([[(200, 0, 0), (0, 200, 0), (0, 0, 200)], [(200, 200, 0), (0, 200, 200), (200, 0, 200)]], np.uint8)
LENGTHS = (5, 1, 9)


def make_rows():
    """Two versions of three shots, each of one colour that grows brighter by the frame."""
    return [
        (
            name,
            [
                np.stack([np.full((8, 20, 3), c, np.uint8) + np.uint8(2 * f) for f in range(n)])
                for c, n in zip(row, LENGTHS)
            ],
        )
        for name, row in zip(("training scene", "sample"), COLOURS)
    ]


def where(sheet, colour):
    """Bounding box (left, top, right, bottom) of the pixels of exactly this colour."""
    y, x = np.nonzero((np.asarray(sheet) == colour).all(axis=-1))
    return x.min(), y.min(), x.max(), y.max()


def test_contact_sheet_has_a_column_per_shot_and_a_row_per_version():
    captions = ["a red shot " * 20, "grün", "blue"]
    sheet = contact_sheet(make_rows(), captions, title="Colours " * 40, notes=["1 dB", "2 dB", "3 dB"], fps=12.0)
    boxes = np.array([[where(sheet, colour) for colour in row] for row in COLOURS])  # [row, shot, 4]: the first frames
    left, top, right, bottom = np.moveaxis(boxes, -1, 0)
    assert (left[:, 1:] > right[:, :-1]).all()
    assert (top[1] > bottom[0]).all()
    np.testing.assert_array_equal(left[0], left[1])
    np.testing.assert_array_equal(top, top[:, :1].repeat(3, axis=1))

    # Below the first frame lie the middle one and the last, for the shot of one frame nothing.
    for row, colours in enumerate(COLOURS):
        for shot, count in enumerate(LENGTHS):
            for frame in {count // 2, count - 1} - {0}:
                box = where(sheet, colours[shot] + np.uint8(2 * frame))
                assert box[0] == left[row, shot]
                assert box[1] > bottom[row, shot]
    pixels = np.asarray(sheet)
    below = pixels[bottom[0, 1] + 8 : top[1, 1] - 8, left[0, 1] : right[0, 1]]
    assert (below == below[0, 0]).all()


def test_contact_sheet_keeps_the_shape_of_frames_and_grows_with_captions():
    rows = [("sample", [np.zeros((3, 30, 10, 3), np.uint8)])]
    sheet = contact_sheet(rows, ["short"])
    left, top, right, bottom = where(sheet, (0, 0, 0))
    assert (right - left + 1) * 9 <= bottom - top + 1 <= (right - left + 1) * 9 + 10  # three frames of 1 : 3, and gaps
    assert contact_sheet(rows, ["long " * 60]).height > sheet.height


def test_a_caption_that_is_cut_says_so(monkeypatch):
    drawn, text = [], ImageDraw.ImageDraw.text

    def noted(self, at, line, *rest, **style):
        drawn.append(line)
        text(self, at, line, *rest, **style)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", noted)
    contact_sheet(make_rows()[:1], ["few words", "long " * 200, "long " * 10])
    assert "few words" in drawn
    assert len([line for line in drawn if line.endswith("long …")]) == 1  # not where all of ten words are shown


def test_contact_sheet_names_what_does_not_match():
    rows = make_rows()
    with pytest.raises(ValueError, match="the row 'training scene' has 3 shots, but there are 2 captions"):
        contact_sheet(rows, ["a", "b"])
    with pytest.raises(ValueError, match="1 notes for 3 shots"):
        contact_sheet(rows, ["a", "b", "c"], notes=["x"])


@pytest.mark.parametrize(("depth", "shots"), [(1, 1), (1, 2), (5, 3), (6, 5), (12, 20)])
def test_routing_picture_of_any_number_of_layers_and_shots(depth, shots):
    shares = np.random.default_rng(0).dirichlet(np.ones(shots), size=(depth, shots))
    picture = np.asarray(routing_picture(shares * np.tri(shots)[None], t=0.5))
    assert picture.ndim == 3
    assert picture.std() > 5
    edge = np.concatenate([picture[:3].reshape(-1, 3), picture[-3:].reshape(-1, 3), picture[:, :3].reshape(-1, 3)])
    assert (edge == edge[0]).all()  # nothing runs over the margins


def test_routing_picture_shows_shares_where_they_are():
    shares = np.zeros((1, 4, 4))
    shares[0, 3, 0] = shares[0, 1, 0] = shares[0, 2, 1] = 1
    picture = np.asarray(routing_picture(shares)).astype(int)
    dark = (picture[..., 2] - picture[..., 0] > 80)[:, : picture.shape[1] * 45 // 100]  # without the scale's bar
    y, x = np.nonzero(dark)
    second_column = x > (x.min() + x.max()) / 2
    assert y.min() < y[second_column].min()  # row 2 of the first column, then row 3 of the second
    assert y[second_column].max() < y.max()  # then row 4 of the first


def test_pictures_are_written_whole_or_not_at_all(tmp_path):
    save_picture(Image.new("RGB", (4, 4), "red"), tmp_path / "new" / "a.png")
    with Image.open(tmp_path / "new" / "a.png") as image:
        assert (image.size, image.format) == ((4, 4), "PNG")
    save_picture(Image.new("RGB", (4, 4), "red"), tmp_path / "a.JPG")
    with Image.open(tmp_path / "a.JPG") as image:
        assert image.format == "JPEG"

    class Broken:
        def save(self, path, *_, **__):
            with open(path, "wb") as file:
                file.write(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(SamplingError, match=r"a.png cannot be written \(No space left on device\); free some space"):
        save_picture(Broken(), tmp_path / "new" / "a.png")
    with pytest.raises(SamplingError, match=r"below.png cannot be written"):
        save_picture(Image.new("RGB", (4, 4)), tmp_path / "new" / "a.png" / "below.png")
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["a.png"]
    with Image.open(tmp_path / "new" / "a.png") as image:
        assert image.getpixel((0, 0)) == (255, 0, 0)


def test_shots_that_continue_the_one_before_are_marked(monkeypatch):
    written, text = [], ImageDraw.ImageDraw.text

    def watched(self, at, line, *arguments, **options):
        written.append(line)
        return text(self, at, line, *arguments, **options)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", watched)
    contact_sheet(make_rows(), ["a", "a", "b"], continues=[False, True, False])
    assert [line for line in written if "shot " in line] == ["shot 1", "→ shot 2", "shot 3"]
    shares = np.full((1, 3, 3), 0.2, np.float32)
    marked = routing_picture(shares, continues=[False, True, False])
    assert marked.tobytes() != routing_picture(shares).tobytes()
