"""Principal components of space-time patches: the linear autoencoder with the least squared error, in closed form.

A clip is cut into patches of stride (t, h, w) = `PcaConfig.stride`; the first frame, which stands alone, into
patches of (1, h, w), with a basis of its own. For patches x with mean m and covariance C = U diag(s^2) U^T, latent
channel c is

    z_c = a / s_c^w  *  u_c^T (x - m),        a: mean variance of the channels = 1                            (1)

for the `channels` largest s_c, with w = `PcaConfig.whiten`. The reconstruction does not depend on w; what the
diffusion model's loss cares about does: with w = 0 a channel counts by its share of the pixels' energy, with w = 1
all channels count the same, details and their noise included.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from typing import Self

import numpy as np
from einops import rearrange

from moc_jax.codecs.base import CodecMismatch, latent_frames
from moc_jax.config import PcaConfig
from moc_jax.shapes import Float, Float32, typed

_MOST = 16384  # patches of a clip that enter the covariance, spread evenly: more cost time and change nothing
_LEAST_STD = 1 / 255  # half a step of 8-bit pixels in [-1, 1]: components below it are rounding, not picture


class _Moments:
    """Count, sum and sum of outer products of vectors that come clip by clip, in float64."""

    def __init__(self, size: int):
        self.count = 0
        self.total = np.zeros(size)
        self.outer = np.zeros((size, size))

    def add(self, vectors: Float[np.ndarray, "n d"]) -> None:
        if len(vectors) > _MOST:
            vectors = vectors[np.linspace(0, len(vectors) - 1, _MOST).astype(int)]
        vectors = vectors.astype(np.float64)
        self.count += len(vectors)
        self.total += vectors.sum(axis=0)
        self.outer += vectors.T @ vectors

    def principal(self, channels: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Mean [d], the first components [channels, d], largest first, and their standard deviations [channels]."""
        mean = self.total / self.count
        covariance = self.outer / self.count - np.outer(mean, mean)
        variance, vectors = np.linalg.eigh(covariance)
        basis = vectors.T[::-1][:channels]
        std = np.sqrt(np.maximum(variance[::-1][:channels], 0))
        return mean, basis, np.maximum(std, _LEAST_STD)


@dataclasses.dataclass(frozen=True, eq=False)
class _Basis:
    """x -> (x - mean) @ basis.T * scale, and back."""

    mean: Float32[np.ndarray, " d"]
    basis: Float32[np.ndarray, "Z d"]
    scale: Float32[np.ndarray, " Z"]

    def encode(self, patches: Float[np.ndarray, "f y x d"]) -> Float[np.ndarray, "f y x Z"]:
        matrix = (self.basis * self.scale[:, None]).T
        return patches @ matrix - self.mean @ matrix  # the product first: it is much smaller than the patches

    def decode(self, latents: Float[np.ndarray, "f y x Z"]) -> Float[np.ndarray, "f y x d"]:
        return latents @ (self.basis / self.scale[:, None]) + self.mean


