"""Under jit, grad, vmap, remat and scan, in bfloat16, and twice: compiled as users compile it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moc_jax.config import MoCConfig
from tests.attention import oracle
from tests.attention.compiled import BACKENDS, moc_attention, route
from tests.attention.configs import DENSE, MULTI_SHOT, SINGLE_SHOT, name
from tests.attention.scenes import HEAD_DIM, PAIR, cut, qkv, table_of
from tests.attention.tolerances import GRADIENT, OUTPUT, assert_close

pytestmark = pytest.mark.parametrize("backend", BACKENDS)
OTHERS = [cut(1, (2, [6, 6, 6]), (1, [9, 2, 5])), cut(0, (1, [3, 3, 3, 3]), (0, [17, 8]))]


@pytest.mark.long_for("reference")
@pytest.mark.slow_interpreted
def test_eager_is_jit(backend):
    cfg = MULTI_SHOT
    q, k, v = (jnp.asarray(x) for x in qkv(0, PAIR, backend=backend))
    eager = moc_attention(q, k, v, table_of(PAIR), cfg, backend=backend)
    static = ("cfg", "backend")
    jitted = jax.jit(moc_attention, static_argnames=static)(q, k, v, table_of(PAIR), cfg, backend=backend)
    assert_close(eager, jitted, "output")
    assert_close(eager, oracle.moc(*map(np.asarray, (q, k, v)), PAIR, cfg).out, "output")
    np.testing.assert_array_equal(
        route(q, k, table_of(PAIR), cfg, backend=backend),
        jax.jit(route, static_argnames=static)(q, k, table_of(PAIR), cfg, backend=backend),
    )


@pytest.mark.slow_interpreted
@pytest.mark.parametrize("cfg", [SINGLE_SHOT, DENSE[0]], ids=name)
def test_a_second_run_is_bitwise_equal(backend, cfg):

    @jax.jit
    def run(q, k, v, table, dout):
        out, vjp = jax.vjp(lambda q, k, v: moc_attention(q, k, v, table, cfg, backend=backend), q, k, v)
        return out, vjp(dout), route(q, k, table, cfg, backend=backend)

    q, k, v = qkv(0, PAIR, backend=backend)
    first, second = (run(q, k, v, table_of(PAIR), v[:, ::-1]) for _ in range(2))
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second)):
        np.testing.assert_array_equal(a, b)


@pytest.mark.long_for("reference")
@pytest.mark.slow_interpreted
def test_vmap(backend):
    """Over batches of scenes, each with its own table."""
    cfg = MULTI_SHOT
    batches = (PAIR, OTHERS)
    q, k, v = (np.stack(x) for x in zip(*(qkv(i, scenes, backend=backend) for i, scenes in enumerate(batches))))
    tables = jax.tree.map(lambda *x: jnp.stack(x), *map(table_of, batches))

    def run(q, k, v, table):
        out, vjp = jax.vjp(lambda *x: moc_attention(*x, table, cfg, backend=backend), q, k, v)
        return out, vjp(jnp.ones_like(out)), route(q, k, table, cfg, backend=backend)

    outs, grads, routes = jax.jit(jax.vmap(run))(q, k, v, tables)
    for i, scenes in enumerate(batches):
        want = oracle.moc(q[i], k[i], v[i], scenes, cfg)
        np.testing.assert_array_equal(routes[i], want.routes)
        assert_close(outs[i], want.out, "output")
        want_grads = oracle.moc_gradients(q[i], k[i], v[i], want.mask, np.ones_like(v[i]))
        for got, expected, which in zip(grads, want_grads, ("dq", "dk", "dv")):
            assert_close(got[i], expected, which, table=GRADIENT)


@pytest.mark.long_for("reference")
@pytest.mark.slow_interpreted
def test_layers_under_scan_and_remat(backend):
    """Three layers as a model runs them, and the same three in a Python loop through the other backend."""
    layers, table = 3, table_of(PAIR)
    x = qkv(0, PAIR, backend=backend)[0]
    weights = np.random.default_rng(2).standard_normal((layers, 3, HEAD_DIM, HEAD_DIM)) / 4
    weights = weights.astype(x.dtype)

    def layer(x, w, backend):
        q, k, v = jnp.einsum("bnhd,ide->ibnhe", x, w, precision="highest")
        return x + moc_attention(q, k, v, table, cfg, backend=backend)

    def scanned(x, weights, backend):
        def body(x, w):
            return layer(x, w, backend), None

        return jnp.sum(jnp.square(jax.lax.scan(jax.checkpoint(body), x, weights)[0]))

    def looped(x, weights, backend):
        for w in weights:
            x = layer(x, w, backend)
        return jnp.sum(jnp.square(x))

    # In bfloat16 one layer's rounding would change the next one's picks, so there all chunks are picked.
    cfg = SINGLE_SHOT if x.dtype == jnp.float32 else MoCConfig(top_k=12, self_anchor="chunk", causal_routing=False)
    got, grads = jax.jit(jax.value_and_grad(scanned, (0, 1)), static_argnums=2)(x, weights, backend)
    want, want_grads = jax.jit(jax.value_and_grad(looped, (0, 1)), static_argnums=2)(x, weights, "reference")
    assert_close(got, want, "loss")
    assert_close(grads[0], want_grads[0], "dx", table=GRADIENT)
    assert_close(grads[1], want_grads[1], "dw", table=GRADIENT)


@pytest.mark.slow_interpreted(DENSE[0])
@pytest.mark.long_interpreted(MULTI_SHOT)
@pytest.mark.parametrize("cfg", [MULTI_SHOT, DENSE[0]], ids=name)
def test_bfloat16(backend, cfg):
    """Scores and softmax stay float32: routes are exactly those of the same numbers in float32."""
    low = [*qkv(0, PAIR, dtype=jnp.bfloat16), qkv(1, PAIR, dtype=jnp.bfloat16)[2]]
    q, k, v, dout = (x.astype(np.float32) for x in low)
    table = table_of(PAIR)
    routed = jax.jit(route, static_argnames=("cfg", "backend"))
    routes = routed(*low[:2], table, cfg, backend=backend)
    exact = backend if backend != "pallas_gpu" else "reference"
    np.testing.assert_array_equal(routes, routed(q, k, table, cfg, backend=exact))

    @jax.jit
    def run(q, k, v, dout):
        out, vjp = jax.vjp(lambda *x: moc_attention(*x, table, cfg, backend=backend), q, k, v)
        return out, vjp(dout)

    out, grads = run(*low)
    want = oracle.moc(q, k, v, PAIR, cfg, np.asarray(routes))
    assert out.dtype == jnp.bfloat16
    assert_close(out, want.out, "output", table=OUTPUT, dtype="bfloat16")
    want_grads = oracle.moc_gradients(q, k, v, want.mask, dout)
    for got, expected, which in zip(grads, want_grads, ("dq", "dk", "dv")):
        assert got.dtype == jnp.bfloat16
        assert_close(got, expected, which, table=GRADIENT, dtype="bfloat16")
