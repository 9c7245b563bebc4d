"""Video <-> latents. The model sees latents only, so a VAE can take the default codec's place by name.

`CodecConfig` says which: `CODECS` has the class that each of its kinds builds. The default is `pca`: a linear
autoencoder of space-time patches that is fitted in closed form on the training clips and saved inside the checkpoint,
so sampling needs nothing but the checkpoint.
"""

from collections.abc import Iterable

import numpy as np

from moc_jax.codecs.base import Codec, CodecMismatch, crop_frames, pixels_from_unit, pixels_to_unit
from moc_jax.codecs.pca import PCACodec
from moc_jax.config import CodecConfig, PcaConfig
from moc_jax.config.base import Settings
from moc_jax.shapes import Float

__all__ = [
    "CODECS",
    "Codec",
    "CodecMismatch",
    "crop_frames",
    "fit_codec",
    "load_codec",
    "pixels_from_unit",
    "pixels_to_unit",
]

CODECS: dict[type[Settings], type[Codec]] = {PcaConfig: PCACodec}


def fit_codec(cfg: CodecConfig, clips: Iterable[Float[np.ndarray, "F Y X 3"]]) -> Codec:
    """A codec for `clips`, which are read once, one at a time, by codecs that are fitted.

    Raises:
        ValueError: there is nothing to fit on, or a clip's size or values do not fit; the message says which clip.
        ConfigError: its downloaded weights are not there, or are others.
    """
    return CODECS[type(cfg)].fit(cfg, clips)


def load_codec(cfg: CodecConfig, state: dict[str, np.ndarray]) -> Codec:
    """The codec that `state` (from `Codec.state`) was taken from.

    Raises:
        CodecMismatch: the state belongs to another configuration; names the field and both values.
        ConfigError: its downloaded weights are not there, or are others.
    """
    return CODECS[type(cfg)].load(cfg, state)
