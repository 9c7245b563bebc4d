"""Sizes of blocks: which rows a kernel takes at a time, by chip and by what there is to attend to.

Large blocks cost less per pair and waste more where a run ends. `tuned.py` holds the best sizes of each chip for long
scenes; here they are cut down to what a scene has: blocks no longer than its chunks, shots or captions need, sizes that
divide one another as kernels want them, and all of it within the chip's vector memory.
"""

import dataclasses
import itertools
from collections.abc import Iterable
from typing import Literal, NamedTuple

import jax.numpy as jnp

from moc_jax.attention.layout import by_shot, round_up
from moc_jax.attention.pallas_tpu import flash, flash_backward, tuned
from moc_jax.attention.pallas_tpu.device import LANES, ROWS, Chip
from moc_jax.config import MoCConfig
from moc_jax.scene import ChunkTable

Kernel = Literal["anchors", "picks"]
_FORWARD = {"anchors": tuned.ANCHORS, "picks": tuned.PICKS}
# From the second table only what is computed at once, where it divides more keys: the first is for blocks that hold
# certain chunks.
_BACKWARD = {"anchors": (tuned.ANCHOR_GRADIENTS,), "picks": (tuned.PICK_GRADIENTS, tuned.ANCHOR_GRADIENTS)}

_MOST = 2048  # rows of any block
_WORTH = 256  # rows that take as long as what a block costs beside its rows
_TRANSPOSED_FROM = 1024  # rows of both blocks: smaller ones wait for the transposed sums
_SMALL_PARTS = 2.5  # how much longer a block takes whose parts are 128 x 128: each waits for the matrix units


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blocks:
    """All sizes of one attention."""

    anchors: flash.ForwardTiling  # video queries over their anchors
    text: flash.ForwardTiling  # captions over theirs
    picks: flash.ForwardTiling  # sorted queries over a chunk
    gradient_keys: int  # rows of a tile of anchors' keys
    anchor_gradients: flash_backward.GradientTiling
    pick_gradient_keys: int  # rows of a tile of a chunk's keys
    pick_gradients: flash_backward.GradientTiling
    span: int | None = None  # queries whose pairs are spread and merged at once; None: as many as fit
    span_step: int | None = None  # queries of a step of that

    def __post_init__(self):
        sizes = (self.anchors.queries, self.anchor_gradients.block, self.text.queries)
        if any(self.align % size for size in sizes):
            raise ValueError(f"{self}: of the blocks of ordered queries, {sizes}, each must divide the largest")
        if self.picks.queries % self.pick_gradients.block:
            raise ValueError(f"{self}: blocks of sorted queries must divide their tiles")

    @property
    def align(self) -> int:
        """Rows at whose multiples a segment's queries start."""
        return max(self.anchors.queries, self.anchor_gradients.block, self.text.queries)

    @property
    def most_keys(self) -> int:
        """Rows of the largest block of keys."""
        sizes = (self.anchors.keys, self.text.keys, self.picks.keys, self.gradient_keys, self.pick_gradient_keys)
        return max(sizes)


