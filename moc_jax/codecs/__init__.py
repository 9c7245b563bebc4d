"""Video <-> latents. The model sees latents only.

`CodecConfig` says by which codec: `CODECS` has the class that each of its kinds builds. The default is `pca`: a linear
autoencoder of space-time patches that is fitted in closed form on the training clips and saved inside the checkpoint,
so sampling needs nothing but the checkpoint. `wan_vae` is the autoencoder of Wan, from public weights.
"""

from collections.abc import Iterable

import numpy as np

from moc_jax.codecs.base import (
    Codec,
    CodecError,
    CodecMismatch,
    crop_frames,
    latent_frames,
    pixels_from_unit,
    pixels_to_unit,
)
from moc_jax.codecs.pca import PCACodec
from moc_jax.codecs.wan_vae import WanVae, described
from moc_jax.config import CodecConfig, PcaConfig, WanVaeConfig
from moc_jax.config.base import Settings
from moc_jax.shapes import Float

__all__ = [
    "CODECS",
    "Codec",
    "CodecError",
    "CodecMismatch",
    "crop_frames",
    "fit_codec",
    "fit_sums",
    "is_fitted",
    "latent_frames",
    "load_codec",
    "pixels_from_unit",
    "pixels_to_unit",
    "public_autoencoder",
    "sums_of",
]

CODECS: dict[type[Settings], type[Codec]] = {PcaConfig: PCACodec, WanVaeConfig: WanVae}


def public_autoencoder(place: str) -> str:
    """What an autoencoder in public files is, in a line, with its licence; none of its numbers is read.

    Raises:
        WeightsError: it is not whole.
        ConfigError: it is something else.
    """
    return described(place)


def fit_codec(cfg: CodecConfig, clips: Iterable[Float[np.ndarray, "F Y X 3"]]) -> Codec:
    """A codec for `clips`, which are read once, one at a time, by codecs that are fitted.

    Raises:
        ValueError: there is nothing to fit on, or a clip's size or values do not fit; the message says which clip.
        ConfigError: its downloaded weights are not there, or are others.
    """
    return fit_sums(cfg, [sums_of(cfg, clips)] if is_fitted(cfg) else ())


def sums_of(cfg: CodecConfig, clips: Iterable[Float[np.ndarray, "F Y X 3"]]) -> dict[str, np.ndarray]:
    """What a codec that is fitted needs of `clips`, as arrays: several processes can each read some of the clips.

    Raises:
        ValueError: a clip's size or values do not fit; the message says which clip.
    """
    return CODECS[type(cfg)].sums(cfg, clips)


def fit_sums(cfg: CodecConfig, sums: Iterable[dict[str, np.ndarray]]) -> Codec:
    """A codec for the clips that `sums` are of, each from `sums_of`; they are added up in this order.

    Raises:
        ValueError: there is nothing to fit on.
        ConfigError: its downloaded weights are not there, or are others.
    """
    return CODECS[type(cfg)].fit(cfg, sums)


def is_fitted(cfg: CodecConfig) -> bool:
    """Whether such a codec is fitted on clips; else `fit_codec` reads none."""
    return CODECS[type(cfg)].fitted


def load_codec(cfg: CodecConfig, state: dict[str, np.ndarray]) -> Codec:
    """The codec that `state` (from `Codec.state`) was taken from.

    Raises:
        CodecMismatch: the state belongs to another configuration; names the field and both values.
        ConfigError: its downloaded weights are not there, or are others.
    """
    return CODECS[type(cfg)].load(cfg, state)
