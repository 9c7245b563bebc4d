"""Checkpoints of adapters: the weights that they are beside are found, recognised and joined, in either type."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moc_jax import models
from moc_jax.checkpoint import CheckpointError, Checkpoints, load_for_sampling
from moc_jax.checkpoint_base import base_of, frozen_like, load_base
from moc_jax.config import ConfigError, LoraConfig, TrainConfig
from moc_jax.sharding import logical_axes, tree_shardings
from tests.training.small import CONFIG, mesh_of
from tests.training.test_public_weights import MODEL
from tests.weights.folders import arrays, write

LORA = LoraConfig(rank=3, alpha=6.0)


def nowhere(directory, step=None, *, shardings=None):
    raise AssertionError(directory)


@pytest.fixture(params=["bfloat16", pytest.param("float32", marks=pytest.mark.long)])
def saved(request, tmp_path):
    """A workdir, the run's model, and its weights as it held them."""
    model = dataclasses.replace(MODEL, dtype=request.param, lora=LORA)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), frozen_like(model))
    folder = write(tmp_path / "base", arrays(MODEL), MODEL)
    frozen, where = load_base(str(folder), model, like, nowhere, setting="it")
    shapes, random = models.trained(nnx.to_pure_dict(models.abstract(model)[1])), np.random.default_rng(0)
    adapters = jax.tree.map(lambda x: jnp.asarray(random.normal(size=x.shape), x.dtype), shapes)
    checkpoints = Checkpoints(str(tmp_path / "run/checkpoints"), TrainConfig())
    config, beside = dataclasses.replace(CONFIG, model=model), base_of(frozen, where)
    checkpoints.save(1, {"params": adapters}, config=config, codec_state={}, data_state={}, base=beside)
    checkpoints.close()
    return str(tmp_path / "run"), model, models.joined(frozen, adapters)


def test_adapters_come_back_with_what_they_are_beside(saved):
    folder, model, held = saved
    apart = load_for_sampling(folder, adapters="apart")
    assert apart.config.model == model
    jax.tree.map(np.testing.assert_array_equal, apart.params, held)
    assert {str(x.dtype) for x in jax.tree.leaves(models.frozen(apart.params))} == {"float32", model.dtype}
    merged = load_for_sampling(folder)
    assert merged.config.model == dataclasses.replace(model, lora=LoraConfig())
    assert merged.licence.startswith("Apache-2.0 for what the Wan team")
    assert merged.digest == apart.digest != load_for_sampling(folder, adapters="alone").digest
    # Merged is not what was rounded for training, but what lies in the files.
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=0.05, atol=0.05),
        merged.params,
        models.merged(models.frozen(held), models.trained(held), LORA),
    )
    weights = nnx.to_pure_dict(models.abstract(merged.config.model)[1])
    axes = logical_axes(models.abstract(merged.config.model)[1])
    places = tree_shardings(weights, axes, mesh_of(4, data=1, fsdp=4))
    split = load_for_sampling(folder, shardings=places)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(split.params), jax.device_get(merged.params))
    assert any(not x.sharding.is_fully_replicated for x in jax.tree.leaves(split.params))


def test_a_base_of_another_model_is_refused(saved, tmp_path):
    wide = dataclasses.replace(MODEL, mlp_dim=40)
    other = write(tmp_path / "other", arrays(wide), wide)
    with pytest.raises(ConfigError, match=r"--base .*other.* is of another model: model\.mlp_dim is 40 there"):
        load_for_sampling(saved[0], base=str(other))
    with pytest.raises(CheckpointError, match=r"--base nowhere, the weights .* is not there; name"):
        load_for_sampling(saved[0], base="nowhere")
