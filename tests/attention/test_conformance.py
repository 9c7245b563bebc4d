"""What Mixture of Contexts promises, one named fact per test, for every backend through the public functions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moc_jax.config import MoCConfig
from moc_jax.scene import VIDEO
from tests.attention import oracle
from tests.attention.compiled import (
    BACKENDS,
    attention,
    attention_and_gradients,
    moc_attention,
    routing,
)
from tests.attention.configs import DENSE, MANY_PICKS, MULTI_SHOT, NO_ANCHORS, PAST, SINGLE_SHOT, name
from tests.attention.scenes import HEAD_DIM, HEADS, PAIR, TEXT_TOKENS, TOKENS, cut, qkv, table_of
from tests.attention.tolerances import GRADIENT, assert_close

pytestmark = pytest.mark.parametrize("backend", BACKENDS)

TWO_SHOTS = [cut(2, (1, [4, 6, 3, 5]), (2, [5, 2, 7, 4])), cut(0, (0, [8, 8]), (3, [1, 16, 3]))]


def weights(cfg, scenes, seed=0, *, backend):
    """The attention weights [B, H, N, N] themselves: with columns of the identity for values, outputs are weights."""
    q, k, _ = qkv(seed, scenes, backend=backend)
    q, k = ((x / HEAD_DIM**0.25).astype(q.dtype) for x in (q, k))
    some = np.split(np.eye(TOKENS, dtype=q.dtype)[:, None], TOKENS // HEAD_DIM, axis=-1)
    outs = [attention(q, k, np.broadcast_to(v, q.shape), table_of(scenes), cfg, backend=backend) for v in some]
    return np.moveaxis(np.concatenate(outs, axis=-1), 2, 1), np.asarray(
        routing(q, k, table_of(scenes), cfg, backend=backend)
    )


def tokens_of(scene, chunks):
    return np.concatenate([np.arange(0), *(scene[c].tokens for c in chunks if c >= 0)]).astype(int)


# ------------------------------------------------------------------------------------------------ who sees whom


@pytest.mark.long_for(PAST[0])
@pytest.mark.long_interpreted(MULTI_SHOT, DENSE[0])
@pytest.mark.slow_interpreted(PAST[0])
@pytest.mark.parametrize("cfg", [MULTI_SHOT, PAST[0], DENSE[0]], ids=name)
def test_weights_lie_on_anchors_and_picks_and_nowhere_else(backend, cfg):
    got, routes = weights(cfg, TWO_SHOTS, backend=backend)
    for b, scene in enumerate(TWO_SHOTS):
        want = oracle.attended(scene, cfg, routes[b])
        np.testing.assert_array_equal(got[b] > 0, want)
        for c, chunk in enumerate(scene):  # every anchor of every query is there, whatever it picked
            always = tokens_of(scene, oracle.anchors(scene, cfg, c))
            assert (got[b][:, chunk.tokens][:, :, always] > 0).all()
    assert_close(got.sum(-1, dtype=np.float64), got.any(-1), "sum of the weights", dtype=str(got.dtype))


@pytest.mark.long_for("chunk")
@pytest.mark.slow_interpreted
@pytest.mark.parametrize(("self_anchor", "dense"), [("shot", DENSE[0]), ("chunk", DENSE[1])])
def test_all_chunks_selected_is_dense(backend, self_anchor, dense):
    all_chunks = MoCConfig(top_k=8, self_anchor=self_anchor, causal_routing=False, visibility=dense.visibility)
    q, k, v = qkv(0, TWO_SHOTS, backend=backend)
    outs = [attention(q, k, v, table_of(TWO_SHOTS), c, backend=backend) for c in (all_chunks, dense)]
    want = oracle.moc(q, k, v, TWO_SHOTS, dense).out[:, TEXT_TOKENS:]
    for out, which in zip(outs, ("all chunks", "dense")):
        assert_close(out[:, TEXT_TOKENS:], want, f"video outputs, {which}")


def test_no_picks_is_anchors_alone(backend):
    cfg = MoCConfig(top_k=0)
    q, k, v = qkv(0, TWO_SHOTS, backend=backend)
    assert routing(q, k, table_of(TWO_SHOTS), cfg, backend=backend).shape == (2, HEADS, TOKENS, 0)
    assert_close(
        attention(q, k, v, table_of(TWO_SHOTS), cfg, backend=backend), oracle.moc(q, k, v, TWO_SHOTS, cfg).out, "output"
    )


@pytest.mark.long_interpreted
def test_routes_can_be_given(backend):
    """The routes of other content, and ones with holes and in any order, are attended to as they stand."""
    cfg = SINGLE_SHOT
    q, k, v = qkv(0, TWO_SHOTS, backend=backend)
    routes = np.array(routing(-q, k, table_of(TWO_SHOTS), cfg, backend=backend))
    routes[:, :, ::3, 0] = -1
    got = attention(q, k, v, table_of(TWO_SHOTS), cfg, routes=routes, backend=backend)
    assert_close(got, oracle.moc(q, k, v, TWO_SHOTS, cfg, routes).out, "output")


# ------------------------------------------------------------------------------------------------ locality


@pytest.mark.long_interpreted
def test_gradient_to_an_unselected_chunk_is_exactly_zero(backend):
    cfg = PAST[0]
    q, k, v = qkv(0, TWO_SHOTS, backend=backend)
    table = table_of(TWO_SHOTS)
    mask = oracle.moc(q, k, v, TWO_SHOTS, cfg).mask
    dout = np.zeros_like(v)
    query = TEXT_TOKENS + 30
    dout[:, query] = 1
    _, (dq, dk, dv) = attention_and_gradients(q, k, v, table, cfg, dout, backend=backend)
    seen = mask[:, :, query].swapaxes(1, 2)  # [B, N, H]
    assert 0 < seen.sum() < seen.size
    np.testing.assert_array_equal(np.any(dk != 0, axis=-1), seen)
    np.testing.assert_array_equal(np.any(dv != 0, axis=-1), seen)
    assert np.any(dq[:, query] != 0, axis=-1).all()
    assert not np.delete(np.asarray(dq), query, axis=1).any()


@pytest.mark.long_interpreted
def test_no_gradient_flows_through_scores(backend):
    """Gradients with the routes found on the way equal those with the same routes held fixed."""
    cfg = SINGLE_SHOT
    q, k, v = qkv(0, TWO_SHOTS, backend=backend)
    table = table_of(TWO_SHOTS)
    routes = np.asarray(routing(q, k, table, cfg, backend=backend))
    want = oracle.moc_gradients(q, k, v, oracle.moc(q, k, v, TWO_SHOTS, cfg, routes).mask, np.ones_like(v))
    _, got = attention_and_gradients(q, k, v, table, cfg, np.ones_like(v), backend=backend)
    for g, w, which in zip(got, want, ("dq", "dk", "dv")):
        assert_close(g, w, which)
    assert not np.any(jax.jvp(lambda q: routing(q, k, table, cfg, backend=backend).astype(float), (q,), (q,))[1])


@pytest.mark.long_interpreted
def test_permuting_tokens_within_an_unselected_chunk_changes_nothing(backend):
    cfg = SINGLE_SHOT
    q, k, v = qkv(0, TWO_SHOTS, backend=backend)
    table = table_of(TWO_SHOTS)
    before, out = (
        np.asarray(routing(q, k, table, cfg, backend=backend)),
        attention(q, k, v, table, cfg, backend=backend),
    )
    changed = 4  # the chunk of scene 0 whose tokens change places
    order = np.arange(TOKENS)
    order[TWO_SHOTS[0][changed].tokens] = order[TWO_SHOTS[0][changed].tokens][::-1]
    k[0], v[0] = k[0, order], v[0, order]
    np.testing.assert_array_equal(routing(q, k, table, cfg, backend=backend), before)
    after = attention(q, k, v, table, cfg, backend=backend)
    blind = (before[0] != changed).all(axis=-1).T & (np.asarray(table.chunk_of[0]) != changed)[:, None]  # [N, H]
    blind[:TEXT_TOKENS] = False  # captions see the whole shot
    assert blind.sum() > TOKENS // 2
    np.testing.assert_array_equal(after[0][blind], out[0][blind])
    np.testing.assert_array_equal(after[1], out[1])


@pytest.mark.slow_interpreted
def test_exchanging_unselected_chunks_changes_nothing(backend):
    """Two chunks of one length that score last trade places: who picks neither does not notice."""
    scene = cut(0, (0, [4, 4, 4, 4, 4, 4]))
    cfg = SINGLE_SHOT
    q, k, v = qkv(0, [scene] * 2, backend=backend)
    table = table_of([scene] * 2)
    before, out = (
        np.asarray(routing(q, k, table, cfg, backend=backend)),
        attention(q, k, v, table, cfg, backend=backend),
    )
    one, other = list(scene[3].tokens), list(scene[6].tokens)
    for x in (k, v):
        x[:, one + other] = x[:, other + one]
    routes, after = (
        np.asarray(routing(q, k, table, cfg, backend=backend)),
        attention(q, k, v, table, cfg, backend=backend),
    )
    named = np.array([0, 1, 2, 6, 4, 5, 3, 7, -1])  # the last one: no pick
    blind = ~np.isin(before, (3, 6)).any(axis=-1)  # [B, H, N]
    blind[:, :, one + other] = False
    blind[:, :, ~np.asarray(table.valid[0])] = False
    assert blind.sum() > 10
    np.testing.assert_array_equal(routes[blind], before[blind])
    assert_close(after.swapaxes(1, 2)[blind], out.swapaxes(1, 2)[blind], "output")
    picks = ~blind & (np.asarray(table.token_kind)[:, None] == VIDEO)
    picks[:, :, one + other] = False
    np.testing.assert_array_equal(routes[picks], named[before[picks]])


@pytest.mark.long_interpreted
def test_padding_is_never_read(backend):
    cfg = SINGLE_SHOT
    q, k, v = qkv(0, TWO_SHOTS, backend=backend)
    table = table_of(TWO_SHOTS)
    before = attention_and_gradients(q, k, v, table, cfg, np.ones_like(v), backend=backend)
    padding = np.asarray(table.chunk_of) < 0
    for x in (q, k, v):
        x[padding] = 1e4
    after = attention_and_gradients(q, k, v, table, cfg, np.ones_like(v), backend=backend)
    for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(before)):
        np.testing.assert_array_equal(a, b)
        assert not np.asarray(a)[padding].any()


@pytest.mark.slow_interpreted("bfloat16")
@pytest.mark.long_interpreted("float32")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_padding_may_hold_anything(backend, dtype):
    """The largest numbers of a type, of text and of video, with which products overflow; NaN for output gradients."""
    if backend == "pallas_gpu" and dtype == "float32":
        pytest.skip("pallas_gpu knows no float32")
    cfg = SINGLE_SHOT
    q, k, v = qkv(0, TWO_SHOTS, dtype=jnp.dtype(dtype))
    dout = np.ones_like(v)
    table = table_of(TWO_SHOTS)
    want = attention_and_gradients(q, k, v, table, cfg, dout, backend=backend)
    padding = np.asarray(table.chunk_of) < 0
    assert padding[:, :TEXT_TOKENS].any()
    assert padding[:, TEXT_TOKENS:].any()
    largest = float(jnp.finfo(dtype).max) / (2 if backend == "pallas_gpu" else 1)  # whose queries are doubled here
    for x, filling in zip((q, k, v, dout), (largest, -largest, largest, np.nan)):
        x[padding] = filling
    got = attention_and_gradients(q, k, v, table, cfg, dout, backend=backend)
    for a, b, which in zip(jax.tree.leaves(got), jax.tree.leaves(want), ("output", "dq", "dk", "dv")):
        np.testing.assert_array_equal(a, b, which)


@pytest.mark.long_interpreted
def test_nan_reaches_who_reads_it_and_nobody_else(backend):
    """NaN in one token's v, k, q or output gradient, for plain backends; for the kernels, a NaN key is not a pick."""
    cfg, token, table = SINGLE_SHOT, TEXT_TOKENS + 9, table_of(TWO_SHOTS)
    inputs = dict(
        zip("qkv", qkv(0, TWO_SHOTS, backend=backend)), dout=np.ones((2, TOKENS, HEADS, HEAD_DIM), np.float32)
    )
    for which in ("v", "k", "q", "dout") if backend in ("reference", "xla") else ():
        q, k, v, dout = (inputs[x].copy() for x in ("q", "k", "v", "dout"))
        {"q": q, "k": k, "v": v, "dout": dout}[which][0, token] = np.nan
        routes = np.asarray(routing(q, k, table, cfg, backend=backend))
        if which == "k":
            assert not (routes[0] == table.chunk_of[0, token]).any()
        mask = oracle.moc(*map(np.nan_to_num, (q, k, v)), TWO_SHOTS, cfg, routes).mask
        out, grads = attention_and_gradients(q, k, v, table, cfg, dout, backend=backend)
        bad, bad_dq, bad_dk, bad_dv = (np.isnan(x).any(axis=-1).swapaxes(1, 2) for x in (out, *grads))  # [B, H, N]
        hit = np.zeros_like(bad)
        hit[0, :, token] = True
        readers = hit if which in ("q", "dout") else (mask & hit[:, :, None]).any(axis=-1)
        read = (mask & readers[..., None]).any(axis=2)  # by those: what their gradients reach
        np.testing.assert_array_equal(bad, np.zeros_like(bad) if which == "dout" else readers, which)
        np.testing.assert_array_equal(bad_dq, readers, which)
        assert not (bad_dk & ~read).any(), which
        assert not (bad_dv & ~read).any(), which
    q, k, _ = (inputs[x].copy() for x in "qkv")
    k[0, token] = np.nan
    routes = np.asarray(routing(q, k, table, cfg, backend=backend))
    assert not (routes[0] == table.chunk_of[0, token]).any()
    assert (routes[1] >= 0).any()


