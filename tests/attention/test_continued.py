"""Queries of a scene's last shots over what is kept of those before: their rows of attention over the whole scene."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moc_jax.attention.api import RoutedAttention
from moc_jax.attention.backends import implementation, resolve
from moc_jax.attention.continued import Given, continued
from moc_jax.attention.kept import Kept, Rows
from tests.attention.compiled import BACKENDS, _value, moc_attention, route
from tests.attention.configs import DENSE, MULTI_SHOT, NO_ANCHORS, PAST, WINDOW, name
from tests.attention.scenes import PAIR, TEXT_TOKENS, TOKENS, qkv, table_of
from tests.attention.tolerances import assert_close

LAYERS, LAYER, ROWS = 2, 1, 128  # rows: of a layer's video
FIRST, END = np.array([1, 2]), np.array([2, 4])  # the shots that are given, of each scene
CAPTIONS, VIDEO = 6, 30  # room for the given tokens
NONSENSE = 7.0  # in all that is not finished
HERE = [
    name for name in BACKENDS[1:] if name != "pallas_gpu"
]  # which knows no such heads: pallas_gpu/test_continued.py


def past(cfg):
    return dataclasses.replace(cfg, visibility="past")


SETTINGS = [past(cfg) for cfg in (MULTI_SHOT, WINDOW, NO_ANCHORS, DENSE[0])] + [PAST[-1]]


def given_of(table):
    """The global caption and those of the given shots, then their video."""
    tokens = np.full((2, CAPTIONS + VIDEO), TOKENS)
    for b, scene in enumerate(PAIR):
        mine = [c for c in scene if c.shot == -1 or FIRST[b] <= c.shot < END[b]]
        for text, begin in ((True, 0), (False, CAPTIONS)):
            rows = np.concatenate([np.arange(TOKENS)[c.tokens] for c in mine if (c.start < TEXT_TOKENS) == text])
            tokens[b, begin : begin + len(rows)] = rows
    return Given.of(table, jnp.asarray(tokens), jnp.asarray(FIRST), jnp.asarray(END), text_tokens=CAPTIONS, shots=2)


def kept_of(k, v, table, cfg, value):
    """Of the shots before the given ones, in one of two layers."""
    finished = (np.asarray(table.token_shot) < FIRST[:, None])[..., None, None]

    def rows(x):
        video = np.where(finished, x, NONSENSE)[:, TEXT_TOKENS:]
        whole = np.full((1, 2, LAYERS * ROWS, *x.shape[2:]), NONSENSE, x.dtype)
        whole[0, :, LAYER * ROWS :][:, : video.shape[1]] = video
        return Rows(jnp.asarray(whole))

    def text(x):
        whole = np.full((1, 2, LAYERS, TEXT_TOKENS, *x.shape[2:]), NONSENSE, x.dtype)
        whole[0, :, LAYER] = np.where(finished, x, NONSENSE)[:, :TEXT_TOKENS]
        return jnp.asarray(whole)

    phi = implementation(value).means(jnp.asarray(k), table, cfg, value)
    columns = jnp.repeat(table.shot < FIRST[:, None], cfg.descriptors, axis=1)[:, None, :, None]
    phi = jnp.stack([jnp.full_like(phi, NONSENSE), jnp.where(columns, phi, NONSENSE)], axis=1)
    return Kept(rows(k), rows(v), text(k), text(v), phi[None])


def check(cfg, q, k, v, value, want, want_routes):
    table = table_of(PAIR)
    given, kept = given_of(table), kept_of(k, v, table, cfg, value)

    @jax.jit
    def run(q, k, v, given, kept, index):
        attention, queries = RoutedAttention(backend=value), given.queries(None)
        return continued(attention, q, k, v, queries, given, kept, index, cfg, with_phi=True)

    at = np.minimum(given.token, TOKENS - 1)
    some = [jnp.asarray(np.take_along_axis(x, at[..., None, None], axis=1)) for x in (q, k, v)]
    out, routes, phi = run(*some, given, kept, jnp.int32(LAYER))
    valid = np.asarray(given.chunk_of) >= 0
    assert valid.sum() == 2 + 2 + 21 + 3 + 2 + 22 + 5, "all tokens of the given shots"
    assert not np.asarray(out)[~valid].any()
    assert_close(
        np.asarray(out)[valid], np.take_along_axis(np.asarray(want), at[..., None, None], axis=1)[valid], "output",
        dtype=np.dtype(q.dtype).name,
    )  # fmt: skip
    if cfg.mode == "moc":
        rows = np.take_along_axis(np.asarray(want_routes).swapaxes(1, 2), at[..., None, None], axis=1)
        np.testing.assert_array_equal(np.asarray(routes).swapaxes(1, 2)[valid], rows[valid])
        means = implementation(value).means(jnp.asarray(k), table, cfg, value)
        seen = (np.asarray(table.shot) < END[:, None]) & (np.asarray(table.kind) == 2)
        np.testing.assert_array_equal(np.swapaxes(phi, 1, 2)[seen], np.swapaxes(means, 1, 2)[seen])


@pytest.mark.parametrize("backend", [pytest.param(BACKENDS[0], marks=pytest.mark.long), *HERE])
@pytest.mark.long_interpreted
@pytest.mark.slow_interpreted(*SETTINGS[1:])
@pytest.mark.parametrize(
    "cfg", [SETTINGS[0], *(pytest.param(cfg, marks=pytest.mark.long) for cfg in SETTINGS[1:])], ids=name
)
def test_rows_of_the_whole(backend, cfg):
    q, k, v = qkv(0, PAIR, backend=backend)
    value = resolve(_value(backend, q), cfg)
    table = table_of(PAIR)
    want = moc_attention(q, k, v, table, cfg, backend=backend)
    routes = route(q, k, table, cfg, backend=backend) if cfg.mode == "moc" else None
    check(cfg, q, k, v, value, want, routes)
