"""What a codec must offer, and the conversion between stored pixels (uint8) and the codec's range [-1, 1]."""

from collections.abc import Iterable
from typing import Any, ClassVar, Protocol, Self

import numpy as np

from moc_jax.errors import Failure
from moc_jax.shapes import Float, Float32, UInt8, typed


class CodecMismatch(Failure, ValueError):
    """A codec's saved state does not belong to the configuration it is loaded for."""


class CodecError(Failure, RuntimeError):
    """A codec can't do its work on these devices."""


class Codec(Protocol):
    """Video in [-1, 1] <-> latents. Pixel sizes are F Y X, latent sizes f y x.

    The first frame is encoded alone and every further latent frame holds `stride[0]` frames, so a clip of
    stride[0] * (f - 1) + 1 frames has f latent frames, and a single image is a clip of one frame.
    """

    fitted: ClassVar[bool]
    """Whether `fit` needs clips' sums; one that is downloaded needs none."""
    stride: tuple[int, int, int]
    channels: int
    batch_size: int
    """Clips that are best encoded together."""

    @classmethod
    def sums(cls, cfg: Any, clips: Iterable[Float[np.ndarray, "F Y X 3"]]) -> dict[str, np.ndarray]:
        """What `fit` needs of these clips, whatever other clips there are; see `sums_of`."""
        ...

    @classmethod
    def fit(cls, cfg: Any, sums: Iterable[dict[str, np.ndarray]]) -> Self:
        """A codec of its own config, from `sums` of some clips each; see `fit_codec`."""
        ...

    @classmethod
    def load(cls, cfg: Any, state: dict[str, np.ndarray]) -> Self:
        """The codec that `state` was taken from; see `load_codec`."""
        ...

    def latent_frames(self, frames: int) -> int:
        """Latent frames of a clip; ValueError with the nearest possible counts when `frames` is not such a count."""
        ...

    def encode(self, video: Float[np.ndarray, "F Y X 3"]) -> Float32[np.ndarray, "f y x Z"]:
        """Latents; ValueError when the clip's frames, rows or columns do not fit the stride."""
        ...

    def encode_batch(self, videos: Float[np.ndarray, "B F Y X 3"]) -> Float32[np.ndarray, "B f y x Z"]:
        """The same of several clips of one size, as one program where there is one."""
        ...

    def decode(self, latents: Float[np.ndarray, "f y x Z"]) -> Float32[np.ndarray, "F Y X 3"]:
        """The clip, clipped to [-1, 1]."""
        ...

    def state(self) -> dict[str, np.ndarray]:
        """What was fitted, as arrays (a checkpoint holds them).

        Of a codec that is downloaded, at most a digest: its files lie where its config says, and `load` checks them.
        """
        ...

    @property
    def fingerprint(self) -> str:
        """A short hash of the configuration and the state: equal codecs have equal latents."""
        ...


def latent_frames(frames: int, stride: int) -> int:
    """Latent frames of a clip of stride * (f - 1) + 1 frames.

    Raises:
        ValueError: `frames` is not such a count; names the nearest that are.
    """
    if frames < 1 or (frames - 1) % stride:
        low = max(1, (frames - 1) // stride * stride + 1)
        raise ValueError(
            f"{frames} frames cannot be encoded: the first stands alone and each further latent frame holds {stride}, "
            f"so a clip has {stride} * n + 1 frames; the nearest counts are {low} and {low + stride}"
        )
    return (frames - 1) // stride + 1


def crop_frames(frames: int, stride: int, multiple: int = 1) -> int:
    """The most frames <= `frames` that encode to a multiple of `multiple` latent frames; 0 if there are too few."""
    if frames < 1:
        return 0
    latent = ((frames - 1) // stride + 1) // multiple * multiple
    return (latent - 1) * stride + 1 if latent else 0


@typed
def pixels_to_unit(pixels: UInt8[np.ndarray, "*shape"]) -> Float32[np.ndarray, "*shape"]:
    """0..255 -> [-1, 1]."""
    return pixels.astype(np.float32) / 127.5 - 1


@typed
def pixels_from_unit(video: Float[np.ndarray, "*shape"]) -> UInt8[np.ndarray, "*shape"]:
    """[-1, 1] -> 0..255, rounded; values outside are clipped."""
    return np.clip(np.rint((video + 1) * 127.5), 0, 255).astype(np.uint8)
