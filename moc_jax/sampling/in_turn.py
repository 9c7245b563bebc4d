"""Sampling shot by shot with what finished shots are read by kept: each call of the model computes one turn's shots.

Under `past` visibility a finished shot never changes, so its keys and values are computed once, at the noise level
`sample.history_noise` at which later shots see it, and kept on the devices (attention/kept.py). In each scene, turns
follow the shots: a take (shots that continue one another, which share their noise level) is one turn, and so is a given
shot, which is only kept.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from moc_jax.attention.api import SceneAttention
from moc_jax.attention.kept import Kept
from moc_jax.attention.layout import round_up
from moc_jax.config import BucketConfig, MoCConfig
from moc_jax.models import After, VideoModel
from moc_jax.scene import SceneLengths
from moc_jax.shapes import Array, Float, Int, Shaped, typed

_UNIT = 32  # tokens of text: scenes of other captions share programs
_NOBODY = -2  # no shot has this turn


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Turn:
    """Shots of each scene of a batch that follow each other, and the most of any turn."""

    first: Int[Array, " B"]
    count: Int[Array, " B"]
    shots: int = dataclasses.field(metadata={"static": True})
    frames: int = dataclasses.field(metadata={"static": True})
    text_tokens: int = dataclasses.field(metadata={"static": True})  # with the global caption's

    def twice(self) -> "Turn":
        """For both captions of guidance."""
        first, count = (jnp.concatenate([x, x]) for x in (self.first, self.count))
        return dataclasses.replace(self, first=first, count=count)

    @typed
    def cut(
        self,
        video: Float[Array, "B F Y X Z"],
        text: Float[Array, "B L E"],
        t: Float[Array, "B S"],
        lengths: SceneLengths,
    ) -> tuple[Array, Array, Array, SceneLengths]:
        """The turn's part of whole scenes: its video, the global and its captions, its noise levels, their lengths."""
        shot = self.first[:, None] + jnp.arange(self.shots)[None]
        mine = jnp.arange(self.shots)[None] < self.count[:, None]

        def of_shots(x: Array) -> Array:
            return jnp.where(mine, _rows(x, shot), 0)

        captions, shared = lengths.text_lengths[:, 1:], lengths.text_lengths[:, :1]
        row = jnp.arange(self.text_tokens)[None]
        texts = _rows(text, jnp.where(row < shared, row, row + self._before(captions)))
        frames = _rows(video, self._before(lengths.shot_frames) + jnp.arange(self.frames)[None])
        own = SceneLengths(of_shots(lengths.shot_frames), jnp.concatenate([shared, of_shots(captions)], axis=1))
        if lengths.clean_first is not None:
            own = dataclasses.replace(own, clean_first=mine & _rows(lengths.clean_first, shot))
        return frames, texts, of_shots(t), own

    @typed
    def spread(
        self, of_turn: Float[Array, "B _ Y X Z"], lengths: SceneLengths, frames: int
    ) -> Float[Array, "B F Y X Z"]:
        """The turn's frames where they are in whole scenes; zeros elsewhere."""
        at = jnp.arange(frames)[None] - self._before(lengths.shot_frames)
        shots = self._before(lengths.shot_frames, self.first + self.count) - self._before(lengths.shot_frames)
        inside = (at >= 0) & (at < shots)
        return jnp.where(inside[:, :, None, None, None], _rows(of_turn, at), 0)

    def _before(self, lengths: Int[Array, "B _"], shots: Int[Array, " B"] | None = None) -> Int[Array, "B 1"]:
        """What the shots before the turn, or the first `shots`, are together."""
        ends = jnp.pad(jnp.cumsum(lengths, axis=1), ((0, 0), (1, 0)))
        return jnp.take_along_axis(ends, (self.first if shots is None else shots)[:, None], axis=1)


def _rows(x: Shaped[Array, "B N *rest"], at: Int[Array, "B n"]) -> Shaped[Array, "B n *rest"]:
    """x at such rows; of rows that are not there, anything."""
    at = jnp.clip(at, 0, x.shape[1] - 1)
    return jnp.take_along_axis(x, at.reshape(*at.shape, *[1] * (x.ndim - 2)), axis=1)


