"""Shots that follow finished ones: where they stand in the whole scene, whose earlier shots are kept."""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from moc_jax.attention.api import RoutedAttention, SceneAttention, scene_keys
from moc_jax.attention.continued import Given, OverKept, Seen, remembered
from moc_jax.attention.deal import Deal
from moc_jax.attention.kept import Kept, Size
from moc_jax.attention.sharded import QKV, OverMesh
from moc_jax.config import ConfigError, MoCConfig, ModelConfig, WanConfig
from moc_jax.models.layers import shot_means
from moc_jax.models.patches import scene_shape
from moc_jax.scene import ChunkTable, SceneLengths, SceneShape, chunk_table, max_chunks
from moc_jax.shapes import Array, Float32, Int, Key, Shaped, typed

Wanted = Literal["velocity", "routes", "means", "new"]
"""What a forward pass is for."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class After:
    """The whole scene that given shots belong to, and what is kept of the shots before them."""

    lengths: SceneLengths  # of all its shots and captions, in latent frames
    first: Int[Array, " B"]  # of its shots, the first given one
    kept: Kept
    frames: int = dataclasses.field(metadata={"static": True})  # latent, of the whole scene and what fills it up
    text_tokens: int = dataclasses.field(metadata={"static": True})


@dataclasses.dataclass(frozen=True)
class Standing:
    """Where given tokens stand in the whole scene."""

    lengths: SceneLengths  # of the whole scene, in tokens
    shape: SceneShape
    given: Given
    kept: Kept  # of the shots before

    @typed
    def of_given(self, whole: Shaped[Array, "B N *rest"]) -> Shaped[Array, "B n *rest"]:
        """What the given ones of all tokens have; of padding, anything."""
        at = jnp.minimum(self.given.token, whole.shape[1] - 1)
        return jnp.take_along_axis(whole, at.reshape(*at.shape, *[1] * (whole.ndim - 2)), axis=1)


def standing(
    after: After,
    video: tuple[int, ...],
    lengths: SceneLengths,
    shape: SceneShape,
    cfg: ModelConfig,
    moc: MoCConfig,
    key: object,
) -> Standing:
    """Where shots stand that are latents of shape `video`, with `lengths` and `shape` in tokens.

    Raises:
        ConfigError: what is kept would not be what the whole scene would compute.
    """
    _check(moc, cfg, key)
    sizes = (video[0], after.frames, *video[2:])
    whole, of_whole = scene_shape(cfg, sizes, (video[0], after.text_tokens), after.lengths)
    frame, at = whole.rows * whole.columns, after.first[:, None]

    def before(lengths: Int[Array, "B _"]) -> Int[Array, "B 1"]:
        """What the first `at` of these are together."""
        ends = jnp.pad(jnp.cumsum(lengths, axis=1), ((0, 0), (1, 0)))
        return jnp.take_along_axis(ends, at, axis=1)

    row = jnp.arange(shape.text_tokens)[None]
    shared = lengths.text_lengths[:, :1]  # of the global caption
    text = jnp.where(row < shared, row, row + before(of_whole.text_lengths[:, 1:]))
    text = jnp.where(row < jnp.sum(lengths.text_lengths, axis=1, keepdims=True), text, whole.tokens)
    row = jnp.arange(shape.video_tokens)[None]
    of_video = whole.text_tokens + frame * before(of_whole.shot_frames) + row
    of_video = jnp.where(row < frame * jnp.sum(lengths.shot_frames, axis=1, keepdims=True), of_video, whole.tokens)
    given = Given.of(
        chunk_table(of_whole, whole, moc.chunk),
        jnp.concatenate([text, of_video], axis=1),
        after.first,
        after.first + jnp.sum(lengths.shot_frames > 0, axis=1),
        text_tokens=shape.text_tokens,
        shots=shape.shots,
    )
    return Standing(of_whole, whole, given, after.kept)


def _check(moc: MoCConfig, cfg: ModelConfig, key: object) -> None:
    why = why_not(moc, cfg) or ("drop-off and drop-in are drawn for whole scenes" if key is not None else "")
    if why:
        raise ConfigError(f"finished shots can't be kept: {why}")


def why_not(moc: MoCConfig, cfg: ModelConfig) -> str:
    """Why keys and values of finished shots would not be what the whole scene would compute; empty: they are."""
    if moc.visibility != "past":
        return f"with moc.visibility {moc.visibility} shots see later ones, and change with them; `past` is needed"
    if moc.mode == "moc" and moc.routing == "random":
        return "moc.routing random draws for each token of the whole scene; choose another"
    if isinstance(cfg, WanConfig) and cfg.condition_channels:
        return f"model.condition_channels is {cfg.condition_channels}: of finished shots it reads nothing that is given"
    return ""


def kept_size(
    cfg: ModelConfig, moc: MoCConfig, shape: SceneShape, deal: Deal, *, batch: int, small: bool = False
) -> Size:
    """How much is kept of so many scenes: of two experts, the layers of the one for high noise come first."""
    return Size(
        batch=batch,
        shape=shape,
        depth=cfg.depth * (2 if isinstance(cfg, WanConfig) and cfg.boundary else 1),
        heads=cfg.heads,
        head_dim=cfg.head_dim,
        dtype=cfg.dtype,
        columns=max_chunks(shape, moc.chunk) * moc.descriptors,
        deal=deal,
        small=small,
    )


class Over(NamedTuple):
    """What a model's blocks attend by: over a scene, or over some shots of it and what is kept of those before."""

    attention: SceneAttention
    moc: MoCConfig
    deal: Deal
    table: ChunkTable
    """Of the given shots."""
    shots: Float32[Array, "B F S"]
    """Of which shot each frame is."""
    place: Standing | None
    wanted: Wanted
    first_kept: int = 0
    """The first of the kept layers that are these blocks'."""

    def __call__(
        self, text: QKV, video: QKV, key: Key[Array, ""] | None, index: Int[Array, ""]
    ) -> tuple[tuple[Array, Array], Seen]:
        """Outputs of text and video, and what is wanted beside, of video alone, in layer `index`."""
        outputs, seen = self._attend(text, video, key, index)
        if self.wanted == "routes":
            assert seen.routes is not None
            seen = Seen(seen.routes[:, :, self.deal.text :])
        if self.wanted == "means":
            q, k = (self.deal.restored(x) for x in video[:2])  # each token once, and none that was added
            seen = Seen(means=shot_means(q, k, self.shots))
        return outputs, seen

    def _attend(self, text: QKV, video: QKV, key, index) -> tuple[tuple[Array, Array], Seen]:
        if self.place is None:
            keys = None if key is None else scene_keys(key, text[0].shape[0], text[0].shape[2])
            over_mesh = OverMesh(self.attention, self.table, self.moc, self.deal, self.wanted == "routes")
            outputs, routes = over_mesh(text, video, keys)
            return outputs, Seen(routes)
        if not isinstance(self.attention, RoutedAttention):
            raise NotImplementedError(f"kept shots need RoutedAttention, not {type(self.attention).__name__}")
        given, kept, asked = self.place.given, self.place.kept, (self.wanted == "routes", self.wanted == "new")
        return OverKept(self.attention, given, kept, self.moc, self.deal, *asked)(text, video, self.first_kept + index)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Routed:
    """A velocity, and what was read to predict it."""

    velocity: Float32[Array, "B F Y X Z"]
    routes: Int[Array, "depth B H V K"]
    """The chunks that the video queries of each layer picked; -1 where a slot is empty."""
    table: ChunkTable
    """The scene's chunks."""


class Forward(NamedTuple):
    """A velocity, and what was read and computed on the way; of the given shots, which may stand in a longer scene."""

    velocity: Float32[Array, "B F Y X Z"]
    seen: Seen
    table: ChunkTable
    place: Standing | None

    def routed(self) -> Routed:
        """With the routes, which were asked for."""
        assert self.seen.routes is not None
        table = self.table if self.place is None else self.place.given.table
        return Routed(velocity=self.velocity, routes=self.seen.routes, table=table)

    def kept(self) -> Kept:
        """What was kept, these shots included."""
        assert self.seen.new is not None
        assert self.place is not None
        return remembered(self.place.kept, self.seen.new, self.place.given)
