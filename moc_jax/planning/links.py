"""How long collectives take: by the links of a torus of TPUs, or as measured between GPUs.

A ring of n devices sends over two links at once, so that an all-gather of B bytes takes B / (2 link); along d sides of
the torus, d times as fast. In an all-to-all each byte crosses a quarter of the ring on the mean: n B / (8 link) for
B bytes of each device (jax-ml.github.io/scaling-book, "Sharded matrices"). A side without its wrap-around link is a
line, half as fast. Between hosts of GPUs the network carries all.
"""

import dataclasses
import math
from typing import Literal

from moc_jax.planning.topology import Topology

Kind = Literal["all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute"]
_OF_A_SWITCH = {
    "all-gather": 0.52,
    "reduce-scatter": 0.52,
    "all-reduce": 0.71,
    "all-to-all": 0.6,
    "collective-permute": 0.52,
}
"""Share of a GPU's NVLink rate: four H200s gathered at 233 GB/s and summed at 321 of 450 (`python -m
benchmarks.pod_check` measures such), and exchanged heads at 270 to 315 in the steps of `python -m benchmarks.scaling`,
by their profiles. What is passed on to one device is taken to be as fast as a gather."""
_OF_A_NETWORK = 0.8  # the usual share of its rate; not measured


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exchange:
    """What the devices of a mesh axis send each other in a step."""

    what: str
    kind: Kind
    axis: str
    bytes: float
    """That each device receives."""
    seconds: float


def exchange(what: str, kind: Kind, axis: str, received: float, size: int, inner: int, where: Topology) -> Exchange:
    """An exchange along an axis of `size` devices, each of which is `inner` neighbouring devices."""
    rate = _gpu_rate if not where.chip.torus else _torus_rate
    return Exchange(what=what, kind=kind, axis=axis, bytes=received, seconds=received / rate(kind, size, inner, where))


def _gpu_rate(kind: Kind, size: int, inner: int, where: Topology) -> float:
    if size * inner <= where.chip.per_host:
        return where.chip.link * _OF_A_SWITCH[kind]
    return where.chip.network * _OF_A_NETWORK


def _torus_rate(kind: Kind, size: int, inner: int, where: Topology) -> float:
    sides = sorted(where.sides)
    while len(sides) > 1 and math.prod(sides[:-1]) >= inner and inner > 1:  # those that the axes inside it take
        inner = max(1, inner // sides.pop(0))
    taken, reached = [], 1
    for side in reversed(sides):
        if reached < size:
            taken.append(side)
            reached *= side
    wraps = all(side % 4 == 0 for side in where.sides) if where.chip.torus == 3 else max(where.sides) == 16
    lanes = max(1, len(taken)) * (2 if wraps else 1)
    if kind == "collective-permute":  # to the neighbors of both sides
        return min(2, lanes) * where.chip.link
    if kind != "all-to-all":
        return lanes * where.chip.link
    side = size ** (1 / max(1, len(taken)))
    return min(lanes, 8 / side * (1 if wraps else 0.5)) * where.chip.link
