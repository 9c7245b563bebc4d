"""Kept keys and values are read where they are, of all layers in one array: in the interpreter, a layer's alone."""

import jax.numpy as jnp
import pytest

from tests.attention.compiled import moc_attention, route
from tests.attention.scenes import HEADS, PAIR, TOKENS, qkv, table_of
from tests.attention.test_continued import SETTINGS, check


@pytest.mark.long
@pytest.mark.parametrize("cfg", [SETTINGS[0], *(pytest.param(cfg, marks=pytest.mark.slow) for cfg in SETTINGS[1:])])
def test_rows_of_the_whole(hopper, cfg):
    q, k, v = qkv(0, PAIR, shape=(TOKENS, HEADS, 64), dtype=jnp.bfloat16)
    table = table_of(PAIR)
    want = moc_attention(q, k, v, table, cfg, backend="reference")
    routes = route(q, k, table, cfg, backend="reference") if cfg.mode == "moc" else None
    check(cfg, q, k, v, hopper, want, routes)
