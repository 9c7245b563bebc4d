"""What the kernels are compiled for: a Hopper GPU, this machine's or another, or an interpreter for tests."""

import dataclasses
from collections.abc import Hashable
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from moc_jax.attention.layout import Queries
from moc_jax.scene import ChunkTable
from moc_jax.shapes import Array, concrete

HEAD_DIMS = (64, 128)
DTYPES = (jnp.bfloat16, jnp.float16)
COMPUTE = 2  # warpgroups that compute
_INTERPRETED = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelTiling:
    """How a kernel uses its shared memory and registers."""

    block: int = 128  # rows per step of a walk
    stages: int = 2  # steps in flight
    buffers: int = 2  # tiles in flight: with 2, the next tile is there when one ends
    compute_registers: int = 232  # per thread; twice this and the copying warpgroup's must stay within 504
    copy_registers: int = 40

    def __post_init__(self):
        if self.block < 64 or self.block % 64 or self.stages < 2 or self.buffers < 1:
            raise ValueError(f"{self}: blocks are multiples of 64 rows, with at least 2 stages and 1 buffer")
        if COMPUTE * self.compute_registers + self.copy_registers > 504:
            raise ValueError(f"{self}: a multiprocessor has 504 registers for a thread of each warpgroup; take fewer")


@dataclasses.dataclass(frozen=True, kw_only=True)
class HopperTiling:
    """What can be tuned: each kernel's tiling, and how work is cut before."""

    forward: KernelTiling = KernelTiling()
    gradients: KernelTiling = KernelTiling(block=64, buffers=1, compute_registers=232, copy_registers=24)
    group_bytes: int = 2**30  # of one buffer of sorted rows; more heads come in groups, one after the other
    text_readers: int = 2048  # that a tile of text's keys takes in one go, about

    def __post_init__(self):
        if self.gradients.block != 64:
            raise ValueError(f"{self.gradients}: gradients are computed in blocks of 64 queries")
        if self.group_bytes < 1 or self.text_readers < 1:
            raise ValueError(f"{self}: group_bytes and text_readers are at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hopper:
    """The kernels for Hopper GPUs.

    Args:
        tiling: None: what is fastest on an H200.
        multiprocessors: Compiles for a GPU with as many (an H100 SXM or an H200 has 132), whatever this machine is.
            None: for this machine's.
        interpret: A `plgpu.InterpretGPUParams`: the kernels run in Pallas' interpreter, for tests without a GPU.
    """

    name: ClassVar[str] = "pallas_gpu"

    tiling: HopperTiling | None = None
    multiprocessors: int | None = None
    interpret: Hashable | None = None

    @property
    def tiles(self) -> HopperTiling:
        """The tiling that is used."""
        return self.tiling or HopperTiling()

    @property
    def thread_blocks(self) -> int:
        """Thread blocks that run at once, one on each multiprocessor."""
        if self.multiprocessors is not None:
            return self.multiprocessors
        return _INTERPRETED if self.interpret is not None else jax.devices()[0].core_count


def is_hopper() -> bool:
    """Whether programs run on a Hopper GPU (compute capability 9)."""
    if jax.default_backend() != "gpu":
        return False
    return str(getattr(jax.devices()[0], "compute_capability", "")).startswith("9.")


def can_do(q: Array | jax.ShapeDtypeStruct) -> bool:
    """Whether the kernels know this type and head dimension."""
    return q.dtype in DTYPES and q.shape[-1] in HEAD_DIMS


def check(backend: Hopper, q: Array, *others: Array) -> None:
    """Raises NotImplementedError where the kernels can't run, or not on q and `others` (k and v)."""
    if not (is_hopper() or backend.interpret is not None or backend.multiprocessors is not None):
        raise NotImplementedError(
            f'backend "pallas_gpu" needs a Hopper GPU (compute capability 9.0), not {jax.devices()[0].device_kind}; '
            'use backend="auto" or "xla"'
        )
    if not (can_do(q) and all(x.dtype == q.dtype for x in others)):
        types = ", ".join(f"{name} {x.dtype}" for name, x in zip("qkv", (q, *others), strict=False))
        raise NotImplementedError(
            f'backend "pallas_gpu" knows bfloat16 and float16 and head dimensions {HEAD_DIMS}, not {types} with '
            f'{q.shape[-1]}; cast to bfloat16, or use backend="xla"'
        )


def check_order(queries: Queries, table: ChunkTable) -> None:
    """Raises NotImplementedError where the query tokens are known not to be in the table's order.

    Keys' gradients walk their readers as runs of rows, which they are in that order.
    """
    chunk_of, start = concrete(queries.chunk_of), concrete(table.start)
    if chunk_of is None or start is None:
        return
    for b, of in enumerate(chunk_of):
        if (np.diff(start[b][of[of >= 0]]) < 0).any():
            raise NotImplementedError(
                f"query tokens of scene {b} are not in the order of the chunk table's tokens, which backend "
                '"pallas_gpu" needs; sort them, or use backend="xla"'
            )
