"""Context drop-off and drop-in: the rules they keep, and the distributions they follow."""

import dataclasses

import jax
import numpy as np
import pytest

from moc_jax.config import MoCConfig
from moc_jax.scene import VIDEO
from tests.attention import oracle
from tests.attention.compiled import BACKENDS, attention_and_gradients, routing
from tests.attention.configs import EVERY, MULTI_SHOT, SINGLE_SHOT, name
from tests.attention.scenes import HEADS, PAIR, TOKENS, cut, qkv, table_of
from tests.attention.tolerances import GRADIENT, assert_close

# Twelve chunks of four tokens: with the own chunk as anchor, all queries have eleven candidates.
UNIFORM = [cut(1, (1, [4] * 12))] * 2
CFG = MoCConfig(top_k=5, self_anchor="chunk", causal_routing=False)
KEYS = jax.random.split(jax.random.key(7), 12)


def picks(cfg, keys=KEYS):
    """The picks of every video query of UNIFORM, without a key and with each of `keys`: [keys, queries, K] each."""
    q, k, _ = qkv(0, UNIFORM)
    table = table_of(UNIFORM)
    video = np.asarray(table.token_kind) == VIDEO
    without = np.asarray(routing(q, k, table, cfg)).swapaxes(1, 2)[video]
    drawn = np.stack([np.asarray(routing(q, k, table, cfg, key=key)).swapaxes(1, 2)[video] for key in keys])
    without, drawn = (x.reshape(*x.shape[:-3], -1, x.shape[-1]) for x in (without, drawn))
    return np.broadcast_to(without, (len(keys), *without.shape)), drawn


def contains(rows, chunks):
    """Which of `chunks` [..., K] are in `rows` [..., J]: [..., K]."""
    return ((chunks[..., :, None] == rows[..., None, :]) & (chunks >= 0)[..., None]).any(axis=-1)


@pytest.mark.long_interpreted
@pytest.mark.parametrize("backend", BACKENDS)
def test_without_a_key_nothing_is_dropped(backend):
    q, k, _ = qkv(0, PAIR, backend=backend)
    for cfg in (MULTI_SHOT, SINGLE_SHOT):
        off = dataclasses.replace(cfg, drop_off_max=0.0, drop_in_rate=0.0, max_drop_in=0)
        routes = [routing(q, k, table_of(PAIR), c, backend=backend) for c in (cfg, off)]
        np.testing.assert_array_equal(*routes)
        assert routes[0].shape[-1] == cfg.top_k


@pytest.mark.parametrize("cfg", [c for c in EVERY if c.mode == "moc"][::13], ids=name)
def test_rules_of_candidates_are_kept(cfg):
    """Whatever is dropped or added: only candidates, none twice, and the same on each backend."""
    cfg = dataclasses.replace(cfg, top_k=3, drop_off_max=0.9, drop_in_rate=1.5)
    q, k, v = qkv(0, PAIR, backend=BACKENDS[-1])  # what all of them know
    table, key = table_of(PAIR), jax.random.key(3)
    routes = [np.asarray(routing(q, k, table, cfg, key=key, backend=backend)) for backend in BACKENDS]
    for other in routes[1:]:
        np.testing.assert_array_equal(other, routes[0])
    plain = oracle.moc(q, k, v, PAIR, cfg).routes
    assert routes[0].shape[-1] == cfg.top_k + cfg.max_drop_in
    for b, scene in enumerate(PAIR):
        allowed_of = [set(oracle.candidates(scene, cfg, c)) for c in range(len(scene))]
        chunk_of = np.asarray(table.chunk_of[b])
        for h in range(HEADS):
            for token in range(TOKENS):
                row = [c for c in routes[0][b, h, token] if c >= 0]
                allowed = allowed_of[chunk_of[token]] if chunk_of[token] >= 0 else set()
                assert len(set(row)) == len(row)
                assert set(row) <= allowed
                assert len(set(row) - set(plain[b, h, token])) <= cfg.max_drop_in


@pytest.mark.long_for("reference")
@pytest.mark.slow_interpreted
@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_follows_the_drawn_routes(backend):
    """Outputs and gradients are those of the anchors, all of them, and of the drawn picks, no others."""
    cfg, key = dataclasses.replace(SINGLE_SHOT, top_k=4, drop_off_max=0.9), jax.random.key(5)
    q, k, v = qkv(0, PAIR, backend=backend)
    table = table_of(PAIR)
    routes = np.asarray(routing(q, k, table, cfg, key=key, backend=backend))
    assert (routes[..., : cfg.top_k] != np.asarray(routing(q, k, table, cfg, backend=backend))).any()
    want = oracle.moc(q, k, v, PAIR, cfg, routes)
    out, grads = attention_and_gradients(q, k, v, table, cfg, np.ones_like(v), key, backend=backend)
    assert_close(out, want.out, "output")
    for got, expected, which in zip(
        grads, oracle.moc_gradients(q, k, v, want.mask, np.ones_like(v)), ("dq", "dk", "dv")
    ):
        assert_close(got, expected, which, table=GRADIENT)
    assert np.abs(oracle.moc(q, k, v, PAIR, cfg).out - out).max() > 1e-3


