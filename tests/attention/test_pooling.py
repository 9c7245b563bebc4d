"""The mean key of each chunk, whatever the chunks' sizes and places."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moc_jax.attention import routing
from moc_jax.attention.pallas_tpu import pool
from moc_jax.config import ChunkConfig
from moc_jax.scene import VIDEO, SceneLengths, SceneShape, chunk_table
from tests.attention.interpreter import INTERPRETER
from tests.attention.scenes import PAIR, qkv, table_of

SHAPE = SceneShape(shots=3, frames=12, rows=9, columns=11, text_tokens=150)
LENGTHS = SceneLengths(jnp.array([[5, 1, 4], [12, 0, 0]]), jnp.array([[3, 44, 0, 5], [0, 100, 1, 0]]))


FUNCTIONS = {
    "routing": jax.jit(routing.descriptors),
    "pallas_tpu": jax.jit(functools.partial(pool.descriptors, interpret=INTERPRETER)),
}
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
