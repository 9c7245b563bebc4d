"""The interpreter that runs Hopper kernels on a CPU: races and reads out of bounds raise, fresh memory holds NaN."""

from collections.abc import Iterator

import jax
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from moc_jax.attention.pallas_gpu.device import Hopper
from tests import private_jax

# jax 0.11 has an interpreter that neither raises on races nor waits for all of a program's warps.
CAN_INTERPRET = "on_race" in getattr(getattr(plgpu, "InterpretGPUParams", None), "__dataclass_fields__", {})


@pytest.fixture
def hopper() -> Iterator[Hopper]:
    """The kernels in the interpreter."""
    if not CAN_INTERPRET:
        pytest.skip(f"jax {jax.__version__} can't interpret Mosaic GPU kernels; 0.12 can")
    if jax.default_backend() != "cpu":
        pytest.skip("the interpreter is for CPUs; here the kernels themselves run")
    params = plgpu.InterpretGPUParams(
        detect_races=True, on_race="raise", out_of_bounds_reads="raise", uninitialized_memory="nan"
    )
    yield Hopper(interpret=params)
    private_jax.reset_gpu_interpreter.value()  # what a failed kernel leaves behind
