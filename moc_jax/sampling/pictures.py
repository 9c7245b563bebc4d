"""Pictures of a sampled scene: a contact sheet of its shots, and which shots each shot reads from."""

import os
import textwrap
import typing
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from moc_jax.files import whole_file
from moc_jax.sampling.generate import SamplingError
from moc_jax.shapes import Float, UInt8, typed

if typing.TYPE_CHECKING:  # half a second, which only a run that draws spends
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap

PAPER, INK, FAINT = "#fcfcfa", "#1d2330", "#7d8493"
_MARGIN, _GAP, _FRAME_GAP = 28, 22, 4
_FRAMES = 3  # of each shot
_CAPTION_LINES = 6  # of each shot; a longer one ends with an ellipsis
_BLUES = "#f3f6fb", "#a9c8ea", "#3f83c4", "#12406f"


Row = tuple[str, Sequence[UInt8[np.ndarray, "_ Y X 3"]]]
"""A version of a scene: what it is, and the frames of each shot."""


class PictureError(SamplingError):
    """A picture that cannot be written: says which, and why."""


def save_picture(picture: Image.Image, path: str | os.PathLike, *, replace: bool = True) -> None:
    """Writes a PNG, or a JPEG if it is called so; it appears under its name only when it is complete.

    Raises:
        TakenError: there is another file, and it is not to be replaced; see `whole_file`.
        PictureError: the file cannot be written, for instance because the disk is full.
    """
    try:
        with whole_file(path, replace=replace) as partial:
            kind = "jpeg" if os.fspath(path).lower().endswith((".jpg", ".jpeg")) else "png"
            picture.save(os.fspath(partial), kind, quality=90)
    except OSError as error:
        raise PictureError(
            f"{os.fspath(path)} cannot be written ({error.strerror or error}); free some space, or write elsewhere"
        ) from error


# ------------------------------------------------------------------------------------------------ contact sheet


