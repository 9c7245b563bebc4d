"""What our kernels execute in a scene, and what that costs by their listings: counting.py's turns of real tables.

Routes are those of random inputs, the same for all heads. Three kernels' results decide about others' turns: of those
what matters is computed here as the kernel would.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.inputs import make_inputs
from benchmarks.settings import Setting
from benchmarks.tpu import counting, listing
from benchmarks.tpu.counting import Call, Turns
from benchmarks.tpu.real_sizes import SceneProgram, program
from moc_jax.attention.api import route
from moc_jax.attention.pallas_tpu.tuning import Blocks


@dataclasses.dataclass(frozen=True, kw_only=True)
class Walk:
    """What a kernel of tiles executes, of all heads."""

    tiles: int
    """That are opened and closed."""
    steps: int
    """With work."""
    idle: int
    """Steps without, of tiles that have fewer than others."""
    others: tuple[int, ...] = ()
    """Turns of the loops that compute a step in another way than most, in their order."""
    other_steps: int = 0
    """Steps computed so."""


@functools.cache
def scene_calls(
    scene: SceneProgram, part: str, chip: str, blocks: Blocks | None = None, *, routed: bool = True
) -> list[Call]:
    """The kernels of a scene's program, in their order; without routes, what picks do is not known."""
    function, (*arrays, _) = program(scene, part, chip, blocks)
    emulations: dict[str, counting.Emulation] = {"moc_move_lanes": _moved, "moc_ranks": _counted}
    if routed:
        emulations["moc_router"] = functools.partial(_routed, routes=random_routes(scene.setting, scene.dim))
    return counting.calls(function, (*arrays, scene.setting.table()), emulations)


@functools.cache
def random_routes(setting: Setting, dim: int) -> np.ndarray:
    """[N, K]"""
    table = setting.table()
    inputs = make_inputs("random", table.chunk_of.shape[1], 1, dim)
    found = jax.jit(lambda q, k: route(q, k, table, setting.moc, backend="xla"))(inputs.q, inputs.k)
    return np.asarray(found)[0, 0]


def _routed(call: Call, routes: np.ndarray) -> list[jax.Array]:
    """Picks [B, H, K, tokens / 128, 128]."""
    (shape,) = (x.shape for x in call.params["out_avals"])
    lines = np.full((shape[2], shape[3] * shape[4]), -1, np.int32)
    lines[:, : len(routes)] = routes.T
    return [jnp.asarray(np.broadcast_to(lines.reshape(shape[2:]), shape))]


def _moved(call: Call) -> list[jax.Array | None]:
    """Columns in their new places, if anybody knows them; -1 elsewhere."""
    if any(x is None for x in call.inputs):
        return [None]
    (shape,) = (x.shape for x in call.params["out_avals"])
    (pieces,), (x,) = call.scalars, (np.asarray(x) for x in call.inputs)
    out, tile = np.full(shape, -1, x.dtype), call.mapping.block_mappings[-1].block_shape[3].block_size
    for g, stretch, ahead, low, high in np.asarray(pieces).reshape(-1, 5):  # of one scene
        begin, end, shift = g * tile + low, min(g * tile + high, shape[3]), stretch + ahead - g * tile
        if begin < end:
            out[..., begin:end] = x[..., begin + shift : end + shift]
    return [jnp.asarray(out)]


def _counted(call: Call) -> list[jax.Array | None]:
    """No ranks, but how many picks each chunk has, the same in every lane, where ranks begin at 0."""
    (begin, routes), ends = call.inputs, call.params["out_avals"][1]
    if routes is None or np.any(begin):
        return [None, None]
    found = [np.bincount(x[x >= 0], minlength=ends.shape[1]) for x in np.asarray(routes).reshape(ends.shape[0], -1)]
    return [None, jnp.asarray(np.broadcast_to(np.stack(found)[..., None], ends.shape).astype(np.int32))]


def walk(name: str, turns: Turns) -> Walk:
    """Of a kernel of tiles, by its branches.

    They stand in this order: where keys are cut, opening a tile, a step, closing; where queries are, opening, a step
    whose rows all are keys, one with others, a step again, closing; if all tiles have a single step, that step, another
    kind of it if there is one, the step again.
    """
    taken = turns.branches
    if "gradients" in name:
        return Walk(tiles=taken[0], steps=taken[1], idle=turns.grid - taken[1])
    if len(taken) == 5:
        tiles, steps, others = taken[0], taken[1] + taken[2], taken[2]
    else:
        tiles = steps = sum(taken[:-1])
        others = sum(taken[1:-1])
    loops = tuple(n for n, single in zip(turns.loops, turns.optional) if not single)
    return Walk(tiles=tiles, steps=steps, idle=turns.grid - steps, others=loops if others else (), other_steps=others)


def walk_cycles(schedule: listing.Schedule, walk: Walk) -> float:
    """Of a walk by a kernel's schedule.

    Raises:
        ValueError: the kernel has fewer loops than are counted.
    """
    others = [n for n in walk.others if n]
    if len(schedule.inner_cycles) < len(others):
        raise ValueError(f"{len(others)} inner loops are counted, but there are {schedule.inner_cycles}")
    tile = min((schedule.tile_cycles, *schedule.alternative_cycles))
    between = schedule.step_cycles - schedule.tile_cycles
    found = between * (walk.steps + walk.idle) + tile * (walk.steps - walk.other_steps)
    return (
        found
        + sum(cycles * n for cycles, n in zip(schedule.inner_cycles, others))
        + sum(schedule.conditional_cycles) * walk.tiles
    )


def cycles(name: str, turns: Turns, bundles: str, slots: str, granule: int) -> float:
    """Of a call of a kernel, by its two listings.

    Raises:
        ValueError: the kernel has other loops than are counted.
    """
    if re.match(r"moc_(forward|gradients)_", name):
        return walk_cycles(listing.read(bundles, slots, granule), walk(name, turns))
    found = listing.loops(bundles, slots)
    try:
        counts = [turns.grid, *turns.of_loops(len(found) - 1)]
    except ValueError as error:
        raise ValueError(f"kernel {name}: {error}") from error
    return sum(loop.cycles * n for loop, n in zip(found, counts, strict=True))
