"""A second kind of codec, as one that is downloaded would be: its config refers to its weights, and nothing is fitted.

Nothing in the package knows it; tests join it to the union and add its class to `CODECS`.
"""

import dataclasses
import hashlib
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from einops import reduce, repeat

from moc_jax.config import Config, PcaConfig, Reference
from moc_jax.config.base import OptionalPath, Settings, Size

WEIGHTS = b"pretend that these are weights"
SHA256 = hashlib.sha256(WEIGHTS).hexdigest()


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeanConfig(Settings, at="codec"):
    """Video <-> means of blocks."""

    name: Literal["mean"] = "mean"
    """`mean`: what a test makes of it."""
    stride: tuple[Size, Size, Size] = (1, 4, 4)
    """Frames, rows and columns per latent."""
    channels: Size = 3
    """Latent channels."""
    file: OptionalPath = ""
    """Where the weights lie."""
    weights: Reference = Reference(name="tests/mean", version="1", sha256=SHA256)
    """Which they are."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WideConfig(Config):
    """A config whose codec is of either kind."""

    codec: PcaConfig | MeanConfig = PcaConfig()


class MeanCodec:
    """See `MeanConfig`."""

    fitted: ClassVar[bool] = False
    batch_size = 2

    def __init__(self, cfg: MeanConfig):
        cfg.weights.check_file(Path(cfg.file), "codec.weights")
        self.stride, self.channels = cfg.stride, cfg.channels
        self.fingerprint = f"mean-{cfg.weights.sha256[:8]}"

    @classmethod
    def sums(cls, cfg, clips):
        return {}

    @classmethod
    def fit(cls, cfg, sums):
        return cls(cfg)

    @classmethod
    def load(cls, cfg, state):
        assert not state
        return cls(cfg)

    def latent_frames(self, frames):
        return frames

    def encode(self, video):
        _, h, w = self.stride
        return reduce(video, "f (y h) (x w) c -> f y x c", "mean", h=h, w=w).astype(np.float32)

    def encode_batch(self, videos):
        return np.stack([self.encode(video) for video in videos])

    def decode(self, latents):
        _, h, w = self.stride
        return repeat(latents, "f y x c -> f (y h) (x w) c", h=h, w=w).astype(np.float32)

    def state(self):
        return {}
