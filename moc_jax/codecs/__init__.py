"""Video <-> latents. The model sees latents only, so a VAE can take the default codec's place by name.

The default is `pca`: a linear autoencoder of space-time patches that is fitted in closed form on the training clips
and saved inside the checkpoint, so sampling needs nothing but the checkpoint.
"""

from collections.abc import Iterable

import numpy as np

from moc_jax.codecs.base import Codec, CodecMismatch, crop_frames, pixels_from_unit, pixels_to_unit
from moc_jax.codecs.pca import PCACodec
from moc_jax.config import CodecConfig
from moc_jax.shapes import Float

__all__ = [
    "Codec",
    "CodecMismatch",
    "crop_frames",
    "fit_codec",
    "load_codec",
    "pixels_from_unit",
    "pixels_to_unit",
]

_CODECS = {"pca": PCACodec}


def fit_codec(cfg: CodecConfig, clips: Iterable[Float[np.ndarray, "F Y X 3"]]) -> Codec:
    """A codec for `clips`, which are read once, one at a time.

    Raises:
        ValueError: there is nothing to fit on, or a clip's size or values do not fit; the message says which clip.
    """
    return _CODECS[cfg.name].fit(cfg, clips)


def load_codec(cfg: CodecConfig, state: dict[str, np.ndarray]) -> Codec:
    """The codec that `state` (from `Codec.state`) was taken from.

    Raises:
        CodecMismatch: the state belongs to another configuration; names the field and both values.
    """
    return _CODECS[cfg.name].load(cfg, state)
