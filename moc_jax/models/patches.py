"""Latents <-> tokens: a token is a patch of latents, of as many frames, rows and columns as `patch` says."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.experimental.layout import Layout, with_layout_constraint

from moc_jax.config import ConfigError, ModelConfig
from moc_jax.scene import SceneLengths, SceneShape
from moc_jax.shapes import Array, Float, typed


def scene_shape(
    cfg: ModelConfig, video: tuple[int, ...], text: tuple[int, ...], lengths: SceneLengths
) -> tuple[SceneShape, SceneLengths]:
    """The scene in tokens: static sizes from the arrays' shapes [B, F, Y, X, Z] and [B, L, E], lengths in token frames.

    Without captions, for a model whose tokens they are not.

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
        text_tokens=text[1] if cfg.joint_text else 0,
    )
    captions = lengths.text_lengths if cfg.joint_text else 0 * lengths.text_lengths
    return shape, dataclasses.replace(lengths, shot_frames=lengths.shot_frames // cfg.patch[0], text_lengths=captions)


@typed
def tokens_of(video: Float[Array, "B F Y X Z"], patch: tuple[int, int, int]) -> Float[Array, "B V W"]:
    """Patches in raster order (t, h, w), each as W numbers, their places in raster order too.

    By strides, a place of all patches at a time, and a patch's numbers next to each other in memory: the TPU compiler
    takes minutes over a transpose of all axes, and over putting tokens that lie next to each other in one row.
    """
    strides = [[slice(first, None, size) for first in range(size)] for size in patch]
    places = [video[:, t, y, x] for t, y, x in itertools.product(*strides)]
    patches = with_layout_constraint(jnp.concatenate(places, axis=-1), Layout(major_to_minor=tuple(range(5))))
    return rearrange(patches, "b f y x w -> b (f y x) w")


@typed
def video_of(
    tokens: Float[Array, "B V W"], shape: SceneShape, patch: tuple[int, int, int]
) -> Float[Array, "B F Y X Z"]:
    """What `tokens_of` cut; `shape` is the scene's, in tokens."""
    sizes = [n * size for n, size in zip((shape.frames, shape.rows, shape.columns), patch, strict=True)]
    channels = tokens.shape[2] // math.prod(patch)
    like = jax.ShapeDtypeStruct((tokens.shape[0], *sizes, channels), tokens.dtype)
    (video,) = jax.linear_transpose(functools.partial(tokens_of, patch=patch), like)(tokens)  # a permutation's inverse
    return video
