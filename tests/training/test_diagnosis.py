"""What is said of a step whose results are not finite."""

import dataclasses

import jax.numpy as jnp
import pytest

from moc_jax.data import prepare
from moc_jax.data.pipeline import make_pipeline
from moc_jax.training.diagnosis import batch_entries, diagnosis
from moc_jax.training.step import StepMetrics


@pytest.mark.parametrize("broken", [0, 1])
def test_the_scene_with_nan_is_named_in_whatever_order_rows_lie(prepared_config, broken):
    rows = (1, 0)
    data = make_pipeline(prepared_config, prepare(prepared_config), split="train", rows=rows)
    entries = batch_entries(prepared_config.train, data.buckets, 0)
    assert entries[0].name != entries[1].name
    scene = next(data)
    scene.video[broken] = float("nan")
    values = {field.name: jnp.float32(1) for field in dataclasses.fields(StepMetrics)}
    values = StepMetrics(**{**values, "scene_loss": jnp.array([1.0, 2.0])})
    text = diagnosis(prepared_config.train, data, 1, scene, rows, values, None)
    data.close()
    named = entries[rows[broken]]
    assert f"the data itself holds NaN or infinity: {named.name} from {named.source}; remove" in text
    assert f"{entries[0].name} from {entries[0].source}: 1, {entries[1].name} from {entries[1].source}: 2." in text
