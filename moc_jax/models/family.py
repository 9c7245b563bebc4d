"""What a family of models must offer."""

import dataclasses
from typing import Any, Protocol

import jax
from flax import nnx

from moc_jax.attention.api import RoutedAttention, SceneAttention
from moc_jax.config import MoCConfig, ModelConfig, Remat
from moc_jax.scene import ChunkTable, SceneLengths
from moc_jax.shapes import Array, Float, Float32, Int, Key


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Routed:
    """A velocity, and what was read to predict it."""

    velocity: Float32[Array, "B F Y X Z"]
    routes: Int[Array, "depth B H V K"]
    """The chunks that the video queries of each layer picked; -1 where a slot is empty."""
    table: ChunkTable
    """The scene's chunks."""


class VideoModel(Protocol):
    """A transformer over the shots of a scene, an nnx.Module whose weights are nnx.Params.

    Every weight carries `logical`, the names of its axes (moc_jax/sharding.py says which are split).
    """

    def __init__(self, cfg: Any, *, rngs: nnx.Rngs) -> None:
        """Fresh weights; `cfg` is the family's own config."""
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
    ) -> Float32[Array, "B F Y X Z"]:
        """Velocity of noisy latents `video` whose shots stand at noise levels `t` in [0, 1] (1: pure noise).

        Args:
            lengths: `shot_frames` in latent frames. Velocities of padding frames mean nothing.
            key: Switches context drop-off and drop-in on (training).
            attention: What the tokens' q, k and v meet in.

        Raises:
            ConfigError: the latents do not divide into patches.
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
    ) -> Routed:
        """The same, with what was picked."""
        ...

    @staticmethod
    def matrix_flops(cfg: ModelConfig, text_tokens: int, video_tokens: int) -> int:
        """FLOPs of one forward pass outside attention."""
        ...

    @staticmethod
    def kept_bytes(cfg: ModelConfig, remat: Remat, moc: MoCConfig) -> int:
        """Bytes per token that all blocks together keep for the backward pass; `remat` is neither `none` nor `auto`."""
        ...
