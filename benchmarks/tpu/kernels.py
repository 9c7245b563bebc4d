"""The kernels whose schedules are compared, each as a program that holds its forward and backward pass.

A new kernel is a function from blocks and head size to a `Program`, and a line in KERNELS.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

_LEAST_TOKENS = 2048
_LEAST_BYTES = 2**28
"""Of each array. Smaller ones fit into VMEM as a whole, where XLA then puts them: the kernel that it compiles would
have none of the copies that it has at real sizes."""


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Rows of a tile: queries, keys fetched at once, keys computed at once."""

    q: int
    kv: int
    compute: int

    def __post_init__(self):
        if self.q % 128 or self.kv % 128 or self.compute % 128 or min(self.q, self.compute) < 128:
            raise ValueError(f"blocks {self}: all sizes must be multiples of 128, the rows of a lane tile")
        if self.kv % self.compute:
            raise ValueError(f"blocks {self}: {self.kv} keys are no multiple of the {self.compute} computed at once")

    @classmethod
    def parse(cls, text: str) -> Self:
        """From "512x1024x512", or "512x1024", whose keys are computed all at once.

        Raises:
            ValueError: the text is no such thing, or no kernel takes the sizes.
        """
        try:
            sizes = [int(size) for size in text.split("x")]
        except ValueError:
            sizes = []
        if len(sizes) not in (2, 3):
            raise ValueError(f"blocks {text!r}: must be QUERIESxKEYS or QUERIESxKEYSxCOMPUTED, such as 512x1024x512")
        return cls(sizes[0], sizes[1], sizes[-1])

    def __str__(self) -> str:
        return f"{self.q}x{self.kv}x{self.compute}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """What is compiled, and what its kernels are called."""

    function: Callable[..., Any]
    arguments: tuple[jax.ShapeDtypeStruct, ...]
    passes: dict[str, str]
    """Start of the name of the kernel of each pass: "forward", "backward"."""


def splash(blocks: Blocks, head_dim: int) -> Program:
    """jax's own splash attention in bfloat16 without a mask, the backward pass as one kernel."""
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

    def both(q, k, v, d_out):
        out, backward = jax.vjp(attend, q, k, v)
        return out, backward(d_out)

    array = jax.ShapeDtypeStruct((heads, tokens, head_dim), jnp.bfloat16)
    passes = {"forward": "splash_mha_fwd", "backward": "splash_mha_dkv"}
    return Program(function=both, arguments=(array,) * 4, passes=passes)


KERNELS: dict[str, Callable[[Blocks, int], Program]] = {"splash": splash}
