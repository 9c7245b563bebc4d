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
from moc_jax.attention.pallas_tpu import attend, device, flash, pairs, ranks, router, tiles, tuning
from moc_jax.attention.pallas_tpu.plan import Plan, plan

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


@dataclasses.dataclass(frozen=True)
class Scene:
    """A setting on a chip."""

    setting: Setting
    heads: int
    dim: int
    chip: str

    @functools.cached_property
    def table(self):
        return self.setting.table()

    @functools.cached_property
    def blocks(self) -> tuning.Blocks:
        with device.compiled_for(self.chip):
            return tuning.blocks(self.setting.moc, self.table, self.dim, jnp.bfloat16)

    @functools.cached_property
    def plan(self) -> Plan:
        return plan(self.table, self.setting.moc, self.blocks)

    @property
    def chunks(self) -> int:
        return self.table.kind.shape[1]

    @functools.cached_property
    def window(self) -> int:
        with device.compiled_for(self.chip):
            return pairs.window_rows(self.plan.order.rows, self.setting.moc.top_k, self.dim, self.chunks)

    @property
    def step(self) -> int:
        return pairs.step_rows(self.plan.order.rows)

    @property
    def windows(self) -> int:
        return -(-self.plan.order.rows // self.window)

    @functools.cached_property
    def routes(self) -> np.ndarray:
        """Of one head, in the queries' order, -1 up to the last window's end: [rows, K]."""
        routes = random_routes(self.setting, self.dim)
        token = np.asarray(self.plan.order.token_of_row[0])
        rows = np.where(token[:, None] >= 0, routes[np.maximum(token, 0)], -1)
        return np.pad(rows, ((0, self.windows * self.window - len(rows)), (0, 0)), constant_values=-1)

    @functools.cached_property
    def runs(self) -> np.ndarray:
        """Slots of each window and chunk."""
        by_window = self.routes.reshape(self.windows, -1)
        counts = [np.bincount(picks[picks >= 0], minlength=self.chunks) for picks in by_window]
        return -(-np.stack(counts) // device.ROWS) * device.ROWS

    def pick_tiles(self, size: int) -> np.ndarray:
        """Tiles of slots of each chunk."""
        return -(-self.runs.sum(axis=0) // size)


@functools.cache
def random_routes(setting: Setting, dim: int) -> np.ndarray:
    """[N, K]"""
    table = setting.table()
    inputs = make_inputs("random", table.chunk_of.shape[1], 1, dim)
    found = jax.jit(lambda q, k: routing.route(q, k, table, setting.moc, block=2048))(inputs.q, inputs.k)
    return np.asarray(found)[0, 0]


def cycles(kernel: str, scene: Scene, bundles: str, slots: str, granule: int) -> float:
    """Of all calls' turns of a kernel over all heads, by its two listings.

    Raises:
        ValueError: the kernel is unknown, or has other loops than are counted here.
    """
    name = re.sub(r"\..*", "", kernel)
    if name in _WALKS:
        schedule = listing.read(bundles, slots, granule)
        walk = _WALKS[name](scene)
        between = schedule.step_cycles - schedule.tile_cycles
        sometimes = sum(schedule.conditional_cycles)
        return walk.steps * schedule.step_cycles + walk.idle * between + walk.tiles * sometimes
    if name not in _TURNS:
        raise ValueError(f"kernel {name}: known are {', '.join([*_WALKS, *_TURNS])}")
    found, turns = listing.loops(bundles, slots), _TURNS[name](scene)
    if len(found) != len(turns):
        raise ValueError(f"kernel {name} has {len(found)} loops, but {len(turns)} are counted")
    return sum(loop.cycles * n for loop, n in zip(found, turns))


# ------------------------------------------------------------------------------------------------- kernels of tiles


def _queries(found: tiles.Tiles, keys: int, heads: int) -> Walk:
    line = np.asarray(flash._walk(found, keys)[0]).reshape(found.count, -1)
    return _walk(line[:, -3], heads)


def _keys(found: tiles.Tiles, block: int, heads: int) -> Walk:
    runs = found.table[0, 0, :, 3:]
    _, counts = tiles.blocks_of(runs[:, 0::2], runs[:, 1::2], block)
    return _walk(np.asarray(counts.sum(axis=1)), heads)


def _walk(steps: np.ndarray, heads: int) -> Walk:
    work = int(steps.sum())
    return Walk(
        tiles=heads * int((steps > 0).sum()),
        steps=heads * work,
        idle=heads * (max(1, int(steps.max())) * len(steps) - work),
    )


def _picks(scene: Scene) -> Walk:
    size = scene.blocks.picks.queries
    used = int(scene.pick_tiles(size).sum())
    most = scene.table.chunk_of.shape[1] * scene.setting.moc.top_k
    capacity = -(-(most + scene.windows * scene.chunks * (device.ROWS - 1)) // size) + scene.chunks
    return Walk(tiles=scene.heads * used, steps=scene.heads * used, idle=scene.heads * (capacity - used))


def _pick_gradients(scene: Scene) -> Walk:
    """Tiles of a chunk's keys, one each, over the slots that pick it."""
    video = np.asarray(scene.table.length[0]) > 0
    block, tile = scene.blocks.pick_gradients.block, scene.blocks.picks.queries
    begin = np.cumsum(scene.pick_tiles(tile)) * tile - scene.pick_tiles(tile) * tile
    end = begin + scene.runs.sum(axis=0)
    steps = np.where(end > begin, -(-end // block) - begin // block, 0)
    return _walk(steps[video], scene.heads)


_WALKS = {
    "moc_forward_text": lambda s: _queries(s.plan.text, s.blocks.text.keys, s.heads),
    "moc_forward_anchors": lambda s: _queries(s.plan.video, s.blocks.anchors.keys, s.heads),
    "moc_forward_picks": _picks,
    "moc_gradients_anchors": lambda s: _keys(s.plan.keys, s.blocks.anchor_gradients.block, s.heads),
    "moc_gradients_picks": _pick_gradients,
}


# -------------------------------------------------------------------------------- kernels of loops, in their order


def _router(s: Scene) -> tuple[int, ...]:
    tiling = router.Tiling.of(s.table.chunk_of.shape[1], s.setting.moc.top_k)
    last = np.asarray(routing.candidate_runs(s.table, s.setting.moc)[2])[0]
    of = np.asarray(s.table.chunk_of)[0]
    until = np.pad(np.where(of >= 0, last[np.maximum(of, 0)], 0), (0, -len(of) % tiling.block))
    used = -(-until.reshape(-1, tiling.block).max(axis=1) // tiling.chunks)
    merges = tiling.block // device.LANES // tiling.merged
    return s.heads * len(used), s.heads * int(np.maximum(used - 1, 0).sum()), s.heads * int((used > 0).sum()) * merges


def _ranks(s: Scene) -> tuple[int, ...]:
    tiling = ranks.Tiling.of(s.window, s.setting.moc.top_k)
    picks = s.routes.reshape(s.windows, s.window, -1).max(axis=2)
    picks = np.pad(picks, ((0, 0), (0, -s.window % tiling.block)), constant_values=-1)
    used = (picks.reshape(-1, tiling.block).max(axis=1) + tiling.chunks) // tiling.chunks
    return s.heads * len(used), s.heads * int(np.maximum(used - 1, 0).sum())


def _look_up(s: Scene) -> tuple[int, ...]:
    registers = s.heads * s.windows * s.window // (device.LANES * device.ROWS)
    blocks = s.window // device.LANES
    size = next(n for n in (32, 16, 8, blocks) if blocks % n == 0)
    steps = s.heads * s.windows * blocks // size
    return steps, registers, registers * (s.chunks // _CHUNKS_AT_ONCE), registers * (s.chunks % _CHUNKS_AT_ONCE)


def _spread(s: Scene) -> tuple[int, ...]:
    windows, rows = s.heads * s.windows, s.heads * s.windows * s.window
    runs, converted = windows * s.chunks, s.heads * int((-(-s.runs.sum(axis=1) // device.LANES)).sum())
    tails = s.heads * s.chunks
    return rows // s.step, tails, runs, rows // pairs._GROUP, converted, runs, tails


def _collect(s: Scene) -> tuple[int, ...]:
    windows, rows = s.heads * s.windows, s.heads * s.plan.order.rows
    some = rows // min(device.LANES, s.step)
    return windows * s.window // s.step, s.heads * s.chunks, windows * s.chunks, some, rows // pairs._GROUP


_TURNS = {
    "moc_router": _router,
    "moc_ranks": _ranks,
    "moc_look_up": _look_up,
    "moc_spread": _spread,
    "moc_merge": _collect,
    "moc_add": _collect,
}
