"""GPUs that are not there, for their compiler: jax's CUDA plugin, which needs no driver and no other package."""

import dataclasses
import importlib.util
import os
from collections.abc import Sequence

import jax
from jax.experimental import topologies

from moc_jax.chips import Chip
from moc_jax.planning.topology import Topology

PACKAGES = "jax-cuda13-plugin jax-cuda13-pjrt"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Die:
    """What the compiler asks about a GPU beside its memory, by NVIDIA's data sheets and programming guide."""

    capability: int
    multiprocessors: int
    cache: int
    """Of the second level, in bytes."""
    shared: int
    """Bytes of a multiprocessor."""
    clock: float
    """GHz."""
    lanes: int = 128
    """Of a multiprocessor, in float32."""

    @property
    def has_own_kernels(self) -> bool:
        """Whether ours are for it."""
        return self.capability == 9


_HOPPER = Die(capability=9, multiprocessors=132, cache=50 << 20, shared=228 << 10, clock=1.98)
_AMPERE = Die(capability=8, multiprocessors=108, cache=40 << 20, shared=164 << 10, clock=1.41, lanes=64)
DIES = {
    "a100": _AMPERE,
    "a100-80gb": _AMPERE,
    "h100": _HOPPER,
    "h200": _HOPPER,
    "b200": Die(capability=10, multiprocessors=148, cache=126 << 20, shared=228 << 10, clock=1.965),
}
_KIB = 1 << 10  # of a multiprocessor's shared memory, that no block gets


def installed() -> bool:
    """Whether the compiler is."""
    return any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))


def environment() -> dict[str, str]:
    """What a process that compiles for them must find when it starts."""
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",  # it looks for cuDNN, and programs only name it
        "XLA_FLAGS": "--xla_gpu_autotune_level=0",  # nothing can be tried
    }


def absent_devices(where: Topology) -> Sequence[jax.Device]:
    """Those of a topology: to be called in the environment above.

    Whatever the hosts, all say that NVLink joins them.
    """
    each = min(where.devices, where.chip.per_host)
    shape, target = f"1x{where.hosts}x{each}", target_config(where.chip)
    return topologies.get_topology_desc("", "cuda", topology=shape, target_config=target).devices


def target_config(chip: Chip) -> str:
    """A GpuTargetConfigProto, as text."""
    die = DIES[chip.name]
    blocks = {"x": 2**31 - 1, "y": 2**16 - 1, "z": 2**16 - 1}
    threads = {"x": 1024, "y": 1024, "z": 64}
    fields = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "threads_per_core_limit": 2048,
        "shared_memory_per_block": 48 << 10,
        "shared_memory_per_block_optin": die.shared - _KIB,
        "shared_memory_per_core": die.shared,
        "registers_per_core_limit": 2**16,
        "registers_per_block_limit": 2**16,
        "core_count": die.multiprocessors,
        "fpus_per_core": die.lanes,
        "clock_rate_ghz": die.clock,
        "l2_cache_size": die.cache,
        "memory_bandwidth": round(chip.bandwidth),
        "device_memory_size": chip.memory,
        "device_address_bits": 64,
        **{f"block_dim_limit_{axis}": most for axis, most in blocks.items()},
        **{f"thread_dim_limit_{axis}": most for axis, most in threads.items()},
    }
    features = " feature_extension: ACCELERATED_FEATURES" if die.capability >= 9 else ""
    versions = 'driver_version: "13.0.0" runtime_version: "12.8.0" dnn_version: "9.10.0"'
    return (
        f"gpu_device_info {{ {' '.join(f'{name}: {value}' for name, value in fields.items())} "
        f'cuda_compute_capability {{ major: {die.capability}{features} }} name: "{chip.kinds[0]}" {versions} }} '
        f'platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }} device_description_str: "{chip.kinds[0]}"'
    )
