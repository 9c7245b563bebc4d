"""How long the devices compute in a step, by phase.

    attention    FLOPs of the attended pairs, over the share of the peak that the kernels reach
    products     FLOPs of the matrices, over the share of the peak that products of this width reach; those of adapters
                 count as nothing, and frozen matrices have no gradients
    the rest     norms, gates, rotary positions, GELU, copies: bytes per token, layer and width, at the memory's rate
    optimizer    every byte of the state and the gradients, read and written once

For GPUs, the shares are those of steps that were measured on one H200 (`python -m benchmarks.model --profile`), 512,
1024 and 1536 wide. For TPUs they are the compiler's estimates for v5p and v6e (benchmarks.tpu_estimate and
benchmarks.tpu_step), and TPU7x is taken to be as v6e, whose matrix units it has: nothing has run there.
"""

import dataclasses

import numpy as np

from moc_jax.chips import Chip
from moc_jax.config import ModelConfig, Remat


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pace:
    """What a kind of chip reaches."""

    forward: float
    """Of the peak, in attention's forward pass."""
    backward: float
    """The same in its gradients, which have 2.5 times the FLOPs."""
    widths: tuple[tuple[int, float], ...]
    """Width of the model, and the share of the peak that its products reach."""
    rest: tuple[float, float]
    """Bytes that a forward pass moves beside these for each byte of a token in a layer, and a whole training step."""


GPU = Pace(forward=0.605, backward=0.49, widths=((512, 0.457), (1024, 0.71), (1536, 0.745)), rest=(90, 377))
TPU = Pace(forward=0.71, backward=0.68, widths=((1536, 0.86),), rest=(140, 469))
_WIDE = dataclasses.replace(TPU, forward=0.285, backward=0.285)  # heads of 128 fill half of a matrix unit
PACES = {"v6e": _WIDE, "tpu7x": _WIDE}


def pace_of(chip: Chip) -> Pace:
    """The chip's, or that of its like."""
    return PACES.get(chip.name, TPU if chip.torus else GPU)


def phases(
    model: ModelConfig,
    policy: Remat,
    matrices: float,
    attention: float,
    tokens: float,
    state: float,
    chip: Chip,
    *,
    training: bool = True,
) -> dict[str, float]:
    """Seconds of one device.

    Args:
        matrices: FLOPs of a forward pass that this device does in products.
        attention: the same in attention.
        tokens: that it has.
        state: bytes of trained weights, optimizer, average and gradients that it holds.
    """
    pace = pace_of(chip)
    widths, shares = zip(*pace.widths)
    products = float(np.interp(model.dim, widths, shares)) * chip.flops
    forward, step = (tokens * model.depth * 2 * model.dim * moved / chip.bandwidth for moved in pace.rest)
    if not training:
        return {
            "attention": attention / (pace.forward * chip.flops),
            "products": matrices / products,
            "the rest": forward,
        }
    again = 1 - _kept(model, policy)
    times = 2 if policy == "full" else 1
    return {
        "attention, forward": times * attention / (pace.forward * chip.flops),
        "attention, backward": 2.5 * attention / (pace.backward * chip.flops),
        "products": ((2 if model.lora.rank else 3) + again) * matrices / products,
        "the rest": step,
        "optimizer": 2 * state / chip.bandwidth,
    }


def _kept(model: ModelConfig, policy: Remat) -> float:
    """The share of a block's products that the backward pass does not compute again."""
    mlp, projections = {
        "none": (2 * model.mlp_dim, 4 * model.dim),
        "dots": (2 * model.mlp_dim, 4 * model.dim),
        "qkv+attention+mlp": (model.mlp_dim, 0),  # norms' gradients need what they were made of
        "attention+mlp": (model.mlp_dim, 0),
    }.get(policy, (0, 0))
    return (mlp + projections) / (4 * model.dim + 2 * model.mlp_dim)
