"""Memory of the `xla` backend grows linearly with the tokens: no tokens x tokens array, nor tokens x chunks."""

import jax
import jax.numpy as jnp
import pytest

from moc_jax.attention.api import moc_attention, route
from moc_jax.attention.pallas_gpu.device import Hopper
from moc_jax.attention.pallas_tpu.device import Tpu
from moc_jax.config import MoCConfig
from tests.attention.configs import MULTI_SHOT, SINGLE_SHOT, name
from tests.attention.scenes import cut, table_of

HEADS, DIM, CHUNK, SHOT = 2, 16, 32, 256
DENSE = MoCConfig(mode="dense")


def program(tokens, cfg, backend):
    """Output and gradients over shots of 256 tokens in chunks of 32, as a traced program, not run."""
    scene = cut(0, *[(0, [CHUNK] * (SHOT // CHUNK))] * (tokens // SHOT), text_tokens=0)
    table = table_of([scene], text_tokens=0, tokens=tokens, chunks=len(scene), max_chunk=CHUNK)
    cfg = MoCConfig(mode=cfg.mode, top_k=3, self_anchor=cfg.self_anchor, causal_routing=False)

    @jax.jit
    def run(q, k, v, table):
        out, vjp = jax.vjp(lambda *x: moc_attention(*x, table, cfg, backend=backend), q, k, v)
        return out, vjp(out)

    x = jax.ShapeDtypeStruct((1, tokens, HEADS, DIM), jnp.float32)
    return run.trace(x, x, x, table)


def largest_array(jaxpr) -> int:
    """Elements of the largest intermediate, loop bodies and kernels included."""
    sizes = [0]
    for eqn in jaxpr.eqns:
        sizes += [v.aval.size for v in eqn.outvars if hasattr(v.aval, "size")]
        for value in jax.tree.leaves(eqn.params, is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                sizes.append(largest_array(inner))
    return max(sizes)


@pytest.mark.parametrize("cfg", [MULTI_SHOT, SINGLE_SHOT, DENSE], ids=name)
def test_no_array_is_quadratic(cfg):
    sizes = {tokens: largest_array(program(tokens, cfg, "xla").jaxpr) for tokens in (8192, 16384, 32768)}
    assert sizes[32768] < 32768**2 / 64
    assert sizes[32768] <= 2.1 * sizes[16384] <= 2.1 * 2.1 * sizes[8192]


@pytest.mark.parametrize("cfg", [SINGLE_SHOT, DENSE], ids=name)
def test_peak_memory_is_linear(cfg):
    """Forward and backward, as the compiler lays it out."""
    small, large = (
        program(tokens, cfg, "xla").lower().compile().memory_analysis().temp_size_in_bytes for tokens in (8192, 32768)
    )
    assert large <= 4.4 * small
    assert large < 32768**2 / 2  # bytes: an eighth of one float32 tokens x tokens array


def test_the_measure_sees_quadratic_arrays():
    traced = program(2048, MULTI_SHOT, "reference")
    assert largest_array(traced.jaxpr) >= 2048**2
    assert traced.lower().compile().memory_analysis().temp_size_in_bytes >= 2048**2


@pytest.mark.parametrize(
    "backend", ["reference", "xla", "pallas_gpu", pytest.param("pallas_tpu", marks=pytest.mark.long)]
)
def test_picks_beyond_the_chunks_cost_no_more_than_all_of_them(backend):
    """No array of routing, attention and gradients grows when top_k goes from 32 of 9 chunks to a million."""
    scene = cut(0, *[(0, [CHUNK] * 3)] * 2, text_tokens=0)
    table = table_of([scene], text_tokens=0, tokens=192, chunks=9, max_chunk=CHUNK)
    x = jax.ShapeDtypeStruct((1, 192, 1, 64), jnp.bfloat16)
    value = {"pallas_gpu": Hopper(multiprocessors=132), "pallas_tpu": Tpu(chip="v5p")}.get(backend, backend)

    def largest(top_k):
        cfg = MoCConfig(top_k=top_k, max_drop_in=min(top_k, 1024), self_anchor="chunk", causal_routing=False)

        def run(q, k, v):
            routes = route(q, k, table, cfg, key=jax.random.key(0), backend=value)
            out, vjp = jax.vjp(lambda *x: moc_attention(*x, table, cfg, routes=routes, backend=value), q, k, v)
            return routes, vjp(out)

        return largest_array(jax.make_jaxpr(run)(x, x, x).jaxpr)

    assert largest(10**6) == largest(32)
