"""No fallback hides: programs for Hopper hold the kernels, and where those can't run the reason is said."""

import collections
import functools
import logging

import jax
import jax.numpy as jnp
import pytest

from moc_jax.attention import api, backends
from moc_jax.attention.pallas_gpu.device import Hopper, HopperTiling, KernelTiling
from moc_jax.config import MoCConfig
from moc_jax.scene import ChunkTable
from tests.attention.configs import MULTI_SHOT
from tests.attention.scenes import PAIR, qkv, table_of

HOPPER = Hopper(multiprocessors=132)  # compiled for, whatever this machine is
off_gpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason="is about machines without a Hopper GPU")
KERNEL_CALLS = {"mpmd_map", "core_map", "pallas_call"}  # what Pallas kernels are in one version of jax or another


def kernels(jaxpr) -> collections.Counter:
    """How often each kernel is called, by name; loop bodies included."""
    found = collections.Counter()
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in KERNEL_CALLS:
            found[eqn.params["name"]] += 1
            continue
        for value in jax.tree.leaves(eqn.params, is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                found += kernels(inner)
    return found


def shape(*dims, dtype=jnp.int32):
    return jax.ShapeDtypeStruct(dims, dtype)


def trace(function, cfg, tokens, chunks, head_dim, dtype=jnp.bfloat16, backend=HOPPER, queries=None):
    """function(q, k, v, ...) for 12 heads and a scene of that size; `queries`: of a slice of so many tokens."""
    table = ChunkTable(*[shape(1, chunks)] * 4, shape(1, tokens), 512, 1280)
    q, x = (shape(1, n, 12, head_dim, dtype=dtype) for n in (queries or tokens, tokens))
    run = functools.partial(function, cfg=cfg, backend=backend)
    return jax.jit(run).trace(q, x, x, table, query_chunk=queries and shape(1, queries))


def gradients(q, k, v, table, **options):
    out, vjp = jax.vjp(lambda *x: api.moc_attention(*x, table, **options), q, k, v)
    return vjp(out)


def routes(q, k, v, table, **options):
    return api.route(q, k, table, **options)


MULTI_SHOT_SIZES = [(180_512, 153, 128), (1_440_512, 1_217, 128)]  # 8 and 64 shots of 22 500 tokens in 18 chunks
SINGLE_SHOT_SIZES = (33_272, 22, 64)
SHOT, CHUNK = MoCConfig(top_k=5), MoCConfig(top_k=3, self_anchor="chunk", causal_routing=False)
WINDOW = MoCConfig(top_k=3, self_anchor="window", visibility="past")
WITH_PICKS, WITHOUT = {"moc_router": 1, "moc_forward": 2}, {"moc_forward": 1}


@pytest.mark.long_for(MULTI_SHOT_SIZES[1], WINDOW)
@off_gpu
@pytest.mark.parametrize(
    ("cfg", "sizes", "forward"),
    [
        (SHOT, MULTI_SHOT_SIZES[0], WITH_PICKS),
        (SHOT, MULTI_SHOT_SIZES[1], WITH_PICKS),
        (CHUNK, SINGLE_SHOT_SIZES, WITH_PICKS),
        (WINDOW, SINGLE_SHOT_SIZES, WITH_PICKS),
        (MoCConfig(mode="dense"), MULTI_SHOT_SIZES[1], WITHOUT),
        (MoCConfig(top_k=0), SINGLE_SHOT_SIZES, WITHOUT),
    ],
    ids=["180k tokens", "1.44M tokens", "chunk", "window", "dense", "no picks"],
)
def test_programs_for_hopper_hold_the_kernels(cfg, sizes, forward):
    assert kernels(trace(api.moc_attention, cfg, *sizes).jaxpr.jaxpr) == forward
    calls = forward["moc_forward"]
    both = forward | {"moc_gradients": calls}
    traced = trace(gradients, cfg, *sizes)
    assert kernels(traced.jaxpr.jaxpr) == both
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("stablehlo.custom_call @mosaic_gpu") == sum(both.values())


@off_gpu
def test_a_shot_of_queries_takes_the_same_kernels():
    """One shot's queries, of any length, over the keys of eight."""
    traced = trace(gradients, SHOT, *MULTI_SHOT_SIZES[0], queries=22_501)
    both = WITH_PICKS | {"moc_gradients": 2}
    assert kernels(traced.jaxpr.jaxpr) == both
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("stablehlo.custom_call @mosaic_gpu") == sum(both.values())


@off_gpu
def test_the_count_sees_programs_without_kernels():
    assert not kernels(trace(gradients, MoCConfig(), 33_272, 22, 64, backend="xla").jaxpr.jaxpr)


@off_gpu
def test_off_hopper_it_is_refused():
    q, k, v = (jnp.asarray(x) for x in qkv(0, PAIR, shape=(64, 2, 64), dtype=jnp.bfloat16))
    options = dict(table=table_of(PAIR), cfg=MULTI_SHOT, backend="pallas_gpu")
    for run in (lambda: api.moc_attention(q, k, v, **options), lambda: api.route(q, k, **options)):
        with pytest.raises(NotImplementedError, match=r'Hopper GPU.*not cpu.*backend="auto" or "xla"'):
            run()


@pytest.mark.parametrize(("function", "top_k"), [(api.moc_attention, 0), (routes, 2)])
@pytest.mark.parametrize(
    ("dtype", "head_dim", "message"),
    [
        (jnp.float32, 64, r"not q float32.*cast to bfloat16"),
        (jnp.bfloat16, 32, r"head dimensions \(64, 128\).* with 32.*backend=\"xla\""),
        (jnp.bfloat16, 256, r"head dimensions \(64, 128\).* with 256"),
    ],
)
def test_what_the_kernels_do_not_know_is_refused(dtype, head_dim, message, function, top_k):
    with pytest.raises(NotImplementedError, match=message):
        trace(function, MoCConfig(top_k=top_k), 6_304, 28, head_dim, dtype)


def test_types_must_agree():
    q, k, v = (jnp.asarray(x) for x in qkv(0, PAIR, shape=(64, 2, 64), dtype=jnp.bfloat16))
    with pytest.raises(NotImplementedError, match="v float16"):
        api.moc_attention(q, k, v.astype(jnp.float16), table_of(PAIR), MoCConfig(top_k=0), backend=HOPPER)


def test_queries_in_another_order_are_refused():
    """Whose keys' readers are no runs: shots the other way round, video before text."""
    table = table_of(PAIR)
    x = shape(2, 64, 2, 64, dtype=jnp.bfloat16)
    for key in (table.token_shot, table.token_kind):
        query_chunk = jnp.take_along_axis(table.chunk_of, jnp.argsort(-key, axis=1), axis=1)
        given = dict(table=table, cfg=MoCConfig(top_k=0), query_chunk=query_chunk, backend=HOPPER)
        with pytest.raises(NotImplementedError, match=r"order of the chunk table.*backend=\"xla\""):
            jax.eval_shape(functools.partial(api.moc_attention, **given), x, x, x)


def test_the_target_is_part_of_what_jit_compiles_for():
    """One jitted function, two targets: two programs, without a state that jit can't see."""
    run = jax.jit(api.moc_attention, static_argnames=("cfg", "backend"))
    table = ChunkTable(*[shape(1, 28)] * 4, shape(1, 6_304), 512, 1280)
    x = shape(1, 6_304, 12, 128, dtype=jnp.bfloat16)
    small = HopperTiling(forward=KernelTiling(block=64))
    for backend, blocks, rows in ((HOPPER, 132, 128), (Hopper(multiprocessors=78, tiling=small), 78, 64)):
        text = str(run.trace(x, x, x, table, cfg=MoCConfig(top_k=0), backend=backend).jaxpr)
        assert f"grid=({blocks},)" in text
        assert f"bf16[2,{rows // 8},2,8,64]" in text  # the ring of keys, as it lies in memory


@pytest.mark.parametrize("fields", [dict(block=96), dict(block=32), dict(stages=1), dict(buffers=0)])
def test_a_tiling_that_no_kernel_can_have_is_refused(fields):
    with pytest.raises(ValueError, match="blocks are multiples of 64 rows, with at least 2 stages and 1 buffer"):
        KernelTiling(**fields)
    with pytest.raises(ValueError, match="504 registers"):
        KernelTiling(compute_registers=240)
    with pytest.raises(ValueError, match="group_bytes and text_readers are at least 1"):
        HopperTiling(text_readers=0)


@pytest.mark.parametrize(
    ("cfg", "chunks", "kernels"),
    [
        (MoCConfig(top_k=16), None, True),
        (MoCConfig(top_k=17), None, False),
        (MoCConfig(top_k=100), 16, True),  # no query holds more picks than there are chunks
        (MoCConfig(top_k=100), 17, False),
        (MoCConfig(top_k=100, mode="dense"), None, True),  # which picks nothing
    ],
)
def test_auto_takes_the_kernels_for_as_many_picks_as_they_can_hold(monkeypatch, cfg, chunks, kernels):
    monkeypatch.setattr(backends.gpu, "is_hopper", lambda: True)
    assert isinstance(backends.resolve("auto", cfg, chunks=chunks), backends.Hopper if kernels else backends.Xla)


@off_gpu
def test_auto_says_once_that_it_is_xla(caplog):
    q, k, v = (jnp.asarray(x) for x in qkv(0, PAIR))
    cfg = MULTI_SHOT
    assert backends.resolve("auto", cfg) == backends.resolve("auto", cfg, q) == backends.Xla()
    backends._say_which.cache_clear()
    with caplog.at_level(logging.INFO, logger=backends.__name__):
        for _ in range(2):
            api.moc_attention(q, k, v, table_of(PAIR), cfg)
    said = [record.getMessage() for record in caplog.records if record.name == backends.__name__]
    kind = f"float32, head dimension 16, {min(cfg.top_k, table_of(PAIR).kind.shape[1])} picks on cpu"
    assert said == [f"attention by plain XLA: there are no kernels for {kind}"]
