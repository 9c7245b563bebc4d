"""The whole backend: its kernels run and no other, sharded it computes the same, and what it can't do it refuses."""

import collections
import dataclasses
import functools
import logging
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moc_jax.attention import api, backends
from moc_jax.attention.pallas_tpu import device
from moc_jax.attention.pallas_tpu.device import Tpu
from moc_jax.config import MoCConfig
from moc_jax.scene import ChunkTable
from tests.attention import oracle
from tests.attention.compiled import attention_and_gradients, outputs_and_gradients, route
from tests.attention.configs import DENSE, MULTI_SHOT, NO_ANCHORS, name
from tests.attention.scenes import HEADS, PAIR, TOKENS, cut, qkv, table_of
from tests.attention.tolerances import GRADIENT, assert_close

ANCHORS = collections.Counter(moc_forward_text=1, moc_forward_anchors=1, moc_move=2)
PICKS = collections.Counter(
    f"moc_{name}" for name in ("pool", "router", "move_lanes", "ranks", "ranks", "spread", "forward_picks", "merge")
)
ANCHOR_GRADIENTS = collections.Counter(moc_gradients_anchors=1, moc_move=5)
PICK_GRADIENTS = collections.Counter(moc_spread=3, moc_add=1, moc_columns=1, moc_gradients_picks=1, moc_move=2)


def kernels(jaxpr) -> collections.Counter:
    """Names of the kernels in a program, with how often each is called."""
    return collections.Counter(params["name"] for params in kernel_calls(jaxpr))