@pytest.mark.long_interpreted
def test_scenes_and_heads_know_nothing_of_each_other(backend):
    cfg = SINGLE_SHOT
    q, k, v = qkv(0, TWO_SHOTS, backend=backend)
    out = attention(q, k, v, table_of(TWO_SHOTS), cfg, backend=backend)
    exchanged = attention(q[::-1], k[::-1], v[::-1], table_of(TWO_SHOTS[::-1]), cfg, backend=backend)
    np.testing.assert_array_equal(exchanged[::-1], out)
    exchanged = attention(q[:, :, ::-1], k[:, :, ::-1], v[:, :, ::-1], table_of(TWO_SHOTS), cfg, backend=backend)
    np.testing.assert_array_equal(exchanged[:, :, ::-1], out)


# ------------------------------------------------------------------------------------------------ causality


@pytest.mark.long_interpreted
@pytest.mark.parametrize("self_anchor", ["shot", "none"])
def test_a_later_shot_never_influences_an_earlier_ones_routes(backend, self_anchor):
    cfg = MoCConfig(top_k=2, self_anchor=self_anchor)
    q, k, _ = qkv(0, PAIR, backend=backend)
    before = np.asarray(routing(q, k, table_of(PAIR), cfg, backend=backend))
    assert (before >= 0).any()
    for last in (0, 1, 2):
        q2, k2, _ = qkv(99, PAIR, backend=backend)
        earlier = np.asarray(table_of(PAIR).token_shot) <= last
        q2[earlier], k2[earlier] = q[earlier], k[earlier]
        after = np.asarray(routing(q2, k2, table_of(PAIR), cfg, backend=backend))
        np.testing.assert_array_equal(np.moveaxis(after, 1, 2)[earlier], np.moveaxis(before, 1, 2)[earlier])


