"""A world of real video: stories that return to places filmed once, which look different in every story.

A place is a window of a take, somewhere in its picture and its time, in colors of its own: turned in hue, of another
contrast, tint and brightness, mirrored or not. Its name (Avon, Brook, ...) says nothing about it. A **reveal** shows it
for the first time; its **recall**, a known number of shots later, shows what the take shows a second later, from a
window that lies elsewhere and moves otherwise. The shots between return to other places, or show places of no name.
The videos are those of three folders, one for each split, so that nothing of a test's was ever trained on.
"""

import dataclasses
import pathlib

import numpy as np

from evidence.footage import FOLDERS, FPS, HEIGHT, WIDTH, Footage, footage
from evidence.stories import CANDIDATES, COLUMNS, MOVES, ROWS, SIZE, Shot, Stories, Story
from moc_jax.shapes import Bool, Float32, UInt8

NAMES = ("Avon", "Brook", "Cove", "Dell", "Elm", "Ford", "Glen", "Hill")

_LATER = 6  # frames at most between the end of what a reveal shows and the begin of what its recall shows
_ZOOM = 1.0, 1.5  # pixels of footage for each of a frame's
_PAN = 0.8, 1.2  # pixels from frame to frame
_REACH = 7 + 1 + 5  # pixels that a window's middle is away from its place's at most
_BOX = 36  # rows and columns in the middle: what a recall shows there, its reveal has shown
_GRID, _BLOCK = 16, 4  # rows and columns of the points by which looks are compared, and of the blocks of points
_APART = 0.12  # root mean square between the blocks of two looks at least, and at most between a look's now and later
_CONTRAST = 0.1  # of a look's points, at least
_TRIES = 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """What is to be remembered."""

    first: int  # frame of the footage with which its reveal begins
    middle: tuple[float, float]  # of the window, column and row of the footage
    zoom: float
    mirrored: bool
    color: Float32[np.ndarray, "3 3"]  # a frame's RGB is color @ the footage's + shade, in 0..255
    shade: Float32[np.ndarray, " 3"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FilmedShot(Shot):
    """A window that moves over a place; `character` is the place's number."""

    window: Float32[np.ndarray, "F 2"]  # its middle from the place's on, column and row, in pixels of the frame
    after: int  # frames since the place's first
    nowhere: Place | None  # where `character` is None

    @property
    def box(self) -> Bool[np.ndarray, "F Y X"]:
        """The middle of the picture."""
        inside = np.abs(np.arange(SIZE) - (SIZE - 1) / 2) <= _BOX / 2
        return np.broadcast_to(inside[:, None] & inside, (len(self.window), SIZE, SIZE))


@dataclasses.dataclass(frozen=True, kw_only=True)
class FilmedStory(Story[Place]):
    """A story of places; they are the looks."""

    footage: Footage
    shots: tuple[FilmedShot, ...]

    def render_shot(self, index: int, look: Place | None = None) -> UInt8[np.ndarray, "F Y X 3"]:
        """One shot's frames; with `look`, as if its place were that one."""
        shot = self.shots[index]
        place = shot.nowhere if shot.character is None else self.looks[shot.character] if look is None else look
        assert place is not None
        at = np.arange(SIZE, dtype=np.float32) - np.float32((SIZE - 1) / 2)
        steps = place.zoom * (shot.window[:, :, None] + at)  # [F, 2, SIZE], of the footage
        x = place.middle[0] + (-steps[:, 0] if place.mirrored else steps[:, 0])
        (top, rows), (left, columns) = _weights(place.middle[1] + steps[:, 1], place), _weights(x, place)
        begin, (height, width) = place.first + shot.after, (of.shape[-1] for of in (rows, columns))
        cut = self.footage.frames[begin : begin + len(x), :, top : top + height, left : left + width]
        frames = rows[:, None] @ cut.astype(np.float32) @ columns.swapaxes(1, 2)[:, None]  # [F, 3, Y, X]
        frames = place.color @ frames.reshape(len(x), 3, -1) + place.shade[:, None]
        frames = np.clip(frames + np.float32(0.5), 0, 255).astype(np.uint8).reshape(-1, 3, SIZE, SIZE)
        return np.ascontiguousarray(np.moveaxis(frames, 1, 3))


@dataclasses.dataclass(frozen=True, kw_only=True)
class VideoWorld(Stories):
    """Stories cut from the videos of a folder, which lie in its folders of `FOLDERS`, one for each split."""

    clips: pathlib.Path = pathlib.Path("cache/clips")

    def __post_init__(self):
        self._check_cast(len(NAMES))
        if not 1 <= self.frames <= 9:
            raise ValueError(f"{self.frames} frames; choose 1..9, since windows leave the footage")
        if self.split not in range(len(FOLDERS)):
            raise ValueError(f"split {self.split}; there are 0..{len(FOLDERS) - 1}, one for each of {FOLDERS}")

    @property
    def identity(self) -> str:
        """Its settings and its videos, wherever they lie."""
        return f"{dataclasses.replace(self, clips=pathlib.Path())!r} of {self._footage.digest}"

    @property
    def size(self) -> int:
        """See `Stories`."""
        return SIZE

    @property
    def text_tokens(self) -> int:
        """See `Stories`."""
        return 10 * (1 + self.shots)

    @property
    def _footage(self) -> Footage:
        return footage(self.clips / FOLDERS[self.split])

    @property
    def _least(self) -> int:
        """Frames of a take from the first that a reveal shows to the last that its recall may show."""
        return 2 * self.frames + _LATER

    def story(self, seed: int) -> FilmedStory:
        """The story of that number: the reveals, then recalls and nameless places in any order.

        Raises:
            ValueError: no video has a take that is long enough, or too few of their places look different.
        """
        random = np.random.default_rng((self.split, seed))
        names = list(map(str, random.permutation(NAMES)))
        places = self._distinct_places(random)
        cast = self._cast(random)
        shots = tuple(self._shot(random, who, cast.index(who) == shot, names) for shot, who in enumerate(cast))
        return FilmedStory(
            caption=f"A story of {', '.join(names[: self.characters])}.",
            looks=places[: self.characters],
            strangers=places[self.characters :],
            footage=self._footage,
            shots=shots,
        )

    def _shot(self, random: np.random.Generator, who: int | None, reveal: bool, names: list[str]) -> FilmedShot:
        pan, row, column = (str(random.choice(list(of))) for of in (MOVES, ROWS, COLUMNS))
        steps = np.arange(self.frames, dtype=np.float32)[:, None] - (self.frames - 1) / 2
        middle = random.uniform(-1, 1, 2)
        later = self.frames + int(random.integers(_LATER + 1))
        if who is None or reveal:
            subject, after = "Elsewhere" if who is None else names[who], 0
        else:
            subject, after = f"{names[who]}, later, from {row} {column}", later
            middle += COLUMNS[column], ROWS[row]
        return FilmedShot(
            caption=f"{subject}. The camera moves {pan}.",
            character=who,
            window=(middle + steps * np.array(MOVES[pan]) * random.uniform(*_PAN)).astype(np.float32),
            after=after,
            nowhere=self._place(random) if who is None else None,
        )

    def _distinct_places(self, random: np.random.Generator) -> tuple[Place, ...]:
        """`CANDIDATES` places in random order, of which no two look alike, and each like itself when it returns."""
        found: list[Place] = []
        seen: list[np.ndarray] = []
        for _ in range(_TRIES):
            place = self._place(random)
            points, later = (_points(self._footage, place, frame) for frame in (self.frames // 2, self._least - 1))
            if points.std(axis=(0, 1)).mean() < _CONTRAST or _apart(points, later) > _APART:
                continue
            if all(_apart(points, other) > _APART for other in seen):
                found.append(place)
                seen.append(points)
            if len(found) == CANDIDATES:
                return tuple(found[i] for i in random.permutation(CANDIDATES))  # see world.distinct_looks
        raise ValueError(
            f"the videos of {self.clips / FOLDERS[self.split]} look too much alike: of {_TRIES} places only "
            f"{len(found)} look different, and a story needs {CANDIDATES}; add other videos"
        )

    def _place(self, random: np.random.Generator) -> Place:
        """Any window of any take that is long enough, each take as likely."""
        takes = self._footage.takes
        takes = takes[takes[:, 1] - takes[:, 0] >= self._least]
        if not len(takes):
            raise ValueError(
                f"no video of {self.clips / FOLDERS[self.split]} shows {self._least / FPS:.1f} seconds without a cut"
            )
        first, end = random.choice(takes)
        zoom = float(random.uniform(*_ZOOM))
        edge = zoom * (SIZE / 2 + _REACH + 1)
        color, shade = _coloring(random)
        return Place(
            first=int(random.integers(first, end - self._least + 1)),
            middle=(float(random.uniform(edge, WIDTH - edge)), float(random.uniform(edge, HEIGHT - edge))),
            zoom=zoom,
            mirrored=bool(random.random() < 0.5),
            color=color,
            shade=shade,
        )


def _coloring(random: np.random.Generator) -> tuple[Float32[np.ndarray, "3 3"], Float32[np.ndarray, " 3"]]:
    """Hue, saturation, tint, contrast and brightness, as an affine function of RGB."""
    turn, gray = random.uniform(-np.pi, np.pi), np.full((3, 3), 1 / 3)
    across = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / np.sqrt(3)  # turns about the axis of grays
    hue = gray + np.cos(turn) * (np.eye(3) - gray) + np.sin(turn) * across
    saturation = random.uniform(0.7, 1.3)
    gain = random.uniform(0.75, 1.2) * random.uniform(0.85, 1.15, 3)
    color = gain[:, None] * (gray + saturation * (hue - gray))
    return color.astype(np.float32), random.uniform(-20, 20, 3).astype(np.float32) + np.float32(128) * (1 - gain)


def _weights(at: np.ndarray, place: Place) -> tuple[int, Float32[np.ndarray, "F Y n"]]:
    """How rows or columns of the footage, from the returned one on, make those of the frame at these places.

    A triangle as wide as a frame's pixel, so that no detail flickers.
    """
    first = int(np.floor(at.min() - place.zoom))
    apart = np.abs(np.arange(first, int(np.ceil(at.max() + place.zoom))) - at[:, :, None])
    weights = np.maximum(0, 1 - apart / place.zoom)
    return first, (weights / weights.sum(axis=2, keepdims=True)).astype(np.float32)


def _points(of: Footage, place: Place, frame: int) -> Float32[np.ndarray, "16 16 3"]:
    """Some points of the place, so many frames after its first, in 0..1."""
    at = place.zoom * SIZE / _GRID * (np.arange(_GRID) - (_GRID - 1) / 2)
    columns, rows = (np.round(middle + at).astype(int) for middle in place.middle)
    shown = of.frames[place.first + frame][:, rows[:, None], columns[::-1] if place.mirrored else columns]
    return np.clip(np.moveaxis(shown, 0, 2) @ place.color.T + place.shade, 0, 255) / np.float32(255)


def _apart(points: np.ndarray, other: np.ndarray) -> float:
    """How much they differ, in blocks."""
    blocks = (points - other).reshape(_GRID // _BLOCK, _BLOCK, _GRID // _BLOCK, _BLOCK, 3).mean((1, 3))
    return float(np.sqrt(np.mean(blocks**2)))