def kernel_calls(jaxpr):
    """Parameters of each call of a kernel in a program."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            yield equation.params
            continue
        for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from kernel_calls(inner)


def shape(*dims, dtype=jnp.int32):
    return jax.ShapeDtypeStruct(dims, dtype)


def trace(function, cfg, dtype=jnp.bfloat16, tokens=4608, chunks=16, head_dim=128, scenes=(1,), backend="pallas_tpu"):
    q = shape(*scenes, tokens, 2, head_dim, dtype=dtype)
    table = ChunkTable(*[shape(*scenes, chunks)] * 4, shape(*scenes, tokens), 512, 512, 4)
    backend = Tpu(chip="v5p") if backend == "pallas_tpu" else backend
    return jax.make_jaxpr(functools.partial(function, cfg=cfg, backend=backend))(q, q, q, table).jaxpr


def routes(q, k, v, table, **options):
    return api.route(q, k, table, **options)


@pytest.fixture
def on_a_tpu(monkeypatch):
    """What JAX says on a machine with TPUs."""
    monkeypatch.setattr(device, "is_tpu", lambda: True)
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(device_kind="TPU v5p")])


def gradients(q, k, v, table, cfg, backend):
    out, vjp = jax.vjp(lambda q, k, v: api.moc_attention(q, k, v, table, cfg, backend=backend), q, k, v)
    return vjp(out)


@pytest.mark.long
@pytest.mark.parametrize("backend", ["auto", pytest.param("pallas_tpu", marks=pytest.mark.long)])
@pytest.mark.parametrize(
    ("cfg", "forward", "backward"),
    [
        (MoCConfig(top_k=3), ANCHORS + PICKS, ANCHOR_GRADIENTS + PICK_GRADIENTS),
        (MoCConfig(mode="dense"), ANCHORS, ANCHOR_GRADIENTS),
        (MoCConfig(top_k=0), ANCHORS, ANCHOR_GRADIENTS),
    ],
    ids=lambda x: name(x) if isinstance(x, MoCConfig) else "",
)
def test_programs_for_tpus_hold_the_kernels(cfg, forward, backward, backend, on_a_tpu):
    assert kernels(trace(api.moc_attention, cfg, backend=backend)) == forward
    assert kernels(trace(gradients, cfg, backend=backend)) == forward + backward


@pytest.mark.long
def test_vmap_calls_each_kernel_once():
    """With more scenes, not scene by scene."""
    cfg = MoCConfig(top_k=3)
    one = trace(gradients, cfg)
    more = trace(lambda *x, **given: jax.vmap(functools.partial(gradients, **given))(*x), cfg, scenes=(3, 1))
    assert kernels(more) == kernels(one)
    assert "while" not in {equation.primitive.name for equation in more.eqns}


def test_programs_for_others_hold_none():
    q = shape(1, TOKENS, HEADS, 16, dtype=jnp.float32)
    table = ChunkTable(*[shape(1, 16)] * 4, shape(1, TOKENS), 12, 17)
    run = functools.partial(api.moc_attention, cfg=MoCConfig(top_k=2))
    assert not kernels(jax.make_jaxpr(run)(q, q, q, table).jaxpr)


def test_off_tpus_it_is_refused():
    q, k, v = (jnp.asarray(x) for x in qkv(0, PAIR))
    with pytest.raises(NotImplementedError, match="needs a TPU, not cpu"):
        api.moc_attention(q, k, v, table_of(PAIR), MULTI_SHOT, backend="pallas_tpu")


@pytest.mark.parametrize(
    ("dtype", "head_dim", "message"),
    [(jnp.float16, 128, "not q float16"), (jnp.bfloat16, 272, "up to 256.*with 272")],
)
@pytest.mark.parametrize(("function", "top_k"), [(api.moc_attention, 0), (routes, 2)])
def test_what_the_kernels_do_not_know_is_refused(dtype, head_dim, message, function, top_k):
    with pytest.raises(NotImplementedError, match=message):
        trace(function, MoCConfig(top_k=top_k), dtype, head_dim=head_dim)


def test_auto_says_once_what_it_took(caplog, on_a_tpu):
    backends._say_which.cache_clear()
    with caplog.at_level(logging.INFO, logger=backends.__name__):
        for _ in range(2):
            trace(api.moc_attention, MoCConfig(top_k=0), backend="auto")
    said = [record.getMessage() for record in caplog.records if record.name == backends.__name__]
    assert len(said) == 1
    assert "pallas_tpu" in said[0]
    assert "TPU v5p" in said[0]


@pytest.mark.long
@pytest.mark.parametrize(
    "cfg", [MULTI_SHOT, *(pytest.param(cfg, marks=pytest.mark.slow) for cfg in (NO_ANCHORS, DENSE[0]))], ids=name
)
def test_sharded_over_eight_devices(cfg):
    """Scenes over four devices, heads over two, under shard_map: as exact as on one, and where it was asked for."""
    scenes = [*PAIR, cut(1, (2, [6, 6, 6]), (1, [9, 2, 5])), cut(0, (1, [3, 3, 3, 3]), (0, [17, 8]))]
    q, k, v = qkv(0, scenes)
    dout = qkv(1, scenes)[0]
    mesh = jax.make_mesh((4, 2), ("data", "heads"))
    by_head, by_scene = jax.P("data", None, "heads"), jax.P("data")
    table = table_of(scenes)

    def run(q, k, v, dout, table):
        routes = route(q, k, table, cfg, backend="pallas_tpu")
        return routes, outputs_and_gradients(q, k, v, table, cfg, dout, backend="pallas_tpu")

    specs = (*[by_head] * 4, jax.tree.map(lambda _: by_scene, table))
    out_specs = jax.P("data", "heads"), (by_head, (by_head,) * 3)
    sharded = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=out_specs, check_vma=False)
    put = jax.tree.map(lambda x, spec: jax.device_put(x, jax.NamedSharding(mesh, spec)), (q, k, v, dout, table), specs)
    routes, (out, grads) = jax.jit(sharded)(*put)
    assert out.sharding.is_equivalent_to(jax.NamedSharding(mesh, by_head), out.ndim)
    want = oracle.moc(q, k, v, scenes, cfg)
    if cfg.mode == "moc":
        np.testing.assert_array_equal(routes, want.routes)
    assert_close(out, want.out, "output")
    want_grads = oracle.moc_gradients(q, k, v, want.mask, dout)
    for got, expected, which in zip(grads, want_grads, ("dq", "dk", "dv")):
        assert_close(got, expected, which, table=GRADIENT)


@pytest.mark.slow
def test_heads_in_groups(monkeypatch):
    """As long scenes need it, each head's pairs by themselves: the same bits."""
    cfg = MULTI_SHOT
    q, k, v = (jnp.asarray(x) for x in qkv(0, PAIR))
    together = attention_and_gradients(q, k, v, table_of(PAIR), cfg, v, backend="pallas_tpu")
    monkeypatch.setattr("moc_jax.attention.pallas_tpu.attend._BUFFER", 1)
    apart = attention_and_gradients(q, k, v, table_of(PAIR), cfg, v, backend="pallas_tpu")
    for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(apart)):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_chunks_longer_than_a_block(monkeypatch):
    """Picks then keep state between blocks, and gradients of pairs add up over tiles of keys."""
    from tests.attention import compiled

    small = dataclasses.replace(
        compiled.SMALL_TPU,
        picks=dataclasses.replace(compiled.SMALL_TPU.picks, keys=8, compute_keys=8),
        pick_gradient_keys=8,
        pick_gradients=dataclasses.replace(compiled.SMALL_TPU.pick_gradients, at_once=8),
    )
    monkeypatch.setattr(compiled, "SMALL_TPU", small)
    cfg = MULTI_SHOT
    q, k, v = (jnp.asarray(x) for x in qkv(0, PAIR))
    given = dict(table=table_of(PAIR), cfg=cfg, dout=v, backend="pallas_tpu")
    out, grads = jax.jit(functools.partial(outputs_and_gradients, **given))(q, k, v)
    want = oracle.moc(*map(np.asarray, (q, k, v)), PAIR, cfg)
    assert_close(out, want.out, "output")
    want_grads = oracle.moc_gradients(*map(np.asarray, (q, k, v)), want.mask, np.asarray(v))
    for got, expected, which in zip(grads, want_grads, ("dq", "dk", "dv")):
        assert_close(got, expected, which, table=GRADIENT)


@pytest.mark.long
def test_one_function_for_two_chips_is_two_programs():
    """The chip is part of what jit compiles for: v4, whose vector memory is small, has its own blocks, and v6e its."""
    q = shape(1, 4608, 2, 128, dtype=jnp.bfloat16)
    table = ChunkTable(*[shape(1, 16)] * 4, shape(1, 4608), 512, 512, 4)
    attention = jax.jit(api.moc_attention, static_argnames=("cfg", "backend"))
    found = {}
    for chip in ("v4", "v6e"):
        traced = attention.trace(q, q, q, table, MoCConfig(top_k=8), backend=Tpu(chip=chip))
        calls = {params["name"]: params for params in kernel_calls(traced.jaxpr.jaxpr)}
        limits = {calls[f"moc_{kernel}"]["compiler_params"].vmem_limit_bytes for kernel in ("spread", "forward_picks")}
        assert limits == {device.Chip(chip).vmem_limit}
        found[chip] = calls["moc_spread"]["grid_mapping"].grid, str(calls["moc_forward_anchors"]["jaxpr"])
    (windows, anchors), (other_windows, other_anchors) = found.values()
    assert windows != other_windows
    assert anchors != other_anchors
