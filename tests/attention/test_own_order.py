"""Attention over a sequence in the user's own order, through `chunk_table_from`, is what the oracle says there."""

import jax.numpy as jnp
import numpy as np
import pytest

from moc_jax import MoCConfig, chunk_table_from
from moc_jax.scene import GLOBAL, NO_SHOT, PAD, TEXT, VIDEO
from tests.attention import oracle
from tests.attention.compiled import BACKENDS, attention_and_gradients, routing
from tests.attention.configs import DENSE, MULTI_SHOT, PAST, SINGLE_SHOT, WINDOW, name
from tests.attention.oracle import Chunk
from tests.attention.scenes import CHUNKS, LONGEST_CHUNK, SHOTS, TEXT_TOKENS, TOKENS, qkv
from tests.attention.tolerances import GRADIENT, assert_close

T, V, P = TEXT, VIDEO, PAD
# Captions before, within and after their shots, a prompt at the end, and tokens in between that take no part.
OWN = [
    [(5, V, 0), (3, T, 0), (4, V, 0), (2, P, 9), (1, T, 0), (7, V, 1), (2, T, 1), (3, V, 1), (9, V, 2), (2, T, GLOBAL)],
    [(2, T, GLOBAL), (6, V, 0), (0, V, 0), (5, V, 1), (2, T, 1), (3, P, 9), (8, V, 2), (1, T, 2), (17, V, 4)],
]
BY_CHUNK = [[(8, V, shot) for shot in range(5)], [(17, V, 0), (3, V, 1), (9, V, 2)]]  # no text, each chunk a shot
# The sizes of other tests, whose programs serve here too.
SIZES = {"tokens": TOKENS, "text_tokens": TEXT_TOKENS, "max_chunk": LONGEST_CHUNK, "max_shots": SHOTS}


def scene_of(own):
    """The oracle's scene, its chunks where the user has them."""
    ends = np.cumsum([length for length, _, _ in own])
    return [
        Chunk(kind, NO_SHOT, 0, 0) if kind == PAD else Chunk(kind, shot, end - length, length)
        for (length, kind, shot), end in zip(own, ends)
    ]


def moved(x, order):
    return np.take_along_axis(np.asarray(x), np.asarray(order)[:, :, None, None], axis=1)


@pytest.mark.long_for(PAST[0], SINGLE_SHOT, WINDOW, DENSE[1])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.long_interpreted(MULTI_SHOT, PAST[0], SINGLE_SHOT, WINDOW, DENSE[1], BY_CHUNK)
@pytest.mark.parametrize(
    ("own", "cfg"),
    [
        *((OWN, cfg) for cfg in (MULTI_SHOT, PAST[0], SINGLE_SHOT, WINDOW, DENSE[1])),
        (BY_CHUNK, MULTI_SHOT),
    ],
    ids=lambda x: name(x) if isinstance(x, MoCConfig) else "moba" if x is BY_CHUNK else "own",
)
def test_tokens_in_ones_own_order(backend, own, cfg):
    scenes = [scene_of(scene) for scene in own]
    q, k, v = qkv(0, scenes, backend=backend)
    dout = np.asarray(qkv(1, scenes, backend=backend)[0])
    rows = [scene + [(0, P, NO_SHOT)] * (CHUNKS - len(scene)) for scene in own]
    lengths, kinds, shots = np.moveaxis(np.array(rows), 2, 0)
    given = [lengths] if own is BY_CHUNK else [lengths, kinds, shots]
    table, order = chunk_table_from(*given, **SIZES)
    back = jnp.argsort(order)

    there = [moved(x, order) for x in (q, k, v)]
    routes = np.asarray(routing(*there[:2], table, cfg, backend=backend))
    routes = np.take_along_axis(routes, np.asarray(back)[:, None, :, None], axis=2)
    for b, scene in enumerate(scenes if cfg.mode == "moc" else []):
        assert oracle.near_ties(routes[b], q[b], k[b], scene, cfg) <= 2
    want = oracle.moc(q, k, v, scenes, cfg, routes)
    out, gradients = attention_and_gradients(*there, table, cfg, moved(dout, order), backend=backend)
    assert_close(moved(out, back), want.out, "output", dtype=str(v.dtype))
    for got, exact, which in zip(gradients, oracle.moc_gradients(q, k, v, want.mask, dout), ("dq", "dk", "dv")):
        assert_close(moved(got, back), exact, which, table=GRADIENT, dtype=str(v.dtype))