@dataclasses.dataclass(frozen=True)
class Round:
    """What a batch of scenes goes through once: calls of the model from noise to video, for some shots of each."""

    now: np.ndarray | np.int32
    """Which of `Denoising`'s turns it is: of all scenes, or [B, 1]."""
    turn: Turn | None = None
    """The shots, where no others are computed."""

    @property
    def samples(self) -> bool:
        """False where it is only of given shots, which wait to be kept."""
        return bool(np.any(self.now >= 0))


def rounds_of(
    turn: np.ndarray, lengths: SceneLengths, texts: Sequence[Array], least: BucketConfig | None = None
) -> list[Round]:
    """The turns of scenes one after another; a scene may have fewer than others.

    Args:
        turn: [B, S]: `Denoising`'s turns; -1 for given shots and for padding.
        lengths: Of the scenes, as numpy arrays.
        texts: [B, P]: the lengths of captions, and of those that guidance steers away from.
        least: what turns have room for at least, so that other scenes' turns have the same shape.
    """
    frames = np.asarray(lengths.shot_frames)
    scenes = [_shots_of_turns(*of_scene) for of_scene in zip(turn, frames)]
    every = [(b, shots) for b, scene in enumerate(scenes) for shots in scene]
    words = [int(text[b, 0] + text[b, 1:][shots].sum()) for b, shots in every for text in texts]
    most = {
        "shots": max(len(shots) for _, shots in every),
        "frames": max(int(frames[b, shots].sum()) for b, shots in every),
        "text_tokens": round_up(max(words), _UNIT),
    }
    most = {name: max(size, getattr(least, name, 0)) for name, size in most.items()}
    found = []
    for index in range(max(map(len, scenes))):
        shots = [scene[index] if index < len(scene) else [] for scene in scenes]
        first = jnp.asarray([of[0] if of else 0 for of in shots], jnp.int32)
        count = jnp.asarray([len(of) for of in shots], jnp.int32)
        numbers = [of_scene[of[0]] if of else -1 for of_scene, of in zip(turn, shots)]
        now = np.array([[number if number >= 0 else _NOBODY] for number in numbers], np.int32)
        found.append(Round(now, Turn(first, count, **most)))
    return found


def _shots_of_turns(turn: np.ndarray, frames: np.ndarray) -> list[list[int]]:
    """The shots of each turn of one scene."""
    found: list[list[int]] = []
    for shot in np.flatnonzero(frames).tolist():
        if found and turn[shot] >= 0 and turn[shot] == turn[found[-1][0]]:
            found[-1].append(shot)
        else:
            found.append([shot])
    return found


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Past:
    """A turn, and what is kept of the shots before."""

    turn: Turn
    kept: Kept

    def _of(self, video: Array, text: Array, lengths: SceneLengths) -> tuple[Turn, After]:
        """The turn, and what it comes after, of whole scenes: once, or once for both captions of guidance."""
        turn = self.turn if len(self.turn.first) == len(video) else self.turn.twice()
        return turn, After(lengths, turn.first, self.kept, frames=video.shape[1], text_tokens=text.shape[1])

    def velocity(self, model: VideoModel, video, text, t, lengths, moc: MoCConfig, attention: SceneAttention) -> Array:
        """Of the turn's shots; zeros elsewhere. The arguments are the model's, of whole scenes."""
        turn, after = self._of(video, text, lengths)
        z, captions, levels, own = turn.cut(video, text, t, lengths)
        found = model(z, captions, levels, own, moc, attention=attention, after=after)
        return turn.spread(found, lengths, video.shape[1])

    def remember(self, model: VideoModel, video, text, t, lengths, moc: MoCConfig, attention: SceneAttention) -> Kept:
        """What is kept after the turn, whose shots `video` shows at noise levels `t`."""
        turn, after = self._of(video, text, lengths)
        z, captions, levels, own = turn.cut(video, text, t, lengths)
        return model.remember(z, captions, levels, own, moc, after, attention=attention)
