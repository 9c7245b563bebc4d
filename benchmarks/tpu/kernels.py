"""The kernels whose schedules are compared, each pass of each as a program of its own.

A new kernel is a function from pass, blocks, head size and chip to a `Program`, and a line in KERNELS.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

from moc_jax.attention.layout import Tiles
from moc_jax.attention.pallas_tpu import flash, flash_backward
from moc_jax.attention.pallas_tpu.device import ROWS, Chip

Pass = Literal["forward", "backward"]
PASSES: tuple[Pass, ...] = ("forward", "backward")
_LEAST_TOKENS = 2048
_LEAST_BYTES = 2**28
"""Of each array. Smaller ones fit into VMEM as a whole, where XLA then puts them: the kernel that it compiles would
have none of the copies that it has at real sizes."""
_HEADS = 12
_RUNS = {"forward": 3, "backward": 2}
"""That a tile of anchors walks: two of text and one of video; as a reader, captions and video."""


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Rows of a tile: queries, keys fetched at once, keys computed at once; the rest is for kernels of ours."""

    q: int
    kv: int
    compute: int
    rows: int | None = None
    """Queries computed at once, forward."""
    ahead: int | None = None
    """Parts whose scores are computed ahead, forward."""
    transposed: bool | None = None
    """Whether sums have the head's dimension for rows, backward."""
    short: tuple[int, int] | None = None
    """Keys of blocks that leave the last ones out, and how many of them are computed at once, forward picks."""

    def __post_init__(self):
        if self.short:
            object.__setattr__(self, "short", tuple(self.short))  # a list, from JSON
        if self.q % 128 or self.kv % 128 or self.compute % 128 or min(self.q, self.compute) < 128:
            raise ValueError(f"blocks {self}: all sizes must be multiples of 128, the rows of a lane tile")
        if self.kv % self.compute:
            raise ValueError(f"blocks {self}: {self.kv} keys are not a multiple of the {self.compute} computed at once")

    @classmethod
    def parse(cls, text: str) -> Self:
        """From "512x1024x512", or "512x1024", whose keys are computed all at once.

        Raises:
            ValueError: the text does not name sizes, or no kernel takes them.
        """
        try:
            sizes = [int(size) for size in text.split("x")]
        except ValueError:
            sizes = []
        if len(sizes) not in (2, 3):
            raise ValueError(f"blocks {text!r}: must be QUERIESxKEYS or QUERIESxKEYSxCOMPUTED, such as 512x1024x512")
        return cls(sizes[0], sizes[1], sizes[-1])

    @classmethod
    def of(cls, tiling: flash.ForwardTiling | flash_backward.GradientTiling, keys: int | None = None) -> Self:
        """Those of a tiling of ours; the backward one is for tiles of so many keys."""
        if isinstance(tiling, flash.ForwardTiling):
            at_once = tiling.compute_keys, tiling.compute_queries, tiling.ahead
            return cls(tiling.queries, tiling.keys, *at_once, short=tiling.short)
        if keys is None:
            raise ValueError(f"{tiling}: says nothing of the keys of a tile")
        return cls(tiling.block, keys, tiling.at_once, transposed=tiling.transposed)

    @property
    def forward(self) -> flash.ForwardTiling:
        """As our forward kernel takes them."""
        return flash.ForwardTiling(self.q, self.kv, self.rows or self.q, self.compute, self.ahead or 0, self.short)

    @property
    def backward(self) -> flash_backward.GradientTiling:
        """As our backward kernel takes them, whose tiles have `kv` rows."""
        return flash_backward.GradientTiling(block=self.q, at_once=self.compute, transposed=bool(self.transposed))

    def __str__(self) -> str:
        size = f"{self.q}x{self.kv}x{self.compute}" + (f" ({self.short[0]}x{self.short[1]})" if self.short else "")
        more = [f"{self.rows} rows"] * (self.rows is not None) + [f"{self.ahead} ahead"] * (self.ahead is not None)
        return ", ".join([size, *more, *["transposed"] * bool(self.transposed)])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """What is compiled, and what its kernel is called."""

    function: Callable[..., Any]
    arguments: tuple[jax.ShapeDtypeStruct, ...]
    kernel: str
    """Start of the kernel's name."""


