"""What a schedule costs: cycles per (query, key) pair, and a step's bytes beside its tile.

Two prices of 2^20 pairs. The first is of the step alone, every row of its blocks counted: it compares kernels. The
second is of the reference scene (README, Speed): initialisation and write-out in some steps, queries and keys that fill
no whole block, all over the pairs that count: it compares block sizes.
"""

import dataclasses
from typing import Any

from benchmarks.tpu.compiler import Chip
from benchmarks.tpu.kernels import Blocks, Pass
from benchmarks.tpu.listing import Schedule

PAIRS = 2**20
_SHOT, _TEXT, _SHOTS, _CHUNK, _PICKS = 22_500, 504, 8, 1250, 5
_TOKENS = _SHOTS * _SHOT + _TEXT
_QUERIES = _TOKENS * _PICKS * _CHUNK // (_SHOTS * _SHOT)  # of a head that pick a chunk


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one kernel at one size of blocks."""

    step_per_pairs: float
    """Cycles of a step, per 2^20 pairs of its blocks; forward picks initialise in every step, which counts."""
    scene_per_pairs: float
    """Cycles of the reference scene, per 2^20 pairs that count."""
    bytes_moved: int
    """By a step, if it runs every copy of the loop: those that stay with a tile are counted as if they didn't."""
    tile_microseconds: float
    """At the clock that the chip's peak implies."""
    transfer_microseconds: float
    """Of those bytes at the peak rate of HBM."""
    hidden: bool
    """Whether the tile takes longer than the transfers, also what is left of it when the last copy to VMEM starts."""


def cost(chip: Chip, kernel: str, way: Pass, blocks: Blocks, schedule: Schedule) -> Cost:
    """The cost of a schedule."""
    seconds, rate = 1 / chip.clock, chip.info.mem_bw_bytes_per_second
    always = sum(schedule.conditional_cycles) if (kernel, way) == ("picks", "forward") else 0
    moved = sum(schedule.bytes_in) + sum(schedule.bytes_out)
    last = schedule.bytes_in[-1] / rate if schedule.bytes_in else 0.0
    return Cost(
        step_per_pairs=(schedule.step_cycles + always) * PAIRS / (blocks.q * blocks.kv),
        scene_per_pairs=scene_cycles(kernel, way, blocks, schedule),
        bytes_moved=moved,
        tile_microseconds=1e6 * schedule.tile_cycles * seconds,
        transfer_microseconds=1e6 * moved / rate,
        hidden=moved / rate <= schedule.tile_cycles * seconds and last <= schedule.cycles_after_copies * seconds,
    )


def scene_cycles(kernel: str, way: Pass, blocks: Blocks, schedule: Schedule) -> float:
    """Cycles per 2^20 pairs of the reference scene. A tile stays while steps walk the other side's blocks."""
    tile, step = (blocks.q, blocks.kv) if way == "forward" else (blocks.kv, blocks.q)
    if kernel == "splash":
        stay, walks = _TOKENS, [_TOKENS]
    elif kernel == "anchors":
        stay, walks = _SHOT, [_TEXT, _SHOT] if way == "forward" else [_SHOT]
    else:
        stay, walks = (_QUERIES, [_CHUNK]) if way == "forward" else (_CHUNK, [_QUERIES])
    whole = kernel == "picks" and blocks.kv >= _CHUNK  # a block holds a chunk
    tiles = 1 if whole and way == "backward" else stay / tile + 0.5  # on average the last one is half full
    steps = 1 if whole and way == "forward" else sum(max(1, length / step + 0.5) for length in walks)
    cycles = tiles * (steps * schedule.step_cycles + sum(schedule.conditional_cycles))
    return cycles * PAIRS / (stay * sum(walks))


def as_json(cost: Cost) -> dict[str, Any]:
    """With as many digits as say something."""
    return {key: round(x, 3) if isinstance(x, float) else x for key, x in dataclasses.asdict(cost).items()}
