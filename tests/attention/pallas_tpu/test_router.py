"""The routing kernel picks what `routing.select` picks: interpreted on tiny scenes."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from moc_jax.attention import routing
from moc_jax.attention.layout import queries_of
from moc_jax.attention.pallas_tpu import router
from moc_jax.attention.pallas_tpu.device import Chip
from moc_jax.attention.pallas_tpu.ranks import ScanTiling
from moc_jax.config import MoCConfig
from tests.attention.configs import COVERING, MULTI_SHOT, NO_ANCHORS, PAST, SINGLE_SHOT, name
from tests.attention.oracle import near_ties
from tests.attention.scenes import BATCH, HEADS, PAIR, cut, qkv, table_of

CHIP = Chip("v5e")
ALL = [cfg for cfg in COVERING if cfg.mode == "moc" and cfg.top_k <= 16]


def inputs(dtype, kind="normal", scenes=PAIR, table=None, tokens=64, seed=0):
    """q and k in `dtype`, descriptors of the keys, and the table."""
    table = table_of(scenes) if table is None else table
    q, k, _ = (jnp.asarray(x, dtype) for x in qkv(seed, scenes, kind, shape=(tokens, HEADS, 16)))
    return q, routing.descriptors(k, table), table, k


def check(q, phi, table, cfg, **options):
    """Exact equality: no near-ties in these inputs, or scores that are exact."""
    got = np.asarray(router.select(q, phi, queries_of(table), table, cfg, chip=CHIP, **options))
    np.testing.assert_array_equal(got, np.asarray(routing.select(q, phi, queries_of(table), table, cfg)))
    assert (got >= 0).any()
    return got


# ------------------------------------------------------------------------------------------------ what goes in


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_three_parts_hold_every_bit_that_counts(scale):
    table = table_of(PAIR)
    phi = scale * np.random.default_rng(0).standard_normal((BATCH, HEADS, 16, 64)).astype(np.float32)
    phi[0, 0, 2, 0] = np.inf
    parts = np.asarray(router._parts(jnp.asarray(phi), table, ScanTiling(block=128), jnp.bfloat16))
    assert parts.shape == (BATCH * HEADS, 1, 3 * 32, 64)
    total = np.asarray(parts, np.float64).reshape(BATCH, HEADS, 4, 3, 8, 64).sum(axis=3).reshape(BATCH, HEADS, 32, 64)
    assert np.isnan(total[:, :, 16:]).all(), "a row of padding"
    total = total[:, :, :16]
    pickable = np.broadcast_to(np.asarray(routing.pickable_chunks(table))[:, None, :, None], phi.shape)
    assert np.isnan(total[~pickable]).all(), "a chunk that nobody may pick"
    assert total[0, 0, 2, 0] == np.inf
    phi[0, 0, 2, 0] = total[0, 0, 2, 0] = 0
    assert (np.abs(total - phi) <= 2.0**-24 * np.abs(phi))[pickable].all()


# ------------------------------------------------------------------------------------------------ what comes out


@pytest.mark.parametrize(
    ("cfg", "dtype"),
    [
        (MULTI_SHOT, jnp.bfloat16),
        (SINGLE_SHOT, jnp.float32),
        (PAST[0], jnp.bfloat16),
        *[pytest.param(cfg, dtype, marks=pytest.mark.slow) for cfg in ALL for dtype in (jnp.bfloat16, jnp.float32)],
    ],
    ids=lambda x: name(x) if isinstance(x, MoCConfig) else x.__name__,
)
def test_picks_are_those_of_xla(cfg, dtype, interpreter):
    """Two scenes of uneven chunks, with padding: every anchor, causal or not, both visibilities."""
    q, phi, table, k = inputs(dtype)
    got = check(q, phi, table, cfg)
    for b, scene in enumerate(PAIR):
        near_ties(got[b], np.asarray(q[b], np.float32), np.asarray(k[b], np.float32), scene, cfg)


def test_ties_go_to_the_lowest_chunk(interpreter):
    kinds = "equal chunks", "integers", "zero queries", "huge queries"
    cfg, table = dataclasses.replace(SINGLE_SHOT, top_k=4), table_of(PAIR * len(kinds))
    q, phi = (jnp.concatenate(x) for x in zip(*[_with_ties(kind) for kind in kinds]))
    check(q, phi, table, cfg)


def _with_ties(kind):
    q, phi, _, _ = inputs(jnp.bfloat16, kind)
    if kind == "equal chunks":
        phi = jnp.broadcast_to(phi[:, :, 2:3], phi.shape)
    elif kind == "zero queries":  # scores of both zeros
        phi = phi.at[:, :, ::2].multiply(-1)
    else:  # means that are integers too, so that every score is exact
        phi = jnp.round(phi)
    return q, phi


@pytest.mark.long
def test_a_nan_score_is_never_picked(interpreter):
    cfg = dataclasses.replace(NO_ANCHORS, top_k=9, causal_routing=False)  # all candidates, and nothing
    q, phi, table, _ = inputs(jnp.bfloat16)
    q = q.at[0, 14].set(jnp.nan)  # a video token: all its scores
    got = check(q, phi.at[:, 0, 3].set(jnp.nan), table, cfg)
    assert not (got[:, 0] == 3).any()
    assert (got[:, 1] == 3).any()
    assert (got[0, :, 14] == -1).all()


@pytest.mark.long
def test_several_tiles_of_chunks_and_blocks_of_tokens(interpreter):
    """44 chunks in tiles of 16; 400 tokens in blocks of 256; lists that begin in one tile and fill in another."""
    scenes = [cut(3, (2, [9] * 20), (1, [8] * 19)), cut(1, (0, [3, 30] * 5), (0, [11] * 9), (2, [40]))]
    table = table_of(scenes, tokens=400, chunks=44, max_chunk=40)
    q, phi, table, _ = inputs(jnp.bfloat16, "integers", scenes, table, tokens=400)
    cfg, tiling = dataclasses.replace(NO_ANCHORS, top_k=5), ScanTiling(block=256, chunks=16)
    got = check(q, jnp.round(phi), table, cfg, tiling=tiling)
    assert got.max() >= 32, "a pick in the last tile"


def test_no_picks(interpreter):
    q, phi, table, _ = inputs(jnp.bfloat16)
    cfg = dataclasses.replace(MULTI_SHOT, top_k=0)
    assert router.select(q, phi, queries_of(table), table, cfg, chip=CHIP).shape == (BATCH, HEADS, 64, 0)


# ------------------------------------------------------------------------------------------------ limits


@pytest.mark.parametrize(
    ("tokens", "top_k", "block"),
    [(64, 5, 128), (1_000, 5, 1024), (1_100, 5, 1024), (6_300, 3, 4096), (180_504, 16, 2048)],
)
def test_blocks_suit_the_sizes(tokens, top_k, block):
    assert router.tiling_of(tokens, top_k) == ScanTiling(block=block)


@pytest.mark.parametrize("sizes", [{"block": 100}, {"block": 512, "chunks": 24}])
def test_blocks_are_whole_registers(sizes):
    with pytest.raises(ValueError, match="must be a multiple of"):
        ScanTiling(**sizes)