@pytest.mark.long
def test_drop_off_removes_floor_p_k():
    """p ~ U(0, p_max), floor(5 p) dropped: each count is as likely as its stretch of p is long; each pick equally."""
    for p_max, shares in [(0.5, [0.4, 0.4, 0.2]), (1.0, [0.2] * 5), (0.2, [1.0])]:
        before, after = picks(dataclasses.replace(CFG, drop_off_max=p_max, max_drop_in=0))
        kept = contains(after, before)
        dropped = (~kept).sum(axis=-1).ravel()
        got = np.bincount(dropped, minlength=len(shares)) / dropped.size
        np.testing.assert_allclose(got, shares, atol=4 * 0.5 / np.sqrt(dropped.size))
        each = 1 - kept.mean(axis=(0, 1))
        np.testing.assert_allclose(each, np.dot(shares, np.arange(len(shares))) / 5, atol=0.03)
        assert (contains(before, after) == (after >= 0)).all()


def test_drop_off_counts_the_picks_that_a_query_holds():
    """With causal routing the n-th chunk's queries hold n, up to five: floor(p n) of them are dropped."""
    cfg = dataclasses.replace(CFG, causal_routing=True, drop_off_max=0.5, max_drop_in=0)
    before, after = picks(cfg)
    held, kept = ((x >= 0).sum(axis=-1) for x in (before, after))
    assert set(held.ravel()) == set(range(6))
    for count, shares in ((0, [1]), (1, [1]), (2, [1]), (3, [2 / 3, 1 / 3]), (4, [0.5, 0.5]), (5, [0.4, 0.4, 0.2])):
        dropped = (held - kept)[held == count]
        got = np.bincount(dropped, minlength=len(shares)) / dropped.size
        np.testing.assert_allclose(got, shares, atol=4 * 0.5 / np.sqrt(dropped.size), err_msg=f"{count} held")


def test_drop_in_is_poisson_cut_at_its_most():
    before, after = picks(dataclasses.replace(CFG, drop_off_max=0.0, drop_in_rate=0.5, max_drop_in=2))
    assert contains(after, before).all()
    new = (after >= 0) & ~contains(before, after)
    added = new.sum(axis=-1).ravel()
    shares = [np.exp(-0.5), 0.5 * np.exp(-0.5), 1 - 1.5 * np.exp(-0.5)]
    np.testing.assert_allclose(np.bincount(added) / added.size, shares, atol=4 * 0.5 / np.sqrt(added.size))
    # Every candidate that was not picked is as likely to be added as any other.
    chunks, token = np.arange(2, 14), np.arange(new.shape[1]) // HEADS % 48
    unpicked = ~(before[..., None] == chunks).any(axis=-2) & (chunks != chunks[token // 4][:, None])
    chance = ((after[..., None] == chunks) & new[..., None]).any(axis=-2).sum(axis=(0, 1)) / unpicked.sum(axis=(0, 1))
    np.testing.assert_allclose(chance, chance.mean(), atol=0.03)


def test_drop_in_takes_what_is_left():
    """Fewer candidates than are drawn: all of them are added, and no more."""
    before, after = picks(dataclasses.replace(CFG, top_k=10, drop_off_max=0.0, drop_in_rate=50.0, max_drop_in=3))
    assert ((after >= 0).sum(axis=-1) == 11).all()
    assert contains(after, before).all()


def test_draws_are_independent_and_repeatable():
    _, after = picks(CFG, [KEYS[0], KEYS[0], KEYS[1]])
    np.testing.assert_array_equal(after[0], after[1])
    assert (after[0] != after[2]).any(axis=-1).mean() > 0.5
    before, _ = picks(CFG, KEYS[:1])
    rows = contains(after[0], before[0])  # of 2 scenes, 48 tokens, 2 heads
    halves = rows.reshape(2, 48, HEADS, -1)
    assert (halves[0] != halves[1]).any(axis=-1).mean() > 0.3  # scenes draw apart
    assert (halves[:, :, 0] != halves[:, :, 1]).any(axis=-1).mean() > 0.3  # heads too
    assert (halves[:, 1:] != halves[:, :-1]).any(axis=-1).mean() > 0.3  # and queries


def test_settings_beyond_the_chunks_cost_no_more_than_all_of_them():
    """A million picks or drop-ins: as wide as there are chunks, rounded up, with the picks that take all chunks."""
    q, k, _ = qkv(0, UNIFORM)
    table, key = table_of(UNIFORM), jax.random.key(0)
    all_chunks = dataclasses.replace(CFG, top_k=20, drop_off_max=0.7, drop_in_rate=2.0, max_drop_in=20)
    million = dataclasses.replace(all_chunks, top_k=10**6, max_drop_in=1024)
    for given in (None, key):
        want, got = (np.asarray(routing(q, k, table, cfg, key=given)) for cfg in (all_chunks, million))
        assert got.shape[-1] == 32 * (1 if given is None else 2)
        np.testing.assert_array_equal(*(np.sort(x, axis=-1)[..., -16:] for x in (got, want)))
    few = dataclasses.replace(CFG, drop_in_rate=400.0, max_drop_in=300)  # 400 ** 300 is no float
    assert (np.asarray(routing(q, k, table, few, key=key)) < 14).all()
