"""Which rows of q each tile takes and which runs of keys it reads, and how a kernel walks them."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from moc_jax.shapes import Array, Int

CACHE = 40 * 2**20  # bytes of keys and values that stay in the level-2 cache (50 MiB on an H100, 60 on an H200)
ALIGN = 8  # rows at whose multiples a copy may start
ROWS = 64  # of one warpgroup: the smallest height of a Hopper matrix product
COMPUTE = 2  # warpgroups that compute
TILE = ROWS * COMPUTE  # rows of a tile


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tiles:
    """The work of one kernel: G tiles per scene and head.

    `table[..., 0]` is a tile's first row (a multiple of 8; -1: an unused tile), then begin and end of each run; a run
    with begin >= end is empty. Where queries walk keys, a used tile has at least one key. The second axis is 1 where
    all heads share their tiles.
    """

    table: Int[Array, "B H G W"]

    @property
    def count(self) -> int:
        """Tiles per scene and head, used or not."""
        return self.table.shape[2]


@dataclasses.dataclass(frozen=True)
class Tuning:
    """How a kernel uses its shared memory and registers."""

    block: int = 128  # rows per step of a walk
    stages: int = 2  # steps in flight
    slots: int = 2  # tiles in flight: with 2, the next tile is there when one ends
    compute_registers: int = 232  # per thread; twice this and the copying warpgroup's must stay within 504
    copy_registers: int = 40

    def __post_init__(self):
        if self.block < 64 or self.block % 64 or self.stages < 2 or self.slots < 1:
            raise ValueError(f"{self}: blocks are multiples of 64 rows, with at least 2 stages and 1 slot")
        if COMPUTE * self.compute_registers + self.copy_registers > 504:
            raise ValueError(f"{self}: a multiprocessor has 504 registers for a thread of each warpgroup; take fewer")


@dataclasses.dataclass(frozen=True)
class Job:
    """What a kernel knows when it is compiled."""

    tuning: Tuning
    blocks: int  # persistent thread blocks
    batch: int
    heads: int  # of q
    dim: int
    tiles: int  # per scene and head
    runs: int  # per tile
    per_head: bool  # whether each head has its own tiles
    rows: int  # of the array whose runs are walked
    sorted_rows: bool  # whether q is [B, H, S, D] and not [B, N, H, D]
    all_cached: bool  # whether keys and values of all heads fit the cache
    interpreted: bool

    @classmethod
    def of(cls, q, k, tiles: Tiles, *, over_keys: bool, sorted_rows: bool, tuning: Tuning, blocks: int, interpret):
        """For q in either order and k [B, N, H, D]; `over_keys`: the runs are of keys, else of queries."""
        batch, tokens, heads, dim = k.shape
        rows = q.shape[2] if sorted_rows and not over_keys else tokens
        if tokens % ALIGN or rows % ALIGN or min(tokens, rows) < TILE:
            raise ValueError(
                f"{tokens} tokens, {rows} rows: both must be multiples of {ALIGN}, at least {TILE}; pad them"
            )
        return cls(
            tuning=tuning,
            blocks=blocks,
            batch=batch,
            heads=q.shape[1] if sorted_rows else heads,
            dim=dim,
            tiles=tiles.count,
            runs=(tiles.table.shape[3] - 1) // 2,
            per_head=tiles.table.shape[1] > 1,
            rows=rows,
            sorted_rows=sorted_rows,
            all_cached=2 * k.nbytes <= batch * CACHE,
            interpreted=interpret is not None,
        )

    def query_rows(self, scene, head, rows):
        """Index of rows of q or d_out."""
        return (scene, head, rows) if self.sorted_rows else (scene, rows, head)


def each_tile(table_ref, job: Job, body, carry):
    """Folds body(item, first row, its line of the table, tiles before it, carry) -> carry over the used tiles of this
    thread block, in an order that all its warpgroups share; (tiles, carry). An item is (scene, head, tile).
    """

    def one(i, before):
        used, carry = before
        item, there = _item(i, lax.axis_index("block"), job)
        line = table_ref.at[item[0], item[1] if job.per_head else 0, item[2]]
        start = line[0]
        return lax.cond(
            there & (start >= 0),
            lambda: (used + 1, body(item, pl.multiple_of(start, ALIGN), line, used, carry)),
            lambda: (used, carry),
        )

    return lax.fori_loop(0, _looks(job), one, (jnp.int32(0), carry))


def _looks(job: Job) -> int:
    """How many items a thread block looks at, at most."""
    if job.all_cached:
        return -(-job.batch * job.heads * job.tiles // job.blocks)
    return job.batch * job.heads * -(-job.tiles // job.blocks)


def _item(i, block, job: Job):
    """The i-th item of a thread block, and whether it exists.

    Neighbours in time share a head's keys, which then come from the cache: heads follow each other, and a head's tiles
    go round all thread blocks. Tiles that take longest or shortest (text, a short last chunk, unused ones) have the
    same places in every head, so each head begins with another thread block, all around evenly; else some blocks would
    get such a tile in every head and end late. Where all heads' keys fit the cache, tiles follow each other and
    heads go round: those of text, which take longest, come first.
    """
    rows = job.batch * job.heads
    if job.all_cached:
        index = block + i * job.blocks
        tile_row, head = lax.div(index, job.heads), lax.rem(index, job.heads)
        there = index < rows * job.tiles
        scene, tile = lax.div(tile_row, job.tiles), lax.rem(tile_row, job.tiles)
    else:
        rounds = -(-job.tiles // job.blocks)
        row = lax.div(i, rounds)
        place = lax.rem(block + job.blocks - lax.div(row * job.blocks, rows), job.blocks)
        tile = place + lax.rem(i, rounds) * job.blocks
        there = tile < job.tiles
        scene, head = lax.div(row, job.heads), lax.rem(row, job.heads)
    inside = jnp.where(there, 1, 0)
    return (scene * inside, head, tile * inside), there


class Way:
    """A tile's way through its runs, block after block.

    A block's rows are [row, row + block); those of the run are [row + low, row + high). Blocks start at multiples of
    8 and stay inside the array: the last one may start earlier than its turn, and what it repeats is masked.
    """

    def __init__(self, line, job: Job):
        block = job.tuning.block
        legs, count = [], jnp.int32(0)
        for r in range(job.runs):
            begin, end = line[1 + 2 * r], line[2 + 2 * r]
            first = begin - lax.rem(begin, ALIGN)
            legs.append((count, first, begin, end))
            count += jnp.where(begin < end, lax.div(end - first + block - 1, block), 0)
        self.count = count  # blocks
        self._legs, self._job = legs, job

    def at(self, s):
        """(row, low, high) of block s."""
        before, first, begin, end = self._legs[0]
        for leg in self._legs[1:]:
            there = s >= leg[0]
            before, first, begin, end = (
                jnp.where(there, new, old) for new, old in zip(leg, (before, first, begin, end), strict=True)
            )
        return _block(first, begin, end, s - before, self._job)


def walk(line, job: Job, step, carry, steps):
    """Folds step(carry, steps so far, row, low, high) over a tile's runs as `Way` has them; (carry, steps so far).

    One run after the other, which takes fewer registers than choosing among them at each step.
    """

    block = job.tuning.block

    def one_run(r, state):
        begin, end = line[1 + 2 * r], line[2 + 2 * r]
        first = begin - lax.rem(begin, ALIGN)
        count = jnp.where(begin < end, lax.div(end - first + block - 1, block), 0)
        carry, steps = state

        def one_block(s, carry):
            return step(carry, steps + s, *_block(first, begin, end, s, job))

        return lax.fori_loop(0, count, one_block, carry), steps + count

    if job.runs == 1:
        return one_run(0, (carry, steps))
    return lax.fori_loop(0, job.runs, one_run, (carry, steps))


def _block(first, begin, end, s, job: Job):
    turn = first + s * job.tuning.block
    row = pl.multiple_of(jnp.minimum(turn, job.rows - job.tuning.block), ALIGN)
    return row, jnp.maximum(begin, turn) - row, end - row
