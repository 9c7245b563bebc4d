"""Shots and captions -> one scene of static shape, as the model reads it."""

from collections.abc import Sequence
from typing import cast

import jax
import numpy as np

from moc_jax.config import BucketConfig
from moc_jax.scene import Scene, SceneLengths
from moc_jax.shapes import Array, Float, typed


@typed
def pack_scene(
    shots: Sequence[Float[np.ndarray, "_ Y X Z"]],
    texts: Sequence[Float[np.ndarray, "_ E"]],
    bucket: BucketConfig,
    *,
    name: str = "the scene",
) -> Scene:
    """One scene without a batch dimension: shots one after another, captions one after another, then zeros.

    Args:
        shots: the latents of each shot, in order.
        texts: the embeddings of the global caption, then of each shot's caption.
        bucket: the static shape to fill.
        name: who is named when it does not fit.

    Raises:
        ValueError: no shot, a caption missing, or more than the bucket holds; names all that does not fit.
    """
    if not shots or len(texts) != len(shots) + 1:
        raise ValueError(
            f"{name} has {len(shots)} shots and {len(texts)} captions; it needs at least one shot, and a caption for "
            f"each besides the global one"
        )
    shot_frames, text_lengths = [len(s) for s in shots], [len(t) for t in texts]
    problem = misfit(bucket, len(shots), sum(shot_frames), sum(text_lengths))
    if problem:
        raise ValueError(f"{name} does not fit its bucket: {problem}")
    return Scene(
        video=_padded(shots, bucket.frames),
        text=_padded([text.astype(np.float32, copy=False) for text in texts], bucket.text_tokens),
        lengths=SceneLengths(
            shot_frames=_padded([np.array(shot_frames, np.int32)], bucket.shots),
            text_lengths=_padded([np.array(text_lengths, np.int32)], bucket.shots + 1),
        ),
    )


def _padded(parts: Sequence[np.ndarray], length: int) -> Array:
    """The parts one after another, then zeros up to `length`; of numpy, until the batch is put on devices."""
    joined = np.concatenate(parts)
    return cast(Array, np.pad(joined, [(0, length - len(joined))] + [(0, 0)] * (joined.ndim - 1)))


def misfit(bucket: BucketConfig, shots: int, frames: int, text_tokens: int) -> str:
    """What of a scene exceeds the bucket, in words; empty if it fits."""
    needs = {"shots": shots, "frames": frames, "text_tokens": text_tokens}
    return ", ".join(
        f"{need} {name.replace('_', ' ')} for a bucket of {getattr(bucket, name)}"
        for name, need in needs.items()
        if need > getattr(bucket, name)
    )


def blank_scene(bucket: BucketConfig, latent_shape: tuple[int, int, int], text_dim: int) -> Scene:
    """A scene of padding only, which counts for nothing in a loss: it fills up a last batch.

    Args:
        bucket: the static shape.
        latent_shape: rows, columns and channels of a latent frame.
        text_dim: width of a text embedding.
    """
    nothing = np.zeros(0, np.int32)
    return Scene(
        video=_padded([np.zeros((0, *latent_shape), np.float32)], bucket.frames),
        text=_padded([np.zeros((0, text_dim), np.float32)], bucket.text_tokens),
        lengths=SceneLengths(
            shot_frames=_padded([nothing], bucket.shots), text_lengths=_padded([nothing], bucket.shots + 1)
        ),
    )


def stack_scenes(scenes: Sequence[Scene]) -> Scene:
    """Scenes of one bucket -> a batch."""
    return jax.tree.map(lambda *rows: np.stack(rows), *scenes)
