"""Principal components of overlapping space-time windows: a linear autoencoder, fitted in closed form.

(a) Lapping. Around every border between patches of one frame, the pixels on either side are split into their even and
    odd parts, and the odd part o is replaced by V o, with an orthogonal V (the lapped transform of Malvar, 1992):

        V = J C_II^T C_IV J,        C: the cosine transforms of types II and IV; J reverses                       (1)

    What looks like a patch of stride (t, h, w) = `PcaConfig.stride` from here on is a window of twice its rows and
    columns, which fades into its neighbors; still, there are as many numbers as pixels, and distances stay the same.

(b) Principal components. The first frame, which stands alone, has patches of (1, h, w) and a basis of its own. For
    patches x with mean m and covariance C = U diag(s^2) U^T, latent channel c is

        z_c = a / s_c^w  *  u_c^T (x - m),        a: mean variance of the channels = 1                            (2)

    for the `channels` largest s_c, with w = `PcaConfig.whiten`. The reconstruction does not depend on w; what the
    diffusion model's loss cares about does: with w = 0 a channel counts by its share of the pixels' energy, with
    w = 1 all channels count the same, details and their noise included.

(c) Reconstruction. Patches are alike where they meet, so a patch's neighbors tell something of what its own latents
    lack: to the m + sum_c z_c u_c s_c^w / a of (2) comes a linear function of its latents and its neighbors', by
    ridge regression of what is missing. Neighbors are the next in rows and columns and, but for the first frame, in
    time; beyond the edges, the patch itself, and before the others the first frame, as if it stood still. A first
    frame's reconstruction needs no other frame, another's needs one latent frame before and one after. What is added
    is orthogonal to all u_c, so a reconstruction has the latents that it was made from.

All follows from second moments, which are added up clip by clip: of patches x, and of x with its neighbors' slowest
waves, `_slow_waves`, four for each channel. A neighbor's latents are what these waves tell of them, by regression, plus
a rest, of which (c) takes the true variance, but no correlation with other patches.
"""

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from typing import ClassVar, Self

import numpy as np
from einops import rearrange

from moc_jax.codecs.base import CodecMismatch, latent_frames
from moc_jax.config import PcaConfig
from moc_jax.shapes import Float, Float32, Int, typed

_MOST = 8192  # patches of a clip that enter the moments, spread evenly: more cost time and change little
_BLOCK = 1024  # of them at a time
_WAVES, _MOST_WAVES = 4, 512  # for each channel, and in all
_LEAST_STD = 1 / 255  # half a step of 8-bit pixels in [-1, 1]: components below it are rounding, not picture
_NOISE = 0.1  # of a channel's deviation: what (c) may expect latents to be wrong by; a model's are
_STILL = ((0, -1, 0), (0, 1, 0), (0, 0, -1), (0, 0, 1))  # where neighbors lie: latent frames, rows and columns
_MOVING = (*_STILL, (-1, 0, 0), (1, 0, 0))


@dataclasses.dataclass(frozen=True, eq=False)
class _Basis:
    """Equation (2), its inverse, and what (c) adds."""

    mean: Float32[np.ndarray, " d"]
    basis: Float32[np.ndarray, "Z d"]
    scale: Float32[np.ndarray, " Z"]
    missing: Float32[np.ndarray, "n d"]  # of the latents around a patch

    def encode(self, patches: Float[np.ndarray, "f y x d"]) -> Float[np.ndarray, "f y x Z"]:
        matrix = (self.basis * self.scale[:, None]).T
        return patches @ matrix - self.mean @ matrix  # the product first: it is much smaller than the patches

    def decode(self, around: Float[np.ndarray, "f y x n"]) -> Float[np.ndarray, "f y x d"]:
        """Patches, of their latents and their neighbors'."""
        matrix = self.missing.copy()
        matrix[: len(self.scale)] += self.basis / self.scale[:, None]
        return around @ matrix + self.mean


