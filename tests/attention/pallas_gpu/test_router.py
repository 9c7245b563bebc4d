"""The routing kernel picks what `routing.select` picks: on tiny scenes, and lowered at real sizes.

Interpreted, or on a Hopper GPU as users run it.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from moc_jax.attention import routing
from moc_jax.attention.layout import queries_of
from moc_jax.attention.pallas_gpu import device, router
from moc_jax.attention.pallas_gpu.router import RouterTiling
from moc_jax.config import MoCConfig
from moc_jax.scene import ChunkTable
from tests.attention.configs import COVERING, MULTI_SHOT, NO_ANCHORS, SINGLE_SHOT, half_long, name
from tests.attention.pallas_gpu.conftest import CAN_INTERPRET
from tests.attention.scenes import BATCH, HEADS, PAIR, cut, qkv, table_of

interpreted = pytest.mark.skipif(
    not (device.is_hopper() or CAN_INTERPRET), reason="jax before 0.12 can't interpret Mosaic GPU kernels"
)
DTYPES = pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])


def inputs(dtype, kind="normal", scenes=PAIR, table=None, tokens=64, seed=0):
    """q in `dtype`, descriptors of keys in `dtype`, and the table."""
    table = table_of(scenes) if table is None else table
    q, k, _ = qkv(seed, scenes, kind, shape=(tokens, HEADS, 64))
    return jnp.asarray(q, dtype), routing.descriptors(jnp.asarray(k, dtype), table), table


def check(q, phi, table, cfg, tiling=None):
    """Exact equality: no near-ties in these inputs, or scores that are exact."""
    interpret = None if device.is_hopper() else plgpu.InterpretGPUParams()
    queries = queries_of(table)
    got = np.asarray(router.select(q, phi, queries, table, cfg, tiling=tiling, interpret=interpret))
    want = np.asarray(routing.select(q, phi, queries, table, cfg))
    np.testing.assert_array_equal(got, want)
    assert (want >= 0).any()
    return got


# ------------------------------------------------------------------------------------------------ what goes in


@DTYPES
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_three_parts_hold_every_bit_that_counts(dtype, scale):
    table = table_of(PAIR)
    phi = scale * np.random.default_rng(0).standard_normal((BATCH, HEADS, table.kind.shape[1], 64)).astype(np.float32)
    tiling = RouterTiling.of(1, phi.shape[2], 64)
    parts = np.asarray(router._parts(jnp.asarray(phi), table, tiling, dtype), np.float64)
    assert parts.shape == (BATCH * HEADS * 3, 16, 64)
    total = parts.reshape(BATCH, HEADS, 3, 16, 64).sum(axis=2)
    pickable = np.broadcast_to(np.asarray(routing.pickable_chunks(table))[:, None, :, None], phi.shape)
    assert np.isnan(total[~pickable]).all(), "a column that nobody may pick"
    power = np.log2(total / phi, where=pickable, out=np.zeros(phi.shape))
    power = np.round(power[:, :, [2]])  # one power of two per head
    error = np.abs(total * 2.0**-power - phi)[pickable].max()
    assert error <= 2.0**-24 * np.abs(phi[pickable]).max()
    assert dtype == jnp.float16 or (power == 0).all()


# ------------------------------------------------------------------------------------------------ what comes out


@pytest.mark.long_for.with_args(jnp.float16)
@interpreted
@DTYPES
@pytest.mark.parametrize("cfg", half_long([c for c in COVERING if c.mode == "moc"]), ids=name)
def test_picks_are_those_of_xla(cfg, dtype):
    """Two scenes of uneven chunks, with padding: every anchor, causal or not, both visibilities."""
    check(*inputs(dtype), cfg)


@interpreted
@pytest.mark.parametrize("kind", ["equal chunks", "integers", "zero queries", "huge queries"])
def test_ties_go_to_the_lowest_chunk(kind):
    q, phi, table = inputs(jnp.bfloat16, kind)
    if kind == "equal chunks":
        phi = jnp.broadcast_to(phi[:, :, 2:3], phi.shape)
    elif kind != "zero queries":  # means that are integers too, so that every score is exact
        phi = jnp.round(phi)
    check(q, phi, table, SINGLE_SHOT)


@interpreted
def test_a_nan_score_is_never_picked():
    cfg = dataclasses.replace(NO_ANCHORS, top_k=16, causal_routing=False)
    q, phi, table = inputs(jnp.bfloat16)
    q = q.at[0, 14].set(jnp.nan)  # a video token: all its scores
    got = check(q, phi.at[:, 0, 3].set(jnp.nan), table, cfg)
    assert not (got[:, 0] == 3).any()
    assert (got[:, 1] == 3).any()
    assert (got[0, :, 14] == -1).all()


@interpreted
@pytest.mark.parametrize("top_k", [router._MOST_PICKS, 100])
def test_more_slots_than_candidates(top_k):
    got = check(*inputs(jnp.float16), dataclasses.replace(MULTI_SHOT, top_k=top_k))
    assert (got[..., -1] == -1).all()


@pytest.mark.long_for(True)
@interpreted
@pytest.mark.parametrize("resident", [True, False])
def test_several_blocks_of_chunks_and_tiles_of_queries(resident):
    """40 chunks in blocks of 8, which stay in shared memory or go through the ring; 400 tokens in programs of 384."""
    scenes = [cut(3, (2, [9] * 20), (1, [8] * 19)), cut(1, (0, [3, 30] * 5), (0, [11] * 9), (2, [40]))]
    table = table_of(scenes, tokens=400, chunks=44, max_chunk=40)
    tiling = RouterTiling(tiles=2, blocks=6, columns=8, buffers=6 if resident else 2)
    assert tiling.resident == resident
    cfg = dataclasses.replace(MULTI_SHOT, top_k=5)
    check(*inputs(jnp.bfloat16, scenes=scenes, table=table, tokens=400), cfg, tiling)


@interpreted
@pytest.mark.parametrize("begin", [0, 5, 14, 33])
def test_slices_pick_as_the_whole(begin):
    """Queries from any token on: of text and video, in the middle of a chunk, of video alone."""
    q, phi, table = inputs(jnp.bfloat16)
    part = slice(begin, begin + 21)
    interpret = None if device.is_hopper() else plgpu.InterpretGPUParams()
    queries = queries_of(table, table.chunk_of[:, part])
    got = router.select(q[:, part], phi, queries, table, SINGLE_SHOT, interpret=interpret)
    want = routing.select(q, phi, queries_of(table), table, SINGLE_SHOT)
    np.testing.assert_array_equal(got, want[:, :, part])


# ------------------------------------------------------------------------------------------------ limits


@pytest.mark.parametrize(
    ("queries", "chunks", "head_dim", "tiles", "blocks", "columns", "buffers"),
    [
        (64, 3, 128, 1, 1, 8, 1),
        (12 * 6_304, 24, 128, 1, 1, 24, 1),
        (12 * 180_504, 153, 128, 8, 2, 80, 2),  # 8 shots of 22 500 tokens in chunks of 1280
        (12 * 1_440_512, 1_217, 128, 8, 13, 96, 2),  # 64 shots
        (12 * 33_272, 1_217, 256, 3, 31, 40, 2),
        (4 * 192 * 4 * 132, 400, 64, 4, 5, 80, 5),
    ],
)
def test_blocks_fit_shared_memory(queries, chunks, head_dim, tiles, blocks, columns, buffers):
    tiling = RouterTiling.of(queries, chunks, head_dim)
    assert tiling == RouterTiling(tiles=tiles, blocks=blocks, columns=columns, buffers=buffers)
    assert blocks * columns >= chunks
    assert (buffers * columns * 3 + router._TILE) * head_dim * 2 <= router._SMEM


def test_more_picks_than_registers_are_refused():
    q, phi, table = inputs(jnp.bfloat16, table=table_of(PAIR, chunks=17))
    with pytest.raises(NotImplementedError, match=r"top_k is 17 of 17 chunks.*at most 16"):
        router.select(q, phi, queries_of(table), table, MoCConfig(top_k=17))


@pytest.mark.parametrize(
    ("tokens", "chunks", "head_dim", "top_k"),
    [(180_512, 153, 128, 5), (1_444_608, 1_217, 128, 5), (6_300, 28, 64, 3), (32_760, 23, 128, 16)],
)
def test_it_lowers_for_hopper(tokens, chunks, head_dim, top_k):
    def shape(*dims, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(dims, dtype)

    table = ChunkTable(*[shape(1, chunks)] * 4, shape(1, tokens), 512, 1280)
    q, phi = shape(1, tokens, 12, head_dim, dtype=jnp.bfloat16), shape(1, 12, chunks, head_dim, dtype=jnp.float32)
    run = jax.jit(lambda q, phi, table: router.select(q, phi, queries_of(table), table, MoCConfig(top_k=top_k)))
    lowered = run.trace(q, phi, table).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("mosaic_gpu") >= 1
    assert lowered.out_info.shape == (1, 12, tokens, top_k)
