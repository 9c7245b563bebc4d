"""The layers' own gradients against autodiff of their equations in float32, and what they keep for them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moc_jax.config import MMDiTConfig
from moc_jax.models import layers, rope
from moc_jax.models.layers import gated_sum, gelu, modulated_norm, normed_heads, of_groups
from moc_jax.models.linear import Linear
from moc_jax.models.rope import rotate

B, GROUPS, EACH, M, H, D = 2, 3, 4, 24, 2, 8
N = GROUPS * EACH


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def per_token(x):
    return jnp.repeat(x, EACH, axis=1)


def modulated_equation(x, scale, shift):
    y = x - x.mean(axis=-1, keepdims=True)
    y = y / jnp.sqrt((y**2).mean(axis=-1, keepdims=True) + 1e-6)
    return y * (1 + per_token(scale)) + per_token(shift)


def turned_equation(x, weight, turns):
    y = x / jnp.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-6) * weight[None, None, None]
    return rotate(y, turns)


def heads_equation(qkv, q_weight, k_weight, turns):
    q, k, v = jnp.moveaxis(qkv, 3, 0)
    return jnp.stack([turned_equation(q, q_weight, turns), turned_equation(k, k_weight, turns), v])


TURNS = rope.turns_of(normal(5, B, N, D // 2))
CASES = {
    "modulated_norm": (
        lambda x, scale, shift: modulated_norm(x, scale, shift, x.dtype),
        modulated_equation,
        (normal(0, B, N, M) + 3, normal(1, B, GROUPS, M), normal(2, B, GROUPS, M)),
    ),
    "gated_sum": (
        gated_sum,
        lambda x, gate, y: x + per_token(gate) * y,
        (normal(0, B, N, M), normal(1, B, GROUPS, M), normal(2, B, N, M)),
    ),
    "normed_heads": (
        lambda qkv, *weights: jnp.stack(normed_heads(qkv, *weights, TURNS)),
        lambda qkv, *weights: heads_equation(qkv, *weights, TURNS),
        (normal(0, B, N, H, 3, D), normal(1, D), normal(2, D)),
    ),
    "gelu": (gelu, functools.partial(nnx.gelu, approximate=True), (2 * normal(0, B, N, M),)),
}


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_the_equation(name):
    function, equation, inputs = CASES[name]
    with jax.numpy_rank_promotion("allow"):
        out, vjp = jax.vjp(function, *inputs)
        expected, expected_vjp = jax.vjp(equation, *inputs)
        np.testing.assert_allclose(out, expected, atol=1e-5)
        d_out = normal(9, *out.shape)
        for mine, theirs in zip(vjp(d_out), expected_vjp(d_out), strict=True):
            np.testing.assert_allclose(mine, theirs, atol=2e-5)


@pytest.mark.parametrize("name", CASES)
def test_nothing_but_inputs_and_numbers_per_row_is_kept_and_bfloat16_stays_so(name):
    """Float32 copies of the tokens are what filled memory and time."""
    function, _, inputs = CASES[name]
    low = [x.astype(jnp.bfloat16) if x.ndim > 2 and x.shape[1] == N else x for x in inputs]
    out, vjp = jax.eval_shape(lambda *x: jax.vjp(function, *x), *low)
    assert out.dtype == jnp.bfloat16
    for kept in jax.tree.leaves(vjp):
        assert kept.dtype == jnp.bfloat16 or kept.size < low[0].size, kept
    gradients = jax.eval_shape(lambda out, *x: jax.vjp(function, *x)[1](out), out, *low)
    assert [(x.dtype, x.shape) for x in gradients] == [(x.dtype, x.shape) for x in low]


def test_remat_sees_the_products_of_linear_maps():
    linear = Linear({"embed": 8}, {"mlp": 24}, dtype=jnp.float32, rngs=nnx.Rngs(0))

    def kept(policy):
        run = jax.checkpoint(
            lambda x: jnp.sum(jnp.sin(linear(x))), policy=layers.kept_policy(MMDiTConfig(remat=policy))
        )
        backward = jax.eval_shape(lambda x: jax.vjp(run, x)[1], jax.ShapeDtypeStruct((2, 5, 8), jnp.float32))
        return [x.shape for x in jax.tree.leaves(backward)]

    assert (10, 24) in kept("dots")
    assert (10, 24) not in kept("attention")


@pytest.mark.parametrize("remat", ["none", "full"])
def test_layers_may_follow_each_other_without_a_loop(remat):
    weights, x = normal(0, 3, M, M), normal(1, 4, M)

    def loss(weights, x, scan_layers):
        cfg = MMDiTConfig(remat=remat, scan_layers=scan_layers)
        x, seen = layers.over_layers(lambda x, w: (jnp.tanh(x @ w), x.sum()), x, weights, cfg)
        return jnp.sum(x**2) + jnp.sum(seen**2)

    looped, apart = (jax.jit(jax.value_and_grad(functools.partial(loss, scan_layers=scan))) for scan in (True, False))
    for a, b in zip(jax.tree.leaves(looped(weights, x)), jax.tree.leaves(apart(weights, x)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    loops = [of.lower(weights, x).as_text().count("stablehlo.while") for of in (looped, apart)]
    assert loops == [2, 0]
    found = apart.lower(weights, x).compile().as_text().count(" tanh(")
    assert found == 3 if remat == "none" else found > 3  # what is to be computed again is not found again


def test_each_group_has_its_captions_numbers_to_the_bit():
    per_caption = normal(0, B, 4, 2, M)
    slot = jnp.array([[0, 3, 1], [2, 2, -1]])
    found = of_groups(per_caption, jax.nn.one_hot(slot, 4))
    for i, each in enumerate(found):
        expected = jnp.where(
            slot[:, :, None] < 0, 0, jnp.take_along_axis(per_caption[:, :, i], slot[:, :, None], axis=1)
        )
        np.testing.assert_array_equal(each, expected)


def test_a_tpus_ways_are_the_others():
    """There, halves are exchanged and groups' numbers looked up by products."""
    x = normal(0, B, N, H, D)
    np.testing.assert_array_equal(rope._permuted(x), rope._flipped(x))
    of_groups, tokens = normal(1, B, GROUPS, M), normal(2, B, N, M)
    np.testing.assert_allclose(layers._looked_up(of_groups, N), layers._repeated(of_groups, N), rtol=2**-16)
    np.testing.assert_allclose(layers._multiplied(tokens, GROUPS), layers._added(tokens, GROUPS), atol=1e-5)


@pytest.mark.parametrize("name", ["modulated_norm", "gated_sum", "normed_heads"])
def test_each_compiler_is_given_its_way(name):
    function, _, inputs = CASES[name]

    def lowered(platform):
        return jax.jit(function).trace(*inputs).lower(lowering_platforms=(platform,)).as_text()

    assert ["dot_general" in lowered(platform) for platform in ("tpu", "cuda")] == [True, False]


def test_gelus_gradient_is_written_before_it_is_summed_on_gpus_alone():
    x = jax.ShapeDtypeStruct((B, N, M), jnp.bfloat16)
    gradient = jax.jit(lambda x, d: jax.vjp(gelu, x)[1](d))
    text = [gradient.trace(x, x).lower(lowering_platforms=(name,)).as_text() for name in ("cuda", "cpu", "tpu")]
    assert ["optimization_barrier" in found for found in text] == [True, False, False]
    assert ["tanh" in found for found in text] == [False, False, True]
