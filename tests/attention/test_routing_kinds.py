"""Routing that does not look at keys, for comparison: the same candidates, as many, and nothing else differs."""

import dataclasses

import jax
import numpy as np
import pytest

from moc_jax.attention import accounting, api
from moc_jax.attention import routing as rules
from moc_jax.attention.layout import queries_of
from moc_jax.scene import VIDEO
from tests.attention.compiled import routing
from tests.attention.configs import EVERY, MULTI_SHOT, name
from tests.attention.scenes import HEADS, PAIR, cut, qkv, table_of

SOME = [c for c in EVERY if c.mode == "moc"][::9]


def candidates(cfg, table):
    """Which chunks each query token may pick: [B, N, C]; a token of padding, none."""
    of, mask = np.asarray(table.chunk_of), np.asarray(rules.candidate_chunks(table, cfg))
    return np.take_along_axis(mask, np.maximum(of, 0)[:, :, None], axis=1) & (of >= 0)[:, :, None]


@pytest.mark.parametrize("cfg", SOME, ids=name)
def test_recent_picks_are_the_last_candidates_before_the_own_chunk(cfg):
    cfg, table = dataclasses.replace(cfg, routing="recent"), table_of(PAIR)
    q, k, _ = qkv(0, PAIR)
    routes = np.asarray(routing(q, k, table, cfg))
    may = candidates(cfg, table)
    for b, n in np.ndindex(may.shape[:2]):
        before = [c for c in np.flatnonzero(may[b, n]) if c < table.chunk_of[b, n]]
        expected = [*before[::-1], *[-1] * cfg.top_k][: cfg.top_k]
        assert routes[b, :, n].tolist() == [expected] * HEADS


@pytest.mark.parametrize("cfg", SOME, ids=name)
def test_random_picks_are_as_many_candidates_as_those_by_keys(cfg):
    random, table = dataclasses.replace(cfg, routing="random"), table_of(PAIR)
    q, k, _ = qkv(0, PAIR)
    by_keys, drawn = (np.asarray(routing(q, k, table, c)) for c in (cfg, random))
    may = candidates(cfg, table)
    assert ((drawn >= 0).sum(-1) == (by_keys >= 0).sum(-1)).all()
    for b, h, n in np.ndindex(drawn.shape[:3]):
        picks = drawn[b, h, n][drawn[b, h, n] >= 0]
        assert len(set(picks)) == len(picks)
        assert may[b, n, picks].all()


def test_random_picks_are_uniform_and_each_head_and_query_has_its_own():
    scene = [cut(1, (1, [4] * 12))] * 2
    table = table_of(scene)
    cfg = dataclasses.replace(MULTI_SHOT, routing="random", top_k=3, self_anchor="chunk", causal_routing=False)
    q, k, _ = qkv(0, scene)
    video = np.asarray(table.token_kind) == VIDEO
    keys = jax.random.split(jax.random.key(1), 12)
    drawn = np.stack([np.asarray(routing(q, k, table, cfg, key=key))[..., :3].swapaxes(1, 2)[video] for key in keys])
    counts = np.bincount(drawn[drawn >= 0], minlength=table.kind.shape[1])[np.asarray(table.kind[0]) == VIDEO]
    expected = counts.sum() / 12
    assert (np.abs(counts - expected) < 4 * np.sqrt(expected)).all()
    without_drop = np.asarray(routing(q, k, table, cfg)).swapaxes(1, 2)[video]
    assert (without_drop[0, 0] != without_drop[0, 1]).any()  # heads
    assert len({row.tobytes() for row in without_drop[:, 0]}) > 10  # queries


def test_random_picks_do_not_depend_on_the_size_of_blocks():
    table = table_of(PAIR)
    keys = api.scene_keys(jax.random.key(2), 2, HEADS)
    whole, parts = (rules.random_picks(queries_of(table), table, MULTI_SHOT, keys, block=b) for b in (None, 5))
    np.testing.assert_array_equal(whole, parts)


@pytest.mark.parametrize("kind", ["random", "recent"])
def test_attention_reads_them(kind):
    cfg, table = dataclasses.replace(MULTI_SHOT, routing=kind), table_of(PAIR)
    q, k, v = qkv(0, PAIR)
    routes = api.route(q, k, table, cfg, backend="xla")
    outputs = [api.moc_attention(q, k, v, table, cfg, routes=r, backend="xla") for r in (None, routes)]
    np.testing.assert_array_equal(*outputs)
    assert (np.asarray(routes) != np.asarray(api.route(q, k, table, MULTI_SHOT, backend="xla"))).any()


def test_they_cost_no_pooling_and_no_scores():
    for kind in ("random", "recent"):
        cost = accounting.account(table_of(PAIR), dataclasses.replace(MULTI_SHOT, routing=kind), 16)
        assert cost.flops_pool == cost.flops_route == 0
        assert cost.pairs == accounting.account(table_of(PAIR), MULTI_SHOT, 16).pairs
