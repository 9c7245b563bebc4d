"""What the kernels need to know of a TPU, and which one a program is for."""

import dataclasses
from typing import TYPE_CHECKING, ClassVar, Literal

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from moc_jax.shapes import Array

if TYPE_CHECKING:
    from moc_jax.attention.pallas_tpu.tuning import Blocks

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
_CORES = {"v4": 2, "v5p": 2}  # that share a program as one device; else one


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tpu:
    """Attention by the kernels for TPUs: a static value, so that programs for two chips are two programs."""

    name: ClassVar[str] = "pallas_tpu"
    chip: str | None = None
    """That programs are for: "v4", "v5e", "v5p", "v6e" or "tpu7x"; None: this machine's."""
    blocks: "Blocks | None" = None
    """Sizes of blocks; None: what suits the chip and the scene."""

    def __post_init__(self):
        if self.chip is not None:
            Chip(self.chip)


@dataclasses.dataclass(frozen=True)
class Chip:
    """A kind of TPU: "v4", "v5e", "v5p", "v6e" or "tpu7x"."""

    name: str

    def __post_init__(self):
        if self.name not in CHIPS.values():
            raise ValueError(f"chip {self.name!r}: known are {', '.join(dict.fromkeys(CHIPS.values()))}")

    @property
    def info(self) -> pltpu.TpuInfo:
        """What Pallas knows of one core."""
        return pltpu.get_tpu_info_for_chip(pltpu.ChipVersion(self.name.removeprefix("tpu")), 1)

    @property
    def cores(self) -> int:
        """That share a program as one device."""
        return _CORES.get(self.name, 1)

    @property
    def memory(self) -> int:
        """Bytes of HBM of a device."""
        return self.info.hbm_capacity_bytes * self.cores

    @property
    def vmem_limit(self) -> int:
        """Bytes of vector memory that a kernel may take: all but an eighth."""
        return self.info.vmem_capacity_bytes * 7 // 8

    def params(self, axes: str, vmem: int | None = None) -> pltpu.CompilerParams:
        """How a kernel is compiled; a letter for each axis of its grid: p for parallel, a for in order.

        `vmem` is what it may take of vector memory, if not the limit. Bounds are not checked at run time, which would
        take 160 cycles of every step: the interpreter checks them.
        """
        meaning: dict[str, Literal["parallel", "arbitrary"]] = {"p": "parallel", "a": "arbitrary"}
        return pltpu.CompilerParams(
            dimension_semantics=tuple(meaning[axis] for axis in axes),
            vmem_limit_bytes=vmem or self.vmem_limit,
            disable_bounds_checks=True,
        )


def heads_of_block(heads: int, bytes_per_head: int, most: int) -> int:
    """As many heads as have `most` bytes; half of them at most, so that two cores share them."""
    return max(n for n in range(1, max(1, heads // 2) + 1) if heads % n == 0 and (n == 1 or n * bytes_per_head <= most))


def is_tpu() -> bool:
    """Whether programs run on a TPU."""
    return jax.default_backend() == "tpu"


def target(chip: str | None) -> Chip:
    """The chip asked for, or this machine's.

    Raises:
        NotImplementedError: none is asked for, and this machine is not a TPU.
        ValueError: there is no such chip.
    """
    if chip is not None:
        return Chip(chip)
    kind = jax.devices()[0].device_kind
    if not is_tpu():
        raise NotImplementedError(
            f'attention by the TPU kernels needs a TPU, not {kind}: use backend="auto" or "xla", or name the chip that '
            'the program is compiled for, as Tpu(chip="v6e")'
        )
    matches = [name for name in CHIPS if kind.startswith(name)]
    return Chip(CHIPS[max(matches, key=len)] if matches else _FOR_UNKNOWN_CHIPS)


def can_do(q: Array | jax.ShapeDtypeStruct) -> bool:
    """Whether the kernels know this type and head dimension."""
    return q.dtype in DTYPES and q.shape[-1] <= 256


def check(q: Array, k: Array, v: Array) -> None:
    """Raises NotImplementedError where the kernels can't do these types or sizes."""
    if not (can_do(q) and q.dtype == k.dtype == v.dtype):
        raise NotImplementedError(
            f'backend "pallas_tpu" knows bfloat16 and float32 and head dimensions up to 256, not q {q.dtype}, '
            f'k {k.dtype}, v {v.dtype} with {q.shape[-1]}; cast to bfloat16, or use backend="xla"'
        )
