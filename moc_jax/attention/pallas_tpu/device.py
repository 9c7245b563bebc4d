"""What the kernels need of the machine: a TPU, a compiler for one, or an interpreter for tests."""

import contextlib
import contextvars
import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from moc_jax.shapes import Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tpu:
    """Kernels for TPUs."""

    name: ClassVar[str] = "pallas_tpu"


DTYPES = (jnp.bfloat16, jnp.float32)
LANES = 128  # of a vector register, and the width of the smallest tile of memory
ROWS = 8  # of a tile of memory: what a copy from memory may start at
CHIPS = {  # by the start of `device_kind`
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5p": "v5p",
    "TPU v5": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
    "TPU v7x": "tpu7x",
}
_FOR_UNKNOWN_CHIPS = "v5e"
CORES = {"v4": 2, "v5p": 2}  # that share a program as one device; else one

_interpreter: contextvars.ContextVar[pltpu.InterpretParams | None] = contextvars.ContextVar("interpreter", default=None)
_compiled_for: contextvars.ContextVar[str | None] = contextvars.ContextVar("compiled_for", default=None)


@contextlib.contextmanager
def interpreted(params: pltpu.InterpretParams):
    """Programs traced inside run their kernels in Pallas' interpreter: tests without a TPU."""
    token = _interpreter.set(params)
    try:
        yield
    finally:
        _interpreter.reset(token)


@contextlib.contextmanager
def compiled_for(chip: str):
    """Programs traced inside are for TPUs of this kind ("v4", "v5e", "v5p", "v6e", "tpu7x"), whatever the machine."""
    if chip not in CHIPS.values():
        raise ValueError(f"chip {chip!r}: known are {', '.join(dict.fromkeys(CHIPS.values()))}")
    token = _compiled_for.set(chip)
    try:
        yield
    finally:
        _compiled_for.reset(token)


def interpreter() -> pltpu.InterpretParams | bool:
    """What to pass as `interpret`: the interpreter's parameters inside `interpreted`, else False."""
    return _interpreter.get() or False


def is_tpu() -> bool:
    """Whether programs run on a TPU."""
    return jax.default_backend() == "tpu"


def is_target() -> bool:
    """Whether programs are for a TPU: this machine's, or one that is compiled for."""
    return is_tpu() or _compiled_for.get() is not None


def chip() -> str:
    """The kind of TPU that programs are traced for."""
    asked = _compiled_for.get()
    if asked is not None:
        return asked
    if not is_tpu():
        return _FOR_UNKNOWN_CHIPS
    kind = jax.devices()[0].device_kind
    matches = [name for name in CHIPS if kind.startswith(name)]
    return CHIPS[max(matches, key=len)] if matches else _FOR_UNKNOWN_CHIPS


def can_do(q: Array | jax.ShapeDtypeStruct) -> bool:
    """Whether the kernels know this type and head dimension."""
    return q.dtype in DTYPES and q.shape[-1] <= 256


def check(q: Array, k: Array, v: Array) -> None:
    """Raises NotImplementedError where the kernels can't run."""
    if not (is_target() or interpreter()):
        raise NotImplementedError(
            f'backend "pallas_tpu" needs a TPU, not {jax.devices()[0].device_kind}; use backend="auto" or "xla"'
        )
    if not (can_do(q) and q.dtype == k.dtype == v.dtype):
        raise NotImplementedError(
            f'backend "pallas_tpu" knows bfloat16 and float32 and head dimensions up to 256, not q {q.dtype}, '
            f'k {k.dtype}, v {v.dtype} with {q.shape[-1]}; cast to bfloat16, or use backend="xla"'
        )


def memory(kind: str | None = None) -> int:
    """Bytes of HBM of a device: of the kind of chip, or of the one that programs are traced for."""
    kind = kind or chip()
    version = pltpu.ChipVersion(kind.removeprefix("tpu"))
    return pltpu.get_tpu_info_for_chip(version, 1).hbm_capacity_bytes * CORES.get(kind, 1)


def vmem_limit() -> int:
    """Bytes of vector memory that a kernel may take: all but an eighth of the chip's."""
    version = pltpu.ChipVersion(chip().removeprefix("tpu"))
    return pltpu.get_tpu_info_for_chip(version, 1).vmem_capacity_bytes * 7 // 8
