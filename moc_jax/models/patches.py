"""Latents <-> tokens: a token is a patch of latents, of as many frames, rows and columns as `patch` says."""

import dataclasses

from einops import rearrange

from moc_jax.config import ConfigError, ModelConfig
from moc_jax.scene import SceneLengths, SceneShape
from moc_jax.shapes import Array, Float, typed


def scene_shape(
    cfg: ModelConfig, video: tuple[int, ...], text: tuple[int, ...], lengths: SceneLengths
) -> tuple[SceneShape, SceneLengths]:
    """The scene in tokens: static sizes from the arrays' shapes [B, F, Y, X, Z] and [B, L, E], lengths in token frames.

    Raises:
        ConfigError: the latents do not divide into patches.
    """
    for name, size, patch in zip(("frames", "rows", "columns"), video[1:4], cfg.patch, strict=True):
        if size % patch:
            raise ConfigError(
                f"latents have {size} {name}, which model.patch {cfg.patch} cuts into pieces of {patch}; "
                f"use {size // patch * patch} or {(size // patch + 1) * patch}"
            )
    shape = SceneShape(
        shots=lengths.shot_frames.shape[1],
        frames=video[1] // cfg.patch[0],
        rows=video[2] // cfg.patch[1],
        columns=video[3] // cfg.patch[2],
        text_tokens=text[1],
    )
    return shape, dataclasses.replace(lengths, shot_frames=lengths.shot_frames // cfg.patch[0])


@typed
def tokens_of(video: Float[Array, "B F Y X Z"], patch: tuple[int, int, int]) -> Float[Array, "B V W"]:
    """Patches in raster order (t, h, w), each as W numbers."""
    pt, ph, pw = patch
    return rearrange(video, "b (f pt) (y ph) (x pw) z -> b (f y x) (pt ph pw z)", pt=pt, ph=ph, pw=pw)


@typed
def video_of(
    tokens: Float[Array, "B V W"], shape: SceneShape, patch: tuple[int, int, int]
) -> Float[Array, "B F Y X Z"]:
    """What `tokens_of` cut; `shape` is the scene's, in tokens."""
    pt, ph, pw = patch
    return rearrange(
        tokens,
        "b (f y x) (pt ph pw z) -> b (f pt) (y ph) (x pw) z",
        **{"f": shape.frames, "y": shape.rows, "pt": pt, "ph": ph, "pw": pw},
    )
