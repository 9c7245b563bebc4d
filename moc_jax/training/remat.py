"""Which `model.remat` a run with `auto` takes: from sizes alone (held.py), before anything is compiled."""

import os
from collections.abc import Mapping

import jax

from moc_jax.config import ModelConfig, Remat

# From the fastest to the one of least memory, as measured (docs/configs.md). `none`, which was slower than all of them
# then and with the present blocks is faster than `full`, needed several times the memory.
POLICIES: tuple[Remat, ...] = "dots", "attention+mlp", "attention", "full"
_WIDE = 1024  # at 512 `dots` was slower than `attention+mlp`, at 1024 as fast; wider is reckoned, not measured
USABLE = 0.95  # of a device's memory; the rest is for batches that wait and for gaps between arrays


def policies(model: ModelConfig) -> tuple[Remat, ...]:
    """Those that `auto` chooses from, the fastest first."""
    return POLICIES if model.dim > _WIDE else POLICIES[1:]


def choose(needs: Mapping[Remat, float], memory: int) -> tuple[Remat, str]:
    """The first policy whose bytes a device with `memory` bytes has, or the last, and why."""
    fits = [policy for policy in needs if needs[policy] <= USABLE * memory]
    shown = ", ".join(f"{policy} {need / 2**30:.3g}" for policy, need in needs.items())
    what = "the fastest that fits" if fits else "none surely fits"
    return (*fits, POLICIES[-1])[0], f"{what} {memory / 2**30:.3g} GiB; needed are about, in GiB: {shown}"


def device_memory() -> int:
    """Bytes that a device of this process may use; devices that tell none share their machine's."""
    devices = jax.local_devices()
    limits = [(device.memory_stats() or {}).get("bytes_limit") for device in devices]
    shared = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // len(devices)
    return min(limit or shared for limit in limits)
