"""Launches are told apart by what they are for."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks.launches import launches, stage_of


@pytest.mark.parametrize(
    ("launch", "op_name", "stage"),
    [
        ("loop_add_fusion", "jit(run)/transpose(jvp(moc_attention))/moc_plan/moc_sort/add", "sort"),
        ("loop_add_fusion", "jit(run)/jvp(moc_attention)/moc_merge/add", "merge"),
        ("loop_add_fusion", "jit(run)/jvp(moc_attention)/add", "other"),
        ("moc_ranks_mosaic_gpu_kernel", "", "sort"),
        ("moc_forward_mosaic_gpu_kernel", "", "attend"),
        ("memcpy32_post", "", "other"),
    ],
)
def test_a_launch_belongs_to_its_innermost_scope(launch, op_name, stage):
    assert stage_of(launch, op_name) == stage


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="has launches there")
def test_without_a_gpu_nothing_is_launched():
    x = jnp.ones(4)
    assert launches(jax.jit(jnp.sin).lower(x).compile(), (x,)) == []
