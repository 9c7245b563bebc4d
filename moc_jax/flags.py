"""The flags that XLA gets before jax starts: to overlap what devices exchange with what they compute.

The TPU compiler takes its flags from LIBTPU_INIT_ARGS when it is loaded, and ends a process that gives it one that it
doesn't know; tests give it each of these. Most are its defaults today, and stay what they are here when those change.
What it does on some chips alone is left to it: with `xla_tpu_enable_async_collective_fusion` no step compiles for v6e.
"""

import os
from collections.abc import MutableMapping

OVERLAP = {
    # Gathers of weights, and sums of gradients, run beside the products of the layer before.
    "xla_enable_async_all_gather": "true",
    "xla_enable_async_all_reduce": "true",
    "xla_tpu_enable_async_all_to_all": "true",
    "xla_tpu_overlap_compute_collective_tc": "true",
    # Between slices: sums over `data` are taken out of loops and overlap whatever their sizes.
    "xla_tpu_enable_data_parallel_all_reduce_opt": "true",
    "xla_tpu_data_parallel_opt_different_sized_ops": "true",
}


def set_flags(environment: MutableMapping[str, str] = os.environ) -> None:
    """Adds OVERLAP to LIBTPU_INIT_ARGS, but for flags that it, or XLA_FLAGS, has already."""
    given = environment.get("LIBTPU_INIT_ARGS", "")
    theirs = {word.lstrip("-").partition("=")[0] for word in f"{given} {environment.get('XLA_FLAGS', '')}".split()}
    ours = [f"--{name}={value}" for name, value in OVERLAP.items() if name not in theirs]
    environment["LIBTPU_INIT_ARGS"] = " ".join([*given.split(), *ours])
