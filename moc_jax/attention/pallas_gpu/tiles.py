"""How a kernel walks its tiles, and each tile its runs.

A tile's line (layout.py) is its first row (a multiple of 8; -1: an unused tile), then begin and end of each run. Where
queries walk keys, a used tile has at least one key. Where keys walk queries, a line ends with the tile's group, whose
tiles have the same runs, its place there, and begin and end of the rows that are the tile's own.
"""

import dataclasses
from collections.abc import Hashable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from moc_jax.attention.layout import ALIGN, Tiles
from moc_jax.attention.pallas_gpu.device import COMPUTE, Hopper, KernelTiling
from moc_jax.shapes import Array, Int

CACHE = 40 * 2**20  # bytes of keys and values that stay in the level-2 cache (50 MiB on an H100, 60 on an H200)
ROWS = 64  # of one warpgroup: the smallest height of a Hopper matrix product
TILE = ROWS * COMPUTE  # rows of a tile

Ref = Any  # a view of memory inside a kernel; Pallas has no public type for it


@dataclasses.dataclass(frozen=True)
class Job:
    """What a kernel knows when it is compiled."""

    tiling: KernelTiling
    thread_blocks: int  # persistent
    batch: int
    heads: int  # of q
    dim: int
    tiles: int  # per scene and head
    runs: int  # per tile
    unit: int  # rows at whose multiples blocks start
    per_head: bool  # whether each head has its own tiles
    rows: int  # of the array whose runs are walked
    sorted_rows: bool  # whether q is [B, H, S, D] and not [B, Q, H, D]
    heads_first: bool  # whether tiles go through all heads before the next tile's turn comes
    in_turn: bool  # whether tiles wait for those before them
    dealt: bool  # whether the table of tiles says how they are dealt
    interpret: Hashable | None  # the interpreter's parameters

    @classmethod
    def of(cls, q, k, tiles: Tiles, backend: Hopper, tiling: KernelTiling, *, over_keys: bool, sorted_rows: bool):
        """For q in either order and k [B, N, H, D]; `over_keys`: the runs are of keys, else of queries."""
        batch, tokens, heads, dim = k.shape
        queries = q.shape[2 if sorted_rows else 1]
        if tokens % ALIGN or queries % ALIGN or min(tokens, queries) < TILE:
            raise ValueError(
                f"{tokens} tokens, {queries} queries: both must be multiples of {ALIGN}, at least {TILE}; pad them"
            )
        return cls(
            tiling=tiling,
            # The interpreter runs one thread block after the other: they could not wait for each other.
            thread_blocks=1 if backend.interpret is not None and not over_keys else backend.thread_blocks,
            batch=batch,
            heads=q.shape[1] if sorted_rows else heads,
            dim=dim,
            tiles=tiles.count,
            runs=(tiles.table.shape[3] - (1 if over_keys else 5)) // 2,
            unit=ALIGN if over_keys else tiling.block,
            per_head=tiles.table.shape[1] > 1,
            rows=tokens if over_keys else queries,
            sorted_rows=sorted_rows,
            heads_first=2 * k.nbytes <= batch * CACHE or not over_keys,
            in_turn=not over_keys,
            dealt=over_keys and tiles.deal is not None and 2 * k.nbytes <= batch * CACHE,
            interpret=backend.interpret,
        )

    def query_rows(self, scene, head, rows):
        """Index of rows of q or d_out."""
        return (scene, head, rows) if self.sorted_rows else (scene, rows, head)


def each_tile(table_gmem_ref, job: Job, body, carry, deal_gmem_ref=None):
    """Folds body(item, first row, its line of the table, tiles before it, carry) -> carry over the used tiles of this
    thread block, in an order that all its warpgroups share; (tiles, carry). An item is (scene, head, tile).
    """
    deal = [deal_gmem_ref[i] for i in range(1, 4)] if deal_gmem_ref is not None and job.dealt else None
    looks = _looks(job) if deal is None else _dealt_looks(deal, job)

    def one(i, before):
        used, carry = before
        item, there = _item(i, lax.axis_index("block"), job, deal)
        line = table_gmem_ref.at[item[0], item[1] if job.per_head else 0, item[2]]
        start = line[0]
        return lax.cond(
            there & (start >= 0),
            lambda: (used + 1, body(item, pl.multiple_of(start, ALIGN), line, used, carry)),
            lambda: (used, carry),
        )

    return lax.fori_loop(0, looks, one, (jnp.int32(0), carry))


