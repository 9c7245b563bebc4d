"""Queries need not be keys: slices of a scene's tokens, for every backend through the public functions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moc_jax.attention.layout import queries_of
from tests.attention import oracle
from tests.attention.compiled import BACKENDS, attention_and_gradients, outputs_and_gradients, route, routing
from tests.attention.configs import COVERING, DENSE, MULTI_SHOT, NO_ANCHORS, PAST, SINGLE_SHOT, WINDOW, name
from tests.attention.scenes import HEAD_DIM, LARGE, PAIR, TEXT_TOKENS, qkv, table_of
from tests.attention.tolerances import GRADIENT, assert_close

of_backends = pytest.mark.parametrize("backend", BACKENDS)
SOME = [MULTI_SHOT, SINGLE_SHOT, PAST[0], WINDOW, NO_ANCHORS, DENSE[1]]
REST = [cfg for cfg in COVERING if cfg not in SOME]

Q = 32  # rows of a slice: half of a scene's
# Where the slices of PAIR's two scenes begin, and how many tokens they have.
SLICES = {
    "shots": ((27, 29), Q),
    "in the middle of chunks": ((15, 21), Q),
    "of captions": ((1, 4), Q),
    "text only": ((0, 0), TEXT_TOKENS),
    "video only": ((12, 12), Q),
    "into padding": ((40, 40), 24),
    "no tokens": ((0, 0), 0),
}


def sliced(x, begin, tokens):
    """The slices [begin, begin + tokens) of x [B, N, ...], with zeros up to Q rows behind."""
    rows = [row[b : b + tokens] for row, b in zip(x, begin, strict=True)]
    return np.stack([np.concatenate([row, np.zeros((Q - tokens, *row.shape[1:]), row.dtype)]) for row in rows])


def chunks_of(table, begin, tokens):
    """`query_chunk` of such slices."""
    return sliced(np.asarray(table.chunk_of) + 1, begin, tokens) - 1


def only(x, begin, tokens):
    """x with zeros in place of all that is not in the slices."""
    kept = np.zeros_like(x)
    for b, first in enumerate(begin):
        kept[b, first : first + tokens] = x[b, first : first + tokens]
    return kept


def run(q, k, v, dout, cfg, begin, tokens, backend):
    """Routes, output and gradients of the slices' queries."""
    table = table_of(PAIR)
    chunk = chunks_of(table, begin, tokens)
    q, dout = sliced(q, begin, tokens), sliced(dout, begin, tokens)
    routes = np.asarray(routing(q, k, table, cfg, query_chunk=chunk, backend=backend))
    out, grads = attention_and_gradients(q, k, v, table, cfg, dout, query_chunk=chunk, backend=backend)
    return routes, *map(np.asarray, (out, *grads))


@functools.cache
def oracles(cfg, backend):
    """What the oracle says of the whole, and for each slice the gradients that its output's bring; in float32 once."""
    if backend != "pallas_gpu" and backend != "reference":
        return oracles(cfg, "reference")
    q, k, v = qkv(0, PAIR, backend=backend)
    dout = qkv(1, PAIR, backend=backend)[0]
    whole = oracle.moc(q, k, v, PAIR, cfg)
    return whole, [oracle.moc_gradients(q, k, v, whole.mask, only(dout, *where)) for where in SLICES.values()]


@pytest.mark.long_for(*SOME[1:])
@of_backends
@pytest.mark.slow_interpreted(*(cfg for cfg in SOME if cfg is not MULTI_SHOT))
@pytest.mark.long_interpreted(MULTI_SHOT)
@pytest.mark.parametrize("cfg", [*SOME, *(pytest.param(cfg, marks=pytest.mark.slow) for cfg in REST)], ids=name)
def test_slices_of_a_scene(backend, cfg):
    """Each slice gives its rows of the whole; keys and values get its share of the gradients."""
    q, k, v = qkv(0, PAIR, backend=backend)
    dout = qkv(1, PAIR, backend=backend)[0]
    whole, gradients = oracles(cfg, backend)
    for (begin, tokens), want_grads in zip(SLICES.values(), gradients, strict=True):
        routes, out, dq, dk, dv = run(q, k, v, dout, cfg, begin, tokens, backend)
        if cfg.mode == "moc":
            want = _rows(whole.routes.swapaxes(1, 2), begin, tokens)
            np.testing.assert_array_equal(routes[:, :, :tokens].swapaxes(1, 2), want)
        assert (routes[:, :, tokens:] == -1).all()
        assert_close(out[:, :tokens], _rows(whole.out, begin, tokens), "output")
        assert not out[:, tokens:].any(), "padding must get 0"
        want_dq, want_dk, want_dv = want_grads
        assert_close(dq[:, :tokens], _rows(want_dq, begin, tokens), "dq", table=GRADIENT)
        assert not dq[:, tokens:].any()
        assert_close(dk, want_dk, "dk", table=GRADIENT)
        assert_close(dv, want_dv, "dv", table=GRADIENT)


