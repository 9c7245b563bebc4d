"""The encoder and the decoder of Wan's autoencoders, a piece of a video at a time.

2.1: 8 x 8 pixels of 4 frames to 16 channels. 2.2: 16 x 16 pixels of 4 frames to 48; 2 x 2 pixels go in and come out as
channels, and each level has a way past it without weights.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
from einops import rearrange

from moc_jax.codecs.wan_vae.layers import (
    Kept,
    Past,
    Weights,
    attention,
    averaged,
    causal,
    doubled,
    halved,
    linear,
    norm,
    repeated,
    residual,
)
from moc_jax.shapes import Array, Float, Float32, typed

MULTIPLIERS = 1, 2, 4, 4
TIME = False, True, True
"""Which levels halve time on the way down."""
BLOCKS = 2
"""Of a level; the decoder's have one more."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What weights' shapes say of an autoencoder."""

    channels: int
    encoder: int
    """Width of the encoder's first level."""
    decoder: int
    """Width of the decoder's last level."""
    shortcuts: bool
    """2.2: levels with ways past them, and pixels two by two."""

    @property
    def version(self) -> str:
        """Of Wan, that it came with."""
        return "2.2" if self.shortcuts else "2.1"

    @property
    def pixels(self) -> int:
        """Side of the blocks of pixels that go in as channels."""
        return 2 if self.shortcuts else 1

    @property
    def down(self) -> list[tuple[int, int]]:
        """Channels that each level of the encoder reads and gives."""
        widths = [self.encoder * m for m in (1, *MULTIPLIERS)]
        return list(itertools.pairwise(widths))

    @property
    def up(self) -> list[tuple[int, int]]:
        """Channels that each level of the decoder reads and gives, the smallest pictures first; in 2.1 the step to the
        next halves them."""
        widths = [self.decoder * m for m in (MULTIPLIERS[-1], *MULTIPLIERS[::-1])]
        halves = not self.shortcuts
        return [(a // 2 if halves and i else a, b) for i, (a, b) in enumerate(itertools.pairwise(widths))]


def down_names(sizes: Sizes, level: int) -> tuple[list[str], str]:
    """Of the blocks of a level, and of the step to the next, which the last level lacks."""
    if sizes.shortcuts:
        at = f"encoder.down_blocks.{level}"
        return [f"{at}.resnets.{i}" for i in range(BLOCKS)], f"{at}.downsampler"
    first = level * (BLOCKS + 1)
    return [f"encoder.down_blocks.{first + i}" for i in range(BLOCKS)], f"encoder.down_blocks.{first + BLOCKS}"


def up_names(sizes: Sizes, level: int) -> tuple[list[str], str]:
    """As `down_names`."""
    at = f"decoder.up_blocks.{level}"
    return [
        f"{at}.resnets.{i}" for i in range(BLOCKS + 1)
    ], f"{at}.{'upsampler' if sizes.shortcuts else 'upsamplers.0'}"


@typed
def encode_piece(
    w: Weights, sizes: Sizes, before: Kept | None, video: Float[Array, "B F Y X 3"]
) -> tuple[Float32[Array, "B f y x Z"], Kept]:
    """Means of latents of a piece, and what the next needs of it.

    Args:
        w: the weights, in the type that is computed in.
        before: what the piece before has left; None: this one begins with the video's first frame, which has a latent
            frame of its own. All other latent frames hold four.
        video: in [-1, 1].
    """
    past, last = Past(before), len(MULTIPLIERS) - 1
    x = video.astype(w["encoder.conv_in.weight"].dtype)
    x = rearrange(x, "b f (y q) (x r) c -> b f y x (c r q)", q=sizes.pixels, r=sizes.pixels)
    x = causal(w, "encoder.conv_in", past, x)
    for level, (_, width) in enumerate(sizes.down):
        blocks, step = down_names(sizes, level)
        time, space = (2 if level < last and TIME[level] else 1), (2 if level < last else 1)
        beside = averaged(past, x, width, time=time, space=space) if sizes.shortcuts else None
        for block in blocks:
            x = residual(w, block, past, x)
        if level < last:
            x = halved(w, step, past, x, time=TIME[level])
        if beside is not None:
            x = x + beside
    x = _middle(w, "encoder", past, x)
    x = causal(w, "encoder.conv_out", past, jax.nn.silu(norm(w, "encoder.norm_out", x)))
    means = linear(w, "quant_conv", x)[..., : sizes.channels]
    return means.astype(jnp.float32), past.kept


@typed
def decode_piece(
    w: Weights, sizes: Sizes, before: Kept | None, latents: Float[Array, "B f y x Z"]
) -> tuple[Float32[Array, "B F Y X 3"], Kept]:
    """Pixels of a piece, clipped to [-1, 1], and what the next needs of it. Arguments as `encode_piece`."""
    past, last = Past(before), len(MULTIPLIERS) - 1
    x = latents.astype(w["decoder.conv_in.weight"].dtype)
    x = causal(w, "decoder.conv_in", past, linear(w, "post_quant_conv", x))
    x = _middle(w, "decoder", past, x)
    for level, (_, width) in enumerate(sizes.up):
        blocks, step = up_names(sizes, level)
        time = level < last and TIME[last - 1 - level]
        beside = None
        if sizes.shortcuts and level < last:
            beside = repeated(past, x, width, time=2 if time else 1, space=2)
        for block in blocks:
            x = residual(w, block, past, x)
        if level < last:
            x = doubled(w, step, past, x, time=time)
        if beside is not None:
            x = x + beside
    x = causal(w, "decoder.conv_out", past, jax.nn.silu(norm(w, "decoder.norm_out", x)))
    x = rearrange(x, "b f y x (c r q) -> b f (y q) (x r) c", q=sizes.pixels, r=sizes.pixels)
    return jnp.clip(x.astype(jnp.float32), -1, 1), past.kept


def _middle(w: Weights, side: str, past: Past, x: Array) -> Array:
    x = residual(w, f"{side}.mid_block.resnets.0", past, x)
    x = attention(w, f"{side}.mid_block.attentions.0", x)
    return residual(w, f"{side}.mid_block.resnets.1", past, x)
