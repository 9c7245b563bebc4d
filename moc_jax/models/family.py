"""What a family of models must offer, and what all families share."""

import abc
from typing import Any, NamedTuple

from flax import nnx

from moc_jax.attention.api import RoutedAttention, SceneAttention
from moc_jax.attention.kept import Kept
from moc_jax.config import ConfigError, MoCConfig, Remat
from moc_jax.models.after import After, Forward, Routed, Wanted
from moc_jax.scene import SceneLengths
from moc_jax.shapes import Array, Bool, Float, Float32, Key, typed

OwnConfig = Any
"""The config of a family's own kind."""


class Inputs(NamedTuple):
    """What a model is given; see `VideoModel.__call__`."""

    video: Float[Array, "B F Y X Z"]
    text: Float[Array, "B L E"]
    t: Float[Array, "B S"]
    lengths: SceneLengths
    moc: MoCConfig
    key: Key[Array, ""] | None = None
    attention: SceneAttention = RoutedAttention()
    condition: Float[Array, "B F Y X _"] | None = None
    after: After | None = None
    active: Bool[Array, "B S"] | None = None

    def check_condition(self, channels: int) -> None:
        """Raises ConfigError unless the condition is that of a model which reads so many channels of it."""
        wanted = (*self.video.shape[:4], channels) if channels else None
        given = None if self.condition is None else self.condition.shape
        if given != wanted:
            raise ConfigError(
                f"condition has shape {given}; with model.condition_channels = {channels} and latents of "
                f"{self.video.shape} it must be {wanted}"
            )


class VideoModel(nnx.Module):
    """A transformer over the shots of a scene that predicts the flow's velocity, noise - z_0, of all of them at once.

    Every weight is an nnx.Param and carries `logical`, its axes' names (moc_jax/sharding.py says which are split).
    """

    @abc.abstractmethod
    def __init__(self, cfg: OwnConfig, *, rngs: nnx.Rngs):
        """Fresh weights."""

    @abc.abstractmethod
    def forward(self, given: Inputs, wanted: Wanted) -> Forward:
        """What the other methods give, each a part of it; see `__call__`."""

    @typed
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
        active: Bool[Array, "B S"] | None = None,
    ) -> Float32[Array, "B F Y X Z"]:
        """Velocity of noisy latents `video` whose shots stand at noise levels `t` in [0, 1] (1: pure noise).

        Args:
            lengths: `shot_frames` in latent frames. Velocities of padding frames mean nothing.
            key: Switches context drop-off and drop-in on (training).
            attention: What the tokens' q, k and v meet in.
            condition: What a model with `condition_channels` reads beside the latents; others are given none. Of Wan
                2.2 I2V, a mask, 1 where frames are given, and the latents of the given frames.
            after: The whole scene, of which the others are some shots that follow each other (`lengths`: theirs;
                `text`: the global caption and theirs), and what is kept of the shots before, under `past` visibility.
            active: The shots whose velocities are wanted, the noisiest of which decides among experts; none given: all.

        Raises:
            ConfigError: the latents do not divide into patches, or the condition is not the model's, or what is kept is
                not what would be computed.
        """
        given = Inputs(video, text, t, lengths, moc, key, attention, condition, after, active)
        return self.forward(given, "velocity").velocity

    @typed
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
        active: Bool[Array, "B S"] | None = None,
    ) -> Routed:
        """The same, with what was picked."""
        given = Inputs(video, text, t, lengths, moc, key, attention, condition, after, active)
        return self.forward(given, "routes").routed()

    @typed
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
        """The mean query and the mean key of each shot's tokens, as attention reads them; 0 for a shot of no frames.

        Of two experts, those of the one that `t` asks for.
        """
        given = Inputs(video, text, t, lengths, moc, attention=attention, condition=condition)
        means = self.forward(given, "means").seen.means
        assert means is not None
        return means

    @typed
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
        return self.forward(Inputs(video, text, t, lengths, moc, attention=attention, after=after), "new").kept()

    @staticmethod
    @abc.abstractmethod
    def matrix_flops(cfg: OwnConfig, text_tokens: int, video_tokens: int) -> int:
        """FLOPs of one forward pass outside attention."""

    @staticmethod
    @abc.abstractmethod
    def kept_bytes(cfg: OwnConfig, remat: Remat, moc: MoCConfig, shots: int) -> int:
        """Bytes per token that all blocks together keep for the backward pass of scenes of so many shots; `remat` is
        neither `none` nor `auto`."""
