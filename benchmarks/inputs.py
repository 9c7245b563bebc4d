"""Queries, keys, values and output gradients: with routes that have nothing in common, or alike among neighbours."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moc_jax.shapes import Array, Float, Float32, Int, Key, typed

Kind = Literal["random", "correlated"]
_REACH = 1024  # tokens over which correlated tokens change
_NOISE = 0.1  # share of a correlated token's variance that is its own


class Inputs(NamedTuple):
    """One scene, bfloat16."""

    q: Float[Array, "1 N H D"]
    k: Float[Array, "1 N H D"]
    v: Float[Array, "1 N H D"]
    d_out: Float[Array, "1 N H D"]


def make_inputs(kind: Kind, tokens: int, heads: int, head_dim: int) -> Inputs:
    """All of unit variance. `random`: every token on its own, so that routes are uniformly random and neighbouring
    queries agree on nothing. `correlated`: queries and keys vary slowly along the tokens, as in video.
    """

    size = (1, tokens, heads, head_dim)

    def plain(key):
        return jax.random.normal(key, size, jnp.bfloat16)

    def smooth(key):
        return _smooth(key, *size[1:]).astype(jnp.bfloat16)

    def make(key):
        q, k, v, d_out = jax.random.split(key, 4)
        routed = smooth if kind == "correlated" else plain
        return Inputs(routed(q), routed(k), plain(v), plain(d_out))

    return jax.jit(make)(jax.random.key(0))


@typed
def _smooth(key: Key[Array, ""], tokens: int, heads: int, head_dim: int) -> Float32[Array, "1 N H D"]:
    """Random knots every `_REACH` tokens, blended linearly, and noise."""
    knot_key, noise_key = jax.random.split(key)
    knots = jax.random.normal(knot_key, (tokens // _REACH + 2, heads, head_dim))
    token = jnp.arange(tokens)
    weight = (token % _REACH / _REACH)[:, None, None]
    left, right = knots[token // _REACH], knots[token // _REACH + 1]
    slow = ((1 - weight) * left + weight * right) / jnp.sqrt((1 - weight) ** 2 + weight**2)
    own = jax.random.normal(noise_key, slow.shape)
    return (jnp.sqrt(1 - _NOISE) * slow + jnp.sqrt(_NOISE) * own)[None]


def union_ratio(routes: Int[Array, "B H N K"], text_tokens: int, *, tile: int = 128, tiles: int = 64) -> float | None:
    """How many chunks a tile of neighbouring queries picks together, over how many each picks by itself: U / k.

    1: all pick the same. The mean over `tiles` tiles of every head, evenly spread over the video; None if nothing is
    picked.
    """
    video = routes.shape[2] - text_tokens
    tile = min(tile, video)
    starts = text_tokens + np.linspace(0, video - tile, tiles).astype(int)
    sampled = np.asarray(routes[0][:, starts[:, None] + np.arange(tile)])  # [H, tiles, T, K]
    ratios = []
    for picks in sampled.reshape(-1, *sampled.shape[2:]):
        each = (picks >= 0).sum(axis=-1)
        if each.any():
            ratios.append(len(np.unique(picks[picks >= 0])) / each[each > 0].mean())
    return float(np.mean(ratios)) if ratios else None
