"""What every world has in common: stories whose shots show a look for the first time and, later, once more."""

import abc
import dataclasses
from typing import Any

import numpy as np

from moc_jax.shapes import Bool, UInt8

SIZE = 64  # rows and columns of a frame
CANDIDATES = 16
"""Looks that a story has: its characters', and strangers' that nobody sees, to tell the characters from."""
MOVES = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}
ROWS = {"top": -7.0, "center": 0.0, "bottom": 7.0}
COLUMNS = {"left": -7.0, "middle": 0.0, "right": 7.0}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shot(abc.ABC):
    """What happens in one shot; `caption` says all of it but the looks."""

    caption: str
    character: int | None

    @property
    @abc.abstractmethod
    def box(self) -> Bool[np.ndarray, "F Y X"]:
        """Where the look of the shot's character may show, and is asked for."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Story[Look](abc.ABC):
    """A scene before it is rendered."""

    caption: str
    looks: tuple[Look, ...]
    strangers: tuple[Look, ...]
    """Of no character; exchangeable with `looks`, so that without memory each candidate is as likely as any other."""
    shots: tuple[Shot, ...]

    @property
    def recalls(self) -> list[tuple[int, int]]:
        """(recall, reveal): both shots of each character, by recall."""
        cast = [shot.character for shot in self.shots]
        pairs = ((shot, cast.index(who)) for shot, who in enumerate(cast) if who is not None)
        return [(shot, reveal) for shot, reveal in pairs if shot != reveal]

    def render(self) -> UInt8[np.ndarray, "F Y X 3"]:
        """All shots' frames, one shot after another."""
        return np.concatenate([self.render_shot(shot) for shot in range(len(self.shots))])

    @abc.abstractmethod
    def render_shot(self, index: int, look: Look | None = None) -> UInt8[np.ndarray, "F Y X 3"]:
        """One shot's frames; with `look`, as if its character looked so."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stories(abc.ABC):
    """A world: which stories there are. Equal seeds give equal stories, whatever was rendered before."""

    shots: int = 12
    frames: int = 9
    """Of each shot."""
    characters: int = 4
    split: int = 0
    """Stories of different splits have nothing in common."""

    @property
    @abc.abstractmethod
    def size(self) -> int:
        """Rows and columns of a frame, in pixels."""

    @property
    def identity(self) -> str:
        """All that its stories depend on."""
        return repr(self)

    @property
    def recolorable(self) -> bool:
        """Whether a story in any other order of channels, or with some inverted, is as likely."""
        return False

    @property
    @abc.abstractmethod
    def text_tokens(self) -> int:
        """Enough for all captions of any story, with a begin token each."""

    @abc.abstractmethod
    def story(self, seed: int) -> Story[Any]:
        """The story of that number."""

    def _cast(self, random: np.random.Generator) -> list[int | None]:
        """Who is in each shot: the reveals, then recalls and shots of nobody in any order."""
        later = [*range(self.characters), *[None] * (self.shots - 2 * self.characters)]
        return [*random.permutation(self.characters).tolist(), *(later[i] for i in random.permutation(len(later)))]

    def _check_cast(self, names: int) -> None:
        if not 1 <= self.characters <= min(names, self.shots // 2):
            raise ValueError(
                f"{self.characters} characters in {self.shots} shots: each needs a reveal and a recall, and there are "
                f"{names} names; try {min(names, self.shots // 2)}"
            )
