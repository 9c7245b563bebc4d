"""How often the loops of our kernels run in a scene: what turns a kernel's schedule into its time.

Tables of tiles are computed as the program would compute them, and routes are those of random inputs. A listing is one
turn of each loop; a test holds the loops that a kernel has against what is counted here.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.inputs import make_inputs
from benchmarks.settings import Setting
from benchmarks.tpu import listing
from moc_jax.attention import routing
from moc_jax.attention.api import route
from moc_jax.attention.layout import Tiles, queries_of
from moc_jax.attention.pallas_tpu import (
    attend,
    device,
    flash,
    flash_backward,
    moves,
    pairs,
    pool,
    ranks,
    router,
    tuning,
)
from moc_jax.attention.pallas_tpu.placement import Placement
from moc_jax.attention.pallas_tpu.plan import OrderedTiles, key_rows, ordered_tiles
from moc_jax.scene import VIDEO

_CHUNKS_AT_ONCE = 8  # that `look_up` goes through in a turn


@dataclasses.dataclass(frozen=True, kw_only=True)
class Walk:
    """What a kernel of tiles executes, of all heads."""

    tiles: int
    """With any step."""
    steps: int
    """With work."""
    idle: int
    """Steps without, of tiles that have fewer than others."""
    others: tuple[int, ...] = ()
    """Turns of the loops that compute a step in another way than most, in their order."""
    other_steps: int = 0
    """Steps computed so."""


@dataclasses.dataclass(frozen=True)
class Scene:
    """A setting on a chip."""

    setting: Setting
    heads: int
    dim: int
    chip: str
    sizes: tuning.Blocks | None = None
    """Instead of those that the chip has."""

    @functools.cached_property
    def table(self):
        return self.setting.table()

    @functools.cached_property
    def blocks(self) -> tuning.Blocks:
        if self.sizes is not None:
            return self.sizes
        return tuning.blocks(self.setting.moc, self.table, self.dim, jnp.bfloat16, device.Chip(self.chip))

    @functools.cached_property
    def plan(self) -> OrderedTiles:
        return jax.jit(lambda table: ordered_tiles(queries_of(table), table, self.setting.moc, self.blocks))(self.table)

    @property
    def chunks(self) -> int:
        return self.table.kind.shape[1]

    @property
    def key_rows(self) -> int:
        return key_rows(self.table.chunk_of.shape[1], self.table.text_tokens, self.blocks)

    @functools.cached_property
    def placement(self) -> Placement:
        """Shapes, of one scene."""
        shape = jax.ShapeDtypeStruct((1, self.heads, *self.table.chunk_of.shape[1:], self.setting.moc.top_k), jnp.int32)
        static = attend._Static(device.Chip(self.chip), self.blocks, self.table.max_chunk, self.table.text_tokens, 0)
        place = functools.partial(attend._place, table=self.table, static=static, dim=self.dim, dtype=jnp.bfloat16)
        order = self.plan.order
        return jax.eval_shape(lambda routes: place(routes, order), shape)

    @property
    def step(self) -> int:
        return self.placement.step

    @property
    def window(self) -> int:
        return self.placement.steps * self.step

    @property
    def windows(self) -> int:
        return self.placement.runs.shape[2]

    @functools.cached_property
    def routes(self) -> np.ndarray:
        """Of one head, in the queries' order, -1 up to the last window's end: [rows, K]."""
        routes = random_routes(self.setting, self.dim)
        rows = np.full((self.windows * self.window, routes.shape[1]), -1, routes.dtype)
        for source, target, size in zip(*(np.asarray(x[0]) for x in self.plan.order.moves)):
            rows[target : target + size] = routes[source : source + size]
        return rows

    @functools.cached_property
    def runs(self) -> np.ndarray:
        """Slots of each window and chunk."""
        by_window = self.routes.reshape(self.windows, -1)
        counts = [np.bincount(picks[picks >= 0], minlength=self.chunks) for picks in by_window]
        return -(-np.stack(counts) // device.ROWS) * device.ROWS

    @property
    def groups(self) -> int:
        """Of heads."""
        return attend._groups(self.heads, self.placement, self.dim, jnp.bfloat16, device.Chip(self.chip))

    def pick_tiles(self, size: int) -> np.ndarray:
        """Tiles of slots of each chunk."""
        return -(-self.runs.sum(axis=0) // size)


@functools.cache
def random_routes(setting: Setting, dim: int) -> np.ndarray:
    """[N, K]"""
    table = setting.table()
    inputs = make_inputs("random", table.chunk_of.shape[1], 1, dim)
    found = jax.jit(lambda q, k: route(q, k, table, setting.moc, backend="xla"))(inputs.q, inputs.k)
    return np.asarray(found)[0, 0]


def calls(kernel: str, scene: Scene) -> int:
    """How often a kernel of a program runs: those of pairs once per group of heads."""
    by_group = ("moc_columns", "moc_spread", "moc_merge", "moc_add", "moc_forward_picks", "moc_gradients_picks")
    return scene.groups if kernel.startswith(by_group) else 1


def cycles(kernel: str, scene: Scene, bundles: str, slots: str, granule: int) -> float:
    """Of all calls' turns of a kernel over all heads, by its two listings.

    Raises:
        ValueError: the kernel is unknown, or has other loops than are counted here.
    """
    name = re.sub(r"\..*", "", kernel)
    if name in _WALKS:
        return walk_cycles(listing.read(bundles, slots, granule), _WALKS[name](scene))
    if name not in _TURNS:
        raise ValueError(f"kernel {name}: known are {', '.join([*_WALKS, *_TURNS])}")
    found, (turns, *others) = listing.loops(bundles, slots), _TURNS[name](scene)
    matching = [n for n in (turns, *others) if len(n) == len(found)]
    if not matching:
        raise ValueError(f"kernel {name} has {len(found)} loops, but {len(turns)} are counted")
    return sum(loop.cycles * n for loop, n in zip(found, matching[0]))


# ------------------------------------------------------------------------------------------------- kernels of tiles


def walk(kernel: str, scene: Scene) -> Walk:
    """What one of the kernels of tiles executes in a scene."""
    return _WALKS[kernel](scene)


def walk_cycles(schedule: listing.Schedule, walk: Walk) -> float:
    """Of a walk by a kernel's schedule.

    Raises:
        ValueError: the kernel has fewer loops than are counted.
    """
    if len(schedule.inner_cycles) < len(walk.others):
        raise ValueError(f"{len(walk.others)} inner loops are counted, but there are {schedule.inner_cycles}")
    tile = min(schedule.tile_cycles, *schedule.alternative_cycles, schedule.tile_cycles)
    between = schedule.step_cycles - schedule.tile_cycles
    found = between * (walk.steps + walk.idle) + tile * (walk.steps - walk.other_steps)
    others = sum(cycles * n for cycles, n in zip(schedule.inner_cycles, walk.others))
    return found + others + sum(schedule.conditional_cycles) * walk.tiles


def _queries(found: Tiles, tiling: flash.ForwardTiling, last_block: int, heads: int) -> Walk:
    """Blocks of keys that are not all a run's go part by part."""
    runs = np.asarray(found.table[0, 0], int).reshape(found.count, -1, 2)
    steps, partial, parts = np.zeros(found.count, int), 0, 0
    for tile, lines in enumerate(runs):
        for begin, end in lines[lines[:, 0] < lines[:, 1]]:
            for first in range(begin // device.ROWS * device.ROWS, end, tiling.keys):
                row = min(first, last_block)
                low, high = max(begin, first) - row, min(end - row, tiling.keys)
                steps[tile] += 1
                if low > 0 or high < tiling.keys:
                    partial += 1
                    parts += -(-high // tiling.compute_keys) - low // tiling.compute_keys
    keep = partial * (tiling.queries // tiling.compute_queries)
    walk = _walk(steps, heads)
    one_part = tiling.queries == tiling.compute_queries  # then the first loop has one turn, and is none
    others = (parts,) if one_part else (keep, parts)
    return dataclasses.replace(walk, others=tuple(heads * n for n in others), other_steps=heads * partial)


def _keys(found: Tiles, block: int, heads: int) -> Walk:
    runs = found.table[0, 0, :, 3:]
    _, counts = flash_backward._blocks_of(runs[:, 0::2], runs[:, 1::2], block)
    return _walk(np.asarray(counts, int).sum(axis=1), heads)


def _walk(steps: np.ndarray, heads: int) -> Walk:
    work = int(steps.sum())
    idle = max(1, int(steps.max())) * len(steps) - work
    return Walk(tiles=heads * int((steps > 0).sum()), steps=heads * work, idle=heads * idle)


def _picks(scene: Scene) -> Walk:
    """One block each; those of chunks that a short block doesn't hold go by some queries at a time."""
    tiling = scene.blocks.picks
    of_chunk = scene.pick_tiles(tiling.queries)
    used = scene.heads * int(of_chunk.sum())
    idle = scene.heads * scene.placement.tile_chunk.shape[2] - used
    if not tiling.short:
        return Walk(tiles=used, steps=used, idle=idle)
    start, length = (np.asarray(x[0]) for x in (scene.table.start, scene.table.length))
    row = np.minimum(start // device.ROWS * device.ROWS, scene.key_rows - tiling.keys)
    long = scene.heads * int(of_chunk[start + length - row > tiling.short[0]].sum())
    return Walk(
        tiles=used,
        steps=used,
        idle=idle,
        others=(long * (tiling.queries // tiling.compute_queries),),
        other_steps=long,
    )


def _pick_gradients(scene: Scene) -> Walk:
    """Tiles of a chunk's keys, one each, over the slots that pick it."""
    video = np.asarray(scene.table.length[0]) > 0
    block, tile = scene.blocks.pick_gradients.block, scene.blocks.picks.queries
    begin = np.cumsum(scene.pick_tiles(tile)) * tile - scene.pick_tiles(tile) * tile
    end = begin + scene.runs.sum(axis=0)
    steps = np.where(end > begin, -(-end // block) - begin // block, 0)
    return _walk(steps[video], scene.heads)


_WALKS = {
    "moc_forward_text": lambda s: _queries(s.plan.text, s.blocks.text, s.key_rows - s.blocks.text.keys, s.heads),
    "moc_forward_anchors": lambda s: _queries(
        s.plan.video, s.blocks.anchors, s.key_rows - s.blocks.anchors.keys, s.heads
    ),
    "moc_forward_picks": _picks,
    "moc_gradients_anchors": lambda s: _keys(s.plan.keys, s.blocks.anchor_gradients.block, s.heads),
    "moc_gradients_picks": _pick_gradients,
}


# -------------------------------------------------------------------------------- kernels of loops, in their order


def _columns(s: Scene) -> list[tuple[int, ...]]:
    """Of all slots, used or not, 2048 at a time."""
    rows = s.placement.slots
    return [(s.heads * (rows // next(n for n in (2048, 1024, 512, 256, 128) if rows % n == 0)),)]


def _router(s: Scene) -> list[tuple[int, ...]]:
    tiling = router.tiling_of(s.table.chunk_of.shape[1], s.setting.moc.top_k)
    last = np.asarray(routing.candidate_runs(s.table, s.setting.moc)[2])[0]
    of = np.asarray(s.table.chunk_of)[0]
    until = np.pad(np.where(of >= 0, last[np.maximum(of, 0)], 0), (0, -len(of) % tiling.block))
    used = -(-until.reshape(-1, tiling.block).max(axis=1) // tiling.chunks)
    merges = tiling.block // device.LANES // router._merged(tiling)
    more = s.heads * int(np.maximum(used - 1, 0).sum())
    return [(s.heads * len(used), more, s.heads * int((used > 0).sum()) * merges)]


def _ranks(s: Scene) -> list[tuple[int, ...]]:
    tiling = ranks.tiling_of(s.window, s.setting.moc.top_k)
    picks = s.routes.reshape(s.windows, s.window, -1).max(axis=2)
    picks = np.pad(picks, ((0, 0), (0, -s.window % tiling.block)), constant_values=-1)
    used = (picks.reshape(-1, tiling.block).max(axis=1) + tiling.chunks) // tiling.chunks
    return [(s.heads * len(used), s.heads * int(np.maximum(used - 1, 0).sum()))]


def _look_up(s: Scene) -> list[tuple[int, ...]]:
    registers = s.heads * s.windows * s.window // (device.LANES * device.ROWS)
    blocks = s.window // device.LANES
    size = next(n for n in (32, 16, 8, blocks) if blocks % n == 0)
    steps = s.heads * s.windows * blocks // size
    turns = steps, registers, registers * (s.chunks // _CHUNKS_AT_ONCE), registers * (s.chunks % _CHUNKS_AT_ONCE)
    return [turns, turns[:3]]  # the few chunks that are left may be unrolled


def _spread(s: Scene) -> list[tuple[int, ...]]:
    windows, rows = s.heads * s.windows, s.heads * s.windows * s.window
    moved = s.heads * int((s.runs.sum(axis=1) > 0).sum()) * s.window
    runs, converted = windows * s.chunks, s.heads * int((-(-s.runs.sum(axis=1) // device.LANES)).sum())
    tails = s.heads * s.chunks
    return [(rows // s.step, tails, runs, moved // pairs._GROUP, converted, runs, tails)]


def _collect(s: Scene) -> list[tuple[int, ...]]:
    """Windows without any pair skip the rows of pairs."""
    windows, block = s.heads * s.windows, min(device.LANES, s.step)
    picked = np.repeat(s.runs.sum(axis=1) > 0, s.window // s.step)[: s.plan.order.rows // s.step]
    some, none = (s.heads * int(n) * (s.step // block) for n in (picked.sum(), (~picked).sum()))
    fetches = s.heads * s.chunks, windows * s.chunks
    return [(windows * s.window // s.step, *fetches, some, some * (block // pairs._GROUP), none)]


def _pool(s: Scene) -> list[tuple[int, ...]]:
    """Runs of all video chunks, some rows at a time."""
    length = np.asarray(s.table.length[0])[np.asarray(s.table.kind[0]) == VIDEO]
    rows = -(-(s.table.max_chunk + device.ROWS - 1) // pool._GROUP) * pool._GROUP
    steps = -(-(s.table.max_chunk + device.ROWS - 1) // min(rows, pool._MOST_ROWS))
    group = max(1, s.heads // 2)
    groups, parts = s.heads // group, s.heads // pool.heads_at_once(group, s.setting.head_dim)
    blocks = parts * int((-(-length // pool._GROUP) + 1).sum())
    return [(groups * s.chunks * steps, parts * s.chunks * steps, blocks)]


def _move(s: Scene) -> list[tuple[int, ...]]:
    """The grid, clearing, pieces, some rows of a piece, heads."""
    rows, tile = s.plan.order.rows, moves._ROWS_OF_TILE
    tiles, pieces = -(-rows // tile), -(-rows // tile) + 2 * s.setting.shots + 1
    blocks = pieces * (tile // moves._ROWS_AT_ONCE)
    groups = 2
    turns = groups * tiles, 0, groups * pieces, groups * blocks, s.heads * blocks
    return [turns, turns[:1] + turns[2:]]


# Turns of each loop of a kernel; several answers where a loop may be missing.
_TURNS = {
    "moc_columns": _columns,
    "moc_pool": _pool,
    "moc_move": _move,
    "moc_router": _router,
    "moc_ranks": _ranks,
    "moc_look_up": _look_up,
    "moc_spread": _spread,
    "moc_merge": _collect,
    "moc_add": _collect,
}