@pytest.mark.slow_interpreted(PAST[1])
@pytest.mark.long_interpreted(PAST[0])
@pytest.mark.parametrize("cfg", PAST, ids=name)
def test_past_visibility_shuts_out_later_shots(backend, cfg):
    q, k, v = qkv(0, PAIR, backend=backend)
    table = table_of(PAIR)
    before = attention(q, k, v, table, cfg, backend=backend)
    for last in (-1, 0, 1, 2):
        later = np.asarray(table.token_shot) > last
        changed = qkv(99, PAIR, backend=backend)
        for new, old in zip(changed, (q, k, v)):
            new[~later] = old[~later]
        after = attention(*changed, table, cfg, backend=backend)
        np.testing.assert_array_equal(after[~later], before[~later])


@pytest.mark.long_interpreted
def test_routing_graph_has_no_cycle(backend):
    """Causal routing: every pick comes before the query's own chunk."""
    for cfg in (MoCConfig(top_k=3), MoCConfig(top_k=3, self_anchor="none")):
        q, k, _ = qkv(0, PAIR, backend=backend)
        table = table_of(PAIR)
        routes = np.asarray(routing(q, k, table, cfg, backend=backend))
        assert (routes < np.maximum(np.asarray(table.chunk_of), 0)[:, None, :, None]).all()
        assert (routes[:, :, np.asarray(table.token_shot[1]) > 0] >= 0).any()


