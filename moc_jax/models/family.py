"""What a family of models must offer."""

import dataclasses
from typing import Any, Protocol

import jax
from flax import nnx

from moc_jax.attention.api import RoutedAttention, SceneAttention
from moc_jax.attention.kept import Kept
from moc_jax.config import MoCConfig, Remat
from moc_jax.scene import ChunkTable, SceneLengths
from moc_jax.shapes import Array, Float, Float32, Int, Key

OwnConfig = Any
"""The config of a family's own kind."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Routed:
    """A velocity, and what was read to predict it."""

    velocity: Float32[Array, "B F Y X Z"]
    routes: Int[Array, "depth B H V K"]
    """The chunks that the video queries of each layer picked; -1 where a slot is empty."""
    table: ChunkTable
    """The scene's chunks."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class After:
    """The whole scene that given shots belong to, and what is kept of the shots before them."""

    lengths: SceneLengths  # of all its shots and captions, in latent frames
    first: Int[Array, " B"]  # of its shots, the first given one
    kept: Kept
    frames: int = dataclasses.field(metadata={"static": True})  # latent, of the whole scene and what fills it up
    text_tokens: int = dataclasses.field(metadata={"static": True})


class VideoModel(Protocol):
    """A transformer over the shots of a scene, an nnx.Module whose weights are nnx.Params.

    Every weight carries `logical`, the names of its axes (moc_jax/sharding.py says which are split).
    """

    def __init__(self, cfg: OwnConfig, *, rngs: nnx.Rngs) -> None:
        """Fresh weights."""
        ...

    def __call__(
        self,
        video: Float[Array, "B F Y X Z"],
        text: Float[Array, "B L E"],
        t: Float[Array, "B S"],
        lengths: SceneLengths,
        moc: MoCConfig,
        *,
        key: Key[Array, ""] | None = None,
        attention: SceneAttention = RoutedAttention(),
        condition: Float[Array, "B F Y X _"] | None = None,
        after: After | None = None,
    ) -> Float32[Array, "B F Y X Z"]:
        """Velocity of noisy latents `video` whose shots stand at noise levels `t` in [0, 1] (1: pure noise).

        Args:
            lengths: `shot_frames` in latent frames. Velocities of padding frames mean nothing.
            key: Switches context drop-off and drop-in on (training).
            attention: What the tokens' q, k and v meet in.
            condition: What a model with `condition_channels` reads beside the latents; others are given none.
            after: The whole scene, of which the others are some shots that follow each other (`lengths`: theirs;
                `text`: the global caption and theirs), and what is kept of the shots before, under `past` visibility.

        Raises:
            ConfigError: the latents do not divide into patches, or the condition is not the model's, or what is kept is
                not what would be computed.
        """
        ...

    def routed(
        self,
        video: Float[Array, "B F Y X Z"],
        text: Float[Array, "B L E"],
        t: Float[Array, "B S"],
        lengths: SceneLengths,
        moc: MoCConfig,
        *,
        key: Key[Array, ""] | None = None,
        attention: SceneAttention = RoutedAttention(),
        condition: Float[Array, "B F Y X _"] | None = None,
        after: After | None = None,
    ) -> Routed:
        """The same, with what was picked."""
        ...

    def features(
        self,
        video: Float[Array, "B F Y X Z"],
        text: Float[Array, "B L E"],
        t: Float[Array, "B S"],
        lengths: SceneLengths,
        moc: MoCConfig,
        *,
        attention: SceneAttention = RoutedAttention(),
        condition: Float[Array, "B F Y X _"] | None = None,
    ) -> Float32[Array, "depth B 2 S H D"]:
        """The mean query and the mean key of each shot's tokens, as attention reads them; 0 for a shot of no frames."""
        ...

    def remember(
        self,
        video: Float[Array, "B F Y X Z"],
        text: Float[Array, "B L E"],
        t: Float[Array, "B S"],
        lengths: SceneLengths,
        moc: MoCConfig,
        after: After,
        *,
        attention: SceneAttention = RoutedAttention(),
    ) -> Kept:
        """What is kept once these shots are, too, at the noise levels at which later shots are to see them."""
        ...

    @staticmethod
    def matrix_flops(cfg: OwnConfig, text_tokens: int, video_tokens: int) -> int:
        """FLOPs of one forward pass outside attention."""
        ...

    @staticmethod
    def kept_bytes(cfg: OwnConfig, remat: Remat, moc: MoCConfig, shots: int) -> int:
        """Bytes per token that all blocks together keep for the backward pass of scenes of so many shots; `remat` is
        neither `none` nor `auto`."""
        ...
