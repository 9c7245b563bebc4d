"""How near a sample comes to the scene it was trained on, measured against what the codec makes of that scene."""

from collections.abc import Sequence

import numpy as np

from moc_jax.codecs import Codec, pixels_from_unit
from moc_jax.scene import Scene
from moc_jax.shapes import Shaped, UInt8, typed


@typed
def psnr(a: Shaped[np.ndarray, "*shape"], b: Shaped[np.ndarray, "*shape"]) -> float:
    """Peak signal-to-noise ratio in dB: 10 log10(range^2 / mean squared error); infinite for equal arrays.

    Args:
        a, b: frames of one type: uint8 (range 255) or floats in [-1, 1] (range 2).

    Raises:
        ValueError: the types differ.
    """
    if a.dtype != b.dtype:
        raise ValueError(f"cannot compare {a.dtype} with {b.dtype} frames; convert one of them")
    peak = 255.0 if a.dtype == np.uint8 else 2.0
    error = np.mean(np.square(a.astype(np.float64) - b.astype(np.float64)))
    return float("inf") if error == 0 else float(10 * np.log10(peak**2 / error))


def mean_psnr(sample: Sequence[np.ndarray], reference: Sequence[np.ndarray]) -> tuple[float, list[float]]:
    """Mean over the shots of each shot's PSNR, and those.

    Raises:
        ValueError: the two have other shots, or shots of other lengths.
    """
    ours, theirs = [shot.shape for shot in sample], [shot.shape for shot in reference]
    if ours != theirs:
        raise ValueError(
            f"cannot compare shots of shapes {ours} with shots of shapes {theirs}; sample the scene with the durations "
            "that it was trained with"
        )
    per_shot = [psnr(a, b) for a, b in zip(sample, reference)]
    return float(np.mean(per_shot)), per_shot


def reconstruct_scene(scene: Scene, codec: Codec, index: int = 0) -> list[UInt8[np.ndarray, "_ Y X 3"]]:
    """The frames of each shot of scene `index` of a batch: the best that a model of these latents can show."""
    frames = np.asarray(scene.lengths.shot_frames)[index]
    shots = np.split(np.asarray(scene.video)[index], np.cumsum(frames))
    return [pixels_from_unit(codec.decode(shot)) for shot, count in zip(shots, frames) if count]
