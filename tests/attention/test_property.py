"""Every backend against the numpy oracle: routes, outputs and gradients, over random scenes and all kinds of config."""

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from moc_jax.scene import VIDEO
from tests.attention import oracle
from tests.attention.compiled import (
    BACKENDS,
    FAMILIES,
    attention_and_gradients,
    outputs_and_gradients,
    routing,
)
from tests.attention.configs import (
    COVERING,
    DENSE,
    EVERY,
    MULTI_SHOT,
    NO_ANCHORS,
    PAST,
    SINGLE_SHOT,
    WINDOW,
    name,
)
from tests.attention.scenes import HEAD_DIM, HUGE, KINDS_OF_DATA, LARGE, PAIR, qkv, random_scenes, table_of
from tests.attention.tolerances import GRADIENT, OUTPUT, assert_close


def check(cfg, scenes, kind, seed, backends):
    """Routes up to proven near-ties; outputs and dq, dk, dv for those routes."""
    q, k, v = qkv(seed, scenes, kind, backend=backends[0])
    dout = np.random.default_rng(seed + 1).standard_normal(v.shape).astype(v.dtype)
    table, routes = table_of(scenes), None
    for backend in backends:
        before, routes = routes, np.asarray(routing(q, k, table, cfg, backend=backend))
        assert routes.shape[-1] == (cfg.top_k if cfg.mode == "moc" else 0)
        ties = [
            oracle.near_ties(routes[b], q[b], k[b], scene, cfg) for b, scene in enumerate(scenes) if cfg.mode == "moc"
        ]
        assert kind != "normal" or sum(ties) <= 1, f"{sum(ties)} near-ties are more than chance gives"
        if not np.array_equal(before, routes):
            want = oracle.moc(q, k, v, scenes, cfg, routes)
            want_grads = oracle.moc_gradients(q, k, v, want.mask, dout)
        out, grads = attention_and_gradients(q, k, v, table, cfg, dout, backend=backend)
        scale = HUGE if kind == "huge queries" else 1
        # Weights in bfloat16 are off by a share of themselves, so outputs by that share of the values.
        spread = 1 if v.dtype == np.float32 else max(1, np.abs(v).max().astype(float) / max(1, np.abs(want.out).max()))
        assert_close(out, want.out, f"{backend} output", table=OUTPUT, scale=scale * spread)
        assert not np.asarray(out)[np.asarray(table.chunk_of) < 0].any(), "padding queries must output 0"
        for grad, want_grad, which in zip(grads, want_grads, ("dq", "dk", "dv")):
            assert_close(grad, want_grad, f"{backend} {which}", table=GRADIENT, scale=scale)


INTERPRETED = [family for family in FAMILIES if family == ["pallas_tpu"]]


@pytest.mark.long_for(*(cfg for cfg in COVERING if cfg not in (MULTI_SHOT, PAST[1])))
@pytest.mark.parametrize("backends", [family for family in FAMILIES if family not in INTERPRETED], ids="-".join)
@pytest.mark.parametrize("cfg", COVERING, ids=name)
@hypothesis.settings(max_examples=15, deadline=None, derandomize=True)
@example(scenes=PAIR, kind="normal", seed=0)
@given(scenes=random_scenes(), kind=st.sampled_from(KINDS_OF_DATA), seed=st.integers(0, 2**16))
def test_random_scenes(backends, cfg, scenes, kind, seed):
    check(cfg, scenes, kind, seed, backends)


# Those with as many picks as others share their programs.
SOME = [MULTI_SHOT, NO_ANCHORS, WINDOW, PAST[0], DENSE[0]]


@pytest.mark.slow_interpreted(*(cfg for cfg in COVERING if cfg not in SOME))
@pytest.mark.long_interpreted
@pytest.mark.parametrize("backends", INTERPRETED, ids="-".join)
@pytest.mark.parametrize("cfg", COVERING, ids=name)
@hypothesis.settings(max_examples=1, deadline=None, derandomize=True)
@example(scenes=PAIR, kind="normal", seed=0)
@given(scenes=random_scenes(), kind=st.sampled_from(KINDS_OF_DATA), seed=st.integers(0, 2**16))
def test_random_scenes_interpreted(backends, cfg, scenes, kind, seed):
    check(cfg, scenes, kind, seed, backends)


@pytest.mark.parametrize("cfg", [cfg for cfg in EVERY if cfg.mode == "moc"], ids=name)
def test_routes_under_every_config(cfg):
    q, k, _ = qkv(5, PAIR)
    table = table_of(PAIR)
    routes = np.asarray(routing(q, k, table, cfg, backend="xla"))
    np.testing.assert_array_equal(routes, [oracle.route(q[b], k[b], scene, cfg) for b, scene in enumerate(PAIR)])
    text_or_padding = np.asarray(table.token_kind) != VIDEO
    assert (routes.swapaxes(1, 2)[text_or_padding] == -1).all()


@pytest.mark.long_for(SINGLE_SHOT, PAST[0], DENSE[1])
@pytest.mark.slow_interpreted
@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("cfg", [MULTI_SHOT, SINGLE_SHOT, PAST[0], DENSE[1]], ids=name)
def test_large_scenes(backend, cfg):
    """Tiles and blocks of the sizes that users run, against the oracle."""
    tokens = 180 + 742
    table = table_of(LARGE, text_tokens=180, tokens=tokens, max_chunk=300)
    q, k, v = qkv(0, LARGE, shape=(tokens, 1, HEAD_DIM), backend=backend)
    dout = qkv(1, LARGE, shape=(tokens, 1, HEAD_DIM), backend=backend)[0]
    routes = np.asarray(routing(q, k, table, cfg, backend=backend))
    if cfg.mode == "moc":
        assert sum(oracle.near_ties(routes[b], q[b], k[b], scene, cfg) for b, scene in enumerate(LARGE)) <= 1
    want = oracle.moc(q, k, v, LARGE, cfg, routes)
    out, grads = jax.jit(outputs_and_gradients, static_argnames=("cfg", "backend"))(
        q, k, v, table, cfg, dout, backend=backend
    )
    assert_close(out, want.out, "output", table=OUTPUT)
    want_grads = oracle.moc_gradients(q, k, v, want.mask, dout)
    for grad, want_grad, which in zip(grads, want_grads, ("dq", "dk", "dv")):
        assert_close(grad, want_grad, which, table=GRADIENT)


@pytest.mark.slow
@pytest.mark.parametrize("backends", FAMILIES, ids="-".join)
@pytest.mark.parametrize("cfg", EVERY, ids=name)
@hypothesis.settings(max_examples=50, deadline=None)
@given(scenes=random_scenes(), kind=st.sampled_from(KINDS_OF_DATA), seed=st.integers(0, 2**16))
def test_random_scenes_under_every_config(backends, cfg, scenes, kind, seed):
    check(cfg, scenes, kind, seed, backends)