class _Moments:
    """Count, sum and sum of outer products of patches that come clip by clip, and of neighbors' waves, in float64."""

    def __init__(self, stride: tuple[int, int, int], channels: int, beside: tuple[tuple[int, int, int], ...]):
        size = 3 * math.prod(stride)
        self._waves = _slow_waves(stride, min(_WAVES * channels, _MOST_WAVES, size)).T
        self._channels, self._beside = channels, beside
        self.count = 0
        self._total = np.zeros(size + len(beside) * self._waves.shape[1])
        self._outer = np.zeros((len(self._total), len(self._total)))

    def add(self, patches: Float[np.ndarray, "f y x d"], *, start: int = 0) -> None:
        """Those from latent frame `start` on; the others are only neighbors."""
        waves, flat = patches @ self._waves, patches.reshape(-1, patches.shape[-1])
        first = start * len(flat) // len(patches)
        places = np.linspace(first, len(flat) - 1, min(len(flat) - first, _MOST)).round().astype(int)
        for begin in range(0, len(places), _BLOCK):
            block = places[begin : begin + _BLOCK]
            vectors = np.concatenate([flat[block], _around(waves, block, self._beside)], axis=1)
            self.count += len(vectors)
            self._total += vectors.sum(axis=0, dtype=np.float64)
            self._outer += vectors.T @ vectors

    def state(self) -> dict[str, np.ndarray]:
        return {"count": np.array(self.count), "total": self._total, "outer": self._outer}

    def join(self, count: np.ndarray, total: np.ndarray, outer: np.ndarray) -> None:
        """Adds those of other clips, from `state`."""
        self.count += int(count)
        self._total += total
        self._outer += outer

    def basis(self, whiten: float, like: Float[np.ndarray, "Z d"] | None = None) -> _Basis:
        """(b) and (c). A component's sign is arbitrary: its product with that of `like` of the same rank, or else the
        sum of its entries, is positive."""
        size, beside, channels = len(self._waves), len(self._beside), self._channels
        totals = self._total / self.count
        means = np.concatenate([totals[:size], np.tile(totals[:size] @ self._waves, beside)])  # of all, edges too
        covariance = self._outer / self.count - np.outer(totals, means) - np.outer(means, totals - means)
        variance, vectors = np.linalg.eigh(covariance[:size, :size])
        vectors = vectors[:, ::-1][:, :channels]
        vectors *= np.where((vectors.T * (1 if like is None else like)).sum(axis=1) < 0, -1.0, 1.0)
        std = np.maximum(np.sqrt(np.maximum(variance[::-1][:channels], 0)), _LEAST_STD)
        scale = std**-whiten / np.sqrt(np.mean(std ** (2 - 2 * whiten)))  # a / s_c^w of equation (2)

        # Latents of a patch itself, and what waves tell of its neighbors': encoder.T @ (patch, waves of neighbors).
        of_waves = self._waves.T @ covariance[:size, :size]
        told = np.linalg.pinv(of_waves @ self._waves, rcond=1e-9, hermitian=True) @ of_waves @ vectors
        encoder = np.zeros((len(totals), (1 + beside) * channels))
        encoder[:size, :channels] = vectors * scale
        encoder[size:, channels:] = np.kron(np.eye(beside), told * scale)
        latents, lacking = encoder.T @ covariance @ encoder, encoder.T @ covariance[:, :size]
        lacking -= lacking @ vectors @ vectors.T
        untold = latents[:channels, :channels] - (told * scale).T @ of_waves @ self._waves @ (told * scale)
        latents[channels:, channels:] += np.kron(np.eye(beside), untold)
        noise = np.maximum(_NOISE**2 * np.diag(latents), 1e-9)  # the latter for flat clips
        missing = np.linalg.solve(latents + np.diag(noise), lacking)
        return _Basis(*_float32(totals[:size], vectors.T, scale, missing))


def _moments(cfg: PcaConfig) -> tuple[_Moments, _Moments]:
    """Of first frames and of further ones."""
    _, h, w = cfg.stride
    return _Moments((1, h, w), cfg.channels, _STILL), _Moments(cfg.stride, cfg.channels, _MOVING)