# ------------------------------------------------------------------------------------------------ corners


@pytest.mark.parametrize("kind", ["equal chunks", "zero queries"])
def test_ties_go_to_the_lowest_chunk(backend, kind):
    # Integers and lengths of powers of two: sums without rounding, so that equal means score equally in float32.
    scene = cut(1, (1, [4, 8, 1]), (0, [2, 8, 16]), (2, [8]))
    q, k, _ = qkv(0, [scene] * 2, kind, backend=backend)
    q, k = np.round(4 * q), np.round(4 * k)
    for cfg, own_last, own_middle in [
        (MULTI_SHOT, [2, 3], [2, 3]),
        (MoCConfig(top_k=4, causal_routing=False), [2, 3, 4, 6], [2, 3, 4, 10]),
        (SINGLE_SHOT, [2, 3], [2, 3]),
    ]:
        routes = np.asarray(routing(q, k, table_of([scene] * 2), cfg, backend=backend))
        assert (routes[:, :, scene[10].tokens] == own_last).all()
        assert (routes[:, :, scene[7].tokens] == own_middle).all()


@pytest.mark.long_interpreted
def test_equal_keys_tie_whatever_the_lengths_of_chunks(backend):
    scene = cut(1, (1, [3, 7, 1]), (0, [5, 6, 11]), (2, [8]))
    q, k, _ = qkv(0, [scene] * 2, "equal chunks", backend=backend)
    routes = np.asarray(routing(q, k, table_of([scene] * 2), MoCConfig(top_k=6, causal_routing=False), backend=backend))
    for chunk, others in ((10, [2, 3, 4, 6, 7, 8]), (7, [2, 3, 4, 10, -1, -1]), (3, [6, 7, 8, 10, -1, -1])):
        assert (routes[:, :, scene[chunk].tokens] == others).all()


