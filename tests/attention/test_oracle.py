"""The oracle is what all backends are held to, so its rules are checked here against lists written by hand."""

import dataclasses

import numpy as np
import pytest

from moc_jax.config import MoCConfig
from moc_jax.scene import GLOBAL, TEXT, VIDEO
from tests.attention import oracle
from tests.attention.oracle import Chunk
from tests.attention.scenes import cut, qkv

# chunks:            0       1  2  3  4       5  (empty caption) 6  7       8  9
SCENE = cut(1, (1, [2, 2, 3]), (0, [4, 1]), (2, [3]))
TOKENS = 12 + 15


def test_cut_lays_out_text_before_video():
    assert SCENE[:3] == [Chunk(TEXT, GLOBAL, 0, 1), Chunk(TEXT, 0, 1, 1), Chunk(VIDEO, 0, 12, 2)]
    assert SCENE[5:] == [
        Chunk(TEXT, 1, 2, 0),
        Chunk(VIDEO, 1, 19, 4),
        Chunk(VIDEO, 1, 23, 1),
        Chunk(TEXT, 2, 2, 2),
        Chunk(VIDEO, 2, 24, 3),
    ]


@pytest.mark.parametrize(
    ("settings", "chunk", "anchors", "candidates"),
    [
        # Video queries, joint denoising.
        ({}, 3, [0, 1, 2, 3, 4, 8], []),
        ({}, 7, [0, 1, 6, 7, 8], [2, 3, 4]),
        ({"causal_routing": False}, 3, [0, 1, 2, 3, 4, 8], [6, 7, 9]),
        ({"self_anchor": "chunk"}, 3, [0, 1, 3, 8], [2]),
        ({"self_anchor": "chunk", "causal_routing": False}, 3, [0, 1, 3, 8], [2, 4, 6, 7, 9]),
        ({"self_anchor": "window", "window": 1}, 2, [0, 1, 2, 3, 8], []),
        ({"self_anchor": "window", "window": 1, "causal_routing": False}, 6, [0, 1, 6, 7, 8], [2, 3, 4, 9]),
        ({"self_anchor": "none"}, 3, [0, 1, 8], [2]),
        ({"self_anchor": "none", "causal_routing": False}, 3, [0, 1, 8], [2, 3, 4, 6, 7, 9]),
        ({"text_anchor": "own+global"}, 9, [0, 8, 9], [2, 3, 4, 6, 7]),
        ({"text_anchor": "none"}, 9, [9], [2, 3, 4, 6, 7]),
        # Video queries, past only.
        ({"visibility": "past"}, 7, [0, 1, 6, 7], [2, 3, 4]),
        ({"visibility": "past", "causal_routing": False, "self_anchor": "chunk"}, 3, [0, 1, 3], [2, 4]),
        ({"visibility": "past", "text_anchor": "own+global"}, 3, [0, 1, 2, 3, 4], []),
        # Text queries pick nothing: text and their own shot, whatever the anchors of video are.
        ({"text_anchor": "none", "self_anchor": "none"}, 1, [0, 1, 2, 3, 4, 8], []),
        ({"causal_routing": False}, 8, [0, 1, 8, 9], []),
        ({}, 0, [0, 1, 8], []),
        ({"visibility": "past"}, 8, [0, 1, 8, 9], []),
        ({"visibility": "past"}, 1, [0, 1, 2, 3, 4], []),
        ({"visibility": "past"}, 0, [0], []),
        # Dense.
        ({"mode": "dense", "self_anchor": "none", "text_anchor": "none"}, 3, [0, 1, 2, 3, 4, 6, 7, 8, 9], []),
        ({"mode": "dense"}, 0, [0, 1, 2, 3, 4, 6, 7, 8, 9], []),
        ({"mode": "dense", "visibility": "past"}, 6, [0, 1, 2, 3, 4, 6, 7], []),
        ({"mode": "dense", "visibility": "past"}, 0, [0], []),
    ],
)
def test_rules_by_hand(settings, chunk, anchors, candidates):
    cfg = MoCConfig(**settings)
    assert oracle.anchors(SCENE, cfg, chunk) == anchors
    assert oracle.candidates(SCENE, cfg, chunk) == candidates


