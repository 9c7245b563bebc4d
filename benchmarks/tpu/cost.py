"""What a schedule costs: cycles per (query, key) pair, and a step's bytes beside its tile.

Two prices of 2^20 pairs. The first is of the step alone, every row of its blocks counted: it compares kernels. The
second is of the reference scene (README, Speed), walked tile by tile as the program would: initialisation, write-out,
and queries and keys that fill no whole block, all over the pairs that count. It compares block sizes.
"""

import dataclasses
from typing import Any

from benchmarks.settings import SETTINGS
from benchmarks.tpu.compiler import CHIPS
from benchmarks.tpu.counting import turns
from benchmarks.tpu.kernels import Blocks, Pass
from benchmarks.tpu.listing import Schedule
from benchmarks.tpu.real_sizes import SceneProgram
from benchmarks.tpu.walks import scene_calls, walk, walk_cycles
from moc_jax.attention.pallas_tpu import flash, flash_backward, tuning

PAIRS = 2**20
_SHOT, _TEXT, _SHOTS, _CHUNK = 22_500, 504, 8, 1250
_TOKENS = _SHOTS * _SHOT + _TEXT
_SETTING = SETTINGS["multi_shot"]
_NAMES: dict[Pass, str] = {"forward": "forward", "backward": "gradients"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one kernel at one size of blocks."""

    step_per_pairs: float
    """Cycles of a step, per 2^20 pairs that it computes; what forward picks do beside their tile counts."""
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


def cost(name: str, kernel: str, way: Pass, blocks: Blocks, schedule: Schedule) -> Cost:
    """The cost of a schedule on a chip."""
    chip = CHIPS[name]
    seconds, rate = 1 / chip.clock, chip.info.mem_bw_bytes_per_second
    always = sum(schedule.conditional_cycles) if (kernel, way) == ("picks", "forward") else 0
    keys = blocks.short[0] if blocks.short and way == "forward" else blocks.kv
    moved = sum(schedule.bytes_in) + sum(schedule.bytes_out)
    last = schedule.bytes_in[-1] / rate if schedule.bytes_in else 0.0
    return Cost(
        step_per_pairs=(schedule.step_cycles + always) * PAIRS / (blocks.q * keys),
        scene_per_pairs=scene_cycles(name, kernel, way, blocks, schedule),
        bytes_moved=moved,
        tile_microseconds=1e6 * schedule.tile_cycles * seconds,
        transfer_microseconds=1e6 * moved / rate,
        hidden=moved / rate <= schedule.tile_cycles * seconds and last <= schedule.cycles_after_copies * seconds,
    )


def scene_cycles(chip: str, kernel: str, way: Pass, blocks: Blocks, schedule: Schedule) -> float:
    """Cycles per 2^20 pairs of the reference scene."""
    if kernel == "splash":
        tile, step = (blocks.q, blocks.kv) if way == "forward" else (blocks.kv, blocks.q)
        tiles, steps = (-(-_TOKENS // size) for size in (tile, step))
        cycles = tiles * (steps * schedule.step_cycles + sum(schedule.conditional_cycles))
        return cycles * PAIRS / _TOKENS**2
    name, part = f"moc_{_NAMES[way]}_{kernel}", "forward" if way == "forward" else "gradients"
    scene, sizes = SceneProgram(setting=_SETTING, heads=1), _sizes(way, blocks)
    calls = scene_calls(scene, part, chip, sizes, routed=kernel == "picks")
    (call,) = [call for call in calls if call.name == name]
    cycles = walk_cycles(schedule, walk(name, turns(call)))
    return cycles * PAIRS / scene_pairs(kernel, way)


def scene_pairs(kernel: str, way: Pass) -> int:
    """The reference scene's pairs that count, of one head: with the kernel's step, not in a loop beside it."""
    if kernel == "anchors":
        return _SHOTS * _SHOT * (_SHOT + (_TEXT if way == "forward" else 0))
    return (_SHOTS - 1) * _SHOT * _SETTING.moc.top_k * _CHUNK  # the first shot has no candidates


def _sizes(way: Pass, blocks: Blocks) -> tuning.Blocks:
    """Those of one kernel, others to go with them."""
    forward = blocks.forward if way == "forward" else flash.ForwardTiling(blocks.q, 1024, 256, 256)
    backward = blocks.backward if way == "backward" else flash_backward.GradientTiling(block=blocks.q, at_once=128)
    keys = blocks.kv if way == "backward" else 1024
    return tuning.Blocks(
        anchors=forward,
        text=flash.ForwardTiling(128, 1024, 128, 256),
        picks=forward,
        gradient_keys=keys,
        anchor_gradients=backward,
        pick_gradient_keys=keys,
        pick_gradients=backward,
    )


def as_json(cost: Cost) -> dict[str, Any]:
    """With as many digits as say something."""
    return {key: round(x, 3) if isinstance(x, float) else x for key, x in dataclasses.asdict(cost).items()}
