"""Anchors and picks by themselves, merged, and their gradients: on every backend, for queries that are not the keys."""

import jax.numpy as jnp
import numpy as np
import pytest

from moc_jax.attention.parts import delta_of, merge
from moc_jax.scene import TEXT
from tests.attention import oracle
from tests.attention.compiled import BACKENDS, gradients_in_parts, in_parts
from tests.attention.configs import COVERING, DENSE, MULTI_SHOT, NO_ANCHORS, PAST, SINGLE_SHOT, name
from tests.attention.scenes import BATCH, HEAD_DIM, HEADS, PAIR, TEXT_TOKENS, qkv, table_of
from tests.attention.test_queries import SLICES, Q, chunks_of, only, sliced
from tests.attention.tolerances import GRADIENT, OUTPUT, assert_close

SOME = [MULTI_SHOT, SINGLE_SHOT, PAST[0], NO_ANCHORS, DENSE[0]]
REST = [cfg for cfg in COVERING if cfg not in SOME]


def log_sum_exps(q, k, mask):
    """[B, H, N]: of every query's scores; -inf of those that see nothing."""
    q, k = q.astype(np.float64), k.astype(np.float64)
    scores = np.einsum("bnhd,bmhd->bhnm", q, k) / np.sqrt(q.shape[-1])
    with np.errstate(divide="ignore"):
        return np.log(np.sum(np.where(mask, np.exp(scores), 0), axis=-1))


@pytest.mark.long_for(*SOME[1:])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.slow_interpreted(*(cfg for cfg in SOME if cfg is not MULTI_SHOT))
@pytest.mark.long_interpreted(MULTI_SHOT)
@pytest.mark.parametrize("cfg", [*SOME, *(pytest.param(cfg, marks=pytest.mark.slow) for cfg in REST)], ids=name)
def test_parts_make_the_whole(backend, cfg):
    """Of a slice of the queries: output, log-sum-exp and gradients."""
    q, k, v = qkv(0, PAIR, backend=backend)
    dout = qkv(1, PAIR, backend=backend)[0]
    table, (begin, tokens) = table_of(PAIR), SLICES["in the middle of chunks"]
    whole = oracle.moc(q, k, v, PAIR, cfg)
    query_chunk = chunks_of(table, begin, tokens)
    some_q, some_dout, routes = (sliced(x, begin, Q) for x in (q, dout, whole.routes.swapaxes(1, 2)))
    routes = routes.swapaxes(1, 2)
    if cfg.mode == "dense":
        routes = routes[..., :0]

    found = in_parts(some_q, k, v, routes, table, cfg, query_chunk, backend=backend)
    out, lse = merge(*found)
    dtype = np.dtype(q.dtype).name
    assert out.dtype == v.dtype
    assert lse.dtype == jnp.float32
    assert_close(out, sliced(whole.out, begin, Q), "output", dtype=dtype)
    want = sliced(log_sum_exps(q, k, whole.mask).swapaxes(1, 2), begin, Q).swapaxes(1, 2)
    nothing = np.isneginf(want)
    np.testing.assert_array_equal(np.isneginf(lse), nothing)
    assert_close(np.where(nothing, 0, lse), np.where(nothing, 0, want), "log-sum-exp", dtype=dtype)

    of_parts = gradients_in_parts(
        some_q, k, v, routes, some_dout, lse, delta_of(out, some_dout), table, cfg, query_chunk, backend=backend
    )
    dq, dk, dv = (sum(x.astype(jnp.float32) for x in of_both) for of_both in zip(*of_parts, strict=True))
    want_dq, want_dk, want_dv = oracle.moc_gradients(q, k, v, whole.mask, only(dout, begin, Q))
    assert_close(dq, sliced(want_dq, begin, Q), "dq", table=GRADIENT, dtype=dtype)
    assert_close(dk, want_dk, "dk", table=GRADIENT, dtype=dtype)
    assert_close(dv, want_dv, "dv", table=GRADIENT, dtype=dtype)


SHARD_TOKENS = TEXT_TOKENS + 40


