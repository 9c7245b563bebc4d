"""Principal components of overlapping space-time windows: a linear autoencoder, fitted in closed form.

(a) Lapping. Around every border between patches, the pixels on either side are split into their even and odd parts,
    and the odd part o is replaced by V o, with an orthogonal V (the type-II lapped orthogonal transform, Malvar 1992):

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
    time; beyond the edges, the patch itself. A first frame's reconstruction needs no other frame. What is added is
    orthogonal to all u_c, so a reconstruction has the latents that it was made from.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from typing import Self

import numpy as np
from einops import rearrange

from moc_jax.codecs.base import CodecMismatch, latent_frames, pixels_from_unit, pixels_to_unit
from moc_jax.config import PcaConfig
from moc_jax.shapes import Float, Float32, UInt8, typed

_MOST = 16384  # patches of a clip that enter the covariance, spread evenly: more cost time and change nothing
_LEAST_STD = 1 / 255  # half a step of 8-bit pixels in [-1, 1]: components below it are rounding, not picture
_CLIPS = 64  # of which a part is kept to fit (c), spread evenly
_PART_SIDE, _PART = 192, 2**21  # the most rows and columns, and about the most numbers, of such a part
_NOISE = 0.1  # of a channel's deviation: what (c) may expect latents to be wrong by; a model's are


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
    """Equation (2), its inverse, and what (c) adds."""

    mean: Float32[np.ndarray, "d"]
    basis: Float32[np.ndarray, "Z d"]
    scale: Float32[np.ndarray, "Z"]
    missing: Float32[np.ndarray, "n d"]  # of the latents around a patch, see `_around`

    def encode(self, patches: Float[np.ndarray, "f y x d"]) -> Float[np.ndarray, "f y x Z"]:
        matrix = (self.basis * self.scale[:, None]).T
        return patches @ matrix - self.mean @ matrix  # the product first: it is much smaller than the patches

    def decode(self, latents: Float[np.ndarray, "f y x Z"]) -> Float[np.ndarray, "f y x d"]:
        return latents @ (self.basis / self.scale[:, None]) + self.mean

    def fitted(self, parts: Iterable[tuple[np.ndarray, np.ndarray]]) -> "_Basis":
        """This basis with `missing`, for patches [f y x d] and the latents around them [f y x n]."""
        count = outer = cross = 0
        for patches, around in parts:
            rest = patches - self.decode(around[..., : len(self.scale)])
            x, y = (rearrange(a, "f y x d -> (f y x) d").astype(np.float64) for a in (around, rest))
            count, outer, cross = count + len(x), outer + x.T @ x, cross + x.T @ y
        noise = np.maximum(_NOISE**2 * np.diag(outer), 1e-9 * count)  # the latter for flat clips
        return dataclasses.replace(self, missing=np.float32(np.linalg.solve(outer + np.diag(noise), cross)))


class PCACodec:
    """See the module; build one with `fit` or `load`."""

    def __init__(self, cfg: PcaConfig, first: _Basis, rest: _Basis):
        self.stride = cfg.stride
        self.channels = cfg.channels
        self._cfg = cfg
        self._first, self._rest = first, rest

    @classmethod
    def fit(cls, cfg: PcaConfig, clips: Iterable[Float[np.ndarray, "F Y X 3"]]) -> Self:
        """(b) for the patches of `clips`, which are read once, one at a time, and (c) for those of parts of them."""
        t, h, w = cfg.stride
        first, rest = _Moments(3 * h * w), _Moments(3 * t * h * w)
        parts, videos, every = [], 0, 1
        for number, clip in enumerate(clips):
            if not np.isfinite(clip).all():
                raise ValueError(f"clip {number} to fit the codec on holds NaN or infinite values")
            latent_frames(len(clip), t)
            _check_size(cfg, clip.shape)
            lapped = _lapped(cfg, clip)
            first.add(rearrange(_stills(cfg, lapped), "f y x d -> (f y x) d"))
            rest.add(rearrange(_rest_patches(cfg, lapped), "f y x d -> (f y x) d"))
            if len(clip) > 1 and videos % every == 0:
                parts.append(_part(cfg, clip))
            videos += len(clip) > 1
            if len(parts) > _CLIPS:
                parts, every = parts[::2], 2 * every
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
        nothing = (np.zeros((cfg.channels * n, size)) for n, size in zip(_AROUND, (3 * h * w, 3 * t * h * w)))
        codec = cls(
            cfg,
            _Basis(*_float32(first_mean, first_basis, _scale(first_std, cfg.whiten), next(nothing))),
            _Basis(*_float32(mean, basis, _scale(std, cfg.whiten), next(nothing))),
        )
        return codec._completed(parts)

    def _completed(self, parts: list[UInt8[np.ndarray, "F Y X 3"]]) -> Self:
        """(c), for parts of clips."""

        def stills():
            for part in parts:
                patches = _stills(self._cfg, _lapped(self._cfg, pixels_to_unit(part)))
                yield patches, _around(self._first.encode(patches))

        def rest():
            for part in parts:
                lapped = _lapped(self._cfg, pixels_to_unit(part))
                patches, first = _rest_patches(self._cfg, lapped), self._first.encode(_stills(self._cfg, lapped[:1]))
                yield patches, self._around_rest(first, self._rest.encode(patches))

        return type(self)(self._cfg, self._first.fitted(stills()), self._rest.fitted(rest()))

    def _around_rest(
        self, first: Float[np.ndarray, "1 y x Z"], rest: Float[np.ndarray, "f y x Z"]
    ) -> Float[np.ndarray, "f y x n"]:
        """`_around` with latents before and after; before the others the first frame, as if it stood still."""
        still = self._rest.encode(np.tile(self._first.decode(first), self.stride[0]))
        in_time = np.pad(np.concatenate([still, rest]), ((0, 1), (0, 0), (0, 0), (0, 0)), mode="edge")
        return np.concatenate([_around(rest), in_time[:-2], in_time[2:]], axis=-1)

    @classmethod
    def load(cls, cfg: PcaConfig, state: dict[str, np.ndarray]) -> Self:
        """Checks `state` against `cfg`, field by field."""
        t, h, w = cfg.stride
        missing = sorted({"stride", "whiten", *_NAMES} - set(state))
        if missing:
            raise CodecMismatch(
                f"the saved codec is not a pca codec of this version: it lacks {', '.join(missing)}; use the version "
                "that saved it, or prepare the data and train again"
            )
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
            around = _AROUND[part == "rest"] * cfg.channels
            expected = {
                "mean": (sizes[part],),
                "basis": (cfg.channels, sizes[part]),
                "scale": (cfg.channels,),
                "missing": (around, sizes[part]),
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

    @typed
    def decode(self, latents: Float[np.ndarray, "f y x Z"]) -> Float32[np.ndarray, "F Y X 3"]:
        """Latents -> video, clipped to [-1, 1].

        Raises:
            ValueError: the latents have another number of channels.
        """
        if latents.shape[-1] != self.channels:
            raise ValueError(f"latents have {latents.shape[-1]} channels, but the codec has {self.channels}")
        t, h, w = self.stride
        z_1, z = latents[:1], latents[1:]
        first = self._first.decode(z_1) + _around(z_1) @ self._first.missing
        rest = self._rest.decode(z) + self._around_rest(z_1, z) @ self._rest.missing
        first = rearrange(first, "f y x (h w c) -> f (y h) (x w) c", h=h, w=w)
        rest = rearrange(rest, "f y x (t h w c) -> (f t) (y h) (x w) c", t=t, h=h, w=w)
        return np.clip(_lapped(self._cfg, np.concatenate([first, rest]), inverse=True), -1, 1)

    def state(self) -> dict[str, np.ndarray]:
        """What (b) and (c) found for first and further frames, and the settings they were fitted with."""
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


_NAMES = tuple(f"{part}_{field.name}" for part in ("first", "rest") for field in dataclasses.fields(_Basis))
_AROUND = (5, 7)  # patches: itself and four neighbors, and for further frames two in time


def _scale(std: Float[np.ndarray, "Z"], whiten: float) -> Float[np.ndarray, "Z"]:
    """a / s_c^w of equation (2): the channels' variances average to one."""
    return std**-whiten / np.sqrt(np.mean(std ** (2 - 2 * whiten)))


