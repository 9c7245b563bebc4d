"""Errors by what lies behind them; XLA's texts are those that users of GPUs, TPUs and CPUs report."""

import errno

import jax
import pytest

from moc_jax.errors import disk_full, explain_memory, out_of_memory

GPU_RUN = (
    "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 68719476736 bytes.\nBufferAssignment OOM Debugging.\n"
    "BufferAssignment stats:\n parameter allocation: 6.00GiB"
)
GPU_NEW = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 14.65GiB."
GPU_BFC = "RESOURCE_EXHAUSTED: Failed to allocate request for 2.00GiB (2147483648B) on device ordinal 0"
GPU_CUDA = "INTERNAL: CUDA error: Failed call to cuGraphInstantiate: CUDA_ERROR_OUT_OF_MEMORY: out of memory"
TPU_COMPILE = (
    "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 17.45G of 15.48G "
    "hbm. Exceeded hbm capacity by 1.97G.\n\nTotal hbm usage >= 17.97G:\n    reserved        530.00M"
)
TPU_VMEM = (
    "RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 20.00M of 16.00M vmem. Exceeded vmem capacity by "
    "4.00M."
)
TPU_RUN = (
    "RESOURCE_EXHAUSTED: Error allocating device buffer: Attempting to allocate 2.00G. That was not possible. There "
    "are 1.50G free.; (0x0x0_HBM0)"
)
TPU_LOAD = (
    "RESOURCE_EXHAUSTED: Error loading program: Attempting to reserve 12.50G at the bottom of memory. That was not "
    "possible. There are 10.25G free, 0B reserved, and 10.25G reservable."
)
CPU = "RESOURCE_EXHAUSTED: Out of memory allocating 1099511627776 bytes."


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (GPU_RUN, "64 GiB were asked for"),
        (GPU_NEW, "14.65 GiB were asked for"),
        (GPU_BFC, "2 GiB were asked for"),
        (GPU_CUDA, GPU_CUDA),
        (TPU_COMPILE, "17.45 GiB were asked for, and there are 15.48 GiB"),
        (TPU_VMEM, "20 MiB were asked for, and there are 16 MiB"),
        (TPU_RUN, "2 GiB were asked for, and there are 1.5 GiB"),
        (TPU_LOAD, "12.5 GiB were asked for, and there are 10.25 GiB"),
        (CPU, "1 TiB were asked for"),
    ],
)
def test_too_little_memory_is_recognised_with_its_amounts(text, told):
    error = jax.errors.JaxRuntimeError(text)
    assert out_of_memory(error) == told
    wrapped = ValueError("no handler")
    wrapped.__cause__ = error
    assert out_of_memory(wrapped) == told
    assert out_of_memory(ExceptionGroup("several", [KeyError("x"), wrapped])) == told


@pytest.mark.parametrize(
    "error",
    [
        jax.errors.JaxRuntimeError("UNKNOWN: Gloo all-reduce failed: Connection reset by peer"),
        jax.errors.JaxRuntimeError("INVALID_ARGUMENT: Executable expected parameter 0 of size 8 but got 4"),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Received message larger than max (5242880 vs. 4194304)"),
        ValueError("RESOURCE_EXHAUSTED: Out of memory"),
        None,
    ],
)
def test_other_errors_are_none(error):
    assert out_of_memory(error) is None


class Planned(Exception):
    pass


class Job:
    size = 7

    @explain_memory("a job", Planned, lambda job: f"size is {job.size}: make it smaller")
    def run(self, error=None):
        if error is not None:
            raise error
        return self.size


def test_the_error_names_what_how_much_and_which_settings():
    with pytest.raises(
        Planned,
        match=r"^the devices' memory is too small for a job: 64 GiB were asked for\. size is 7: make it",
    ) as caught:
        Job().run(jax.errors.JaxRuntimeError(GPU_RUN))
    assert isinstance(caught.value.__cause__, jax.errors.JaxRuntimeError)


def test_what_a_device_has_is_added_where_it_is_known(monkeypatch):
    class Device:
        device_kind = "NVIDIA H100"

        def memory_stats(self):
            return {"bytes_limit": 64 * 2**30}

    monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
    with pytest.raises(Planned, match=r"asked for \(NVIDIA H100 has 64 GiB for this process\)\. size"):
        Job().run(jax.errors.JaxRuntimeError(GPU_RUN))


@pytest.mark.parametrize("error", [KeyError("a bug"), Planned("by a method within"), OSError(errno.ENOSPC, "full")])
def test_all_other_errors_stay_as_they_are(error):
    with pytest.raises(type(error)) as caught:
        Job().run(error)
    assert caught.value is error
    assert Job().run() == 7


def test_a_full_disk_is_found_however_deep():
    full = OSError(errno.ENOSPC, "No space left on device")
    wrapped = RuntimeError("background save failed")
    wrapped.__cause__ = full
    assert all(map(disk_full, [full, wrapped, ExceptionGroup("several", [KeyError(), wrapped]), ValueError("ENOSPC")]))
    assert not any(map(disk_full, [None, OSError(errno.EACCES, "denied"), KeyError()]))