class PCACodec:
    """See the module; build one with `fit` or `load`."""

    fitted: ClassVar[bool] = True
    batch_size = 1

    def __init__(self, cfg: PcaConfig, first: _Basis, rest: _Basis):
        self.stride = cfg.stride
        self.channels = cfg.channels
        self._cfg = cfg
        self._first, self._rest = first, rest

    @classmethod
    def sums(cls, cfg: PcaConfig, clips: Iterable[Float[np.ndarray, "F Y X 3"]]) -> dict[str, np.ndarray]:
        """The moments of the patches of `clips`, which are read once, one at a time."""
        t = cfg.stride[0]
        first, rest = _moments(cfg)
        for number, clip in enumerate(clips):
            if not np.isfinite(clip).all():
                raise ValueError(f"clip {number} to fit the codec on holds NaN or infinite values")
            latent_frames(len(clip), t)
            _check_size(cfg, clip.shape)
            lapped = _lapped(cfg, clip)
            stills = _stills(cfg, lapped[::t])
            first.add(stills)
            if len(clip) > 1:
                rest.add(np.concatenate([np.tile(stills[:1], t), _rest_patches(cfg, lapped)]), start=1)
        return {
            f"{part}_{name}": a for part, of in (("first", first), ("rest", rest)) for name, a in of.state().items()
        }

    @classmethod
    def fit(cls, cfg: PcaConfig, sums: Iterable[dict[str, np.ndarray]]) -> Self:
        """(b) and (c), by moments that are added up in the order given."""
        t = cfg.stride[0]
        first, rest = _moments(cfg)
        for each in sums:
            first.join(*(each[f"first_{name}"] for name in ("count", "total", "outer")))
            rest.join(*(each[f"rest_{name}"] for name in ("count", "total", "outer")))
        if not rest.count:
            raise ValueError(
                f"the codec needs at least one clip of {t + 1} frames or more to be fitted on (the first frame, and "
                f"codec.stride {t}); it got {'single frames only' if first.count else 'no clip'}"
            )
        moving = rest.basis(cfg.whiten)
        # One channel means much the same in all frames.
        return cls(cfg, first.basis(cfg.whiten, rearrange(moving.basis, "z (t d) -> z t d", t=t).sum(axis=1)), moving)

    @classmethod
    def load(cls, cfg: PcaConfig, state: dict[str, np.ndarray]) -> Self:
        """Checks `state` against `cfg`, field by field."""
        t, h, w = cfg.stride
        version = int(state["version"]) if "version" in state else 1 if "rest_basis" in state else None
        if version not in (None, _VERSION):
            raise CodecMismatch(
                f"the saved codec is a pca codec of format {version}, without windows that overlap, but this program "
                f"reads format {_VERSION}: use the version that saved it, or prepare the data and train again"
                if version < _VERSION
                else f"the saved codec is a pca codec of format {version}, but this program reads format {_VERSION}: "
                "use a newer version"
            )
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
            around = 1 + len(_STILL if part == "first" else _MOVING)
            expected = {
                "mean": (sizes[part],),
                "basis": (cfg.channels, sizes[part]),
                "scale": (cfg.channels,),
                "missing": (around * cfg.channels, sizes[part]),
            }[kind]
            if state[name].shape != expected or not np.isfinite(state[name]).all():
                raise CodecMismatch(
                    f"the saved codec's {name} is damaged: shape {state[name].shape}, expected {expected}, finite"
                )
        arrays = _float32(*(state[name] for name in _NAMES))
        return cls(cfg, _Basis(*arrays[:4]), _Basis(*arrays[4:]))

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
        lapped = _lapped(self._cfg, video)
        first = self._first.encode(_stills(self._cfg, lapped[:1]))
        rest = self._rest.encode(_rest_patches(self._cfg, lapped))
        return np.concatenate([first, rest]).astype(np.float32)

    def encode_batch(self, videos: Float[np.ndarray, "B F Y X 3"]) -> Float32[np.ndarray, "B f y x Z"]:
        """See `moc_jax.codecs.Codec`."""
        return np.stack([self.encode(video) for video in videos])

    @typed
    def decode(self, latents: Float[np.ndarray, "f y x Z"]) -> Float32[np.ndarray, "F Y X 3"]:
        """Latents -> video, clipped to [-1, 1].

        Raises:
            ValueError: the latents have another number of channels.
        """
        if latents.shape[-1] != self.channels:
            raise ValueError(f"latents have {latents.shape[-1]} channels, but the codec has {self.channels}")
        t, h, w = self.stride
        first = self._first.decode(_with_neighbors(latents[:1], _STILL))
        still = self._rest.encode(np.tile(first, t))
        rest = self._rest.decode(_with_neighbors(np.concatenate([still, latents[1:]]), _MOVING)[1:])
        first = rearrange(first, "f y x (h w c) -> f (y h) (x w) c", h=h, w=w)
        rest = rearrange(rest, "f y x (t h w c) -> (f t) (y h) (x w) c", t=t, h=h, w=w)
        return np.clip(_lapped(self._cfg, np.concatenate([first, rest]), inverse=True), -1, 1)

    def state(self) -> dict[str, np.ndarray]:
        """What (b) and (c) found for first and further frames, and the settings they were fitted with."""
        parts = {"first": self._first, "rest": self._rest}
        arrays = {name: getattr(parts[name.split("_")[0]], name.split("_")[1]) for name in _NAMES}
        settings = {"stride": np.array(self.stride), "whiten": np.array(self._cfg.whiten)}
        return {"version": np.array(_VERSION), **settings, **arrays}

    @property
    def fingerprint(self) -> str:
        """A short hash of the configuration and the basis."""
        digest = hashlib.sha256(json.dumps(dataclasses.asdict(self._cfg)).encode())
        for name, array in sorted(self.state().items()):
            digest.update(name.encode() + np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()[:16]


_VERSION = 2  # of the state; 1 had neither (a) nor (c)
_NAMES = tuple(f"{part}_{field.name}" for part in ("first", "rest") for field in dataclasses.fields(_Basis))


def _float32(*arrays: np.ndarray) -> tuple[np.ndarray, ...]:
    return tuple(np.asarray(a, np.float32) for a in arrays)


def _around(
    values: Float[np.ndarray, "f y x n"], places: Int[np.ndarray, " p"], offsets: Sequence[tuple[int, int, int]]
) -> Float[np.ndarray, "p m"]:
    """Values at these offsets from the places, which count over all frames, rows and columns."""
    shape = values.shape[:3]
    at = np.stack(np.unravel_index(places, shape))
    around = [np.ravel_multi_index(tuple(at + np.array(o)[:, None]), shape, mode="clip") for o in offsets]
    return np.concatenate([values.reshape(-1, values.shape[-1])[index] for index in around], axis=1)


def _with_neighbors(
    latents: Float[np.ndarray, "f y x Z"], beside: tuple[tuple[int, int, int], ...]
) -> Float[np.ndarray, "f y x n"]:
    """Each patch's latents, and then its neighbors'."""
    shape = latents.shape[:3]
    return _around(latents, np.arange(math.prod(shape)), ((0, 0, 0), *beside)).reshape(*shape, -1)


def _lapped(cfg: PcaConfig, video: Float[np.ndarray, "F Y X 3"], *, inverse: bool = False) -> np.ndarray:
    """(a): video with the pixels around the borders of patches turned, or turned back."""
    video = np.array(video, np.float32, order="C")
    _, h, w = cfg.stride
    rows, columns = _turn(h, 1), _turn(w, 3)
    if inverse:
        rows, columns = rows.T, columns.T
    for frame in video:
        around = frame[h - h // 2 : len(frame) - h // 2]
        around[:] = (rows @ around.reshape(-1, h, 3 * frame.shape[1])).reshape(around.shape)
        around = frame[:, w - w // 2 : frame.shape[1] - w // 2]
        around[:] = (around.reshape(-1, 3 * w) @ columns.T).reshape(around.shape)
    return video


@functools.cache
def _turn(size: int, values: int) -> Float32[np.ndarray, "n n"]:
    """Equation (1) for the size / 2 pixels before and after a border; of an odd size, the last pixel stays. Each pixel
    has so many values, side by side."""
    half = size // 2
    n = np.arange(half) + 0.5
    four = np.sqrt(2 / max(half, 1)) * np.cos(np.pi / max(half, 1) * np.outer(n, n))
    odd = np.hstack([-np.eye(half)[::-1], np.eye(half)]) / np.sqrt(2)
    turn = np.eye(size)
    turn[: 2 * half, : 2 * half] += odd.T @ ((_cosines(half).T @ four)[::-1, ::-1] - np.eye(half)) @ odd
    return np.kron(turn.astype(np.float32), np.eye(values, dtype=np.float32))


def _cosines(size: int) -> Float[np.ndarray, "n n"]:
    """The cosine transform of type II: one frequency per row, lowest first."""
    k = np.arange(size)
    waves = np.cos(np.pi / max(size, 1) * np.outer(k, k + 0.5))
    return waves * np.sqrt(np.where(k == 0, 1, 2) / max(size, 1))[:, None]


_COLORS = np.array([[1, 1, 1], [1, 0, -1], [1, -2, 1]]) / np.sqrt([[3], [2], [6]])  # brightness, and two differences
_COLOR_VARIANCE = np.array([1, 0.1, 0.05])
_CORRELATION = 0.95  # of the next pixel, as pictures have it


def _slow_waves(stride: tuple[int, int, int], count: int) -> Float32[np.ndarray, "count d"]:
    """The `count` orthonormal waves over a patch that have most variance if each pixel is correlated with the next."""
    axes = [_cosines(size) for size in stride] + [_COLORS]
    variance = np.ones(())
    for axis in axes[:3]:
        k = np.arange(len(axis))
        correlation = _CORRELATION ** np.abs(k[:, None] - k)
        variance = variance[..., None] * np.sum(axis @ correlation * axis, axis=1)
    variance = variance[..., None] * _COLOR_VARIANCE
    # Rounded, so that of waves that are alike but for their direction always the same comes first.
    order = np.argsort(-np.log(variance).round(6), axis=None, kind="stable")[:count]
    waves = [axis[k] for axis, k in zip(axes, np.unravel_index(order, variance.shape))]
    return np.einsum("nt,ny,nx,nc->ntyxc", *waves).reshape(count, -1).astype(np.float32)


def _stills(cfg: PcaConfig, frames: np.ndarray) -> np.ndarray:
    _, h, w = cfg.stride
    return rearrange(frames, "f (y h) (x w) c -> f y x (h w c)", h=h, w=w)


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
