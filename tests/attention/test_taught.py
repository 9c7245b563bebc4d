"""Attention of histories and of shots that are learned behind them, by hand, and the same in XLA and on Hopper GPUs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moc_jax.attention.api import RoutedAttention
from moc_jax.attention.layout import queries_of
from moc_jax.attention.taught import taught
from moc_jax.config import AttentionConfig, Config, ConfigError, DiffusionConfig, MoCConfig
from moc_jax.scene import TEXT
from tests.attention.compiled import BACKENDS, _value
from tests.attention.scenes import PAIR, qkv, table_of
from tests.attention.tolerances import GRADIENT, assert_close

CFG = MoCConfig(top_k=2, visibility="past")
OWN = MoCConfig(top_k=2, visibility="past", text_anchor="own+global")
TWICE = [PAIR[0], PAIR[0], PAIR[1], PAIR[1]]  # each one's history, then itself


@functools.partial(jax.jit, static_argnums=(4, 5))
def run(q, k, v, d_out, cfg, value):
    """Output, routes and gradients."""
    table = table_of(TWICE)
    attention = taught(RoutedAttention(backend=value))

    def attend(q, k, v):
        return attention.of_queries(q, k, v, queries_of(table), table, cfg)

    out, vjp, routes = jax.vjp(attend, q, k, v, has_aux=True)
    return out, routes, *vjp(d_out)


def inputs(backend, head_dim=16):
    q, k, v = qkv(0, TWICE, backend=backend, shape=(64, 2, head_dim))
    return q, k, v, qkv(1, TWICE, backend=backend, shape=(64, 2, head_dim))[0]


def by_hand(q, k, v, cfg):
    """What learned shots read, query by query: [B, H, N, D]; picks are those of the histories' means."""
    table = table_of(TWICE)
    shot, kind, chunk = (np.asarray(x) for x in (table.token_shot, table.token_kind, table.chunk_of))
    routes = np.asarray(run(q, k, v, np.zeros_like(q), cfg, "reference")[1])
    out = np.zeros(q.shape, np.float64)
    for b, n, h in np.ndindex(*q.shape[:3]):
        if b % 2 == 0 or chunk[b, n] < 0:
            continue
        text = kind[b] == TEXT
        is_text, mine = kind[b, n] == TEXT, shot[b] == shot[b, n]
        own = text & (mine | (shot[b] == -1)) | (~text & mine)
        own &= (chunk[b] >= 0) & ((shot[b, n] >= 0) | (shot[b] == -1))
        reads_captions = is_text or cfg.text_anchor == "all"
        past = text & (shot[b] >= 0) & (shot[b] < shot[b, n]) & reads_captions & (chunk[b] >= 0)
        past = past | np.isin(chunk[b], [c for c in routes[b, h, n] if c >= 0])
        keys = np.concatenate([k[b, own, h], k[b - 1, past, h]]).astype(np.float64)
        values = np.concatenate([v[b, own, h], v[b - 1, past, h]])
        p = np.exp(keys @ q[b, n, h].astype(np.float64) / np.sqrt(q.shape[-1]))
        out[b, n, h] = p @ values / p.sum()
    return out


@pytest.mark.long
@pytest.mark.parametrize("cfg", [CFG, OWN], ids=["all captions", "own+global"])
def test_what_learned_shots_read(cfg):
    q, k, v, d_out = inputs("reference")
    out = np.asarray(run(q, k, v, d_out, cfg, "reference")[0])
    assert_close(out[1::2], by_hand(q, k, v, cfg)[1::2], "output")


@pytest.mark.long
@pytest.mark.parametrize("cfg", [CFG, OWN], ids=["all captions", "own+global"])
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name not in ("reference", "pallas_tpu")])
def test_backends(backend, cfg):
    check(cfg, backend, _value(backend, np.zeros((1, 64))))


def check(cfg, backend, value, head_dim=16):
    q, k, v, d_out = inputs(backend, head_dim)
    found, want = run(q, k, v, d_out, cfg, value), run(q, k, v, d_out, cfg, "reference")
    np.testing.assert_array_equal(found[1], want[1])
    dtype = np.dtype(q.dtype).name
    assert_close(found[0], want[0].astype(jnp.float32), "output", dtype=dtype)
    for name, a, b in zip(("dq", "dk", "dv"), found[2:], want[2:], strict=True):
        assert_close(a, b.astype(jnp.float32), name, table=GRADIENT, dtype=dtype)


def test_over_groups_of_tokens_it_gathers_whatever_moves_less():
    """Queries that go to their picks would not meet their own copies there."""
    assert taught(RoutedAttention(exchange="auto")).exchange == "gather"
    with pytest.raises(ConfigError, match=r"attention.exchange = dispatch, but diffusion.teacher_forcing gathers keys"):
        Config(
            attention=AttentionConfig(exchange="dispatch"),
            moc=MoCConfig(visibility="past"),
            diffusion=DiffusionConfig(teacher_forcing=True),
        )
