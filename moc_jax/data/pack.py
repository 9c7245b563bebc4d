"""Shots and captions -> one scene of static shape, as the model reads it."""

import itertools
from collections.abc import Sequence
from typing import cast

import jax
import numpy as np

from moc_jax.config import BucketConfig, MoCConfig
from moc_jax.scene import Scene, SceneLengths
from moc_jax.shapes import Array, Float, Float32, typed


@typed
def pack_scene(
    shots: Sequence[Float[np.ndarray, "_ Y X Z"]],
    texts: Sequence[Float[np.ndarray, "_ E"]],
    bucket: BucketConfig,
    *,
    continues: Sequence[bool] = (),
    clean_first: Sequence[bool] | None = None,
    condition: Sequence[Float[np.ndarray, "_ Y X C"]] | None = None,
    name: str = "the scene",
) -> Scene:
    """One scene without a batch dimension: shots one after another, captions one after another, then zeros.

    Args:
        shots: the latents of each shot, in order.
        texts: the embeddings of the global caption, then of each shot's caption.
        bucket: the static shape to fill.
        continues: which shots continue the one before, from the first on; those that are not said do not.
        clean_first: whose first frame is given clean, of models that know that.
        condition: what is given of each shot, of models that read that.
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
            continues=_padded([np.array(continues, bool)], bucket.shots),
            clean_first=None if clean_first is None else _padded([np.array(clean_first, bool)], bucket.shots),
        ),
        condition=None if condition is None else _padded(condition, bucket.frames),
    )


@typed
def condition_of(
    latents: Float[np.ndarray, "f Y X Z"], given: int, stride: int
) -> Float32[np.ndarray, "f Y X {stride}+Z"]:
    """What a model reads of a shot of which so many latent frames are given: a mask, a channel for each of `stride`
    frames, and latents of what is given, the rest grey; zeros if it is nothing."""
    mask = np.zeros((*latents.shape[:3], stride), np.float32)
    mask[:given] = 1
    return np.concatenate([mask, latents if given else np.zeros_like(latents)], axis=-1, dtype=np.float32)


def own_texts(
    texts: Sequence[Float[np.ndarray, "_ E"]], captions: Sequence[str], continues: Sequence[bool], cfg: MoCConfig
) -> list[Float[np.ndarray, "_ E"]]:
    """The embeddings as they stand in a scene: a shot that continues another under its caption needs no second one.

    Args:
        texts: of each of `captions`, the global one, then each shot's.
    """
    if captions_again(cfg):
        return list(texts)
    again = [False, *(c and a == b for c, (a, b) in zip(continues, itertools.pairwise(captions)))]
    return [text[:0] if same else text for text, same in zip(texts, again, strict=True)]


def captions_again(cfg: MoCConfig) -> bool:
    """Whether a shot that continues another under its caption has it again: its queries see no captions but its own."""
    return cfg.text_anchor == "own+global"


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


def blank_scene(
    bucket: BucketConfig, latent_shape: tuple[int, int, int], text_dim: int, *, clean: bool = False, condition: int = 0
) -> Scene:
    """A scene of padding only, which counts for nothing in a loss: it fills up a last batch.

    Args:
        bucket: the static shape.
        latent_shape: rows, columns and channels of a latent frame.
        text_dim: width of a text embedding.
        clean: first frames are given clean.
        condition: channels of what is given otherwise; 0: it isn't.
    """
    nothing = np.zeros(0, np.int32)
    return Scene(
        video=_padded([np.zeros((0, *latent_shape), np.float32)], bucket.frames),
        text=_padded([np.zeros((0, text_dim), np.float32)], bucket.text_tokens),
        lengths=SceneLengths(
            shot_frames=_padded([nothing], bucket.shots),
            text_lengths=_padded([nothing], bucket.shots + 1),
            continues=_padded([np.zeros(0, bool)], bucket.shots),
            clean_first=_padded([np.zeros(0, bool)], bucket.shots) if clean else None,
        ),
        condition=_padded([np.zeros((0, *latent_shape[:2], condition), np.float32)], bucket.frames)
        if condition
        else None,
    )


def stack_scenes(scenes: Sequence[Scene]) -> Scene:
    """Scenes of one bucket -> a batch."""
    return jax.tree.map(lambda *rows: np.stack(rows), *scenes)
