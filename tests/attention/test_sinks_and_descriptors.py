"""Settings that let a query find more: the first chunks of earlier shots as sinks, and several descriptors a chunk."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moc_jax.attention import api
from moc_jax.attention import routing as rules
from moc_jax.attention.accounting import account
from moc_jax.attention.columns import by_column, columns
from moc_jax.attention.layout import queries_of
from moc_jax.attention.pallas_gpu import device, router
from moc_jax.config import ConfigError, MoCConfig
from moc_jax.scene import VIDEO
from tests.attention import oracle
from tests.attention.compiled import BACKENDS, attention_and_gradients, moc_attention, routing
from tests.attention.configs import EVERY, MULTI_SHOT, SINGLE_SHOT, name
from tests.attention.pallas_gpu.conftest import CAN_INTERPRET
from tests.attention.scenes import CHUNKS, HEADS, KINDS_OF_DATA, PAIR, SHOTS, cut, qkv, table_of
from tests.attention.tolerances import GRADIENT, OUTPUT, assert_close

SINK = dataclasses.replace(MULTI_SHOT, sink_chunks=1)
HALVES = dataclasses.replace(MULTI_SHOT, descriptors=2)
HALVES_OF_ONE_SHOT = dataclasses.replace(SINGLE_SHOT, descriptors=2)
BOTH = dataclasses.replace(MULTI_SHOT, sink_chunks=2, descriptors=3, visibility="past", text_anchor="own+global")
SETTINGS = [SINK, HALVES, BOTH]
IDS = ["sink", "halves", "both"]
FOUR_SHOTS = [
    cut(2, (1, [4, 6]), (2, [5, 2, 1]), (0, [3, 3]), (1, [7, 1, 5])),
    cut(0, (0, [8, 8, 2]), (3, [1]), (0, []), (1, [6, 3, 9, 1])),
]


@pytest.mark.slow_interpreted("huge queries")
@pytest.mark.long_interpreted
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["normal", "huge queries"])
@pytest.mark.parametrize("cfg", [*(pytest.param(cfg, marks=pytest.mark.long) for cfg in SETTINGS[:2]), BOTH], ids=IDS)
def test_routes_outputs_and_gradients_are_the_oracles(cfg, kind, backend):
    scenes = FOUR_SHOTS
    q, k, v = qkv(3, scenes, kind, backend=backend)
    dout = np.random.default_rng(1).standard_normal(v.shape).astype(v.dtype)
    table = table_of(scenes)
    routes = np.asarray(routing(q, k, table, cfg, backend=backend))
    assert routes.shape[-1] == cfg.top_k + min(CHUNKS, cfg.sink_chunks * (SHOTS - 1))
    ties = [oracle.near_ties(routes[b], q[b], k[b], scene, cfg) for b, scene in enumerate(scenes)]
    assert kind != "normal" or sum(ties) <= 1
    want = oracle.moc(q, k, v, scenes, cfg, routes)
    out, grads = attention_and_gradients(q, k, v, table, cfg, dout, backend=backend)
    scale = 64 if kind == "huge queries" else 1
    assert_close(out, want.out, "output", table=OUTPUT, scale=scale)
    for grad, expected in zip(grads, oracle.moc_gradients(q, k, v, want.mask, dout)):
        assert_close(grad, expected, "gradient", table=GRADIENT, scale=scale)


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS_OF_DATA)
@pytest.mark.parametrize("cfg", [c for c in EVERY if c.mode == "moc"][::5], ids=name)
def test_several_descriptors_under_every_anchor(cfg, kind):
    """Ties, too, go to the lowest chunk."""
    cfg = dataclasses.replace(cfg, descriptors=2)
    q, k, _ = qkv(5, PAIR, kind)
    routes = np.asarray(routing(q, k, table_of(PAIR), cfg))
    found = [oracle.near_ties(routes[b], q[b], k[b], scene, cfg) for b, scene in enumerate(PAIR)]
    assert kind != "equal chunks" or not any(found)


@pytest.mark.long
def test_one_descriptor_and_no_sink_change_nothing():
    q, k, _ = qkv(0, PAIR)
    table = table_of(PAIR)
    for b, scene in enumerate(PAIR):
        np.testing.assert_array_equal(
            routing(q, k, table, dataclasses.replace(MULTI_SHOT, descriptors=1, sink_chunks=0))[b],
            oracle.route(q[b], k[b], scene, MULTI_SHOT),
        )
    np.testing.assert_array_equal(columns(jnp.asarray(k), table, MULTI_SHOT), rules.descriptors(jnp.asarray(k), table))


def test_a_second_descriptor_finds_what_the_mean_hides():
    """A chunk of two opposite halves has a mean of zero, and one of a little of everything wins."""
    scenes = [cut(0, (0, [8, 8, 8]), (0, [4]))] * 2
    q, k, _ = qkv(0, scenes)
    q, k = np.zeros_like(q), np.zeros_like(k)
    start = scenes[0][2].start
    q[..., 0] = 1
    k[:, start : start + 4, :, 0], k[:, start + 4 : start + 8, :, 0] = 1, -1
    k[:, start + 8 : start + 16, :, 0] = 0.1
    for descriptors, best in ((1, 3), (2, 2)):
        routes = routing(q, k, table_of(scenes), dataclasses.replace(HALVES, descriptors=descriptors))
        assert routes[0, 0, scenes[0][-1].start, 0] == best


def test_sinks_are_kept_whatever_is_dropped_and_never_picked_twice():
    cfg, table = dataclasses.replace(SINK, drop_off_max=1.0, drop_in_rate=3.0), table_of(FOUR_SHOTS)
    q, k, _ = qkv(0, FOUR_SHOTS)
    routes = np.asarray(routing(q, k, table, cfg, key=jax.random.key(0)))
    assert routes.shape[-1] == 2 + 2 + 4
    for b, scene in enumerate(FOUR_SHOTS):
        for i, chunk in enumerate(scene):
            always = oracle.sinks(scene, cfg, i)
            assert len(always) == (chunk.kind == VIDEO) * len(
                {c.shot for c in scene if c.kind == VIDEO and 0 <= c.shot < chunk.shot}
            )
            for row in routes[b][:, chunk.tokens].reshape(-1, routes.shape[-1]):
                assert row[4:][row[4:] >= 0].tolist() == always
                assert not set(row[:4]) & set(always)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["keys", "random", "recent"])
def test_every_kind_of_routing_has_sinks(kind):
    cfg = dataclasses.replace(SINK, routing=kind)
    q, k, v = qkv(0, FOUR_SHOTS)
    table = table_of(FOUR_SHOTS)
    routes = np.asarray(routing(q, k, table, cfg))
    want = np.stack([oracle.route(q[b], k[b], scene, cfg, 4) for b, scene in enumerate(FOUR_SHOTS)])
    np.testing.assert_array_equal(routes[..., 2:], want[..., 2:])
    outputs = [moc_attention(q, k, v, table, cfg, routes=r, backend="xla") for r in (None, routes)]
    np.testing.assert_array_equal(*outputs)


def test_sinks_alone():
    cfg, table = dataclasses.replace(SINK, top_k=0), table_of(FOUR_SHOTS)
    q, k, _ = qkv(0, FOUR_SHOTS)
    for key in (None, jax.random.key(0)):
        routes = np.asarray(api.route(q, k, table, cfg, key=key, backend="xla"))
        want = [oracle.route(q[b], k[b], scene, cfg, 4) for b, scene in enumerate(FOUR_SHOTS)]
        np.testing.assert_array_equal(routes, want)
    dense = dataclasses.replace(cfg, mode="dense")
    assert api.route(q, k, table, dense, backend="xla").shape[-1] == 0


@pytest.mark.parametrize("cfg", SETTINGS, ids=IDS)
def test_counts_the_mask(cfg):
    q, k, v = qkv(0, FOUR_SHOTS)
    table = table_of(FOUR_SHOTS)
    routes = np.asarray(routing(q, k, table, cfg))
    counted = account(table, cfg, 16, jnp.asarray(routes))
    assert counted.pairs == oracle.moc(q, k, v, FOUR_SHOTS, cfg, routes).mask.sum() / HEADS
    assert account(table, cfg, 16).pairs >= counted.pairs
    plain = account(table, dataclasses.replace(cfg, sink_chunks=0, descriptors=1), 16)
    assert account(table, cfg, 16).flops_route == cfg.descriptors * plain.flops_route
    assert account(table, cfg, 16).flops_pool == plain.flops_pool
    alone = dataclasses.replace(cfg, top_k=0)
    sinks = account(table, alone, 16).pairs - account(table, dataclasses.replace(alone, sink_chunks=0), 16).pairs
    assert sinks == sum(
        chunk.length * sum(scene[c].length for c in oracle.sinks(scene, cfg, i))
        for scene in FOUR_SHOTS
        for i, chunk in enumerate(scene)
    )


@pytest.mark.skipif(not (device.is_hopper() or CAN_INTERPRET), reason="jax before 0.12 can't interpret such kernels")
@pytest.mark.parametrize("dtype", [jnp.bfloat16, pytest.param(jnp.float16, marks=pytest.mark.long)])
@pytest.mark.parametrize(
    "cfg",
    [*(pytest.param(cfg, marks=pytest.mark.long) for cfg in SETTINGS[:2]), BOTH, HALVES_OF_ONE_SHOT],
    ids=[*IDS, "one shot"],
)
def test_the_routing_kernel_picks_the_same_columns(cfg, dtype):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    table = table_of(FOUR_SHOTS)
    q, k, _ = (jnp.asarray(x, dtype) for x in qkv(0, FOUR_SHOTS, shape=(64, HEADS, 64)))
    arguments = q, columns(k, table, cfg), queries_of(table), table, by_column(cfg, table)
    interpret = None if device.is_hopper() else plgpu.InterpretGPUParams()
    got, want = router.select(*arguments, interpret=interpret), rules.select(*arguments)
    np.testing.assert_array_equal(got, want)
    assert (np.asarray(want) >= 0).any()


def test_what_sinks_need_is_said():
    for wrong in ({"self_anchor": "chunk"}, {"causal_routing": False}):
        with pytest.raises(
            ConfigError, match=r"moc.sink_chunks = 2 needs moc.self_anchor = shot and moc.causal_routing"
        ):
            MoCConfig(sink_chunks=2, **wrong)
    with pytest.raises(ConfigError, match=r"moc.descriptors is 0"):
        MoCConfig(descriptors=0)
    q, phi, table = jnp.zeros((2, 64, 2, 64), jnp.bfloat16), jnp.zeros((2, 2, 32, 64)), table_of(PAIR)
    with pytest.raises(NotImplementedError, match=r"top_k is 9 of 16 chunks, moc.descriptors is 2.*at most 16"):
        router.select(q, phi, queries_of(table), table, by_column(MoCConfig(top_k=9, descriptors=2), table))
