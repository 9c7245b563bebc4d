"""Sizes of blocks for every chip and every published setting: they exist, and what they hold fits vector memory."""

import itertools

import jax
import jax.numpy as jnp
import pytest

from benchmarks.settings import SETTINGS, multi_shot
from moc_jax.attention.pallas_tpu import device, tuning
from moc_jax.attention.pallas_tpu.device import LANES

CHIPS = tuple(dict.fromkeys(device.CHIPS.values()))


@pytest.mark.parametrize("name", [*SETTINGS, "minutes"])
@pytest.mark.parametrize("chip", CHIPS)
def test_blocks_fit_vector_memory(chip, name):
    """What a kernel must hold by its description; the compiler's own needs come on top (test_compiles.py)."""
    setting = SETTINGS.get(name) or multi_shot(64)
    table = jax.eval_shape(setting.table)
    for dim, dtype in itertools.product((64, 128, 256), (jnp.bfloat16, jnp.float32)):
        with device.compiled_for(chip):
            blocks = tuning.blocks(setting.moc, table, dim, dtype)
            limit = device.vmem_limit()
        wide = -(-dim // LANES) * LANES
        row, row32 = jnp.dtype(dtype).itemsize * wide, 4 * wide
        for t in (blocks.anchors, blocks.text, blocks.picks):
            twice = 2 * row * (2 * t.queries + 2 * t.keys)  # q, out, k, v
            assert twice + t.queries * (row32 + 4 * LANES) <= limit  # the sum of p v, and the reference
            assert not any(rows % LANES for rows in (t.queries, t.keys))
        for keys, t in (
            (blocks.gradient_keys, blocks.anchor_gradients),
            (blocks.pick_gradient_keys, blocks.pick_gradients),
        ):
            twice = 2 * row * (2 * t.block + 4 * keys)  # q, d_out, k, v, dk, dv
            assert twice + row32 * (t.block + 2 * keys) <= limit  # sums of dq, dk, dv
            assert not any(rows % LANES for rows in (t.block, keys))