def deal(loads: Int[Array, "B G"], longest: int, heads: int, thread_blocks: int) -> Int[Array, "3"]:
    """How tiles are dealt that are so much work each, the same for all heads: (first, long, rounds).

    Tiles that are more than `longest` and follow each other, from tile `first` on, are dealt first, one to each of
    `long` thread blocks, which then sit out `rounds` rounds of all others. If there are too many, none count as long.
    """
    loads = loads.reshape(-1)
    index, is_long = jnp.arange(loads.size), loads > longest
    count, first = jnp.sum(is_long), jnp.min(jnp.where(is_long, index, loads.size))
    last = jnp.max(jnp.where(is_long, index, 0))
    others, work = jnp.sum((loads > 0) & ~is_long), jnp.sum(jnp.where(is_long, 0, loads))
    rounds_of_long = jnp.max(loads) * others // jnp.maximum(work, 1)
    count = jnp.where((last - first + 1 == count) & (2 * count * heads <= thread_blocks), count, 0)
    most = -(-others * heads // (thread_blocks - count * heads))  # after which there are no others
    dealt = jnp.stack([first, count * heads, jnp.minimum(rounds_of_long, most)])
    return jnp.where(count > 0, dealt, 0).astype(jnp.int32)


def _looks(job: Job) -> int:
    """How many items a thread block looks at, at most."""
    if job.heads_first:
        return -(-job.batch * job.heads * job.tiles // job.thread_blocks)
    return job.batch * job.heads * -(-job.tiles // job.thread_blocks)


def _dealt_looks(deal, job: Job):
    """The same for dealt tiles."""
    _, long, rounds = deal
    others = job.batch * job.heads * job.tiles - long - rounds * (job.thread_blocks - long)
    return rounds + 1 + lax.div(jnp.maximum(others, 0) + job.thread_blocks - 1, job.thread_blocks)


def _item(i, block, job: Job, deal=None):
    """The i-th item of a thread block, and whether it exists.

    Neighbours in time share a head's keys, which then come from the cache: heads follow each other, and a head's tiles
    go round all thread blocks. Tiles that take longest or shortest (text, a short last chunk, unused ones) have the
    same places in every head, so each head begins with another thread block, all around evenly; else some blocks would
    get such a tile in every head and end late.

    Where all heads' keys fit the cache, or tiles take turns, tiles follow each other and heads go round: those of text,
    which take longest, come first, and few tiles wait for each other at once, since heads don't. Where the table says
    so (`deal`), whoever has one of these gets fewer of the others. As each thread block takes its tiles in their order,
    and all thread blocks run at once, the first tile that is not done never waits.
    """
    rows = job.batch * job.heads
    if job.heads_first:
        index, first = block + i * job.thread_blocks, 0
        if deal is not None:
            first, long, rounds = deal
            has_long = jnp.where(block < long, 1, 0)
            turn = i - has_long + rounds * has_long  # of the others, which those with a long tile join late
            early = turn * (job.thread_blocks - long) + block - long
            late = rounds * (job.thread_blocks - long) + (turn - rounds) * job.thread_blocks + block
            index = jnp.where((i == 0) & (block < long), block, long + jnp.where(turn < rounds, early, late))
        tile_row, head = lax.div(index, job.heads), lax.rem(index, job.heads)
        there = index < rows * job.tiles
        tile_row = lax.rem(tile_row + first, job.batch * job.tiles)
        scene, tile = lax.div(tile_row, job.tiles), lax.rem(tile_row, job.tiles)
    else:
        rounds = -(-job.tiles // job.thread_blocks)
        row = lax.div(i, rounds)
        place = lax.rem(block + job.thread_blocks - lax.div(row * job.thread_blocks, rows), job.thread_blocks)
        tile = place + lax.rem(i, rounds) * job.thread_blocks
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
        self._job, self._legs, self.count = job, [], jnp.int32(0)  # blocks
        for r in range(job.runs):
            leg, count = _leg(line, r, job)
            self._legs.append((self.count, leg))
            self.count += count

    def at(self, s):
        """(row, low, high) of block s."""
        before, leg = self._legs[0]
        for first, other in self._legs[1:]:
            there = s >= first
            before = jnp.where(there, first, before)
            leg = _Leg(*(jnp.where(there, new, old) for new, old in zip(other, leg, strict=True)))
        return _block(leg, s - before, self._job)


def walk(line, job: Job, step, carry, steps):
    """Folds step(carry, steps so far, run, row, low, high) over a tile's runs as `Way` has them; (carry, steps so far).

    One run after the other, which takes fewer registers than choosing among them at each step.
    """

    def one_run(r, state):
        leg, count = _leg(line, r, job)
        carry, steps = state

        def one(s, carry):
            return step(carry, steps + s, r, *_block(leg, nth_block(s, count) if job.in_turn else s, job))

        carry = lax.fori_loop(0, count, one, carry)
        return carry, steps + count

    if job.runs == 1:
        return one_run(0, (carry, steps))
    return lax.fori_loop(0, job.runs, one_run, (carry, steps))


def nth_block(s, count):
    """The block that is the s-th of a run whose tiles take turns: its first comes last.

    Runs of two groups may meet within a block. It is the last of one and the first of the other, whose tiles come after
    those of the first: visited first, it would keep them from anything until the first group is done.
    """
    return jnp.where(s + 1 < count, s + 1, 0)


class _Leg(NamedTuple):
    first: Array  # row of the first block
    begin: Array  # of the run
    end: Array


def _leg(line, r, job: Job) -> tuple[_Leg, Array]:
    """A tile's run, and in how many blocks it comes."""
    begin, end, block = line[1 + 2 * r], line[2 + 2 * r], job.tiling.block
    first = begin - lax.rem(begin, job.unit)
    return _Leg(first, begin, end), jnp.where(begin < end, lax.div(end - first + block - 1, block), 0)


def _block(leg: _Leg, s, job: Job):
    turn = leg.first + s * job.tiling.block
    row = pl.multiple_of(jnp.minimum(turn, job.rows - job.tiling.block), ALIGN)
    return row, jnp.maximum(leg.begin, turn) - row, leg.end - row
