"""Which device has which tokens of a scene that lies on many devices.

The devices of one scene are R groups of U: those of a group share their tokens and have other heads each. A group has
an equal part of EVERY frame, so that its queries cost as much as any other group's, whatever the lengths of the shots,
and where scenes are padded; a group's parts, frame after frame, are cut into W equal runs, one for each of its devices
(W = U, times the devices that share heads and MLP, for what is done token by token).

    frame f     [ part of group 0 | part of group 1 | ... ]                n tokens in R parts of G = s g
    group r     [ its part of frame 0 | of frame 1 | ... ]                 F parts of s pieces, in W runs
    text        [ run 0 | run 1 | ... ]                                    R W runs

A *piece*, g tokens of one frame, is the unit that runs are made of. Where n does not divide, the last groups' parts
reach back into the parts before: these tokens are computed twice, and the first ones count. What has to be added
besides are whole frames behind the last, and text behind the text.
"""

import dataclasses
import functools
import math

import jax.numpy as jnp
import numpy as np

from moc_jax.attention.layout import Queries, round_up
from moc_jax.config import ConfigError
from moc_jax.scene import TEXT, ChunkTable, SceneShape
from moc_jax.shapes import Array, Int, Shaped


@dataclasses.dataclass(frozen=True, kw_only=True)
class Deal:
    """Sizes of a scene and of what its devices have of it; what follows from them, and nothing else."""

    text: int
    """L: text tokens."""
    frames: int
    """F."""
    frame: int
    """n: tokens of a frame."""
    groups: int = 1
    """R: groups of devices, each with tokens of its own."""
    head_groups: int = 1
    """U: devices of a group, each with heads of its own."""
    sharing: int = 1
    """Devices that share heads and MLP: a device's run of tokens is cut once more for them."""

    @classmethod
    def of(cls, shape: SceneShape, *, groups: int, head_groups: int, sharing: int) -> "Deal":
        """For scenes of this shape."""
        frame = shape.rows * shape.columns
        return cls(
            text=shape.text_tokens,
            frames=shape.frames,
            frame=frame,
            groups=groups,
            head_groups=head_groups,
            sharing=sharing,
        )

    @property
    def devices(self) -> int:
        """Of one scene: the mesh's context axis."""
        return self.groups * self.head_groups

    @property
    def text_rows(self) -> int:
        """Text tokens and what is added behind."""
        return round_up(self.text, self.devices * self.sharing)

    @functools.cached_property
    def _cut(self) -> tuple[int, int, int]:
        """Frames with those added, pieces of a part, tokens of a piece: as few tokens as can be."""
        runs = self.head_groups * self.sharing

        def cut(pieces: int) -> tuple[int, int, int]:
            frames = round_up(self.frames, runs // math.gcd(pieces, runs))
            return frames, pieces, -(-self.frame // (self.groups * pieces))

        cuts = [cut(pieces) for pieces in range(1, runs + 1)]
        return min((c for c in cuts if c[1] == 1 or c[1] * c[2] <= self.frame), key=math.prod)

    @property
    def pieces(self) -> int:
        """Of a group's part of a frame."""
        return self._cut[1]

    @property
    def part(self) -> int:
        """G: tokens that a group has of each frame."""
        return self._cut[1] * self._cut[2]

    @property
    def group_rows(self) -> int:
        """Video tokens of a group, those of added frames included."""
        return self._cut[0] * self.part

    @property
    def video_rows(self) -> int:
        """Of all groups."""
        return self.groups * self.group_rows

    def first(self, group):
        """Where a group's part of a frame begins in it; `group` may be traced."""
        return jnp.minimum(group * self.part, self.frame - self.part)

    # -------------------------------------------------------------------------------------------- whole arrays

    def dealt(self, video: Shaped[Array, "B V *rest"]) -> Shaped[Array, "B _ *rest"]:
        """Tokens in memory's order -> in the devices' order [B, R F' G, ...]; zeros in added frames."""
        if self.devices * self.sharing == 1:
            return video
        batch, _, *rest = video.shape
        x = video.reshape(batch, self.frames, self.frame, *rest)
        x = jnp.pad(x, [(0, 0), (0, self._cut[0] - self.frames)] + [(0, 0)] * (x.ndim - 2))
        if self.groups > 1:
            first = np.minimum(np.arange(self.groups) * self.part, self.frame - self.part)
            x = jnp.moveaxis(x[:, :, first[:, None] + np.arange(self.part)], 2, 1)
        return x.reshape(batch, self.video_rows, *rest)

    def restored(self, video: Shaped[Array, "B _ *rest"]) -> Shaped[Array, "B V *rest"]:
        """What `dealt` dealt, back in memory's order."""
        if self.devices * self.sharing == 1:
            return video
        batch, _, *rest = video.shape
        return self.assembled(video.reshape(batch, self.groups, -1, self.part, *rest)[:, :, : self.frames])

    def assembled(self, parts: Shaped[Array, "B R _ G *rest"]) -> Shaped[Array, "B _ *rest"]:
        """All groups' parts of frames, of all or of some -> their tokens in memory's order."""
        batch, _, frames, _, *rest = parts.shape
        whole, more = divmod(self.frame, self.part)
        x = jnp.moveaxis(parts[:, :whole], 1, 2).reshape(batch, frames, whole * self.part, *rest)
        if more:
            x = jnp.concatenate([x, parts[:, whole, :, self.part - more :]], axis=2)
        return x.reshape(batch, frames * self.frame, *rest)

    def text_dealt(self, text: Shaped[Array, "B L *rest"]) -> Shaped[Array, "B _ *rest"]:
        """Text with what is added behind: zeros."""
        return jnp.pad(text, [(0, self.text_rows - self.text if i == 1 else 0) for i in range(text.ndim)])

    def of_pieces(self, of_frames: Shaped[Array, "B F *rest"]) -> Shaped[Array, "B _ *rest"]:
        """What frames have, for each piece [B, R F' s, ...]; that of the last frame in added ones."""
        frame = np.minimum(np.arange(self._cut[0]), self.frames - 1)
        if self.devices * self.sharing == 1:
            return of_frames
        return of_frames[:, np.tile(np.repeat(frame, self.pieces), self.groups)]

    # -------------------------------------------------------------------------------------------- a group's tokens

    def trimmed(self, text: Shaped[Array, "B _ H D"], video: Shaped[Array, "B _ H D"]) -> Shaped[Array, "B Q H D"]:
        """A group's text and video without what was added that `rows` doesn't know."""
        if self.groups == 1:
            text = text[:, : self.text]
        return jnp.concatenate([text, video[:, : self.frames * self.part]], axis=1)

    def filled(self, x: Shaped[Array, "B Q H D"]) -> tuple[Shaped[Array, "B _ H D"], Shaped[Array, "B _ H D"]]:
        """The inverse of `trimmed`; zeros where something was added."""
        run = self.text_rows // self.groups
        size = self.text if self.groups == 1 else run

        def more(x, count):
            return jnp.pad(x, ((0, 0), (0, count - x.shape[1]), (0, 0), (0, 0)))

        return more(x[:, :size], run), more(x[:, size:], self.group_rows)

    def rows(self, group) -> Int[Array, " Q"]:
        """The token of the table that each of a group's queries is: its run of text, then its parts of the frames.

        Beyond N where there is none, behind the text.
        """
        run = self.text_rows // self.groups
        text = group * run + jnp.arange(run, dtype=jnp.int32)
        frame = jnp.arange(self.frames, dtype=jnp.int32)[:, None] * self.frame
        video = self.text + frame + self.first(group) + jnp.arange(self.part, dtype=jnp.int32)[None]
        nowhere = self.text + self.frames * self.frame
        return jnp.concatenate([jnp.where(text < self.text, text, nowhere), video.reshape(-1)])

    def queries(self, table: ChunkTable, group) -> Queries:
        """A group's tokens as queries of the table's keys."""
        row, run = self.rows(group), self.text_rows // self.groups
        first = self.first(group)

        def before(token: Int[Array, "B C"]) -> Int[Array, "B C"]:
            """How many of the group's queries are tokens before this one, of text or of video."""
            video = token - self.text
            inside = jnp.clip(video % self.frame - first, 0, self.part)
            of_video = run + video // self.frame * self.part + inside
            return jnp.where(table.kind == TEXT, jnp.clip(token - group * run, 0, run), of_video).astype(jnp.int32)

        start = before(table.start)
        length = jnp.where(table.length > 0, before(table.start + table.length) - start, 0)
        chunk_of = table.chunk_of.at[:, row].get(mode="fill", fill_value=-1)
        return Queries(chunk_of, start, length, text_tokens=min(table.text_tokens, run), first_video=run, row=row)


def head_groups(heads: int, devices: int, wanted: int = 0) -> int:
    """U: the most groups of heads that divide `heads`, those of one tensor shard, and the devices of a scene.

    Args:
        wanted: So many instead; 0: the most.

    Raises:
        ConfigError: `wanted` does not divide both.
    """
    if wanted and (heads % wanted or devices % wanted):
        raise ConfigError(
            f"attention.head_groups = {wanted} must divide the {heads} heads that mesh.tensor leaves and mesh.context "
            f"= {devices}; 0 takes {math.gcd(heads, devices)}"
        )
    return wanted or math.gcd(heads, devices)