@pytest.mark.long_interpreted
def test_duplicated_chunks_are_picked_in_order(backend):
    """Chunks 3, 5 and 6 hold the same keys; wherever the first of them is picked, the others follow it."""
    scene = cut(0, (0, [4, 4, 4, 4, 4, 4, 4]))
    cfg = MoCConfig(top_k=6, self_anchor="chunk", causal_routing=False)
    q, k, _ = qkv(0, [scene] * 2, "integers", backend=backend)
    for copy in (5, 6):
        k[:, scene[copy].tokens] = k[:, scene[3].tokens]
    routes = np.asarray(routing(q, k, table_of([scene] * 2), cfg, backend=backend))
    for token in [*scene[2].tokens, *scene[7].tokens]:
        for row in routes[:, :, token].reshape(-1, 6).tolist():
            assert [c for c in row if c in (3, 5, 6)] == [3, 5, 6]
    want = [oracle.route(q[b], k[b], scene, cfg) for b in range(2)]
    np.testing.assert_array_equal(routes, want)


@pytest.mark.slow_interpreted  # the next one's picks are these
@pytest.mark.parametrize("cfg", MANY_PICKS, ids=name)
def test_top_k_beyond_the_candidates_takes_them_all(backend, cfg):
    q, k, _ = qkv(0, TWO_SHOTS, backend=backend)
    routes = np.asarray(routing(q, k, table_of(TWO_SHOTS), cfg, backend=backend))
    for b, scene in enumerate(TWO_SHOTS):
        for c, chunk in enumerate(scene):
            allowed = oracle.candidates(scene, cfg, c)
            picked = np.sort(routes[b][:, chunk.tokens, : len(allowed)], axis=-1)
            assert (picked == allowed).all()
            assert (routes[b][:, chunk.tokens, len(allowed) :] == -1).all()


