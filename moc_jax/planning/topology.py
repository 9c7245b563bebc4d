"""What there could be to run on: `v5p:8x8x4`, a slice of TPUs, or `h200:4`, GPUs of hosts with eight each."""

import dataclasses
import math
import re

from moc_jax.chips import CHIPS, Chip
from moc_jax.config import ConfigError

_3D = (
    "1x1x1 1x1x2 1x2x2 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x4x12 4x8x8 4x4x16 8x8x8 8x8x12 8x8x16 8x16x16 16x16x16 16x16x24"
)
_2D = "1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16"
SHAPES = {3: _3D.split(), 2: _2D.split()}
"""Slices in chips by dimensions of the torus, sides in rising order; they may be given in any."""
_GPUS = 1, 2, 4, 8
_MOST = 16_384


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips that a run would have to itself."""

    name: str
    chip: Chip
    sides: tuple[int, ...]
    """Of the torus, in chips; empty for GPUs."""
    devices: int
    """As jax counts them."""

    @property
    def hosts(self) -> int:
        """That the devices are in."""
        return math.ceil(self.devices / self.chip.per_host)


def topology(name: str) -> Topology:
    """The topology of this name.

    Raises:
        ConfigError: none; lists those that there are.
    """
    kind, _, size = name.lower().partition(":")
    chip = next((chip for chip in CHIPS if chip.name == kind), None)
    if chip is not None and chip.torus and re.fullmatch(r"\d+(x\d+)*", size):
        sides = tuple(int(side) for side in size.split("x"))
        if "x".join(map(str, sorted(sides))) in SHAPES[chip.torus]:
            return Topology(f"{kind}:{size}", chip, sides, math.prod(sides) * chip.per_chip)
    if chip is not None and not chip.torus and re.fullmatch(r"\d{1,5}", size):
        count = int(size)
        if count in _GPUS or (count and count % chip.per_host == 0 and count <= _MOST):
            return Topology(f"{kind}:{size}", chip, (), count)
    raise ConfigError(f"--topology {name} is not one that is known. There are:\n" + "\n".join(known()))


def known() -> list[str]:
    """A line for each kind of chip, with its sizes."""
    lines = []
    for chip in CHIPS:
        gpus = f"{', '.join(map(str, _GPUS))} and multiples of {chip.per_host}"
        lines.append(f"  {chip.name}: {' '.join(SHAPES[chip.torus]) + ', in any order' if chip.torus else gpus}")
    return lines