def contact_sheet(
    rows: Sequence[Row],
    captions: Sequence[str],
    *,
    title: str = "",
    notes: Sequence[str] = (),
    fps: float = 0.0,
    continues: Sequence[bool] = (),
) -> Image.Image:
    """One column per shot, one row per version of the scene, a few frames of each shot from its first to its last.

    Args:
        rows: for instance the original, what the codec makes of it, and the sample.
        captions: of each shot, written below its column.
        title: the global caption.
        notes: a line below each column's caption, for instance a score.
        fps: frames per second, for the durations in the columns' heads; 0 leaves them out.
        continues: which shots continue the one before, from the first on; an arrow in the column's head says so.

    Raises:
        ValueError: rows or notes that do not have one entry per caption.
    """
    columns = len(captions)
    _check_columns(rows, columns, notes)
    height, width = rows[0][1][0].shape[1:3]
    cell = max(140, min(300, 1900 // columns))
    shown = (cell, max(1, round(cell * height / width)))
    small, normal, large = (_font(size) for size in (13, 15, 22))
    # In columns narrower than a caption of some words, wrap by the measured width of an average letter.
    letters = max(12, int(cell / normal.getlength("n" * 20) * 20))
    texts = [
        textwrap.wrap(caption, letters, max_lines=_CAPTION_LINES, placeholder=" …") or [""] for caption in captions
    ]
    strip = _FRAMES * shown[1] + (_FRAMES - 1) * _FRAME_GAP
    label = 30
    head = _MARGIN + (42 if title else 0) + 26
    foot = 12 + 20 * max(map(len, texts)) + (24 if notes else 0) + _MARGIN
    size = (
        _MARGIN * 2 + label + columns * cell + (columns - 1) * _GAP,
        head + len(rows) * strip + (len(rows) - 1) * _GAP + foot,
    )
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    if title:
        draw.text((_MARGIN + label, _MARGIN - 6), _shortened(title, large, size[0] - 2 * _MARGIN - label), INK, large)

    for c in range(columns):
        left = _MARGIN + label + c * (cell + _GAP)
        seconds = f"  ·  {len(rows[0][1][c]) / fps:.1f} s" if fps else ""
        draw.text((left, head - 22), f"{'→ ' * any(continues[c : c + 1])}shot {c + 1}{seconds}", FAINT, small)
        for r, (_, shots) in enumerate(rows):
            _paste_strip(sheet, shots[c], (left, head + r * (strip + _GAP)), shown)
        bottom = head + len(rows) * strip + (len(rows) - 1) * _GAP + 10
        for n, line in enumerate(texts[c]):
            draw.text((left, bottom + 20 * n), line, INK, normal)
        if notes:
            draw.text((left, bottom + 20 * max(map(len, texts)) + 4), notes[c], FAINT, small)
    for r, (name, _) in enumerate(rows):
        _draw_upright(sheet, name, (_MARGIN, head + r * (strip + _GAP)), strip, normal)
    return sheet


def shots_sheet(
    frames: Sequence[UInt8[np.ndarray, "Y X 3"]], captions: Sequence[str], numbers: Sequence[int], columns: int = 8
) -> Image.Image:
    """One frame of each shot, in rows, with its number and the beginning of its caption: of long videos."""
    height, width = frames[0].shape[:2]
    shown = (200, max(1, round(200 * height / width)))
    small, columns = _font(13), min(columns, len(frames))
    rows, step = -(-len(frames) // columns), (shown[0] + _FRAME_GAP, shown[1] + 24)
    size = 2 * _MARGIN + columns * step[0] - _FRAME_GAP, 2 * _MARGIN + rows * step[1]
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    for k, (frame, caption, number) in enumerate(zip(frames, captions, numbers, strict=True)):
        left, top = _MARGIN + k % columns * step[0], _MARGIN + k // columns * step[1]
        sheet.paste(Image.fromarray(frame).resize(shown, Image.Resampling.BICUBIC), (left, top))
        draw.text((left, top + shown[1] + 3), _shortened(f"{number}  {caption}", small, shown[0]), FAINT, small)
    return sheet


def shown_frames(shot: UInt8[np.ndarray, "F Y X 3"]) -> UInt8[np.ndarray, "_ Y X 3"]:
    """The frames of a shot that a contact sheet shows, from its first to its last; of these it shows all."""
    return shot[np.linspace(0, len(shot) - 1, min(_FRAMES, len(shot))).round().astype(int)]


def _check_columns(rows: Sequence[Row], columns: int, notes: Sequence[str]) -> None:
    for name, shots in rows:
        if len(shots) != columns:
            raise ValueError(f"the row {name!r} has {len(shots)} shots, but there are {columns} captions")
    if notes and len(notes) != columns:
        raise ValueError(f"there are {len(notes)} notes for {columns} shots")


def _paste_strip(sheet: Image.Image, shot: np.ndarray, corner: tuple[int, int], shown: tuple[int, int]) -> None:
    for n, frame in enumerate(shown_frames(shot)):
        image = Image.fromarray(frame).resize(shown, Image.Resampling.BICUBIC)
        sheet.paste(image, (corner[0], corner[1] + n * (shown[1] + _FRAME_GAP)))


def _draw_upright(
    sheet: Image.Image, text: str, corner: tuple[int, int], length: int, font: ImageFont.FreeTypeFont
) -> None:
    strip = Image.new("RGB", (length, 24), PAPER)
    ImageDraw.Draw(strip).text((length / 2, 12), _shortened(text, font, length), INK, font, anchor="mm")
    sheet.paste(strip.rotate(90, expand=True), corner)


def _shortened(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text.rstrip()}…"


def _font(size: int) -> ImageFont.FreeTypeFont:
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size)


# ------------------------------------------------------------------------------------------------ routing


@typed
def routing_picture(
    shares: Float[np.ndarray, "depth S S"], *, t: float = 0.5, continues: Sequence[bool] = ()
) -> Image.Image:
    """One heat map per layer: row s shows how the picks of shot s divide among the shots; see `Sampler.routing`.

    `continues`: which shots continue the one before, from the first on; an arrow before the number says so.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize
    from matplotlib.figure import Figure

    depth, shots, _ = shares.shape
    columns = min(range(1, depth + 1), key=lambda c: (-depth % c > c // 4, abs(c / -(-depth // c) - 1.6)))
    rows = -(-depth // columns)
    most = max(0.1, np.ceil(shares.max() * 10 - 1e-6) / 10)  # many shots share little each: use the whole scale

    # All in inches, so that any number of layers and shots keeps its margins.
    side, gap_x, gap_y = min(4.5, max(1.9, 0.38 * shots)), 0.45, 0.6
    left, right, top, bottom = 0.85, 1.1, 1.25, 0.8
    width = max(6.4, left + columns * side + (columns - 1) * gap_x + right)
    height = top + rows * side + (rows - 1) * gap_y + bottom
    figure = Figure((width, height), dpi=130, facecolor=PAPER)
    canvas = FigureCanvasAgg(figure)
    colours = LinearSegmentedColormap.from_list("reads", _BLUES)

    def place(x: float, y: float, w: float, h: float):
        """Axes of w x h inches whose upper left corner lies x, y inches from the figure's."""
        return figure.add_axes((x / width, 1 - (y + h) / height, w / width, h / height))

    def write(x: float, y: float, text: str, size: float, colour: str = INK, **style):
        figure.text(x / width, 1 - y / height, text, size=size, color=colour, va="center", **style)

    for layer in range(depth):
        row, column = divmod(layer, columns)
        axes = place(left + column * (side + gap_x), top + row * (side + gap_y), side, side)
        _heat_map(axes, shares[layer], f"layer {layer + 1}", most, colours, continues)
    write(left, 0.38, "Which shots each shot reads from", 14, weight="bold")
    write(left, 0.68, f"share of the picks in %, at t = {t:g} over all heads; captions are always read", 9, FAINT)
    write(left + (columns * (side + gap_x) - gap_x) / 2, height - 0.32, "shot that is read", 10, ha="center")
    write(0.32, top + (height - top - bottom) / 2, "shot that reads", 10, rotation=90, ha="center")
    bar_at = left + columns * (side + gap_x) - gap_x + 0.3
    scale = ScalarMappable(Normalize(0, most), colours)
    bar = figure.colorbar(scale, cax=place(bar_at, top, 0.14, min(side, 2.5)), ticks=[0, most])
    bar.ax.set_yticklabels(["0 %", f"{100 * most:.0f} %"], size=8, color=INK)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


def _heat_map(
    axes: "Axes", shares: np.ndarray, title: str, most: float, colours: "Colormap", continues: Sequence[bool]
) -> None:
    shots = len(shares)
    shown = np.where(shares.sum(axis=1, keepdims=True) > 0, shares, np.nan)
    own = np.diag(shares) == 0
    shown[own, own] = np.nan
    axes.set_facecolor("#e6e6e3")  # the own shot, which is an anchor and no pick; and shots that pick nothing
    axes.imshow(shown, cmap=colours, vmin=0, vmax=most, aspect="equal")
    axes.set_title(title, size=10, color=INK, loc="left", pad=4)
    ticks = range(0, shots, 1 if shots <= 12 else -(-shots // 8))
    names = ["→" * any(continues[s : s + 1]) + str(s + 1) for s in ticks]
    axes.set_xticks(ticks, names, size=8, color=FAINT)
    axes.set_yticks(ticks, names, size=8, color=FAINT)
    axes.tick_params(length=0)
    for edge in axes.spines.values():
        edge.set_visible(False)
    for edge in range(1, shots):
        axes.axhline(edge - 0.5, color=PAPER, linewidth=1)
        axes.axvline(edge - 0.5, color=PAPER, linewidth=1)
    if shots <= 12:
        for s, r in zip(*np.nonzero(np.nan_to_num(shown) >= 0.005)):
            colour = PAPER if shown[s, r] > 0.45 * most else INK
            axes.text(r, s, f"{100 * shown[s, r]:.0f}", ha="center", va="center", size=8, color=colour)
        for s in np.flatnonzero(own).tolist():
            axes.text(s, s, "own", ha="center", va="center", size=7, color=FAINT)