def blocks(cfg: MoCConfig, table: ChunkTable, dim: int, dtype, chip: Chip) -> Blocks:
    """The sizes for a config on a chip."""
    size, (tokens, chunks) = _Size(dim, jnp.dtype(dtype).itemsize), (table.chunk_of.shape[1], table.kind.shape[1])
    segment, keys = _segment_and_anchors(cfg, table)
    chunk = _Run(table.max_chunk + ROWS - 1)
    pickers = _Run(max(1, tokens * cfg.top_k // chunks), known=False)
    caption = _Run(max(1, table.text_tokens // ((table.max_shots or chunks) + 1)), known=False)
    anchors = _forward(chip, "anchors", size, segment, keys)
    picks = _forward(chip, "picks" if chunk.length <= _MOST else "anchors", size, pickers, [chunk])
    if chunk.length <= _MOST:
        picks = _with_short(chip, picks, table.max_chunk)
    own = _Run(segment.length + ROWS - 1, segment.known)
    gradient_keys, anchor_gradients = _backward(chip, "anchors", size, own, segment, tile=anchors.queries)
    pick_gradient_keys, pick_gradients = _backward(chip, "picks", size, chunk, pickers, tile=picks.queries)
    return Blocks(
        anchors=anchors,
        text=_forward(chip, "anchors", size, caption, [_Run(tokens + ROWS - 1)], most_queries=LANES),
        picks=picks,
        gradient_keys=gradient_keys,
        anchor_gradients=anchor_gradients,
        pick_gradient_keys=pick_gradient_keys,
        pick_gradients=pick_gradients,
    )


def anchor_keys(cfg: MoCConfig, table: ChunkTable) -> int:
    """How many keys a video query's anchors have, about."""
    return sum(run.length for run in _segment_and_anchors(cfg, table)[1])


@dataclasses.dataclass(frozen=True)
class _Run:
    """Rows that are walked, or cut into tiles, from their first on."""

    length: int
    known: bool = True  # else the length is a mean, and where the last block ends is left to chance

    def cost(self, block: int) -> float:
        """Rows that blocks cover, and the rows' worth of what each costs beside them."""
        covered = -(-self.length // block) * block if self.known else max(block, self.length + block / 2)
        return covered * (1 + _WORTH / block)


def _segment_and_anchors(cfg: MoCConfig, table: ChunkTable) -> tuple[_Run, list[_Run]]:
    """Video queries that share their anchors, and the keys that those read, as far as shapes tell."""
    video = max(1, table.chunk_of.shape[1] - table.text_tokens)
    shots = table.max_shots or table.kind.shape[1]
    shot, chunk = _Run(-(-video // shots), known=shots == 1), _Run(table.max_chunk)
    window = 2 * cfg.window + 1 if cfg.self_anchor == "window" else 1
    own = {"shot": shot, "none": None}.get(cfg.self_anchor, _Run(min(video, window * table.max_chunk)))
    read = [_Run(video) if cfg.mode == "dense" else own, _Run(table.text_tokens) if table.text_tokens else None]
    keys = [_Run(run.length + ROWS - 1, run.known) for run in read if run]
    return shot if by_shot(cfg) else chunk, keys or [chunk]


class _Size(NamedTuple):
    """What a row takes."""

    dim: int  # of heads
    itemsize: int

    def forward(self, t: flash.ForwardTiling) -> int:
        """Bytes of vector memory of the forward kernel: q, out, k and v twice, the state, and parts under way."""
        wide = round_up(self.dim, LANES)
        state = 4 * t.queries * (3 * LANES + 2 * wide)
        parts = 4 * t.compute_queries * t.compute_keys * (t.ahead + 2)
        return 4 * self.itemsize * wide * (t.queries + t.keys) + state + parts

    def backward(self, t: flash_backward.GradientTiling, rows: int) -> int:
        """The same of the backward kernel: q and d_out twice, k, v, dk and dv twice and as they are summed, dq."""
        wide, size = round_up(self.dim, LANES), self.itemsize
        queries = t.block * wide * (4 * size + 12)
        return queries + rows * wide * (10 * size + 8) + 4 * t.block * t.at_once * size // 2


def _forward(
    chip: Chip, kernel: Kernel, size: _Size, queries: _Run, keys: list[_Run], most_queries: int = _MOST
) -> flash.ForwardTiling:
    """The tiling of the least cost that fits: queries in tiles, over blocks of keys."""
    most = min(_FORWARD[kernel][chip.name][0], most_queries)
    options = itertools.product(_candidates([queries], most), _candidates(keys, _MOST))

    def cost(t: flash.ForwardTiling) -> float:
        small = _SMALL_PARTS if max(t.compute_queries, t.compute_keys) <= LANES else 1.0
        return small * queries.cost(t.queries) * sum(run.cost(t.keys) for run in keys)

    tilings = [forward_tiling(chip, kernel, q, kv) for q, kv in options]
    return min((t for t in tilings if size.forward(t) <= chip.vmem_limit), key=cost)


def _with_short(chip: Chip, picks: flash.ForwardTiling, longest_chunk: int) -> flash.ForwardTiling:
    """Chunks that begin at a multiple of 8 may need 128 rows less than others."""
    rows = picks.keys - LANES
    if not longest_chunk <= rows < picks.keys:
        return picks
    return dataclasses.replace(picks, short=(rows, forward_tiling(chip, "picks", picks.queries, rows).compute_keys))


def forward_tiling(chip: Chip, kernel: Kernel, queries: int, keys: int) -> flash.ForwardTiling:
    """Blocks of these sizes, with what is computed at once on the chip cut down to what divides them."""
    _, _, at_once, keys_at_once, ahead, *of_short = _FORWARD[kernel][chip.name]
    return flash.ForwardTiling(
        queries=queries,
        keys=keys,
        compute_queries=_divisor(queries, at_once),
        compute_keys=max(_divisor(keys, most) for most in (keys_at_once, *of_short)),
        ahead=ahead,
    )


def _backward(
    chip: Chip, kernel: Kernel, size: _Size, keys: _Run, queries: _Run, tile: int
) -> tuple[int, flash_backward.GradientTiling]:
    """(rows of a tile of keys, tiling) of the least cost that fits; blocks of queries divide `tile`."""
    most, most_keys, *_ = _BACKWARD[kernel][0][chip.name]
    divisors = [block for block in range(LANES, tile + 1, LANES) if tile % block == 0]
    small = [block for block in divisors if block <= most]
    options = [
        (rows, backward_tiling(chip, kernel, block, rows, size.dim))
        for block in (small if 2 * max(small) >= min(most, tile) else divisors)
        for rows in _candidates([keys], max(most_keys, _whole(keys)))
    ]
    fitting = [(rows, t) for rows, t in options if size.backward(t, rows) <= chip.vmem_limit]
    return min(fitting, key=lambda option: keys.cost(option[0]) * queries.cost(option[1].block))


def backward_tiling(chip: Chip, kernel: Kernel, block: int, rows: int, dim: int) -> flash_backward.GradientTiling:
    """Blocks of these sizes, with the keys computed at once on the chip cut down to what divides them."""
    tables = _BACKWARD[kernel]
    at_once = max(_divisor(rows, table[chip.name][2]) for table in tables)
    large = min(block, rows) >= _TRANSPOSED_FROM and dim <= LANES
    return flash_backward.GradientTiling(block=block, at_once=at_once, transposed=tables[0][chip.name][3] and large)


def _candidates(runs: Iterable[_Run], most: int) -> list[int]:
    """Sizes to choose from: powers of two, and what holds a run as a whole."""
    powers = [LANES << i for i in range((_MOST // LANES).bit_length())]
    whole = [-(-run.length // unit) * unit for run in runs if run.known for unit in (LANES, 2 * LANES)]
    return sorted({size for size in (*powers, *whole) if size <= most})


def _whole(run: _Run) -> int:
    """Rows of the block that holds the run, if it may."""
    rows = -(-run.length // (2 * LANES)) * 2 * LANES
    return rows if run.known and rows <= _MOST else LANES


def _divisor(size: int, most: int) -> int:
    """The largest multiple of 128 that divides a size and is no larger than `most`."""
    return max(x for x in range(LANES, max(LANES, min(size, most)) + 1, LANES) if size % x == 0)