@of_backends
@pytest.mark.slow_interpreted
@pytest.mark.parametrize("group", [0, 1])
def test_a_groups_part_of_every_frame(backend, group):
    """The queries of one of several devices of a scene (deal.py): routes and outputs are rows of the whole."""
    cfg, table = MULTI_SHOT, table_of(PAIR)
    q, k, v = qkv(0, PAIR, backend=backend)
    dout = qkv(1, PAIR, backend=backend)[0]
    frame, part = 13, 7  # tokens, of which a group has these from the front or from the back
    video = np.arange(q.shape[1] - TEXT_TOKENS).reshape(-1, frame)[:, slice(part) if group == 0 else slice(-part, None)]
    half = TEXT_TOKENS // 2
    rows = np.concatenate([np.arange(group * half, (group + 1) * half), TEXT_TOKENS + video.ravel()])
    chunk = np.asarray(table.chunk_of)[:, rows]
    routes = np.asarray(routing(q[:, rows], k, table, cfg, query_chunk=chunk, backend=backend))
    out, grads = attention_and_gradients(
        q[:, rows], k, v, table, cfg, dout[:, rows], query_chunk=chunk, backend=backend
    )
    whole, mine = oracle.moc(q, k, v, PAIR, cfg), np.zeros_like(dout)
    mine[:, rows] = dout[:, rows]
    wanted = oracle.moc_gradients(q, k, v, whole.mask, mine)
    np.testing.assert_array_equal(routes, whole.routes[:, :, rows])
    assert_close(out, whole.out[:, rows], "output")
    for found, want, name_of in zip(grads, (wanted[0][:, rows], *wanted[1:]), ("dq", "dk", "dv"), strict=True):
        assert_close(found, want, name_of, table=GRADIENT)


def _rows(x, begin, tokens):
    return np.stack([row[b : b + tokens] for row, b in zip(x, begin, strict=True)])


@of_backends
@pytest.mark.slow_interpreted
@pytest.mark.parametrize(
    "cfg", [MULTI_SHOT, *(pytest.param(cfg, marks=pytest.mark.long) for cfg in (SINGLE_SHOT, DENSE[1]))], ids=name
)
def test_slices_that_begin_at_shots_are_bits_of_the_whole(backend, cfg):
    q, k, v = qkv(0, PAIR, backend=backend)
    dout = qkv(1, PAIR, backend=backend)[0]
    table = table_of(PAIR)
    whole = np.asarray(routing(q, k, table, cfg, backend=backend))
    out, (dq, _, _) = attention_and_gradients(q, k, v, table, cfg, dout, backend=backend)
    for begin, tokens in (SLICES["shots"], SLICES["video only"], ((0, 0), Q)):
        routes, some_out, some_dq, *_ = run(q, k, v, dout, cfg, begin, tokens, backend)
        np.testing.assert_array_equal(routes.swapaxes(1, 2), _rows(whole.swapaxes(1, 2), begin, tokens))
        np.testing.assert_array_equal(some_out, _rows(np.asarray(out), begin, tokens))
        np.testing.assert_array_equal(some_dq, _rows(np.asarray(dq), begin, tokens))


