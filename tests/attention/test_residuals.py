"""Attention's residuals by name: what is kept is not computed again, counted in the program of a layer's gradient."""

import collections

import jax
import jax.numpy as jnp
import pytest

from moc_jax import RESIDUALS, Hopper, MoCConfig, Tpu, Xla, moc_attention
from tests.attention.scenes import PAIR, table_of

# By backend, what routing does, and what attention forward does.
FORWARD = {
    Xla(): (["top_k"], ["exp"]),
    Hopper(multiprocessors=132): (["moc_router", "sort"], ["moc_forward"]),
    Tpu(chip="v5p"): (
        ["moc_router", "moc_ranks"],
        ["moc_forward_anchors", "moc_forward_text", "moc_forward_picks", "moc_merge"],
    ),
}


@pytest.mark.parametrize(
    "backend", [pytest.param(b, id=b.name, marks=[pytest.mark.long] if isinstance(b, Tpu) else []) for b in FORWARD]
)
def test_what_is_kept_is_not_computed_again(backend):
    table, weights = table_of(PAIR), jnp.ones((4, 128, 128), jnp.bfloat16)
    x = jax.ShapeDtypeStruct((*table.chunk_of.shape, 2, 128), jnp.bfloat16)

    def layer(x, weights):
        q, k, v, w = jnp.einsum("bnhd,ide->ibnhe", x, weights)
        out = moc_attention(q, k, v, table, MoCConfig(top_k=2), key=jax.random.key(0), backend=backend)
        return jnp.sum((out * w).astype(jnp.float32) ** 2)

    def counts(layer):
        found = _operations(jax.make_jaxpr(jax.grad(layer, (0, 1)))(x, weights).jaxpr, collections.Counter())
        return [[found[name] for name in names] for names in FORWARD[backend]]

    def keeping(*names):
        return jax.checkpoint(layer, policy=jax.checkpoint_policies.save_only_these_names(*names))

    once = counts(layer)
    assert min(map(min, once)) > 0
    assert counts(keeping(*RESIDUALS)) == once
    routing, attention = counts(keeping(*RESIDUALS[:2]))  # all but the routes
    assert all(again > first for again, first in zip(routing, once[0]))
    assert attention == once[1]


def _operations(jaxpr, found):
    """How often each primitive, or kernel by its name, is in a program."""
    for equation in jaxpr.eqns:
        found[equation.params.get("name") or equation.primitive.name] += 1
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                _operations(inner, found)
    return found
