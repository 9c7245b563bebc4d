"""Adapters: the base model before the first step, x W + b + scale dropout(x) A B after it, and nothing else trained."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moc_jax import models
from moc_jax.config import ConfigError, LoraConfig, MMDiTConfig, OptimizerConfig, TrainConfig, WanConfig
from moc_jax.models.layers import stacked
from moc_jax.models.linear import Linear
from moc_jax.models.lora import adapted, with_dropout
from moc_jax.models.mmdit.block import BlockModulation
from moc_jax.sharding import key_path, shard_batch
from moc_jax.training.state import create_state, make_blueprint
from moc_jax.training.step import make_train_step, train_step
from tests.training.small import CONFIG, make_scene, mesh_of

LORA = LoraConfig(rank=4, alpha=8.0)
SMALL = {"dim": 24, "depth": 2, "heads": 2, "latent_channels": 4, "text_dim": 8, "dtype": "float32", "remat": "none"}
FAMILIES = {"mmdit": MMDiTConfig(**SMALL), "wan": WanConfig(**SMALL, mlp_dim=32, text_rows=4)}


def with_lora(name, lora=LORA, **fields):
    return dataclasses.replace(FAMILIES[name], lora=lora, **fields)


def random_params(cfg, seed=0):
    """Adapters and weights that all matter."""
    weights = nnx.to_pure_dict(models.abstract(cfg)[1])
    leaves, tree = jax.tree.flatten(weights)
    random = np.random.default_rng(seed)
    return jax.tree.unflatten(tree, [(0.2 * random.normal(size=x.shape)).astype(x.dtype) for x in leaves])


def velocity(cfg, params, key=None):
    """Of two scenes, without drop-off and drop-in; with a key, as adapters train."""
    scene = make_scene(batch=2)

    @functools.partial(
        jax.jit, compiler_options={"xla_allow_excess_precision": False}
    )  # bfloat16 is rounded as it says
    def run(params, scene):
        model = nnx.merge(models.abstract(cfg)[0], params)
        model = model if key is None else models.with_dropout(model, key)
        t = jnp.full(scene.lengths.shot_frames.shape, 0.4)
        return model(scene.video, scene.text, t, scene.lengths, CONFIG.moc)

    return np.asarray(run(params, scene))


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_before_the_first_step_the_model_is_its_base_bit_for_bit(name, dtype):
    cfg = with_lora(name, dtype=dtype)
    base = random_params(dataclasses.replace(cfg, lora=LoraConfig()))
    fresh = nnx.to_pure_dict(nnx.state(models.build(cfg, rngs=nnx.Rngs(0)), nnx.Param))
    held = jax.tree.map(lambda x, like: jnp.asarray(x, like.dtype), base, models.frozen(fresh))
    params = models.joined(held, models.trained(fresh))
    np.testing.assert_array_equal(velocity(cfg, params), velocity(dataclasses.replace(cfg, lora=LoraConfig()), base))
    assert {x.dtype for x in jax.tree.leaves(models.trained(fresh))} == {jnp.dtype("float32")}


@pytest.mark.long
@pytest.mark.parametrize("targets", [("*",), ("out", "mlp/*")])
@pytest.mark.parametrize("name", FAMILIES)
def test_apart_is_merged(name, targets):
    cfg = with_lora(name, dataclasses.replace(LORA, targets=targets))
    params = random_params(cfg)
    merged = models.merged(models.frozen(params), models.trained(params), cfg.lora)
    plain = dataclasses.replace(cfg, lora=LoraConfig())
    assert jax.tree.structure(merged) == jax.tree.structure(nnx.to_pure_dict(models.abstract(plain)[1]))
    apart, together = velocity(cfg, params), velocity(plain, merged)
    assert np.linalg.norm(apart - velocity(plain, models.frozen(params))) > 0.1 * np.linalg.norm(apart)
    np.testing.assert_allclose(apart, together, atol=1e-4 * np.abs(together).max())


def test_an_adapter_is_what_the_paper_says():
    linear = Linear({"embed": 6}, {"heads": 2, "head_dim": 3}, dtype=jnp.float32, rngs=nnx.Rngs(0))
    adapted(linear, LoraConfig(rank=2, alpha=3.0, targets=("*",)), rngs=nnx.Rngs(1))
    linear.lora.b.set_value(jax.random.normal(jax.random.key(1), (2, 2, 3)))
    x, a, b, w = (
        np.asarray(y)
        for y in (
            jax.random.normal(jax.random.key(2), (4, 5, 6)),
            linear.lora.a[...],
            linear.lora.b[...].reshape(2, 6),
            linear.kernel[...].reshape(6, 6),
        )
    )
    np.testing.assert_allclose(linear(x).reshape(4, 5, 6), x @ w + 1.5 * (x @ a) @ b, atol=1e-5)
    assert np.abs(a).max() <= 6**-0.5


@pytest.mark.long
def test_dropout_drops_inputs_of_adapters_in_training_alone():
    cfg = with_lora("wan", dataclasses.replace(LORA, dropout=0.5))
    params = random_params(cfg)
    apart = velocity(cfg, params)
    np.testing.assert_array_equal(apart, velocity(with_lora("wan"), params))
    one, same, other = (velocity(cfg, params, jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert np.linalg.norm(one - other) > 1e-2 * np.linalg.norm(one) < np.linalg.norm(one - apart)


def test_dropout_differs_by_layer_and_keeps_the_mean():
    linear = Linear({"embed": 6}, {"embed_out": 6}, dtype=jnp.float32, rngs=nnx.Rngs(0))
    adapted(linear, LoraConfig(rank=6, targets=("*",), dropout=0.75), rngs=nnx.Rngs(1))
    linear.lora.a.set_value(jnp.eye(6))
    linear.lora.b.set_value(jnp.eye(6))
    with_dropout(linear, jax.random.key(0))
    kept = np.asarray(linear.lora(jnp.ones((1, 4000, 6))))
    assert set(np.unique(kept)) == {0.0, 4.0}
    assert abs(kept.mean() - 1) < 0.05
    model = models.build(with_lora("wan", dataclasses.replace(LORA, dropout=0.5)), rngs=nnx.Rngs(0))
    keys = models.with_dropout(model, jax.random.key(0)).network.blocks.mlp.up.lora.key[...]
    assert keys.shape == (2,)
    assert np.any(jax.random.key_data(keys[0]) != jax.random.key_data(keys[1]))


def test_targets_that_name_nothing_are_refused():
    with pytest.raises(
        ConfigError, match=r"model\.lora\.targets has 'to_q', which names no .* these are network/blocks/attention/k,"
    ):
        models.abstract(with_lora("wan", LoraConfig(rank=2, targets=("blocks/*", "to_q"))))
    with pytest.raises(ConfigError, match="targets is empty"):
        LoraConfig(rank=2, targets=())


# ------------------------------------------------------------------------------------------------ training

TRAIN, OPTIMIZER = TrainConfig(steps=10, ema_decay=0.5), OptimizerConfig(learning_rate=1e-2, warmup_steps=0)


def begun(cfg, mesh, adapters=None):
    blueprint = make_blueprint(cfg, OPTIMIZER, TRAIN, mesh)
    base = random_params(dataclasses.replace(cfg, lora=LoraConfig()))
    frozen = jax.tree.map(
        lambda x, like: jax.device_put(jnp.asarray(x, like.dtype), like.sharding), base, blueprint.abstract.frozen
    )
    return blueprint, create_state(blueprint, adapters, frozen)


def trained(cfg, mesh, adapters=None):
    """After a step."""
    blueprint, state = begun(cfg, mesh, adapters)
    step = make_train_step(TRAIN, OPTIMIZER, CONFIG.diffusion, blueprint, mesh)
    with jax.set_mesh(mesh):
        return step(state, shard_batch(make_scene(), mesh), CONFIG.moc)[0]


@pytest.mark.long
@pytest.mark.parametrize("name", ["mmdit", pytest.param("wan", marks=pytest.mark.long)])
def test_a_step_trains_adapters_and_nothing_else(name):
    cfg, mesh = with_lora(name, dataclasses.replace(LORA, dropout=0.2)), mesh_of(1)
    _, state = begun(cfg, mesh)
    before = jax.device_get(state)
    after = jax.device_get(trained(cfg, mesh))
    jax.tree.map(np.testing.assert_array_equal, before.frozen, after.frozen)
    for part in (after.params, after.ema, after.optimizer[1][0].mu):
        assert {path[-2] for path in map(key_path, dict(jax.tree.leaves_with_path(part)))} == {"lora"}
    moved = {
        key_path(path)[-1]
        for path, x in jax.tree.leaves_with_path(
            jax.tree.map(lambda x, y: np.abs(x - y).max(), before.params, after.params)
        )
        if x > 0
    }
    assert "b" in moved  # of A, B = 0 gives no gradient
    assert after.items().keys() == {"params", "ema", "optimizer"}


@pytest.mark.long
@pytest.mark.parametrize("name", FAMILIES)
def test_frozen_weights_have_no_gradients(name):
    """A matrix costs two products with the tokens, not three, and its adapter next to nothing."""
    wide = {"dim": 96, "depth": 2, "lora": LoraConfig(rank=1)}
    cfg = with_lora(name, **(wide if name == "mmdit" else {**wide, "mlp_dim": 384}))
    moc = dataclasses.replace(CONFIG.moc, mode="dense")

    def flops(model):
        blueprint = make_blueprint(model, OPTIMIZER, TRAIN, mesh_of(1))
        step = train_step(TRAIN, OPTIMIZER, CONFIG.diffusion, blueprint)
        compiled = jax.jit(lambda state, scene: step(state, scene, moc, jax.random.key(0))[0].params)
        return compiled.lower(blueprint.abstract, make_scene()).compile().cost_analysis()["flops"]

    assert flops(cfg) < 0.8 * flops(dataclasses.replace(cfg, lora=LoraConfig()))


@pytest.mark.long
@pytest.mark.parametrize(
    ("sizes", "dropout"), [({"data": 1, "fsdp": 4}, 0.2), ({"data": 1, "fsdp": 2, "context": 1, "tensor": 2}, 0.0)]
)
@pytest.mark.parametrize("name", FAMILIES)
def test_meshes_have_the_same_gradients(name, sizes, dropout):
    cfg = with_lora(name, dataclasses.replace(LORA, dropout=dropout))
    adapters = models.trained(random_params(cfg, 1))
    one, several = (trained(cfg, mesh, adapters) for mesh in (mesh_of(1), mesh_of(4, **sizes)))
    for (path, x), y in zip(jax.tree.leaves_with_path(one.optimizer), jax.tree.leaves(several.optimizer), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-4 * np.abs(x).max(), err_msg=str(path))
    split = {key_path(path)[-1] for path, x in jax.tree.leaves_with_path(several.params) if split_up(x)}
    assert split == {"a", "b"}


def split_up(x):
    return not x.sharding.is_fully_replicated


def test_each_layers_modulation_has_an_adapter_of_its_own():
    class Model(nnx.Module):
        def __init__(self):
            self.modulation = stacked(BlockModulation, FAMILIES["mmdit"], nnx.Rngs(0))

    lora = LoraConfig(rank=2, targets=("linear",), dropout=0.5)
    model, x = adapted(Model(), lora, rngs=nnx.Rngs(1)), jax.random.normal(jax.random.key(0), (2, 5, 24))
    adapter = model.modulation.text.linear.lora
    adapter.b.set_value(jax.random.normal(jax.random.key(1), adapter.b.shape))
    expected = jnp.einsum("bpi,lir,lrco->lbpco", jax.nn.silu(x), adapter.a[...], adapter.b[...]) * adapter.scale
    np.testing.assert_allclose(model.modulation(x)[0], expected, rtol=1e-5, atol=1e-5)  # beside weights of zeros
    dropped = with_dropout(model, jax.random.key(2)).modulation(x)[0]
    assert dropped.shape == expected.shape
    assert not np.allclose(dropped, expected)
