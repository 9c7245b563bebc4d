"""The codec: weights on devices, latents normalised, batches over what devices a host has."""

import functools
import hashlib
import math
from collections.abc import Iterable
from typing import ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from moc_jax.codecs.base import CodecError, CodecMismatch, latent_frames
from moc_jax.codecs.wan_vae.layers import Weights
from moc_jax.codecs.wan_vae.names import recognised, tensors
from moc_jax.codecs.wan_vae.network import Sizes
from moc_jax.codecs.wan_vae.published import DEVIATIONS, MEANS
from moc_jax.codecs.wan_vae.streaming import decoded, encoded, tiled
from moc_jax.config import ConfigError, WanVaeConfig
from moc_jax.errors import explain_memory
from moc_jax.shapes import Float, Float32, typed
from moc_jax.showing import named
from moc_jax.tensor_files.beside import open_beside, weights_digest
from moc_jax.tensor_files.places import LICENCE
from moc_jax.tensor_files.safetensors import Stored


def _opened(place: str, setting: str) -> tuple[tuple[Sizes, int], dict[str, Stored]]:
    what, pth = "Wan's autoencoder", "*vae*.pth"
    return open_beside(place, folder="vae", pth=pth, what=what, setting=setting, recognise=recognised)


def described(place: str) -> str:
    """See `moc_jax.codecs.public_autoencoder`."""
    (sizes, spelling), stored = _opened(place, "the place")
    count, names = sum(math.prod(x.shape) for x in stored.values()), ("diffusers", "original")[spelling]
    return f"Wan's autoencoder {sizes.version}: {count:,} parameters with {names} names; licence: {LICENCE}"