@pytest.mark.long
@pytest.mark.slow_interpreted
@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize(
    "cfg", [MULTI_SHOT, *(pytest.param(cfg, marks=pytest.mark.long) for cfg in (SINGLE_SHOT, DENSE[1]))], ids=name
)
def test_slices_that_begin_at_multiples_of_128_rows_are_bits_of_the_whole(backend, cfg):
    """With tiles and blocks of the sizes that users run."""
    tokens, text = 180 + 742, 180
    table = table_of(LARGE, text_tokens=text, tokens=tokens, max_chunk=300)
    (q, k, v), (dout, *_) = (qkv(i, LARGE, shape=(tokens, 1, HEAD_DIM), backend=backend) for i in range(2))
    run = jax.jit(routes_and_gradients, static_argnames=("cfg", "backend"))
    whole = [np.asarray(x) for x in run(q, k, v, table, cfg, dout, backend=backend)]
    for first in (128, 256, 640):
        rows = slice(first, first + 256)
        chunk = table.chunk_of[:, rows]
        found = run(q[:, rows], k, v, table, cfg, dout[:, rows], query_chunk=chunk, backend=backend)
        for part, want, which in zip(found, whole, ("routes", "output", "dq")):
            np.testing.assert_array_equal(part, want[:, rows], err_msg=f"{which} of rows from {first} on")


def routes_and_gradients(q, k, v, table, cfg, dout, query_chunk=None, *, backend):
    """Routes [B, Q, H, K], output and dq."""
    routes = route(q, k, table, cfg, query_chunk=query_chunk, backend=backend)
    out, (dq, _, _) = outputs_and_gradients(q, k, v, table, cfg, dout, query_chunk=query_chunk, backend=backend)
    return jnp.swapaxes(routes, 1, 2), out, dq


@of_backends
@pytest.mark.slow_interpreted
def test_shards_of_a_batch_are_its_whole(backend):
    """Two shards, of other tokens in either scene, disjoint and together all: the whole's output and gradients."""
    cfg = SINGLE_SHOT
    q, k, v = qkv(0, PAIR, backend=backend)
    dout = qkv(1, PAIR, backend=backend)[0]
    shards = [(0, Q), (Q, 0)]  # where each begins in either scene
    found = [run(q, k, v, dout, cfg, begin, Q, backend) for begin in shards]
    out, dq = np.zeros_like(q), np.zeros_like(q)
    for begin, (_, some_out, some_dq, *_) in zip(shards, found, strict=True):
        for b, first in enumerate(begin):
            out[b, first : first + Q], dq[b, first : first + Q] = some_out[b], some_dq[b]
    dk, dv = (sum(x[i].astype(np.float32) for x in found) for i in (3, 4))
    want = oracle.moc(q, k, v, PAIR, cfg)
    dtype = np.dtype(q.dtype).name
    assert_close(out, want.out, "output")
    for got, expected, which in zip((dq, dk, dv), oracle.moc_gradients(q, k, v, want.mask, dout), ("dq", "dk", "dv")):
        assert_close(got, expected, which, table=GRADIENT, dtype=dtype)


def test_runs_of_query_rows():
    """Start and length of each chunk's rows, of any slice, with padding anywhere between shots."""
    table = table_of(PAIR)
    for begin, tokens in SLICES.values():
        _check_runs(table, chunks_of(table, begin, tokens))
    _check_runs(table, np.array([[-1, -1, 7, 7, 8, -1, -1, 2, 2, 3], [0, -1, 2, -1, 4, -1, 5, -1, 9, -1]]))
    _check_runs(table, np.full((2, 0), -1))
    _check_runs(table, np.arange(32).reshape(2, 16) % 16)  # each chunk has one
    whole = queries_of(table)
    again = queries_of(table, table.chunk_of)
    some = np.asarray(table.length) > 0
    np.testing.assert_array_equal(again.length, table.length)
    np.testing.assert_array_equal(np.where(some, again.start, 0), np.where(some, whole.start, 0))


def _check_runs(table, query_chunk):
    queries = jax.jit(queries_of)(table, query_chunk)
    assert queries.text_tokens == min(TEXT_TOKENS, query_chunk.shape[1])
    for b, row in enumerate(query_chunk):
        for c in range(table.kind.shape[1]):
            at = np.flatnonzero(row == c)
            assert queries.length[b, c] == len(at)
            if len(at):
                assert queries.start[b, c] == at[0]