def _float32(*arrays: np.ndarray) -> tuple[np.ndarray, ...]:
    return tuple(np.asarray(a, np.float32) for a in arrays)


def _lapped(cfg: PcaConfig, video: np.ndarray, *, inverse: bool = False) -> np.ndarray:
    """(a): video with the pixels around the borders of patches turned, or turned back."""
    video = np.array(video, np.float32)
    for axis, size in zip((1, 2), cfg.stride[1:]):
        turn = _turn(size // 2)
        lines = np.moveaxis(video, axis, -1)  # a view
        borders = np.arange(size, lines.shape[-1], size)
        around = borders[:, None] + np.arange(-(size // 2), size // 2)
        lines[..., around] = lines[..., around] @ (turn if inverse else turn.T)
    return video


def _turn(half: int) -> Float32[np.ndarray, "n n"]:
    """Equation (1) for the `half` pixels before and after a border: even part -> itself, odd part o -> V o."""
    n = np.arange(half) + 0.5
    two = np.sqrt(2 / max(half, 1)) * np.cos(np.pi / max(half, 1) * np.outer(np.arange(half), n))
    two[:1] /= np.sqrt(2)
    four = np.sqrt(2 / max(half, 1)) * np.cos(np.pi / max(half, 1) * np.outer(n, n))
    odd = np.hstack([-np.eye(half)[::-1], np.eye(half)]) / np.sqrt(2)
    return (np.eye(2 * half) + odd.T @ ((two.T @ four)[::-1, ::-1] - np.eye(half)) @ odd).astype(np.float32)


def _around(latents: Float[np.ndarray, "f y x Z"]) -> Float[np.ndarray, "f y x n"]:
    """Each patch's latents, and those above, below, to the left and to the right of it."""
    wide = np.pad(latents, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    beside = wide[:, :-2, 1:-1], wide[:, 2:, 1:-1], wide[:, 1:-1, :-2], wide[:, 1:-1, 2:]
    return np.concatenate([latents, *beside], axis=-1)


def _part(cfg: PcaConfig, clip: np.ndarray) -> np.ndarray:
    """The beginning of a clip, of its upper left part if that is large, as uint8."""
    t, h, w = cfg.stride
    rows, columns = (max(size, _PART_SIDE // size * size) for size in (h, w))
    part = clip[:, :rows, :columns]
    return pixels_from_unit(part[: max(2, _PART // part[0].size // t) * t + 1])


def _stills(cfg: PcaConfig, video: np.ndarray) -> np.ndarray:
    """Patches of single frames, the first and one in so many."""
    t, h, w = cfg.stride
    return rearrange(video[::t], "f (y h) (x w) c -> f y x (h w c)", h=h, w=w)


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