@pytest.mark.slow_interpreted(MANY_PICKS[1])
@pytest.mark.long_interpreted(MANY_PICKS[0])
@pytest.mark.parametrize("cfg", MANY_PICKS, ids=name)
def test_all_candidates_are_attended_to(backend, cfg):
    q, k, v = qkv(0, TWO_SHOTS, backend=backend)
    got = attention(q, k, v, table_of(TWO_SHOTS), cfg, backend=backend)
    assert_close(got, oracle.moc(q, k, v, TWO_SHOTS, cfg).out, "output")


CORNERS = {
    "one chunk": [cut(0, (0, [17])), cut(1, (0, [1]))],
    "one token": [cut(0, (0, [1])), cut(1)],
    "text alone": [cut(3, (2, []), (1, [])), cut(1)],
    "nothing at all": [cut(0), cut(0, (0, []), (0, []))],
    "empty shots": [cut(1, (0, []), (0, [3]), (2, []), (0, []), (1, [5, 4])), cut(0, (0, []), (0, []), (0, [6]))],
    "full": [cut(3, (4, [17, 17]), (5, [17, 1])), cut(12, (0, [13, 13, 13, 13]))],
    "single tokens": [cut(1, (1, [1] * 6), (1, [1] * 5)), cut(0, (0, [1] * 8 + [17]))],
}


@pytest.mark.slow_interpreted("one chunk", "one token", "text alone", "full", "empty shots")
@pytest.mark.long_interpreted("nothing at all", "single tokens")
@pytest.mark.parametrize("corner", CORNERS)
def test_corner_scenes(backend, corner):
    scenes = CORNERS[corner]
    q, k, v = qkv(0, scenes, backend=backend)
    for cfg in (MULTI_SHOT, SINGLE_SHOT):
        want = oracle.moc(q, k, v, scenes, cfg)
        np.testing.assert_array_equal(routing(q, k, table_of(scenes), cfg, backend=backend), want.routes)
        out, grads = attention_and_gradients(q, k, v, table_of(scenes), cfg, np.ones_like(v), backend=backend)
        assert_close(out, want.out, "output")
        for got, expected in zip(grads, oracle.moc_gradients(q, k, v, want.mask, np.ones_like(v))):
            assert_close(got, expected, "gradient", table=GRADIENT)


@pytest.mark.long_interpreted
def test_a_query_with_nothing_to_see_gives_zero(backend):
    cfg = NO_ANCHORS
    q, k, v = qkv(0, TWO_SHOTS, backend=backend)
    out, grads = attention_and_gradients(q, k, v, table_of(TWO_SHOTS), cfg, np.ones_like(v), backend=backend)
    for b, scene in enumerate(TWO_SHOTS):
        first = next(c for c in scene if c.kind == VIDEO)
        assert not np.asarray(out)[b, first.tokens].any()
        assert not np.asarray(grads[0])[b, first.tokens].any()
    assert np.isfinite(np.concatenate([np.ravel(g) for g in grads])).all()


@pytest.mark.slow_interpreted
def test_lengths_are_data(backend):
    """Scenes of other lengths run the same compiled program."""
    traces = []

    @jax.jit
    def run(q, k, v, table):
        traces.append(1)
        return moc_attention(q, k, v, table, MULTI_SHOT, backend=backend)

    for scenes in (PAIR, TWO_SHOTS, CORNERS["empty shots"]):
        q, k, v = qkv(0, scenes, backend=backend)
        want = oracle.moc(q, k, v, scenes, MULTI_SHOT).out
        assert_close(run(q, k, v, table_of(scenes)), want, "output")
    assert len(traces) == 1


def test_sizes_must_agree(backend):
    q, k, v = np.zeros((3, 2, TOKENS + 1, HEADS, HEAD_DIM), np.float32)
    with pytest.raises(ValueError, match=rf"{TOKENS + 1}.*{TOKENS}|{TOKENS}.*{TOKENS + 1}"):
        attention(q, k, v, table_of(PAIR), MoCConfig(), backend=backend)
