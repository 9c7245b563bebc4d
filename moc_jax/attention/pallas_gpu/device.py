"""What the kernels need of the machine: a Hopper GPU, or an interpreter for tests."""

import contextlib
import contextvars
import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from moc_jax.shapes import Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hopper:
    """Kernels for Hopper GPUs."""

    name: ClassVar[str] = "pallas_gpu"


HEAD_DIMS = (64, 128)
DTYPES = (jnp.bfloat16, jnp.float16)
_MULTIPROCESSORS = 132  # of an H100 or H200, for programs compiled where there is none

_interpreter = contextvars.ContextVar("interpreter", default=None)
_compile_only = contextvars.ContextVar("compile_only", default=False)


@contextlib.contextmanager
def interpreted(params):
    """Programs traced inside run their kernels in Pallas' interpreter with `plgpu.InterpretGPUParams`: tests without
    a GPU."""
    token = _interpreter.set(params)
    try:
        yield
    finally:
        _interpreter.reset(token)


@contextlib.contextmanager
def lowered_only():
    """Programs traced inside may be lowered for a Hopper GPU, whatever the machine."""
    token = _compile_only.set(True)
    try:
        yield
    finally:
        _compile_only.reset(token)


def interpreter():
    """The interpreter's parameters inside `interpreted`, else None."""
    return _interpreter.get()


def is_hopper() -> bool:
    """Whether programs run on a Hopper GPU (compute capability 9)."""
    if jax.default_backend() != "gpu":
        return False
    return str(getattr(jax.devices()[0], "compute_capability", "")).startswith("9.")


def multiprocessors() -> int:
    """Thread blocks that run at once."""
    if interpreter() is not None:
        return 2
    return jax.devices()[0].core_count if is_hopper() else _MULTIPROCESSORS


def can_do(q: Array | jax.ShapeDtypeStruct) -> bool:
    """Whether the kernels know this type and head dimension."""
    return q.dtype in DTYPES and q.shape[-1] in HEAD_DIMS


def check(q: Array, k: Array, v: Array) -> None:
    """Raises NotImplementedError where the kernels can't run."""
    if not (is_hopper() or _compile_only.get() or interpreter() is not None):
        raise NotImplementedError(
            f'backend "pallas_gpu" needs a Hopper GPU (compute capability 9.0), not {jax.devices()[0].device_kind}; '
            'use backend="auto" or "xla"'
        )
    if not (can_do(q) and q.dtype == k.dtype == v.dtype):
        raise NotImplementedError(
            f'backend "pallas_gpu" knows bfloat16 and float16 and head dimensions {HEAD_DIMS}, not q {q.dtype}, '
            f'k {k.dtype}, v {v.dtype} with {q.shape[-1]}; cast to bfloat16, or use backend="xla"'
        )