class WanVae:
    """See `WanVaeConfig`; build one with `fit` or `load`, which open its files. Numbers are read at the first use."""

    fitted: ClassVar[bool] = False

    def __init__(self, cfg: WanVaeConfig):
        """Raises WeightsError or ConfigError: its weights are not there or not whole, or of another version."""
        self.stride, self.channels, self.batch_size = cfg.stride, cfg.channels, cfg.batch
        self._cfg = cfg
        (self.sizes, _), self._stored = _opened(cfg.weights, "codec.weights")
        where, sizes = f"codec.weights {named(cfg.weights)}", self.sizes
        if sizes.version != cfg.version:
            raise ConfigError(f"{where} is Wan's autoencoder {sizes.version}, but codec.version is {cfg.version}")
        if sizes.channels != cfg.channels:
            raise ConfigError(f"{where} has {sizes.channels} latent channels; Wan's {cfg.version} has {cfg.channels}")
        self._digest = weights_digest(self._stored)
        self._on_devices: dict[int, tuple[Mesh, Weights]] = {}

    @classmethod
    def sums(cls, cfg: WanVaeConfig, clips: Iterable[Float[np.ndarray, "F Y X 3"]]) -> dict[str, np.ndarray]:
        """Of no clip is anything needed."""
        return {}

    @classmethod
    def fit(cls, cfg: WanVaeConfig, sums: Iterable[dict[str, np.ndarray]]) -> Self:
        """As its files are."""
        return cls(cfg)

    @classmethod
    def load(cls, cfg: WanVaeConfig, state: dict[str, np.ndarray]) -> Self:
        """Checks the weights against those that were used."""
        codec = cls(cfg)
        used = bytes(state["weights"]).hex() if "weights" in state else "none"
        if used != codec._digest:
            raise CodecMismatch(
                f"codec.weights {cfg.weights} holds other numbers (digest {codec._digest[:12]}) than the weights that "
                f"were used (digest {used[:12]}); put those there"
            )
        return codec

    def latent_frames(self, frames: int) -> int:
        """Latent frames of a clip of 1 + 4 n."""
        return latent_frames(frames, self.stride[0])

    def encode(self, video: Float[np.ndarray, "F Y X 3"]) -> Float32[np.ndarray, "f y x Z"]:
        """Normalised means of the latents."""
        return self.encode_batch(video[None])[0]

    def _remedies(self) -> str:
        cfg = self._cfg
        tile = "cut frames into tiles with codec.tile" if not cfg.tile else f"make codec.tile ({cfg.tile}) smaller"
        others = [f"codec.{name} ({getattr(cfg, name)})" for name in ("batch", "piece") if getattr(cfg, name) > 1]
        return f"To need less, {tile}" + (f", or make {' and '.join(others)} smaller" if others else "")

    @explain_memory("the autoencoder", CodecError, _remedies)
    @typed
    def encode_batch(self, videos: Float[np.ndarray, "B F Y X 3"]) -> Float32[np.ndarray, "B f y x Z"]:
        """The same of several clips of one size, over as many devices of this host as share them evenly."""
        b, frames, *pixels, _ = videos.shape
        for name, size, unit in zip(("rows", "columns"), pixels, self.stride[1:]):
            if size % unit:
                low = max(unit, size // unit * unit)
                raise ValueError(
                    f"a frame has {size} {name}, but Wan's autoencoder {self._cfg.version} takes multiples of {unit}; "
                    f"the nearest are {low} and {low + unit}"
                )
        unit, cfg, (mesh, weights) = self.stride[1], self._cfg, self._weights(b)
        out = b, self.latent_frames(frames), pixels[0] // unit, pixels[1] // unit, self.channels
        run = functools.partial(encoded, weights, self.sizes, place=self._placed(mesh), piece=cfg.piece)
        with jax.set_mesh(mesh):
            latents = tiled(run, videos, out, (cfg.tile, cfg.tile // unit), (cfg.overlap, cfg.overlap // unit))
        return (latents - MEANS[cfg.version]) / DEVIATIONS[cfg.version]

    @explain_memory("the autoencoder", CodecError, _remedies)
    @typed
    def decode(self, latents: Float[np.ndarray, "f y x Z"]) -> Float32[np.ndarray, "F Y X 3"]:
        """Latents -> video, clipped to [-1, 1].

        Raises:
            ValueError: the latents have another number of channels.
        """
        if latents.shape[-1] != self.channels:
            raise ValueError(f"latents have {latents.shape[-1]} channels, but the codec has {self.channels}")
        frames, rows, columns, _ = latents.shape
        time, unit, cfg, (mesh, weights) = self.stride[0], self.stride[1], self._cfg, self._weights(1)
        given = (latents * DEVIATIONS[cfg.version] + MEANS[cfg.version]).astype(np.float32)[None]
        out = 1, time * (frames - 1) + 1, rows * unit, columns * unit, 3
        run = functools.partial(decoded, weights, self.sizes, place=self._placed(mesh), piece=cfg.piece)
        with jax.set_mesh(mesh):
            return tiled(run, given, out, (cfg.tile // unit, cfg.tile), (cfg.overlap // unit, cfg.overlap))[0]

    def _weights(self, batch: int) -> tuple[Mesh, Weights]:
        """On as many devices of this host as share a batch evenly."""
        devices = jax.local_devices()
        count = math.gcd(batch, len(devices))
        if count not in self._on_devices:
            mesh = Mesh(np.array(devices[:count]), ("batch",), axis_types=(AxisType.Auto,))
            everywhere = NamedSharding(mesh, PartitionSpec())
            arrays = {x.name: x.of_file(self._stored[x.name].array()) for x in tensors(self.sizes)}
            dtype = jnp.dtype(self._cfg.dtype)
            placed = {name: jax.device_put(np.asarray(x, dtype), everywhere) for name, x in arrays.items()}
            self._on_devices[count] = mesh, placed
        return self._on_devices[count]

    def _placed(self, mesh: Mesh):
        return functools.partial(jax.device_put, device=NamedSharding(mesh, PartitionSpec("batch")))

    def state(self) -> dict[str, np.ndarray]:
        """Which weights they are; the weights stay where they lie."""
        return {"weights": np.frombuffer(bytes.fromhex(self._digest), np.uint8)}

    @property
    def fingerprint(self) -> str:
        """A short hash of the weights and of what else decides on latents."""
        cfg = self._cfg
        tiling = (cfg.tile, cfg.overlap) if cfg.tile else ()
        return hashlib.sha256(f"wan_vae {cfg.version} {self._digest} {cfg.dtype} {tiling}".encode()).hexdigest()[:16]
