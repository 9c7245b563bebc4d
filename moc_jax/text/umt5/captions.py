"""The text encoder: captions in batches, weights on devices or a layer at a time."""

import functools
import hashlib
import math
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from moc_jax.config import ConfigError, Umt5Config
from moc_jax.shapes import Array, Float
from moc_jax.showing import named, shown
from moc_jax.tensor_files.beside import open_beside, weights_digest
from moc_jax.tensor_files.safetensors import Stored
from moc_jax.text.umt5.encoder import Layer, buckets, layer, normed
from moc_jax.text.umt5.names import LICENCE, PARTS, Sizes, layer_name, recognised
from moc_jax.text.umt5.tokens import Tokenizer, tokenizer_digest, tokenizer_file

_ROWS = 64  # a batch is as long as its longest caption, in steps of these: few programs
_FREE = 0.5  # of a device's memory, at most, for weights that stay there: the model's are there, too

# Which axis the devices share: heads, or hidden units.
_SHARDED = {"o": PartitionSpec(None, "heads"), "wo": PartitionSpec(None, "heads"), "bias": PartitionSpec(None, "heads")}
_SHARDED |= dict.fromkeys(("q", "k", "v", "wi_0", "wi_1"), PartitionSpec("heads"))

_layer, _normed = jax.jit(layer), jax.jit(normed)


def _opened(place: str, setting: str) -> tuple[Sizes, dict[str, Stored]]:
    what, pth = "umT5's encoder", "models_t5*.pth"
    return open_beside(place, folder="text_encoder", pth=pth, what=what, setting=setting, recognise=recognised)


def described(place: str) -> str:
    """See `moc_jax.text.public_encoder`."""
    sizes, stored = _opened(place, "the place")
    count = sum(math.prod(x.shape) for x in stored.values())
    file = tokenizer_file("", place)
    _tokens(file, sizes, place)
    widths = f"{count:,} parameters, {sizes.depth} layers of width {sizes.dim}"
    return f"umT5's encoder: {widths}; its tokenizer: {named(file)}; licence: {LICENCE}"


def _tokens(file: Path, sizes: Sizes, place: str) -> Tokenizer:
    tokens = Tokenizer(file)
    if tokens.pieces > sizes.vocabulary:
        raise ConfigError(
            f"the tokenizer has {tokens.pieces} pieces, but {place} embeds {sizes.vocabulary}; name its own with "
            "text.tokenizer"
        )
    return tokens


class Umt5:
    """See `Umt5Config`."""

    def __init__(self, cfg: Umt5Config):
        """Opens the files; numbers are read at the first use.

        Raises:
            WeightsError: the weights are not there or not whole.
            ConfigError: they are of another width than `text.dim`; there is no tokenizer, or none can be read here.
        """
        self._cfg = cfg
        self._sizes, self._stored = _opened(cfg.weights, "text.weights")
        self.dim, self.batch_size = cfg.dim, cfg.batch
        if self._sizes.dim != cfg.dim:
            raise ConfigError(f"text.dim is {cfg.dim}, but {cfg.weights} has a width of {self._sizes.dim}; set that")
        self._tokens = _tokens(tokenizer_file(cfg.tokenizer, cfg.weights), self._sizes, cfg.weights)

    @staticmethod
    def fingerprint(cfg: Umt5Config) -> str:
        """See `moc_jax.text.encoder_fingerprint`."""
        parts = (
            weights_digest(_opened(cfg.weights, "text.weights")[1]),
            tokenizer_digest(tokenizer_file(cfg.tokenizer, cfg.weights)),
            cfg.dtype,
        )
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]

    def __call__(self, caption: str) -> Float[np.ndarray, "L E"]:
        """A row per token, the end's the last, in the type that is computed in."""
        return self.batch([caption])[0]

    def check(self, caption: str) -> None:
        """Raises ValueError: it has more than `text.max_tokens` tokens."""
        self._ids(caption)

    def batch(self, captions: Sequence[str]) -> list[Float[np.ndarray, "_ E"]]:
        """The same for several captions.

        Raises:
            ValueError: one has more than `text.max_tokens` tokens.
        """
        ids = [self._ids(caption) for caption in captions]
        rows = -(-max(map(len, ids)) // _ROWS) * _ROWS
        count = 1 << (len(ids) - 1).bit_length()
        real = np.arange(rows) < np.array([len(x) for x in ids] + [1] * (count - len(ids)))[:, None]
        tokens = np.zeros((count, rows), np.int32)
        for k, x in enumerate(ids):
            tokens[k, : len(x)] = x
        out = self._encoded(tokens, real)
        return [out[k, : len(x)] for k, x in enumerate(ids)]

    def _ids(self, caption: str) -> list[int]:
        ids, most = self._tokens(caption), self._cfg.max_tokens
        if len(ids) > most:
            raise ValueError(
                f"the caption {shown(caption)} has {len(ids)} tokens with the end's, but text.max_tokens is {most}; "
                "shorten it" + (" or raise text.max_tokens" if most < 512 else ": Wan reads 512 at most")
            )
        return ids

    def _encoded(self, tokens: np.ndarray, real: np.ndarray) -> np.ndarray:
        """Where weights come from files, a layer's are read while the one before it is computed, and no more."""
        mesh, kept = self._devices
        everywhere = NamedSharding(mesh, PartitionSpec())
        put = functools.partial(jax.device_put, device=everywhere)
        rows, inverse = np.unique(tokens, return_inverse=True)
        table = np.asarray(self._stored["table"].array()[rows], self._dtype)
        with jax.set_mesh(mesh):
            x = put(table[inverse.reshape(tokens.shape)])
            given = put(real), put(buckets(tokens.shape[1]).astype(np.int32))
            for number in range(self._sizes.depth):
                weights = kept[number] if kept else self._layer(number, mesh)
                if not kept:
                    x.block_until_ready()
                x = _layer(weights, x, *given)
            out = _normed(x, put(np.asarray(self._stored["norm"].array(), self._dtype)))
        return np.asarray(out)

    @property
    def _dtype(self) -> np.dtype:
        return np.dtype(jnp.dtype(self._cfg.dtype))

    def _layer(self, number: int, mesh: Mesh) -> Layer:
        def placed(part: str) -> Array:
            array = np.asarray(self._stored[layer_name(number, part)].array(), self._dtype)
            return jax.device_put(array, NamedSharding(mesh, _SHARDED.get(part, PartitionSpec())))

        return {part: placed(part) for part in PARTS}

    @functools.cached_property
    def _devices(self) -> tuple[Mesh, list[Layer] | None]:
        """As many devices of this host as share heads evenly, and the weights, if they stay there."""
        devices = jax.local_devices()
        count = math.gcd(self._sizes.heads, self._sizes.mlp_dim, len(devices))
        mesh = Mesh(np.array(devices[:count]), ("heads",), axis_types=(AxisType.Auto,))
        if self._cfg.hold == "layers" or (self._cfg.hold == "auto" and not self._fits(devices[0], count)):
            return mesh, None
        with jax.set_mesh(mesh):
            return mesh, [self._layer(number, mesh) for number in range(self._sizes.depth)]

    def _fits(self, device: jax.Device, count: int) -> bool:
        """Whether a device's share of all layers fits; processors' memory isn't asked."""
        memory = device.memory_stats() or {}
        free = memory.get("bytes_limit", 0) - memory.get("bytes_in_use", 0)
        numbers = sum(math.prod(x.shape) for name, x in self._stored.items() if name != "table")
        return numbers * self._dtype.itemsize / count < _FREE * free
