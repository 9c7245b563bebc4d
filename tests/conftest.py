"""CPU, eight virtual devices and strict rank promotion, before jax starts."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
# Tiny programs: compiling them well takes longer than running them badly. The numbers do not depend on it.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
)

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
