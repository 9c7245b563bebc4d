"""Which `model.remat` a run with `auto` takes: from sizes alone, before anything is compiled.

Bytes of a device in a training step, whose batch has N tokens of width M there:

    state + gradients + N depth (what is kept of a token in a block) + what a block takes while it is differentiated

What is kept is counted (`kept_bytes`), the last part is measured.
"""

import os

import jax
import jax.numpy as jnp

from moc_jax.config import MoCConfig, ModelConfig, Remat
from moc_jax.models import kept_bytes
from moc_jax.training.state import TrainState, device_bytes

# From the fastest to the one of least memory, as measured (docs/configs.md). `none`, which was slower than all of them
# then and with the present blocks is faster than `full`, needed several times the memory.
POLICIES: tuple[Remat, ...] = "dots", "attention+mlp", "attention", "full"
# While a block is differentiated: numbers per token and unit of width, and bytes whatever the size. Fitted to steps on
# an H200 from 10 thousand tokens to 180 thousand, which needed between 95 and 100 % of what this comes to.
_BLOCK, _FIXED = 50, 2**28
_WIDE = 1024  # at 512 `dots` was slower than `attention+mlp`, at 1024 as fast; wider is reckoned, not measured
_USABLE = 0.95  # of a device's memory; the rest is for batches that wait and for gaps between arrays


def choose(model: ModelConfig, moc: MoCConfig, state: TrainState, tokens: int, memory: int) -> tuple[Remat, str]:
    """The fastest policy for `tokens` on a device with `memory` bytes, the last one if none fits; and why."""
    policies = POLICIES if model.dim > _WIDE else POLICIES[1:]
    needs = {policy: needed_bytes(model, policy, moc, state, tokens) for policy in policies}
    fits = [policy for policy in policies if needs[policy] <= _USABLE * memory]
    shown = ", ".join(f"{policy} {need / 2**30:.3g}" for policy, need in needs.items())
    what = "the fastest that fits" if fits else "none surely fits"
    return (*fits, POLICIES[-1])[0], f"{what} {memory / 2**30:.3g} GiB; needed are about, in GiB: {shown}"


def needed_bytes(model: ModelConfig, policy: Remat, moc: MoCConfig, state: TrainState, tokens: int) -> int:
    """What a training step with this policy is expected to need on a device that has `tokens` of the batch.

    Args:
        state: arrays or ShapeDtypeStructs, with their shardings.
    """
    block = _BLOCK * model.dim * jnp.dtype(model.dtype).itemsize
    held = device_bytes(state) + device_bytes(state.params)
    return held + _FIXED + tokens * (kept_bytes(model, policy, moc) + block)


def device_memory() -> int:
    """Bytes that a device of this process may use; devices that tell none share their machine's."""
    devices = jax.local_devices()
    limits = [(device.memory_stats() or {}).get("bytes_limit") for device in devices]
    shared = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // len(devices)
    return min(limit or shared for limit in limits)
