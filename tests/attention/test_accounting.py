"""The accounting against the published figures, and against counting the oracle's mask."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from moc_jax.attention.accounting import account, print_settings, uniform_shots
from moc_jax.config import ChunkConfig, MoCConfig
from moc_jax.scene import VIDEO
from tests.attention import oracle
from tests.attention.configs import DENSE, EVERY, MULTI_SHOT, SINGLE_SHOT, name
from tests.attention.scenes import BATCH, CHUNKS, HEADS, PAIR, TOKENS, VIDEO_TOKENS, cut, qkv, table_of

# ------------------------------------------------------------------------------------------------ published figures


BY_SIZE = [(64, 3, 96), (128, 3, 92), (256, 3, 83), (512, 3, 68), (1024, 3, 35)]
BY_TOP_K = [(256, 1, 92), (256, 2, 88), (256, 4, 80), (256, 5, 76), (256, 6, 72)]


@pytest.mark.parametrize(("size", "top_k", "percent"), [*BY_SIZE, *BY_TOP_K])
def test_single_shot_ablation(size, top_k, percent):
    chunk = ChunkConfig(size=size, remainder="tail")
    cfg = MoCConfig(chunk=chunk, top_k=top_k, self_anchor="chunk", causal_routing=False)
    assert 100 * account(uniform_shots(1, 6300, chunk), cfg, 128).sparsity == pytest.approx(percent, abs=1)


@pytest.mark.parametrize(("size", "percent"), [(10240, 70.3), (5120, 76.6), (2560, 81.4), (1280, 84.5)])
def test_multi_shot_schedule(size, percent):
    chunk = ChunkConfig(size=size)
    counted = account(uniform_shots(8, 22500, chunk), MoCConfig(chunk=chunk, top_k=5), 128)
    assert 100 * counted.sparsity == pytest.approx(percent, abs=0.1)
    assert counted.tokens == 180_000


def test_wan_one_frame_per_chunk():
    chunk = ChunkConfig(unit="frames", size=1)
    cfg = MoCConfig(chunk=chunk, top_k=3, self_anchor="chunk", causal_routing=False)
    counted = account(uniform_shots(1, 32_760, chunk, frame=1560), cfg, 128)
    assert 100 * counted.sparsity == pytest.approx(81, abs=0.1)
    assert counted.pairs == 32_760 * 4 * 1560


def test_headline_flops():
    """Nine shots of 20 000 tokens, five chunks of 1024 each: the published 7x (MoC, section 3.3)."""
    chunk = ChunkConfig(size=1024, remainder="tail")
    counted = account(uniform_shots(9, 20_000, chunk), MoCConfig(chunk=chunk, top_k=5, causal_routing=False), 128)
    assert counted.flops == pytest.approx(2.32e12, rel=0.02)
    assert counted.flops_dense == pytest.approx(1.66e13, rel=0.02)
    assert counted.flops_dense / counted.flops == pytest.approx(7.16, rel=0.02)
    assert counted.flops_pool == 180_000 * 128
    assert counted.flops_route == 2 * 180_000 * 180 * 128
    assert counted.flops_attention == 4 * 180_000 * (20_000 + 5 * 1024) * 128


def test_table_is_printed(capsys):
    print_settings()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 17
    assert "84.5%" in next(line for line in lines if line.startswith("multi-shot, chunk 1280"))


# ------------------------------------------------------------------------------------------------ against the mask


@pytest.mark.parametrize("cfg", EVERY, ids=name)
def test_counts_the_mask(cfg):
    q, k, v = qkv(0, PAIR)
    result = oracle.moc(q, k, v, PAIR, cfg)
    counted = account(table_of(PAIR), cfg, 16, jnp.asarray(result.routes), element_bytes=4)
    assert counted.pairs == counted.expected_pairs == result.mask.sum() / HEADS
    sizes = [sum(c.length for c in scene) for scene in PAIR]
    assert counted.tokens == sum(sizes)
    assert counted.dense_pairs == sum(n * n for n in sizes)
    assert counted.sparsity == 1 - counted.pairs / counted.dense_pairs
    assert counted.flops_attention == 4 * counted.pairs * 16
    assert counted.flops_dense == 4 * counted.dense_pairs * 16
    assert counted.kv_bytes == 2 * counted.tokens * 16 * 4
    assert counted.kv_bytes_read == 2 * counted.pairs * 16 * 4
    video = [[c.length for c in scene if c.kind == VIDEO] for scene in PAIR]
    routed = cfg.mode == "moc"
    assert counted.flops_pool == routed * sum(map(sum, video)) * 16
    assert counted.flops_route == routed * sum(2 * sum(n) * len(n) for n in video) * 16


@pytest.mark.parametrize("cfg", EVERY, ids=name)
def test_worst_and_expected_picks(cfg):
    """Without routes: the most and the mean over every possible choice of candidates, by brute force."""
    worst = expected = 0
    for scene in PAIR:
        for i, chunk in enumerate(scene):
            anchored = sum(scene[c].length for c in oracle.anchors(scene, cfg, i))
            allowed = [scene[c].length for c in oracle.candidates(scene, cfg, i)]
            choices = itertools.combinations(allowed, min(cfg.top_k, len(allowed)))
            picked = [sum(choice) for choice in choices]
            worst += chunk.length * (anchored + max(picked))
            expected += chunk.length * (anchored + sum(picked) / len(picked))
    counted = account(table_of(PAIR), cfg, 16)
    assert counted.pairs == worst
    assert counted.expected_pairs == pytest.approx(expected, rel=1e-12)


def test_padding_costs_nothing():
    bare = table_of([PAIR[0]], tokens=TOKENS, chunks=len(PAIR[0]))
    padded = table_of([PAIR[0]], tokens=4 * TOKENS, chunks=4 * CHUNKS)
    assert account(bare, MoCConfig(), 16) == account(padded, MoCConfig(), 16)


def test_no_tokens_at_all():
    counted = account(table_of([cut(0)]), MoCConfig(), 16)
    assert (counted.tokens, counted.pairs, counted.sparsity, counted.expected_sparsity) == (0, 0, 0, 0)


def test_only_anchors_needs_no_routing():
    counted = account(table_of([cut(0, (0, [4] * 13))]), MoCConfig(top_k=0), 16)
    assert counted.pairs == VIDEO_TOKENS**2
    assert counted.flops == counted.flops_attention


@pytest.mark.parametrize("cfg", [MULTI_SHOT, SINGLE_SHOT, DENSE[1]], ids=name)
def test_queries_that_are_not_the_keys(cfg):
    """Each slice counts its own pairs: those of two are the whole's; keys are counted as they are."""
    table, routes = table_of(PAIR), None
    for given in (False, True):
        if given and cfg.mode == "moc":
            q, k, v = qkv(0, PAIR)
            routes = jnp.asarray(oracle.moc(q, k, v, PAIR, cfg).routes)
        whole = account(table, cfg, 16, routes)
        parts = [
            account(table, cfg, 16, None if routes is None else routes[:, :, rows], query_chunk=table.chunk_of[:, rows])
            for rows in (slice(0, 30), slice(30, TOKENS))
        ]
        for figure in ("pairs", "expected_pairs", "dense_pairs", "flops_route", "flops_attention", "kv_bytes_read"):
            assert sum(getattr(part, figure) for part in parts) == pytest.approx(getattr(whole, figure)), figure
        for part in parts:
            assert (part.tokens, part.flops_pool, part.kv_bytes) == (whole.tokens, whole.flops_pool, whole.kv_bytes)


def test_routes_of_another_scene():
    routes = jnp.full((BATCH, HEADS, TOKENS + 1, 2), -1)
    with pytest.raises(ValueError, match=rf"2 scenes of {TOKENS + 1} tokens.*table has 2 of {TOKENS}"):
        account(table_of(PAIR), MoCConfig(), 16, routes)


def test_hours_of_video_take_no_time():
    """Work is per chunk: 1.44 million tokens, whose pairs would not fit anywhere, are counted like any other scene."""
    chunk = ChunkConfig(size=1280)
    counted = account(uniform_shots(64, 22_500, chunk), MoCConfig(chunk=chunk), 128)
    assert counted.dense_pairs == 1_440_000**2
    assert counted.sparsity == pytest.approx(1 - (22_500 + 5 * 1250 * 63 / 64) / 1_440_000, abs=1e-4)
    assert np.isfinite(counted.flops)
