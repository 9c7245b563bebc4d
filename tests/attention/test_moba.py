"""MoBA (arXiv 2502.13189) as a special case: equal chunks, the own chunk as self anchor, causal routing.

MoBA's k counts the own chunk, so its k is our top_k + 1. Inside the own chunk MoBA is causal per token, as language is;
video within a chunk is not, so outputs are compared where both see the same keys (the last token of each chunk), and
everywhere with a MoBA whose own chunk is seen whole.
"""

import numpy as np
import pytest

from moc_jax.config import MoCConfig
from tests.attention.compiled import BACKENDS, attention, routing
from tests.attention.scenes import HEAD_DIM, HEADS, VIDEO_TOKENS, cut, qkv, table_of
from tests.attention.tolerances import assert_close

CHUNK, COUNT = 4, 13
SCENE = cut(0, (0, [CHUNK] * COUNT), text_tokens=0)
TABLE = {"text_tokens": 0, "tokens": VIDEO_TOKENS, "max_chunk": CHUNK}


def naive_moba(q, k, v, chunk, top_k, *, token_causal):
    """MoBA for one sequence q, k, v [N, H, D], as published (its equations 2 to 6): output and chosen chunks [H, N, C].

    Gate: the product with each chunk's mean key, -inf for chunks that begin later, +inf for the own one; top-k of it.
    """
    tokens, heads, dim = q.shape
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    chunk_of = np.arange(tokens) // chunk
    mean = k.reshape(-1, chunk, heads, dim).mean(axis=1)
    gate = np.einsum("nhd,chd->hnc", q, mean)
    own = chunk_of[:, None] == np.arange(len(mean))
    gate[:, chunk_of[:, None] < np.arange(len(mean))] = -np.inf
    gate[:, own] = np.inf
    kth = np.sort(gate, axis=-1)[..., [-top_k]]
    chosen = (gate >= kth) & (gate > -np.inf)
    mask = chosen[..., chunk_of]  # [H, N, N]
    if token_causal:
        mask &= np.arange(tokens)[:, None] >= np.arange(tokens)
    logits = np.where(mask, np.einsum("nhd,mhd->hnm", q, k) / np.sqrt(dim), -np.inf)
    p = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.einsum("hnm,mhd->nhd", p / p.sum(axis=-1, keepdims=True), v), chosen


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.slow_interpreted(1)
@pytest.mark.long_interpreted(3)
@pytest.mark.parametrize("top_k", [1, 3])
def test_moba_is_a_special_case(backend, top_k):
    cfg = MoCConfig(top_k=top_k - 1, self_anchor="chunk")
    q, k, v = qkv(0, [SCENE], shape=(VIDEO_TOKENS, HEADS, HEAD_DIM), backend=backend)
    table = table_of([SCENE], **TABLE)
    routes, out = (
        np.asarray(routing(q, k, table, cfg, backend=backend)),
        attention(q, k, v, table, cfg, backend=backend),
    )

    causal, chosen = naive_moba(q[0], k[0], v[0], CHUNK, top_k, token_causal=True)
    last = np.arange(CHUNK - 1, VIDEO_TOKENS, CHUNK)
    assert_close(out[0][last], causal[last], "last token of each chunk")
    whole, _ = naive_moba(q[0], k[0], v[0], CHUNK, top_k, token_causal=False)
    assert_close(out[0], whole, "output")

    ours = np.zeros_like(chosen)
    for h, n, slot in np.argwhere(routes[0] >= 0):
        ours[h, n, routes[0, h, n, slot] - 2] = True  # the two captions, empty here, are chunks 0 and 1
    ours[:, np.arange(VIDEO_TOKENS), np.arange(VIDEO_TOKENS) // CHUNK] = True
    np.testing.assert_array_equal(ours, chosen)
