"""Further stories for nothing: the same ones in other colors, made on the device.

A still world's colors are drawn alike in red, green and blue, and alike above and below gray. So a story whose channels
are permuted and inverted, in all shots alike, is as likely as the story itself; there are 48 of each. The codec of
principal components is linear, and its windows overlap in each channel alike, hence latents become

    z' = A z + c        with A and c of their own for a shot's first latent frame and for the others
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from evidence.dataset import MarkedScene
from moc_jax.codecs import Codec
from moc_jax.shapes import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Recolorings:
    """All of them, the first being none."""

    matrix: Float[np.ndarray | Array, "n 2 Z Z"]  # of first latent frames, and of the others
    offset: Float[np.ndarray | Array, "n 2 Z"]


def shapes(channels: int) -> Recolorings:
    """A ShapeDtypeStruct in place of each array of what `recolorings` gives."""
    of = (48, 2, channels)
    return jax.eval_shape(lambda: Recolorings(jnp.zeros((*of, channels)), jnp.zeros(of)))


def recolorings(codec: Codec) -> Recolorings:
    """Those of a linear codec: of what its basis holds of a picture, and so without what its decoder adds to that."""
    state, found = codec.state(), []
    for part in ("first", "rest"):
        mean, basis, scale = (state[f"{part}_{name}"] for name in ("mean", "basis", "scale"))
        pixels = np.stack([mean, *(mean + basis / scale[:, None])]).reshape(1 + len(scale), -1, 3)  # of 0 and of units
        for signs in itertools.product((1, -1), repeat=3):
            for order in itertools.permutations(range(3)):
                other = (pixels[..., order] * np.array(signs, np.float32)).reshape(len(pixels), -1)
                found.append((other - mean) @ (basis * scale[:, None]).T)
    latents = np.stack(found).reshape(2, -1, *found[0].shape).swapaxes(0, 1)  # [n, 2, 1 + Z, Z]
    offset = latents[:, :, 0]
    return Recolorings(matrix=latents[:, :, 1:] - offset[:, :, None], offset=offset)


def recolored(scene: MarkedScene, of: Recolorings, which: Int[Array, " B"]) -> MarkedScene:
    """Each scene in other colors."""
    matrix, offset = jnp.asarray(of.matrix)[which], jnp.asarray(of.offset)[which]  # [B, 2, Z, Z], [B, 2, Z]
    frames, shots = scene.video.shape[1], scene.lengths.shot_frames.shape[1]
    rest = (jnp.arange(frames) % (frames // shots) > 0).astype(jnp.int32)
    video = jnp.einsum("bfyxi,bfij->bfyxj", scene.video, matrix[:, rest]) + offset[:, rest][:, :, None, None]
    return dataclasses.replace(scene, video=video)
