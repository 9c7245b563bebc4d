"""Further stories for nothing: the same ones in other colors, made on the device.

A still world's colors are drawn alike in red, green and blue, and alike above and below gray. So a story whose channels
are permuted and inverted, in all shots alike, is as likely as the story itself; there are 48 of each. The codec of
principal components is linear, hence so is what becomes of latents:

    z' = A z + c        with A and c of their own for a shot's first latent frame and for the others
"""

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np

from evidence.dataset import MarkedScene
from moc_jax.codecs import Codec
from moc_jax.shapes import Array, Float, Int

_STEP = 0.1  # latents so small that no pixel is clipped


@dataclasses.dataclass(frozen=True)
class Recolorings:
    """All of them, the first being none."""

    matrix: Float[np.ndarray, "n 2 Z Z"]  # of first latent frames, and of the others
    offset: Float[np.ndarray, "n 2 Z"]


def recolorings(codec: Codec) -> Recolorings:
    """Those of a linear codec."""
    z = np.concatenate([np.zeros((1, codec.channels)), np.eye(codec.channels) * _STEP]).astype(np.float32)
    pixels = codec.decode(np.broadcast_to(z[None], (2, *z.shape))[:, :, None].astype(np.float32))  # one latent a row
    found = []
    for signs in itertools.product((1, -1), repeat=3):
        for order in itertools.permutations(range(3)):
            found.append(codec.encode(pixels[..., order] * np.array(signs, np.float32))[:, :, 0])
    latents = np.stack(found)  # [n, 2, 1 + Z, Z]
    offset = latents[:, :, 0]
    return Recolorings(matrix=(latents[:, :, 1:] - offset[:, :, None]) / _STEP, offset=offset)


def recolored(scene: MarkedScene, of: Recolorings, which: Int[Array, " B"]) -> MarkedScene:
    """Each scene in other colors."""
    matrix, offset = jnp.asarray(of.matrix)[which], jnp.asarray(of.offset)[which]  # [B, 2, Z, Z], [B, 2, Z]
    frames, shots = scene.video.shape[1], scene.lengths.shot_frames.shape[1]
    rest = (jnp.arange(frames) % (frames // shots) > 0).astype(jnp.int32)
    video = jnp.einsum("bfyxi,bfij->bfyxj", scene.video, matrix[:, rest]) + offset[:, rest][:, :, None, None]
    return dataclasses.replace(scene, video=video)
