"""What the suite trusts the interpreter with, shortcuts of the tests included: each fault that it must see, made."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

ROWS, COLUMNS = 32, 128
ANY = pl.BlockSpec(memory_space=pl.ANY)


def run(kernel, *scratch):
    x = jnp.arange(ROWS * COLUMNS, dtype=jnp.float32).reshape(ROWS, COLUMNS)
    call = pl.pallas_call(
        kernel,
        grid=(1,),
        out_shape=jax.ShapeDtypeStruct((8, COLUMNS), jnp.float32),
        in_specs=[ANY],
        out_specs=pl.BlockSpec((8, COLUMNS), lambda i: (0, 0)),
        scratch_shapes=scratch,
    )
    return np.asarray(jax.jit(call)(x))


def copied(wait: bool, first=8):
    """A kernel that copies eight rows to VMEM and reads them; `first` is known when it runs."""

    def kernel(x_hbm_ref, out_vmem_ref, rows_vmem_ref, semaphore):
        rows = pl.ds(first + pl.program_id(0), 8)
        copy = pltpu.make_async_copy(x_hbm_ref.at[rows], rows_vmem_ref, semaphore)
        copy.start()
        if wait:
            copy.wait()
        out_vmem_ref[...] = rows_vmem_ref[...]
        if not wait:
            copy.wait()

    return kernel, pltpu.VMEM((8, COLUMNS), jnp.float32), pltpu.SemaphoreType.DMA


def test_a_copy_that_is_waited_for(interpreter):
    kernel, *scratch = copied(wait=True)
    np.testing.assert_array_equal(run(kernel, *scratch)[:, 0], COLUMNS * np.arange(8, 16))


def test_reading_what_is_being_copied_raises(interpreter):
    kernel, *scratch = copied(wait=False)
    with pytest.raises(Exception, match=r"[Rr]ace"):
        run(kernel, *scratch)


def test_reading_out_of_bounds_raises(interpreter):
    kernel, *scratch = copied(wait=True, first=ROWS - 4)
    with pytest.raises(Exception, match=r"[Oo]ut.of.bounds"):
        run(kernel, *scratch)


def test_fresh_memory_is_nan(interpreter):
    def kernel(x_hbm_ref, out_vmem_ref, rows_vmem_ref):
        out_vmem_ref[...] = rows_vmem_ref[...]

    assert np.isnan(run(kernel, pltpu.VMEM((8, COLUMNS), jnp.float32))).all()
