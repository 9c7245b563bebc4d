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
from collections.abc import Sequence

import numpy as np

from moc_jax.shapes import Bool, Float32, UInt8

NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gwen", "Hugo")
SPOTS = ("harbor", "mill", "garden", "station", "market", "bridge", "tower", "quarry")
MOVES = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}
ROWS = {"top": -7.0, "center": 0.0, "bottom": 7.0}
COLUMNS = {"left": -7.0, "middle": 0.0, "right": 7.0}
LIGHTS = {"day": (1.0, 1.0, 1.0), "evening": (1.0, 0.86, 0.7), "night": (0.55, 0.62, 0.85)}

SIZE = 64  # rows and columns of a frame
_MARGIN = 32  # pixels of panorama around a frame, for the camera
_BOX = 28  # rows and columns of the box around a character
_FRAMES = 15  # of a shot, in which the fastest character stays inside
_APART = 0.3  # between the first colors of two looks, in RGB's unit cube
CANDIDATES = 16
"""Looks that a story has: its characters', and strangers' that nobody sees, to tell the characters from."""


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
class Place:
    """A panorama that the camera looks at."""

    panorama: Float32[np.ndarray, "rows columns 3"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shot:
    """What happens in one shot; `caption` says all of it but the looks."""

    caption: str
    place: int
    character: int | None
    path: Float32[np.ndarray, "F 2"]  # the character's middle, column and row, in pixels
    spin: Float32[np.ndarray, " F"]  # radians
    radius: float  # pixels
    camera: Float32[np.ndarray, "F 2"]  # the frame's corner in the panorama, column and row
    light: tuple[float, float, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Story:
    """A scene before it is rendered."""

    caption: str
    looks: tuple[Look, ...]
    strangers: tuple[Look, ...]
    """Of no character; exchangeable with `looks`, so that without memory each candidate is as likely as any other."""
    places: tuple[Place, ...]
    shots: tuple[Shot, ...]

    @property
    def recalls(self) -> list[tuple[int, int]]:
        """(recall, reveal): both shots of each character, by recall."""
        cast = [shot.character for shot in self.shots]
        pairs = ((shot, cast.index(who)) for shot, who in enumerate(cast) if who is not None)
        return [(shot, reveal) for shot, reveal in pairs if shot != reveal]


@dataclasses.dataclass(frozen=True, kw_only=True)
class World:
    """Which stories there are. Equal seeds give equal stories, whatever was rendered before."""

    shots: int = 12
    frames: int = 9
    """Of each shot."""
    characters: int = 4
    places: int = 3
    still: bool = False
    """Nothing moves, it is always day, and characters stand upright in the middle: to find the look is all there is."""
    split: int = 0
    """Stories of different splits have nothing in common."""

    def __post_init__(self):
        if not 1 <= self.characters <= min(len(NAMES), self.shots // 2):
            raise ValueError(
                f"{self.characters} characters in {self.shots} shots: each needs a reveal and a recall, and there are "
                f"{len(NAMES)} names; try {min(len(NAMES), self.shots // 2)}"
            )
        if not 1 <= self.places <= len(SPOTS):
            raise ValueError(f"{self.places} places; choose 1..{len(SPOTS)}, since each has a name")
        if not 1 <= self.frames <= _FRAMES:
            raise ValueError(f"{self.frames} frames; choose 1..{_FRAMES}, since characters leave the picture")

    @property
    def text_tokens(self) -> int:
        """Enough for all captions of any story, with a begin token each."""
        return (5 if self.still else 16) * (1 + self.shots)

    def story(self, seed: int) -> Story:
        """The story of that number: the reveals, then recalls and empty places in any order."""
        random = np.random.default_rng((self.split, seed))
        names, spots = (list(map(str, random.permutation(of))) for of in (NAMES, SPOTS))
        looks = distinct_looks(random)
        places = tuple(draw_place(random) for _ in range(self.places))
        everyone = range(self.characters)
        later = [*everyone, *[None] * (self.shots - 2 * self.characters)]
        cast = [*random.permutation(self.characters).tolist(), *(later[i] for i in random.permutation(len(later)))]
        return Story(
            caption=f"A story of {', '.join(names[who] for who in everyone)}.",
            looks=looks[: self.characters],
            strangers=looks[self.characters :],
            places=places,
            shots=tuple(self._shot(random, who, names, spots) for who in cast),
        )

    def _shot(self, random: np.random.Generator, who: int | None, names: Sequence[str], spots: Sequence[str]) -> Shot:
        place = int(random.integers(self.places))
        move, pan = random.choice(list(MOVES), 2)
        light = str(random.choice(list(LIGHTS)))
        steps = np.arange(self.frames, dtype=np.float32)[:, None] - (self.frames - 1) / 2
        row, column = str(random.choice(list(ROWS))), str(random.choice(list(COLUMNS)))
        middle = SIZE / 2 + np.array([COLUMNS[column], ROWS[row]]) + random.uniform(-1, 1, 2)
        corner = _MARGIN + random.uniform(-10, 10, 2)
        if self.still:
            return Shot(
                caption="Nobody." if who is None else f"{names[who]}.",
                place=place,
                character=who,
                path=np.full((self.frames, 2), SIZE / 2, np.float32),
                spin=np.zeros(self.frames, np.float32),
                radius=11.5,
                camera=np.full((self.frames, 2), _MARGIN, np.float32),
                light=LIGHTS["day"],
            )
        subject = "Nobody is" if who is None else f"{names[who]} moves {move}, {row} {column},"
        return Shot(
            caption=f"{subject} in the {spots[place]}, by {light}. The camera moves {pan}.",
            place=place,
            character=who,
            path=(middle + steps * np.array(MOVES[move]) * random.uniform(0.6, 1.4)).astype(np.float32),
            spin=(random.uniform(0, 2 * np.pi) + steps[:, 0] * random.uniform(-0.12, 0.12)).astype(np.float32),
            radius=float(random.uniform(8.5, 11.5)),
            camera=(corner + steps * np.array(MOVES[pan]) * random.uniform(0.8, 1.6)).astype(np.float32),
            light=LIGHTS[light],
        )


def distinct_looks(random: np.random.Generator) -> tuple[Look, ...]:
    """`CANDIDATES` looks in random order, of which no two have near colors."""
    found: list[Look] = []
    while len(found) < CANDIDATES:
        look = draw_look(random)
        if all(np.linalg.norm(look.colors[0] - other.colors[0]) > _APART for other in found):
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


def draw_place(random: np.random.Generator) -> Place:
    """Any panorama."""
    side = SIZE + 2 * _MARGIN
    y, x = np.mgrid[:side, :side].astype(np.float32) / SIZE
    horizon = random.uniform(0.6, 1.3) + 0.06 * np.sin(x * random.uniform(3, 9) + random.uniform(0, 6))
    panorama = np.empty((side, side, 3), np.float32)
    for below in (False, True):
        base, tint = random.uniform(0.1, 0.9, (2, 3)).astype(np.float32)
        angle, length = random.uniform(0, np.pi), random.uniform(6, 26)
        wave = np.sin(length * (x * np.cos(angle) + y * np.sin(angle)) + random.uniform(0, 6))
        share = np.where(random.random() < 0.5, wave, np.sign(wave) * np.sqrt(np.abs(wave)))[..., None]
        part = (y > horizon) == below
        panorama[part] = (base + 0.18 * share * (tint - base))[part]
    return Place(panorama=np.clip(panorama, 0, 1))


def render(story: Story) -> UInt8[np.ndarray, "F Y X 3"]:
    """All shots' frames, one shot after another."""
    return np.concatenate([render_shot(story, shot) for shot in range(len(story.shots))])


def render_shot(story: Story, index: int, look: Look | None = None) -> UInt8[np.ndarray, "F Y X 3"]:
    """One shot's frames; with `look`, as if its character looked so."""
    shot = story.shots[index]
    frames = _background(story.places[shot.place].panorama, shot.camera)
    if shot.character is not None:
        _draw(frames, shot, story.looks[shot.character] if look is None else look)
    frames *= np.float32(255) * np.array(shot.light, np.float32)
    return (frames + np.float32(0.5)).astype(np.uint8)


def boxes(shot: Shot) -> Bool[np.ndarray, "F Y X"]:
    """Where the shot's character may be: the box around it, of equal size in all shots."""
    at = np.arange(SIZE)
    rows, columns = (np.abs(at - shot.path[:, [axis]]) <= _BOX / 2 for axis in (1, 0))
    return rows[:, :, None] & columns[:, None, :]


def _background(panorama: np.ndarray, camera: np.ndarray) -> Float32[np.ndarray, "F Y X 3"]:
    """The panorama at the camera's corners, between pixels."""
    whole = np.floor(camera).astype(int)
    frames = np.empty((len(camera), SIZE, SIZE, 3), np.float32)
    for frame, (x, y), (u, v) in zip(frames, whole, camera - whole):
        cut = panorama[y : y + SIZE + 1, x : x + SIZE + 1]
        rows = cut[:-1] + v * (cut[1:] - cut[:-1])
        frame[:] = rows[:, :-1] + u * (rows[:, 1:] - rows[:, :-1])
    return frames


def _draw(frames: np.ndarray, shot: Shot, look: Look) -> None:
    """Puts the character into its box of every frame."""
    corner = np.ceil(shot.path - _BOX / 2).astype(int)  # so that all of it lies in `boxes`
    at = np.arange(_BOX, dtype=np.float32)
    x = (at + (corner[:, :1] - shot.path[:, :1]))[:, None, :] / np.float32(shot.radius)
    y = (at + (corner[:, 1:] - shot.path[:, 1:]))[:, :, None] / np.float32(shot.radius)
    cos, sin = np.cos(shot.spin)[:, None, None], np.sin(shot.spin)[:, None, None]
    x, y = x * cos + y * sin, y * cos - x * sin  # [F, box, box], in radii, turned with the character
    distance = np.hypot(x, y)
    edge = 1 + look.depth * np.cos(look.lobes * np.arctan2(y, x))
    inside = np.clip((edge - distance) * np.float32(shot.radius) + 0.5, 0, 1)[..., None]
    share = _pattern(look, x, y, distance)[..., None]
    spot = (np.hypot(x - look.spot[0], y - look.spot[1]) < 0.28)[..., None]
    body = np.where(spot, look.colors[2], look.colors[0] + share * (look.colors[1] - look.colors[0]))
    for frame, (left, top), alpha, color in zip(frames, corner, inside, body):
        cut = frame[top : top + _BOX, left : left + _BOX]
        cut += alpha * (color - cut)


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