def test_routes_by_hand():
    """Video chunks 2, 3, 5, 6 have means 1, 3, 2, -5 along the only axis; a negative query ranks them backwards."""
    scene = cut(0, (0, [2, 1]), (0, [2, 1]), (0, [1]), text_tokens=0)
    k = np.array([0, 2, 3, 1, 3, -5, 0.0]).reshape(7, 1, 1)
    q = np.array([1, 1, 1, 1, 1, 1, 1.0]).reshape(7, 1, 1)
    cfg = MoCConfig(top_k=3)
    routes = oracle.route(q, k, scene, cfg)
    assert routes[0].tolist() == [[-1] * 3] * 3 + [[3, 2, -1]] * 3 + [[3, 5, 2]]
    assert oracle.route(-q, k, scene, cfg)[0, 6].tolist() == [6, 2, 5]
    assert oracle.route(0 * q, k, scene, cfg)[0, 6].tolist() == [2, 3, 5]


def test_output_by_hand():
    """One query sees two keys with logits 0 and ln 3: its output is a quarter of one value and three of the other."""
    scene = cut(0, (0, [2]), text_tokens=0)
    q = np.array([[[1.0]], [[1.0]]])
    k = np.array([[[0.0]], [[np.log(3)]]])
    v = np.array([[[4.0]], [[8.0]]])
    result = oracle.moc(q[None], k[None], v[None], [scene], MoCConfig(top_k=0))
    np.testing.assert_allclose(result.out.ravel(), [7, 7])


def test_gradients_are_finite_differences():
    q, k, v = (x.astype(np.float64) for x in qkv(0, [SCENE], shape=(TOKENS, 1, 3)))
    mask = oracle.moc(q, k, v, [SCENE], MoCConfig(top_k=1)).mask
    dout = np.random.default_rng(1).standard_normal(q.shape)
    grads = oracle.moc_gradients(q, k, v, mask, dout)
    for i, token in [(0, 20), (1, 13), (2, 25), (1, 0)]:
        step = np.zeros_like(q)
        step[0, token, 0, 1] = 1e-6
        moved = [[x + sign * step * (i == j) for j, x in enumerate((q, k, v))] for sign in (1, -1)]
        high, low = (np.sum(oracle.attend(q[0], k[0], v[0], mask[0]) * dout[0]) for q, k, v in moved)
        assert (high - low) / 2e-6 == pytest.approx(grads[i][0, token, 0, 1], rel=1e-6, abs=1e-9)


def test_near_ties_accepts_rounding_and_nothing_else():
    q, k, _ = qkv(0, [SCENE], shape=(TOKENS, 1, 3))
    cfg = MoCConfig(top_k=2, causal_routing=False)
    routes = oracle.route(q[0], k[0], SCENE, cfg)
    assert oracle.near_ties(routes, q[0], k[0], SCENE, cfg) == 0
    swapped = routes.copy()
    swapped[0, 20] = swapped[0, 20, ::-1]
    with pytest.raises(AssertionError, match="come before"):
        oracle.near_ties(swapped, q[0], k[0], SCENE, cfg)
    for wrong in ([6, 2], [2, 2], [2, -1], [5, 2]):  # own shot, twice, too few, empty caption
        swapped[0, 20] = wrong
        with pytest.raises(AssertionError, match="picks"):
            oracle.near_ties(swapped, q[0], k[0], SCENE, cfg)
    k[0, SCENE[3].tokens] = k[0, SCENE[2].tokens] * np.float32(1 + 2**-23)  # means one unit in the last place apart
    cfg = dataclasses.replace(cfg, top_k=5)
    routes = oracle.route(q[0], k[0], SCENE, cfg)
    exchanged = np.where(routes == 2, 3, np.where(routes == 3, 2, routes))
    assert oracle.near_ties(exchanged, q[0], k[0], SCENE, cfg) == 8  # all video tokens of the two later shots
