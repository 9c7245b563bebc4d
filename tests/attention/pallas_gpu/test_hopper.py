"""The kernels on a Hopper GPU, compiled as users compile them: as exact as cuDNN's dense attention at the same type.

Errors are of whole arrays, |got - want| / |want|, against plain attention in float32 with the same routes.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moc_jax.attention import api
from moc_jax.attention.pallas_gpu import device
from moc_jax.attention.pallas_gpu.device import Hopper, HopperTiling
from moc_jax.config import MoCConfig
from moc_jax.cuts import chunk_table_from
from moc_jax.scene import GLOBAL, VIDEO
from moc_jax.scene import TEXT as TEXT_KIND
from tests.attention import oracle
from tests.attention.configs import name
from tests.attention.scenes import cut, qkv, table_of

pytestmark = pytest.mark.skipif(not device.is_hopper(), reason="needs a Hopper GPU: make test-gpu on one")

NAMES = ("output", "dq", "dk", "dv")
HEADS, TEXT, TOKENS = 3, 173, 1_925
_CUDNN = 1_920  # tokens that cuDNN trains on: an even number of whole tiles
# Uneven chunks around the sizes of warpgroups and tiles beside even ones; captions up to 70 words, one shot without.
SCENES = [
    cut(31, (17, [1, 127, 250, 64]), (0, [333, 65, 8, 129]), (70, [7, 63, 9, 250]), text_tokens=TEXT),
    cut(0, (60, [128, 256, 200, 31, 256]), (3, [128, 31, 256, 256, 200]), text_tokens=TEXT),
]
CONFIGS = [
    MoCConfig(top_k=3),
    MoCConfig(top_k=2, self_anchor="chunk", causal_routing=False),
    MoCConfig(top_k=2, self_anchor="window", window=1, visibility="past"),
    MoCConfig(top_k=3, self_anchor="none", text_anchor="none", causal_routing=False),
    MoCConfig(top_k=1, text_anchor="own+global"),
    MoCConfig(mode="dense"),
    MoCConfig(top_k=0),
]
KINDS = [(dtype, head_dim) for dtype in ("bfloat16", "float16") for head_dim in (64, 128)]


def inputs(dtype, head_dim):
    """q, k, v, dout and the table."""
    draws = [*qkv(0, SCENES, shape=(TOKENS, HEADS, head_dim), dtype=dtype)]
    draws.append(qkv(1, SCENES, shape=(TOKENS, HEADS, head_dim), dtype=dtype)[0])
    table = table_of(SCENES, text_tokens=TEXT, tokens=TOKENS, max_chunk=333)
    return *(jnp.asarray(x) for x in draws), table


def with_gradients(attention, q, k, v, dout):
    out, vjp = jax.vjp(attention, q, k, v)
    return out, *vjp(dout.astype(out.dtype))


def error(got, want):
    got, want = (np.asarray(x, np.float64) for x in (got, want))
    assert np.isfinite(got).all()
    return np.linalg.norm(got - want) / np.linalg.norm(want)


@functools.cache
def cudnn_errors(dtype, head_dim):
    """Of dense attention over all tokens, output and gradients."""
    arrays = [x[:, :_CUDNN] for x in inputs(dtype, head_dim)[:4]]

    def dense(implementation, *arrays):
        return with_gradients(functools.partial(jax.nn.dot_product_attention, implementation=implementation), *arrays)

    got = jax.jit(functools.partial(dense, "cudnn"))(*arrays)
    with jax.default_matmul_precision("highest"):
        want = jax.jit(functools.partial(dense, "xla"))(*(x.astype(jnp.float32) for x in arrays))
    return [error(g, w) for g, w in zip(got, want)]


@pytest.mark.parametrize(("dtype", "head_dim"), KINDS)
@pytest.mark.parametrize("cfg", CONFIGS, ids=name)
def test_as_exact_as_cudnn_and_the_same_on_each_run(cfg, dtype, head_dim):
    hold_to_the_oracle(cfg, dtype, *inputs(dtype, head_dim), SCENES)


def test_heads_one_by_one_over_more_chunks_than_shared_memory_holds():
    *arrays, _ = inputs("bfloat16", 128)
    scenes = [cut(5, (9, [8] * 110), (0, [8] * 109), text_tokens=TEXT)] * len(SCENES)
    runs = [(TEXT_KIND, GLOBAL, 5)]
    for shot, (caption, chunks) in enumerate(((9, 110), (0, 109))):
        runs += [(TEXT_KIND, shot, caption), *[(VIDEO, shot, 8)] * chunks]
    kinds, shots, lengths = np.array(runs).T
    table, _ = chunk_table_from(np.tile(lengths, (len(SCENES), 1)), kinds, shots, tokens=TOKENS, text_tokens=TEXT)
    one_by_one = Hopper(tiling=HopperTiling(group_bytes=1))
    hold_to_the_oracle(MoCConfig(top_k=5), "bfloat16", *arrays, table, scenes, one_by_one)


def hold_to_the_oracle(cfg, dtype, q, k, v, dout, table, scenes, backend=Hopper()):
    arrays = q, k, v, dout

    @functools.partial(jax.jit, static_argnums=0)
    def run(backend, table, q, k, v, dout, routes=None):
        by = dict(table=table, cfg=cfg, backend=backend)
        routes = api.route(q, k, **by) if routes is None else routes
        return routes, *with_gradients(functools.partial(api.moc_attention, routes=routes, **by), q, k, v, dout)

    ours = run.lower(backend, table, *arrays).compile()
    kernels = ours.as_text().count('custom_call_target="mosaic_gpu')
    picks = cfg.mode == "moc" and cfg.top_k > 0
    assert kernels == (5 if picks else 2), "router, then forward and gradients for anchors and for picks"

    routes, *got = ours(table, *arrays)
    for first, second in zip((routes, *got), ours(table, *arrays), strict=True):
        np.testing.assert_array_equal(first, second)

    if picks:
        q, k = (np.asarray(x) for x in arrays[:2])
        ties = [oracle.near_ties(np.asarray(routes)[b], q[b], k[b], scene, cfg) for b, scene in enumerate(scenes)]
        assert sum(ties) <= 3, f"{sum(ties)} near-ties are more than chance gives"

    exact = (x.astype(jnp.float32) for x in arrays)
    _, *want = run("reference", table, *exact, routes)
    padding = np.asarray(table.chunk_of) < 0
    assert padding.any()
    errors = [error(g, w) for g, w in zip(got, want)]
    limits = [1.5 * e for e in cudnn_errors(dtype, q.shape[-1])]
    worse = [f"{which}: {e:.2e} > {most:.2e}" for which, e, most in zip(NAMES, errors, limits) if e > most]
    assert not worse, "; ".join(worse)
    assert not any(np.asarray(x)[padding].any() for x in got), "padding must get 0"
