"""The interpreter that runs TPU kernels on a CPU: races and reads out of bounds raise, fresh memory holds NaN."""

import jax
import pytest
from jax.experimental.pallas import tpu as pltpu

from tests.attention.interpreter import INTERPRETER, every_access, interpreted


@pytest.fixture
def interpreter():
    """Programs traced in the test run their kernels in the interpreter."""
    if jax.default_backend() != "cpu":
        pytest.skip("the interpreter is for CPUs")
    with interpreted(), every_access():
        yield INTERPRETER
    pltpu.reset_tpu_interpret_mode_state()  # what a failed kernel leaves behind