def shard_of_keys(scenes, remainder):
    """The scenes' chunks of odd or even number, packed: the table, in which the others are empty, and their tokens."""
    packed, tokens = [], np.full((len(scenes), SHARD_TOKENS), -1)
    for b, scene in enumerate(scenes):
        places, chunks = {True: 0, False: TEXT_TOKENS}, []
        for c, chunk in enumerate(scene):
            is_text = chunk.kind == TEXT
            length = chunk.length if c % 2 == remainder else 0
            chunks.append(chunk._replace(start=places[is_text], length=length))
            tokens[b, places[is_text] : places[is_text] + length] = chunk.tokens[:length]
            places[is_text] += length
        packed.append(chunks)
    return table_of(packed, tokens=SHARD_TOKENS), tokens


@pytest.mark.slow_interpreted
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cfg", [MULTI_SHOT, DENSE[0]], ids=name)
def test_shards_of_keys_make_the_whole(backend, cfg):
    """All queries over every second chunk's keys, and over the others': four parts, and gradients given all of them."""
    q, k, v = qkv(0, PAIR, backend=backend)
    dout = qkv(1, PAIR, backend=backend)[0]
    whole = oracle.moc(q, k, v, PAIR, cfg)
    routes = whole.routes if cfg.mode == "moc" else whole.routes[..., :0]
    query_chunk, dtype = np.asarray(table_of(PAIR).chunk_of), np.dtype(q.dtype).name
    shards = []
    for remainder in (0, 1):
        table, tokens = shard_of_keys(PAIR, remainder)
        there = (tokens >= 0)[..., None, None]
        shards.append((table, tokens, *(np.where(there, x[np.arange(BATCH)[:, None], tokens], 0) for x in (k, v))))

    found = []
    for table, _, some_k, some_v in shards:
        found += in_parts(q, some_k, some_v, routes, table, cfg, query_chunk, backend=backend)
    out, lse = merge(*found)
    assert_close(out, whole.out, "output", dtype=dtype)

    dq, (dk, dv) = 0, np.zeros((2, *k.shape), np.float32)
    for table, tokens, some_k, some_v in shards:
        final = dout, lse, delta_of(out, dout)
        for grads in gradients_in_parts(q, some_k, some_v, routes, *final, table, cfg, query_chunk, backend=backend):
            some_dq, some_dk, some_dv = (np.asarray(x, np.float32) for x in grads)
            dq = dq + some_dq
            for b, n in zip(*np.nonzero(tokens >= 0)):
                dk[b, tokens[b, n]] += some_dk[b, n]
                dv[b, tokens[b, n]] += some_dv[b, n]
    for got, want, which in zip((dq, dk, dv), oracle.moc_gradients(q, k, v, whole.mask, dout), ("dq", "dk", "dv")):
        assert_close(got, want, which, table=GRADIENT, dtype=dtype)


def test_empty_parts_add_nothing():
    """Whatever their output holds; with empty parts alone, 0 and -inf."""
    shape = 1, 3, HEADS, HEAD_DIM
    out = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    lse = np.log(np.array([2.0, 3.0, 5.0], np.float32) * np.ones((1, HEADS, 1), np.float32))
    empty = np.full(shape, np.nan, np.float32), np.full((1, HEADS, 3), -np.inf, np.float32)
    for parts in (((out, lse), empty), (empty, (out, lse)), ((out, lse),)):
        got_out, got_lse = merge(*parts)
        assert_close(got_out, out, "output", table=OUTPUT)
        assert_close(got_lse, lse, "log-sum-exp")
    got_out, got_lse = merge(empty, empty)
    assert not got_out.any()
    assert np.isneginf(got_lse).all()
    # Equal parts share alike; far smaller ones leave no trace.
    twice, doubled = merge((out, lse), (-out, lse))
    assert_close(twice, np.zeros(shape), "output")
    assert_close(doubled, lse + np.log(2), "log-sum-exp")
    assert_close(merge((out, lse), (1e6 * out, lse - 1000))[0], out, "output")
