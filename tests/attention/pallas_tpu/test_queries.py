"""Queries that are not keys: slices of the tokens by themselves give bit for bit what they give among all others."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from moc_jax.attention import parts
from moc_jax.attention.layout import queries_of
from moc_jax.attention.pallas_tpu import attend
from moc_jax.attention.pallas_tpu.device import Tpu
from tests.attention import oracle, pieces
from tests.attention.compiled import SMALL_TPU
from tests.attention.configs import DENSE, MULTI_SHOT, NO_ANCHORS, PAST, name
from tests.attention.interpreter import interpreted
from tests.attention.scenes import BATCH, HEADS, PAIR, TEXT_TOKENS, TOKENS, qkv, table_of
from tests.attention.tolerances import GRADIENT, assert_close

BACKEND = Tpu(chip="v5e", blocks=SMALL_TPU)
SHOT = TEXT_TOKENS + 15  # where the first scene's second shot begins, in the middle of the other's first
# From one shot on, text and what follows, and from one chunk's middle to another's; as long as each other, so that they
# share programs.
SLICES = [slice(first, first + 32) for first in (SHOT, 0, 20)]


@pytest.fixture
def apart():
    with interpreted(), pieces.apart():
        yield


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Arguments of the backend's functions."""

    cfg: object
    q: object
    k: object
    v: object
    d_out: object
    table: object
    queries: object
    routes: object

    @classmethod
    def whole(cls, cfg):
        q, k, v, d_out = (jnp.asarray(x) for x in (*qkv(0, PAIR), qkv(1, PAIR)[0]))
        table = table_of(PAIR)
        queries, routes = queries_of(table), jnp.zeros((BATCH, HEADS, TOKENS, 0), jnp.int32)
        if cfg.mode == "moc":
            phi = attend.means(k, table, cfg, BACKEND)
            routes = attend.select(q, phi, queries, table, cfg, BACKEND)
        return cls(cfg=cfg, q=q, k=k, v=v, d_out=d_out, table=table, queries=queries, routes=routes)

    def some(self, rows: slice):
        """Of these queries."""
        return dataclasses.replace(
            self,
            q=self.q[:, rows],
            d_out=self.d_out[:, rows],
            routes=self.routes[:, :, rows],
            queries=queries_of(self.table, self.table.chunk_of[:, rows]),
        )

    @property
    def rest(self):
        return self.queries, self.table, self.cfg, BACKEND

    def attend(self):
        return attend.attend(self.q, self.k, self.v, self.routes, *self.rest)

    def parts(self):
        """Anchors and picks: output and log-sum-exp of each."""
        vectors = self.q, self.k, self.v
        return tuple(attend.part(*vectors, routes, *self.rest) for routes in (None, self.routes))

    def gradients(self, lse, delta):
        """(dq, dk, dv) of anchors and of picks."""
        vectors, final = (self.q, self.k, self.v), (self.d_out, lse, delta)
        return tuple(attend.part_gradients(*vectors, routes, *final, *self.rest) for routes in (None, self.routes))


def check_slices_of_outputs(case, out):
    for rows in SLICES:
        some = case.some(rows)
        if case.cfg.mode == "moc":
            phi = attend.means(some.k, case.table, case.cfg, BACKEND)
            np.testing.assert_array_equal(attend.select(some.q, phi, *some.rest), some.routes)
        np.testing.assert_array_equal(some.attend(), out[:, rows])


@pytest.mark.long
def test_slices_of_outputs(apart):
    case = Case.whole(MULTI_SHOT)
    check_slices_of_outputs(case, case.attend())


@pytest.mark.long
@pytest.mark.parametrize(
    "cfg",
    [MULTI_SHOT, *(pytest.param(cfg, marks=pytest.mark.slow) for cfg in (PAST[0], NO_ANCHORS, DENSE[0]))],
    ids=name,
)
def test_parts_make_the_whole_and_have_slices(apart, cfg):
    case = Case.whole(cfg)
    out, of_parts = case.attend(), case.parts()
    merged, lse = parts.merge(*of_parts)
    arrays = [np.asarray(x) for x in (case.q, case.k, case.v)]
    want = oracle.moc(*arrays, PAIR, cfg, np.asarray(case.routes))
    assert_close(out, want.out, "output")
    assert_close(merged, want.out, "merged output")
    delta = jnp.swapaxes(jnp.sum(case.d_out * out, axis=-1), 1, 2)
    grads = case.gradients(lse, delta)
    want_grads = oracle.moc_gradients(*arrays, want.mask, np.asarray(case.d_out))
    for got, expected, which in zip(map(sum, zip(*grads)), want_grads, ("dq", "dk", "dv")):
        assert_close(got, expected, which, table=GRADIENT)
    if cfg != MULTI_SHOT:
        check_slices_of_outputs(case, out)
    for rows in SLICES:
        some = case.some(rows)
        for got, whole in zip(some.parts(), of_parts):
            np.testing.assert_array_equal(got[0], whole[0][:, rows])
            np.testing.assert_array_equal(got[1], whole[1][:, :, rows])
        for got, whole in zip(some.gradients(lse[:, :, rows], delta[:, :, rows]), grads):
            np.testing.assert_array_equal(got[0], whole[0][:, rows])
