"""The mean key of each chunk, whatever the chunks' sizes and places."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moc_jax.attention import routing
from moc_jax.attention.pallas_tpu import pool
from moc_jax.attention.pallas_tpu.device import Chip
from moc_jax.config import ChunkConfig
from moc_jax.scene import VIDEO, SceneLengths, SceneShape, chunk_table
from tests.attention.interpreter import interpreted
from tests.attention.scenes import PAIR, cut, qkv, table_of

SHAPE = SceneShape(shots=3, frames=12, rows=9, columns=11, text_tokens=150)
LENGTHS = SceneLengths(jnp.array([[5, 1, 4], [12, 0, 0]]), jnp.array([[3, 44, 0, 5], [0, 100, 1, 0]]))


_pooled = jax.jit(functools.partial(pool.descriptors, chip=Chip("v5e")))


def interpreted_pooling(k, table):
    with interpreted():
        return _pooled(k, table)


FUNCTIONS = {"routing": jax.jit(routing.descriptors), "pallas_tpu": interpreted_pooling}
pytestmark = pytest.mark.parametrize("room", FUNCTIONS)


def check(room, table, k):
    got, of, k = np.asarray(FUNCTIONS[room](k, table)), np.asarray(table.chunk_of), np.asarray(k, np.float64)
    assert got.dtype == np.float32
    for b, c in np.ndindex(*table.kind.shape):
        if room == "pallas_tpu" and table.kind[b, c] != VIDEO:
            assert not got[b, :, c].any()
            continue
        member = of[b] == c
        want = k[b, member].mean(axis=0) if member.any() else np.zeros(k.shape[2:])
        limit = (member.sum() + 1) * 2.0**-24 * np.abs(k[b, member]).mean(axis=0) if member.any() else want
        assert (np.abs(got[b, :, c] - want) <= limit).all(), (b, c)


# Chunks within a block of the sum, of a few blocks, and of many.
@pytest.mark.parametrize("size", [7, 40, 333, 1188])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_means_are_exact_to_float32_rounding(room, size, dtype):
    k = jax.random.normal(jax.random.key(size), (2, SHAPE.tokens, 2, 8), dtype)
    check(room, chunk_table(LENGTHS, SHAPE, ChunkConfig(size=size)), k)


def test_means_of_hand_cut_chunks(room):
    check(room, table_of(PAIR), jnp.asarray(qkv(0, PAIR)[1]))


def test_a_nan_stays_in_its_chunk(room):
    table, k = table_of(PAIR), jnp.asarray(qkv(0, PAIR)[1])
    chunk = 3
    token = int(table.start[0, chunk])
    bad = np.isnan(np.asarray(FUNCTIONS[room](k.at[0, token].set(jnp.nan), table)))
    assert bad[0, :, chunk].all()
    assert bad.sum() == bad[0, :, chunk].sum()


# Shorter and longer than the first few keys, a register's rows, a block, and (of TPU kernels) what a step reads.
@pytest.mark.parametrize("lengths", [[7, 130, 8, 3, 63, 65, 1], [2100, 3]], ids=str)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_equal_keys_are_their_mean(room, lengths, dtype):
    """Exactly, so that chunks of any lengths tie: a mean over 7 keys of 3 is 3."""
    scene = cut(1, (2, lengths[:2]), (0, lengths[2:]))
    table = table_of([scene], tokens=17 + sum(lengths), max_chunk=max(lengths), chunks=len(scene))
    key = np.random.default_rng(0).standard_normal((1, 1, 2, 16)).astype(dtype)
    key[..., 0, 0] = 3
    got = np.asarray(FUNCTIONS[room](jnp.broadcast_to(key, (1, table.chunk_of.shape[1], 2, 16)), table))
    video = np.asarray(table.kind[0]) == VIDEO
    want = np.broadcast_to(key[0, 0, :, None].astype(np.float32), got[0, :, video].swapaxes(0, 1).shape)
    np.testing.assert_array_equal(got[0][:, video], want)


@pytest.mark.parametrize(("length", "dtype"), [(5, jnp.float32), (100, jnp.bfloat16), (2070, jnp.float32)])
def test_a_mean_does_not_depend_on_its_place(room, length, dtype):
    """The same content after chunks of other lengths, up to the end of memory: the same bits."""
    rng = np.random.default_rng(length)
    scene = cut(0, (0, [1, length, 4, length, 9, length]))
    table = table_of([scene], tokens=scene[-1].tokens[-1] + 1, max_chunk=max(length, 60), chunks=len(scene))
    k = rng.standard_normal((1, table.chunk_of.shape[1], 2, 16)).astype(dtype)
    copies = range(3, len(scene), 2)
    for copy in copies:
        k[0, scene[copy].tokens] = k[0, scene[copies[0]].tokens]
    got = np.asarray(FUNCTIONS[room](jnp.asarray(k), table))[0][:, list(copies)]
    np.testing.assert_array_equal(got, np.broadcast_to(got[:, :1], got.shape))