class PCACodec:
    """See the module; build one with `fit` or `load`."""

    def __init__(self, cfg: PcaConfig, first: _Basis, rest: _Basis):
        self.stride = cfg.stride
        self.channels = cfg.channels
        self._cfg = cfg
        self._first, self._rest = first, rest

    @classmethod
    def fit(cls, cfg: PcaConfig, clips: Iterable[Float[np.ndarray, "F Y X 3"]]) -> Self:
        """Equation (1) for the patches of `clips`, which are read once, one at a time."""
        t, h, w = cfg.stride
        first, rest = _Moments(3 * h * w), _Moments(3 * t * h * w)
        for number, clip in enumerate(clips):
            if not np.isfinite(clip).all():
                raise ValueError(f"clip {number} to fit the codec on holds NaN or infinite values")
            latent_frames(len(clip), t)
            _check_size(cfg, clip.shape)
            first.add(rearrange(_first_patches(cfg, clip), "f y x d -> (f y x) d"))
            rest.add(rearrange(_rest_patches(cfg, clip), "f y x d -> (f y x) d"))
        if not rest.count:
            raise ValueError(
                f"the codec needs at least one clip of {t + 1} frames or more to be fitted on (the first frame, and "
                f"codec.stride {t}); it got {'single frames only' if first.count else 'no clip'}"
            )
        mean, basis, std = rest.principal(cfg.channels)
        first_mean, first_basis, first_std = first.principal(cfg.channels)
        # The sign of a component is arbitrary. Rest: its sum, or by default its first entry, is positive; first: as in
        # the rest's component of the same rank, so that one channel means much the same in all frames.
        basis *= np.where(basis.sum(axis=1) < 0, -1.0, 1.0)[:, None]
        still = rearrange(basis, "z (t d) -> z t d", t=t).sum(axis=1)
        first_basis *= np.where((first_basis * still).sum(axis=1) < 0, -1.0, 1.0)[:, None]
        return cls(
            cfg,
            _Basis(*_float32(first_mean, first_basis, _scale(first_std, cfg.whiten))),
            _Basis(*_float32(mean, basis, _scale(std, cfg.whiten))),
        )

    @classmethod
    def load(cls, cfg: PcaConfig, state: dict[str, np.ndarray]) -> Self:
        """Checks `state` against `cfg`, field by field."""
        t, h, w = cfg.stride
        missing = sorted({"stride", "whiten", *_NAMES} - set(state))
        if missing:
            raise CodecMismatch(f"the saved codec is not a pca codec: it lacks {', '.join(missing)}")
        saved = {
            "stride": tuple(int(s) for s in state["stride"]),
            "channels": len(state["rest_basis"]),
            "whiten": float(state["whiten"]),
        }
        for field, value in saved.items():
            if value != getattr(cfg, field):
                raise CodecMismatch(
                    f"codec.{field} = {getattr(cfg, field)}, but the saved codec was fitted with {value}; "
                    f"set codec.{field} to {value}, or prepare the data and train again"
                )
        sizes = {"first": 3 * h * w, "rest": 3 * t * h * w}
        for name in _NAMES:
            part, kind = name.split("_")
            expected = {"mean": (sizes[part],), "basis": (cfg.channels, sizes[part]), "scale": (cfg.channels,)}[kind]
            if state[name].shape != expected or not np.isfinite(state[name]).all():
                raise CodecMismatch(
                    f"the saved codec's {name} is damaged: shape {state[name].shape}, expected {expected}, finite"
                )
        arrays = _float32(*(state[name] for name in _NAMES))
        return cls(cfg, _Basis(*arrays[:3]), _Basis(*arrays[3:]))

    def latent_frames(self, frames: int) -> int:
        """Latent frames of a clip.

        Raises:
            ValueError: `frames` is not stride * n + 1.
        """
        return latent_frames(frames, self.stride[0])

    @typed
    def encode(self, video: Float[np.ndarray, "F Y X 3"]) -> Float32[np.ndarray, "f y x Z"]:
        """Video in [-1, 1] -> latents.

        Raises:
            ValueError: the clip's frames, rows or columns do not fit the stride.
        """
        self.latent_frames(len(video))
        _check_size(self._cfg, video.shape)
        first = self._first.encode(_first_patches(self._cfg, video))
        rest = self._rest.encode(_rest_patches(self._cfg, video))
        return np.concatenate([first, rest]).astype(np.float32)

    @typed
    def decode(self, latents: Float[np.ndarray, "f y x Z"]) -> Float32[np.ndarray, "F Y X 3"]:
        """Latents -> video, clipped to [-1, 1].

        Raises:
            ValueError: the latents have another number of channels.
        """
        if latents.shape[-1] != self.channels:
            raise ValueError(f"latents have {latents.shape[-1]} channels, but the codec has {self.channels}")
        t, h, w = self.stride
        first = rearrange(self._first.decode(latents[:1]), "f y x (h w c) -> f (y h) (x w) c", h=h, w=w)
        rest = rearrange(self._rest.decode(latents[1:]), "f y x (t h w c) -> (f t) (y h) (x w) c", t=t, h=h, w=w)
        return np.clip(np.concatenate([first, rest]), -1, 1).astype(np.float32)

    def state(self) -> dict[str, np.ndarray]:
        """Mean, basis and scale of first and further frames, and the settings they were fitted with."""
        parts = {"first": self._first, "rest": self._rest}
        arrays = {name: getattr(parts[name.split("_")[0]], name.split("_")[1]) for name in _NAMES}
        return {"stride": np.array(self.stride), "whiten": np.array(self._cfg.whiten), **arrays}

    @property
    def fingerprint(self) -> str:
        """A short hash of the configuration and the basis."""
        digest = hashlib.sha256(json.dumps(dataclasses.asdict(self._cfg)).encode())
        for name, array in sorted(self.state().items()):
            digest.update(name.encode() + np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()[:16]


_NAMES = tuple(f"{part}_{kind}" for part in ("first", "rest") for kind in ("mean", "basis", "scale"))


def _scale(std: Float[np.ndarray, " Z"], whiten: float) -> Float[np.ndarray, " Z"]:
    """a / s_c^w of equation (1): the channels' variances average to one."""
    return std**-whiten / np.sqrt(np.mean(std ** (2 - 2 * whiten)))


def _float32(*arrays: np.ndarray) -> tuple[np.ndarray, ...]:
    return tuple(np.asarray(a, np.float32) for a in arrays)


def _first_patches(cfg: PcaConfig, video: np.ndarray) -> np.ndarray:
    _, h, w = cfg.stride
    return rearrange(video[:1], "f (y h) (x w) c -> f y x (h w c)", h=h, w=w)


def _rest_patches(cfg: PcaConfig, video: np.ndarray) -> np.ndarray:
    t, h, w = cfg.stride
    return rearrange(video[1:], "(f t) (y h) (x w) c -> f y x (t h w c)", t=t, h=h, w=w)


def _check_size(cfg: PcaConfig, shape: tuple[int, ...]) -> None:
    for name, size, unit in zip(("rows", "columns"), shape[1:3], cfg.stride[1:]):
        if size % unit:
            low = max(unit, size // unit * unit)
            raise ValueError(
                f"a frame has {size} {name}, but codec.stride needs a multiple of {unit}; "
                f"the nearest are {low} and {low + unit}"
            )