def splash(way: Pass, blocks: Blocks, head_dim: int, chip: str) -> Program:
    """jax's own splash attention in bfloat16 without a mask, the backward pass as one kernel."""
    del chip
    tokens = math.lcm(blocks.q, blocks.kv)
    tokens *= max(2, _LEAST_TOKENS // tokens)
    heads = math.ceil(_LEAST_BYTES / (2 * tokens * head_dim))
    mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.FullMask((tokens, tokens))] * heads)
    sizes = splash_attention_kernel.BlockSizes(
        block_q=blocks.q,
        block_kv=blocks.kv,
        block_kv_compute=blocks.compute,
        block_q_dkv=blocks.q,
        block_kv_dkv=blocks.kv,
        block_kv_dkv_compute=blocks.compute,
        use_fused_bwd_kernel=True,
    )
    attend = splash_attention_kernel.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1)

    def backward(q, k, v, d_out):
        return jax.vjp(attend, q, k, v)[1](d_out)

    array = jax.ShapeDtypeStruct((heads, tokens, head_dim), jnp.bfloat16)
    if way == "forward":
        return Program(function=attend, arguments=(array,) * 3, kernel="splash_mha_fwd")
    return Program(function=backward, arguments=(array,) * 4, kernel="splash_mha_dkv")


def anchors(way: Pass, blocks: Blocks, head_dim: int, chip: str) -> Program:
    """Our kernels as anchors run them: all heads share the tiles, which walk several runs; dq is a sum over tiles."""
    return _ours(way, blocks, head_dim, chip, runs=_RUNS[way], picks=False)


def picks(way: Pass, blocks: Blocks, head_dim: int, chip: str) -> Program:
    """Our kernels as picks run them: each head has its tiles, of one chunk each, which a block of keys holds."""
    return _ours(way, blocks, head_dim, chip, runs=1, picks=True)


def _ours(way: Pass, blocks: Blocks, head_dim: int, chip: str, *, runs: int, picks: bool) -> Program:
    """One of our kernels in bfloat16; its tables are data, so that they say nothing of the scene but their size."""
    rows = -(-_LEAST_BYTES // (2 * _HEADS * head_dim))
    rows = -(-rows // blocks.q) * blocks.q
    q = jax.ShapeDtypeStruct((1, _HEADS, rows, head_dim), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((1, _HEADS, rows + blocks.kv, head_dim), jnp.bfloat16)
    row = jax.ShapeDtypeStruct((1, _HEADS, rows), jnp.float32)
    tiles = rows // (blocks.q if way == "forward" else blocks.kv)
    columns = 2 * runs if way == "forward" else 3 + 2 * runs
    table = jax.ShapeDtypeStruct((1, _HEADS if picks else 1, tiles, columns), jnp.int32)

    def forward(q, k, v, table):
        how = dict(longest_run=blocks.kv - ROWS + 1 if picks else None, tiling=blocks.forward, chip=Chip(chip))
        return flash.forward(q, k, v, Tiles(table), packed=picks, **how)

    def backward(q, k, v, d_out, lse, delta, table):
        operands = q, k, v, d_out, lse, delta, Tiles(table)
        how = dict(accumulate=not picks, d_q_type=jnp.float32, chip=Chip(chip))
        return flash_backward.gradients(*operands, rows=blocks.kv, tiling=blocks.backward, **how)

    if way == "forward":
        return Program(function=forward, arguments=(q, k, k, table), kernel="moc_forward")
    return Program(function=backward, arguments=(q, k, k, q, row, row, table), kernel="moc_gradients")


KERNELS: dict[str, Callable[[Pass, Blocks, int, str], Program]] = {"splash": splash, "anchors": anchors, "picks": picks}
