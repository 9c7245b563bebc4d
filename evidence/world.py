"""A rendered world whose characters and places look different in every scene: what only memory can tell.

A scene is a pure function of its seed. It has a cast of characters and places with neutral names (Ada, Ben, ...; the
harbor, the mill, ...). How each looks is drawn for the scene: the name says nothing about it. A **reveal** shows one
character for the first time; its **recall**, a known number of shots later, shows it again, once. Motion, camera and
light change between the two, so that a copied frame is wrong: the look must be known, not the picture. The shots
between are of other characters, or of a place alone.

A character is a closed curve with lobes, r(a) = r0 (1 + depth cos(lobes a)), filled with two colors in a pattern
(stripes, checks, rings or dots) and marked with a spot of a third. A place is a panorama of two ground colors, split at
the horizon, with waves of its own direction, wave length and shape. The first colors of a scene's characters lie at
least `_APART` from each other, so that telling them apart does not hang on a shade.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from evidence.stories import CANDIDATES, COLUMNS, MOVES, ROWS, SIZE, Shot, Stories, Story
from moc_jax.shapes import Bool, Float, Float32, UInt8

NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gwen", "Hugo")
SPOTS = ("harbor", "mill", "garden", "station", "market", "bridge", "tower", "quarry")
LIGHTS = {"day": (1.0, 1.0, 1.0), "evening": (1.0, 0.86, 0.7), "night": (0.55, 0.62, 0.85)}

_BOX = 28  # rows and columns of the box around a character
_FRAMES = 15  # of a shot, in which the fastest character stays inside of the smallest frames
_WALK, _PAN = 1.4, 1.6  # the most pixels from frame to frame, of a character and of the camera
_APART = 0.3  # between the first colors of two looks, in RGB's unit cube
_TOGETHER = 2**17  # values that are drawn at a time: what they need stays in the cache


@dataclasses.dataclass(frozen=True, kw_only=True)
class Look:
    """How a character looks."""

    colors: Float32[np.ndarray, "3 3"]  # of the body's two parts, and of the spot; 0..1
    lobes: int
    depth: float
    pattern: int  # stripes, checks, rings, dots
    waves: float  # of the pattern, per radius
    turn: float  # of the pattern, in radians
    spot: tuple[float, float]  # its middle, in radii


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ground:
    """What a place shows above or below its horizon: waves from one color towards another."""

    colors: Float32[np.ndarray, "2 3"]
    slope: tuple[float, float]  # of the waves' phase along columns and rows, in radians per `SIZE` pixels
    phase: float
    sharp: bool

    def waves(
        self, x: Float[np.ndarray, " columns"], y: Float[np.ndarray, " rows"]
    ) -> Float32[np.ndarray, "rows columns"]:
        """At these places: sin(a + b) = sin a cos b + cos a sin b."""
        a, b = self.slope[0] * x, self.slope[1] * y + self.phase
        of_columns, of_rows = np.array([np.sin(a), np.cos(a)]), np.array([np.cos(b), np.sin(b)])
        wave = of_rows.T.astype(np.float32) @ of_columns.astype(np.float32)
        return np.copysign(np.sqrt(np.abs(wave)), wave) if self.sharp else wave


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """A panorama that the camera looks at."""

    horizon: tuple[float, float, float, float]  # its row, and its waves' height, slope and phase
    above: Ground
    below: Ground

    def panorama(self, rows: range, columns: range) -> Float32[np.ndarray, "rows columns*3"]:
        """Part of it, the colors of a pixel side by side."""
        x, y = np.array(columns) / SIZE, np.array(rows) / SIZE
        row, height, slope, phase = self.horizon
        below = y[:, None] > row + height * np.sin(slope * x + phase)
        share = np.where(below, self.below.waves(x, y), self.above.waves(x, y)).repeat(3, axis=1)
        below = below.repeat(3, axis=1)
        (base, tint), (of_base, of_tint) = (np.tile(ground.colors, len(x)) for ground in (self.above, self.below))
        share *= np.where(below, np.float32(0.18) * (of_tint - of_base), np.float32(0.18) * (tint - base))
        share += np.where(below, of_base, base)
        return np.clip(share, 0, 1, out=share)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DrawnShot(Shot):
    """One shot of a character, or of a place alone."""

    place: int
    size: int  # rows and columns of a frame
    path: Float32[np.ndarray, "F 2"]  # the character's middle, column and row, in pixels
    spin: Float32[np.ndarray, " F"]  # radians
    radius: float  # pixels
    camera: Float32[np.ndarray, "F 2"]  # the frame's corner in the panorama, column and row
    light: tuple[float, float, float]
    still: bool  # all frames are the first

    @property
    def box(self) -> Bool[np.ndarray, "F Y X"]:
        """Around the character, of equal size in all shots."""
        at = np.arange(self.size)
        rows, columns = (np.abs(at - self.path[:, [axis]]) <= _BOX / 2 for axis in (1, 0))
        return rows[:, :, None] & columns[:, None, :]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DrawnStory(Story[Look]):
    """A story of drawn characters in drawn places."""

    places: tuple[Place, ...]
    shots: tuple[DrawnShot, ...]

    def render_shot(self, index: int, look: Look | None = None) -> UInt8[np.ndarray, "F Y X 3"]:
        """One shot's frames; with `look`, as if its character looked so."""
        shot = self.shots[index]
        who = None if shot.character is None else self.looks[shot.character] if look is None else look
        frames = 1 if shot.still else len(shot.camera)
        left, top = np.floor(shot.camera[:frames].min(axis=0)).astype(int)
        right, bottom = np.floor(shot.camera[:frames].max(axis=0)).astype(int) + shot.size + 1
        panorama = self.places[shot.place].panorama(range(top, bottom), range(left, right))
        light = np.tile(np.float32(255) * np.array(shot.light, np.float32), shot.size)
        drawn = np.empty((frames, shot.size, 3 * shot.size), np.uint8)
        together = max(1, _TOGETHER // (3 * shot.size**2))
        for first in range(0, frames, together):
            some = slice(first, min(first + together, frames))
            view = _views(panorama, shot.camera[some] - (left, top), shot.size)
            if who is not None:
                _draw(view, shot, some, who)
            view *= light
            view += np.float32(0.5)
            drawn[some] = view
        return drawn.reshape(frames, shot.size, shot.size, 3).repeat(len(shot.camera) // frames, axis=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class World(Stories):
    """Rendered stories."""

    places: int = 3
    size: int = SIZE
    """Rows and columns of a frame, in pixels. Characters are as large in any, and anywhere in it."""
    still: bool = False
    """Nothing moves, it is always day, and characters stand upright in the middle: to find the look is all there is."""
    mixed: Literal["", "names", "words"] = ""
    """Some shots are as in a still world, a share of them that is drawn for each story; their captions are names, as
    there, or as many words as the others have."""

    def __post_init__(self):
        self._check_cast(len(NAMES))
        if self.mixed not in ("", "names", "words"):
            raise ValueError(f"mixed is {self.mixed!r}; choose 'names', 'words' or ''")
        if self.still and self.mixed:
            raise ValueError("still and mixed: choose one, since a still world has no other shots")
        if not 1 <= self.places <= len(SPOTS):
            raise ValueError(f"{self.places} places; choose 1..{len(SPOTS)}, since each has a name")
        if self.size < SIZE:
            raise ValueError(f"frames of {self.size} pixels; choose {SIZE} or more, since characters take {_BOX}")
        most = _FRAMES + int((self.size - SIZE) / _WALK)
        if not 1 <= self.frames <= most:
            raise ValueError(f"{self.frames} frames; choose 1..{most}, since characters leave the picture")

    @property
    def text_tokens(self) -> int:
        """Enough for all captions of any story, with a begin token each."""
        return (5 if self.still else 16) * (1 + self.shots)

    @property
    def recolorable(self) -> bool:
        """Still worlds alone: all colors are drawn alike, and there is no light to change them."""
        return self.still

    @property
    def _more(self) -> int:
        """Frames of a shot beyond those that the smallest frames and panoramas have room for."""
        return max(self.frames - _FRAMES, 0)

    @property
    def _margin(self) -> int:
        """Pixels of panorama around a frame, for the camera."""
        return 32 + int(np.ceil(_PAN / 2 * self._more))

    def story(self, seed: int) -> DrawnStory:
        """The story of that number: the reveals, then recalls and empty places in any order."""
        random = np.random.default_rng((self.split, seed))
        names, spots = (list(map(str, random.permutation(of))) for of in (NAMES, SPOTS))
        looks = distinct_looks(random)
        places = tuple(draw_place(random, self.size, self._margin) for _ in range(self.places))
        cast = self._cast(random)
        still = random.random() if self.mixed else float(self.still)
        return DrawnStory(
            caption=f"A story of {', '.join(names[: self.characters])}.",
            looks=looks[: self.characters],
            strangers=looks[self.characters :],
            places=places,
            shots=tuple(self._shot(random, who, names, spots, still) for who in cast),
        )

    def _shot(
        self, random: np.random.Generator, who: int | None, names: Sequence[str], spots: Sequence[str], still: float
    ) -> DrawnShot:
        place = int(random.integers(self.places))
        move, pan = _one_of(random, MOVES), _one_of(random, MOVES)
        light = _one_of(random, LIGHTS)
        steps = np.arange(self.frames, dtype=np.float32)[:, None] - (self.frames - 1) / 2
        row, column = _one_of(random, ROWS), _one_of(random, COLUMNS)
        reach = 1 + ((self.size - SIZE) - _WALK * self._more) / (2 * ROWS["bottom"])
        middle = self.size / 2 + reach * np.array([COLUMNS[column], ROWS[row]]) + random.uniform(-1, 1, 2)
        corner = self._margin + random.uniform(-10, 10, 2)
        if self.still or (still and random.random() < still):
            subject = "Nobody is" if who is None else f"{names[who]} stands still, center middle,"
            told = f"{subject} in the {spots[place]}, by day. The camera stands still."
            return DrawnShot(
                caption=told if self.mixed == "words" else "Nobody." if who is None else f"{names[who]}.",
                place=place,
                size=self.size,
                character=who,
                path=np.full((self.frames, 2), self.size / 2, np.float32),
                spin=np.zeros(self.frames, np.float32),
                radius=11.5,
                camera=np.full((self.frames, 2), self._margin, np.float32),
                light=LIGHTS["day"],
                still=True,
            )
        subject = "Nobody is" if who is None else f"{names[who]} moves {move}, {row} {column},"
        return DrawnShot(
            caption=f"{subject} in the {spots[place]}, by {light}. The camera moves {pan}.",
            place=place,
            size=self.size,
            character=who,
            path=(middle + steps * np.array(MOVES[move]) * random.uniform(0.6, _WALK)).astype(np.float32),
            spin=(random.uniform(0, 2 * np.pi) + steps[:, 0] * random.uniform(-0.12, 0.12)).astype(np.float32),
            radius=float(random.uniform(8.5, 11.5)),
            camera=(corner + steps * np.array(MOVES[pan]) * random.uniform(0.8, _PAN)).astype(np.float32),
            light=LIGHTS[light],
            still=False,
        )


def _one_of(random: np.random.Generator, names: Iterable[str]) -> str:
    among = list(names)
    return among[int(random.integers(len(among)))]


def distinct_looks(random: np.random.Generator) -> tuple[Look, ...]:
    """`CANDIDATES` looks in random order, of which no two have near colors."""
    found: list[Look] = []
    colors = np.empty((CANDIDATES, 3), np.float32)
    while len(found) < CANDIDATES:
        look = draw_look(random)
        if (np.linalg.norm(colors[: len(found)] - look.colors[0], axis=1) > _APART).all():
            colors[len(found)] = look.colors[0]
            found.append(look)
    # The later ones had to keep clear of the earlier ones: in their own order, the place would tell something.
    return tuple(found[i] for i in random.permutation(CANDIDATES))


def draw_look(random: np.random.Generator) -> Look:
    """Any look."""
    return Look(
        colors=random.uniform(0, 1, (3, 3)).astype(np.float32),
        lobes=int(random.integers(2, 8)),
        depth=float(random.uniform(0.05, 0.3)),
        pattern=int(random.integers(4)),
        waves=float(random.uniform(0.8, 2.2)),
        turn=float(random.uniform(0, np.pi)),
        spot=tuple(random.uniform(-0.45, 0.45, 2)),
    )


def draw_place(random: np.random.Generator, size: int, margin: int) -> Place:
    """Any panorama, for frames of this size with a margin around the first."""
    row = (margin - size / 2 + random.uniform(0.6, 1.3) * size) / SIZE
    slope, phase = random.uniform(3, 9), random.uniform(0, 6)
    return Place(horizon=(row, 0.06, slope, phase), above=_draw_ground(random), below=_draw_ground(random))


def _draw_ground(random: np.random.Generator) -> Ground:
    colors = random.uniform(0.1, 0.9, (2, 3)).astype(np.float32)
    angle, length, phase = random.uniform(0, np.pi), random.uniform(6, 26), random.uniform(0, 6)
    slope = length * np.cos(angle), length * np.sin(angle)
    return Ground(colors=colors, slope=slope, phase=phase, sharp=random.random() >= 0.5)


def _views(
    panorama: Float32[np.ndarray, "rows columns*3"], camera: Float[np.ndarray, "F 2"], size: int
) -> Float32[np.ndarray, "F Y X*3"]:
    """The panorama at the camera's corners, between pixels."""
    whole = np.floor(camera).astype(int)
    u, v = (camera - whole).astype(np.float32).T[..., None, None]
    cut = sliding_window_view(panorama, (size + 1, 3 * (size + 1)))[whole[:, 1], 3 * whole[:, 0]]
    rows = cut[:, 1:] - cut[:, :-1]
    rows *= v
    rows += cut[:, :-1]
    views = rows[:, :, 3:] - rows[:, :, :-3]
    views *= u
    views += rows[:, :, :-3]
    return views


def _draw(views: Float32[np.ndarray, "F Y X*3"], shot: DrawnShot, frames: slice, look: Look) -> None:
    """The character, into views of these frames."""
    path = shot.path[frames]
    corner = np.ceil(path - _BOX / 2)  # so that all of it lies in `box`
    at = np.arange(_BOX, dtype=np.float32)
    x, y = (at + (corner - path).T[..., None]) / np.float32(shot.radius)  # [F, box]
    cos, sin = np.cos(shot.spin[frames])[:, None, None], np.sin(shot.spin[frames])[:, None, None]
    x, y = x[:, None, :], y[:, :, None]
    x, y = x * cos + y * sin, y * cos - x * sin  # [F, box, box], in radii, turned with the character
    distance = np.sqrt(x * x + y * y)
    edge = 1 + look.depth * _cosine_of_multiple(look.lobes, x / np.maximum(distance, np.float32(1e-6)))
    inside, share, spot = (
        of.repeat(3, axis=2)
        for of in (
            np.clip((edge - distance) * np.float32(shot.radius) + np.float32(0.5), 0, 1),
            _pattern(look, x, y, distance),
            (x - np.float32(look.spot[0])) ** 2 + (y - np.float32(look.spot[1])) ** 2 < 0.28**2,
        )
    )
    first, second, of_spot = np.tile(look.colors, _BOX)  # as the colors of a row lie in `views`
    body = np.where(spot, of_spot, first + share * (second - first))
    left, top = corner.astype(int).T
    boxes = sliding_window_view(views, (_BOX, 3 * _BOX), axis=(1, 2), writeable=True)
    where = np.arange(len(views)), top, 3 * left
    behind = boxes[where]
    boxes[where] = behind + inside * (body - behind)


def _cosine_of_multiple(n: int, cosine: np.ndarray) -> np.ndarray:
    """cos(n a), of cos(a), by cos((n + 1) a) = 2 cos(a) cos(n a) - cos((n - 1) a)."""
    before, found = np.ones_like(cosine), cosine
    for _ in range(n - 1):
        before, found = found, 2 * cosine * found - before
    return found


def _pattern(look: Look, x: np.ndarray, y: np.ndarray, distance: np.ndarray) -> Float32[np.ndarray, "F box box"]:
    """The share of the second color, 0..1, with soft edges."""
    k = np.float32(np.pi * look.waves)
    u = x * np.float32(np.cos(look.turn)) + y * np.float32(np.sin(look.turn))
    v = y * np.float32(np.cos(look.turn)) - x * np.float32(np.sin(look.turn))
    wave = (
        lambda: np.sin(2 * k * u),
        lambda: np.sin(k * u) * np.sin(k * v),
        lambda: np.sin(2 * k * distance),
        lambda: np.cos(2 * k * u) + np.cos(2 * k * v) - 1,
    )[look.pattern]()
    return np.clip(0.5 + 2 * wave, 0, 1).astype(np.float32)
