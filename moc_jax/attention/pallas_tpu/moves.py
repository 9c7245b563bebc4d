"""Runs of consecutive rows, or of columns, copied to other places: what a gather does whose indices come in runs.

The output is cut into tiles. What a tile has of a run is a *piece*; `_pieces` lists the pieces of all tiles, one tile
after the other, in scalar memory. A kernel's grid goes through the tiles, and through the pieces of each:

(a) Fetch. A piece's rows come from HBM whole tiles of memory at a time (8 rows, or 128 columns), to where they belong
    in a buffer in VMEM but for a shift of less than two such tiles. The next piece's rows, which may be the next
    tile's, are on their way meanwhile, to the other of two buffers.
(b) Shift. Rows go as 32-bit words to where they can be loaded at any offset; bfloat16 has two rows in a word, and an
    odd shift puts the halves of two words together. Columns rotate by lanes.
(c) Select. Where its pieces don't cover a tile it is filled first; each piece then leaves the other rows as they are.

The first axis of the grid is two halves of the tiles, for chips of two cores; each half begins its own fetches.

Bytes: rows of runs once, whole tiles of memory at both ends; the output once. No FLOPs.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from moc_jax.attention.layout import round_up
from moc_jax.attention.pallas_tpu.device import LANES, ROWS, Chip
from moc_jax.shapes import Array, Float, Int, Int32, typed

_ROWS_OF_TILE = 1024
_COLUMNS, _MOST_COLUMNS = 1024, 8192  # of a tile: a multiple of the first
_BUFFER = 2**21  # bytes; four of them fit all chips
_ROWS_AT_ONCE = 256  # that the unrolled code shifts
_REGISTERS = 32  # that the unrolled code of columns shifts
_HIGH = 16  # bits of the list's second column from which on it says where a piece ends


@dataclasses.dataclass(frozen=True)
class _Walk:
    """What a kernel knows of its work when it is compiled."""

    tile: int  # rows (or columns) of a tile
    tiles: int  # of a scene
    pieces: int  # at most, of a scene
    unit: int  # rows (or columns) of memory that are copied at least
    whole: int  # of x, in whole units; what is behind comes from an array of its own

    @property
    def halves(self) -> int:
        return min(self.tiles, 2)

    @property
    def steps(self) -> int:
        """Tiles of a half; the last half may have one less."""
        return -(-self.tiles // self.halves)

    def block(self, half, step):
        """The tile of a step; beyond the last, the last again."""
        return jnp.minimum(half * self.steps + step, self.tiles - 1)


@typed
def move(
    x: Float[Array, "B H N D"],
    source: Int[Array, "B S"],
    target: Int[Array, "B S"],
    size: Int[Array, "B S"],
    rows: int,
    *,
    chip: Chip,
    tile: int | None = None,
) -> Float[Array, "B H R D"]:
    """Row target[s] + i of the output [B, H, rows, D] is x's row source[s] + i, for i < size[s]; all others are 0.

    Runs lie inside of x and of the output. Those that aren't empty come in the order of their targets, which don't
    overlap; empty ones may stand anywhere and say anything. bfloat16 and float32.

    Bytes: 4 * B * H * D * rows of bfloat16, half of them read.

    Args:
        chip: That the program is for.
        tile: Rows of a tile, a multiple of 16.
    """
    batch, heads, _, dim = x.shape
    packed = 4 // x.dtype.itemsize  # rows in a word
    tile = min(tile or _ROWS_OF_TILE, round_up(rows, 2 * ROWS))
    assert tile % (2 * ROWS) == 0, tile
    assert tile < 2**_HIGH // 2, tile
    parts = [(first, min(LANES, dim - first)) for first in range(0, dim, LANES)]  # columns that are shifted at once
    group = _heads_of_group(heads, (tile + 2 * ROWS) * len(parts) * LANES * x.dtype.itemsize)
    at_once = math.gcd(_ROWS_AT_ONCE, tile)
    words = at_once // packed
    scratch = [
        pltpu.VMEM((2, group, tile + 2 * ROWS, dim), x.dtype),
        pltpu.VMEM((words + 2 * ROWS // packed, LANES), jnp.uint32),
    ]

    def kernel(first_smem_ref, pieces_smem_ref, *refs, walk: _Walk):
        inputs_hbm_ref, refs = refs[: -2 - len(scratch)], refs[-2 - len(scratch) :]
        out_vmem_ref, semaphores, buffers_vmem_ref, words_vmem_ref = refs
        assert out_vmem_ref.shape == (1, group, tile, dim)
        assert buffers_vmem_ref.shape == (2, group, tile + 2 * ROWS, dim)
        scene, these = pl.program_id(1), pl.ds(pl.program_id(2) * group, group)

        def copy_of(source_hbm_ref, begin, buffer, place, count):
            rows_hbm_ref = source_hbm_ref.at[scene, these, pl.ds(begin, count)]
            target_vmem_ref = buffers_vmem_ref.at[buffer, :, pl.ds(place, count)]
            return pltpu.make_async_copy(rows_hbm_ref, target_vmem_ref, semaphores.at[buffer])

        def put(buffer, shift, low, high):
            def some_rows(i, _):
                first = pl.multiple_of(i * at_once, 2 * ROWS)
                row = first + packed * lax.broadcasted_iota(jnp.int32, (words, parts[0][1]), 0)
                mask = _mask_of_words(row, low, high, packed)

                def one_head(head, _):
                    for part in parts:
                        here, own = (0, head, pl.ds(first, at_once), pl.ds(*part)), mask[:, : part[1]]
                        new = shifted(buffer, part, head, first, shift)
                        old = pltpu.bitcast(out_vmem_ref[here], jnp.uint32)
                        out_vmem_ref[here] = pltpu.bitcast((new & own) | (old & ~own), x.dtype)
                    return 0

                return lax.fori_loop(0, group, one_head, 0)

            lax.fori_loop(*_blocks(low, high, at_once), some_rows, 0)

        def shifted(buffer, part, head, first, shift):
            """Rows from first + shift on, as words: from a buffer whose words can be loaded at any offset."""
            more = buffers_vmem_ref[buffer, head, pl.ds(first, at_once + 2 * ROWS), pl.ds(*part)]
            words_vmem_ref[:, pl.ds(0, part[1])] = pltpu.bitcast(more, jnp.uint32)
            word, odd = lax.div(shift, jnp.int32(packed)), lax.rem(shift, jnp.int32(packed)) == 1
            one, after = (words_vmem_ref[pl.ds(word + i, words), pl.ds(0, part[1])] for i in range(2))
            return one if packed == 1 else jnp.where(odd, (one >> 16) | (after << 16), one)

        def clear():
            def one_head(head, _):
                out_vmem_ref[0, head] = jnp.zeros((tile, dim), x.dtype)
                return 0

            lax.fori_loop(0, group, one_head, 0)

        _each_piece(first_smem_ref, pieces_smem_ref, inputs_hbm_ref, walk, copy_of, put, clear)

    return _call(
        kernel,
        "moc_move",
        x,
        (source, target, size),
        out_shape=jax.ShapeDtypeStruct((batch, heads, rows, dim), x.dtype),
        tile=tile,
        unit=ROWS,
        groups=heads // group,
        block=((group, tile, dim), lambda group, block: (group, block, 0)),
        scratch=scratch,
        chip=chip,
    )


def _mask_of_words(row, low, high, packed: int):
    """All bits of the rows in [low, high); `row` is a word's first."""

    def bits(row, mask: int):
        return jnp.where((row >= low) & (row < high), jnp.uint32(mask), jnp.uint32(0))

    return bits(row, 0xFFFFFFFF) if packed == 1 else bits(row, 0xFFFF) | bits(row + 1, 0xFFFF0000)


def _heads_of_group(heads: int, bytes_per_head: int) -> int:
    """As many heads as a buffer has room for, of which there are two for what comes and two for what goes."""
    fit = max(1, _BUFFER // bytes_per_head)
    return max(n for n in range(1, heads + 1) if heads % n == 0 and n <= fit)


@typed
def move_lanes(
    x: Int32[Array, "B M N"],
    source: Int[Array, "B S"],
    target: Int[Array, "B S"],
    size: Int[Array, "B S"],
    columns: int,
    fill: int,
    *,
    chip: Chip,
    tile: int | None = None,
) -> Int32[Array, "B M R"]:
    """`move` along the last axis: column target[s] + i of the output [B, M, columns] is x's column source[s] + i.

    Columns of no run are `fill`. Bytes: 8 * B * M * columns, half of them read.

    Args:
        tile: Columns of a tile, a multiple of 128.
    """
    batch, lines, _ = x.shape
    fit = max(1, _BUFFER // (4 * round_up(lines, ROWS)) // _COLUMNS)
    tile = min(tile or fit * _COLUMNS, _MOST_COLUMNS, round_up(columns, LANES))
    assert tile % LANES == 0, tile
    at_once = math.gcd(tile // LANES, max(1, _REGISTERS // -(-lines // ROWS)))

    def kernel(first_smem_ref, pieces_smem_ref, *refs, walk: _Walk):
        *inputs_hbm_ref, out_vmem_ref, semaphores, buffers_vmem_ref = refs
        assert out_vmem_ref.shape == (1, lines, tile)
        assert buffers_vmem_ref.shape == (2, lines, tile + 2 * LANES)
        scene = pl.program_id(1)
        lane = lax.broadcasted_iota(jnp.int32, (lines, LANES), 1)

        def copy_of(source_hbm_ref, begin, buffer, place, count):
            lanes = source_hbm_ref.at[scene, :, pl.ds(begin, count)]
            return pltpu.make_async_copy(
                lanes, buffers_vmem_ref.at[buffer, :, pl.ds(place, count)], semaphores.at[buffer]
            )

        def put(buffer, shift, low, high):
            ahead = lax.div(shift, jnp.int32(LANES))
            turn = lax.rem(shift, jnp.int32(LANES))
            own = lane < LANES - turn  # the others are the next vector's

            def turned(vector):
                at = pl.ds(pl.multiple_of((vector + ahead) * LANES, LANES), LANES)
                return pltpu.roll(buffers_vmem_ref[buffer, :, at], (LANES - turn) & (LANES - 1), 1)

            def some_vectors(i, before):
                for j in range(at_once):
                    vector = i * at_once + j
                    here = pl.ds(pl.multiple_of(vector * LANES, LANES), LANES)
                    after = turned(vector + 1)
                    column = vector * LANES + lane
                    new, old = jnp.where(own, before, after), out_vmem_ref[0, :, here]
                    out_vmem_ref[0, :, here] = jnp.where((column >= low) & (column < high), new, old)
                    before = after
                return before

            blocks = _blocks(low, high, at_once * LANES)
            lax.fori_loop(*blocks, some_vectors, turned(blocks[0] * at_once))

        def clear():
            out_vmem_ref[0] = jnp.full((lines, tile), fill, jnp.int32)

        _each_piece(first_smem_ref, pieces_smem_ref, inputs_hbm_ref, walk, copy_of, put, clear)

    return _call(
        kernel,
        "moc_move_lanes",
        x,
        (source, target, size),
        out_shape=jax.ShapeDtypeStruct((batch, lines, columns), jnp.int32),
        tile=tile,
        unit=LANES,
        groups=1,
        block=((lines, tile), lambda group, block: (0, block)),
        scratch=[pltpu.VMEM((2, lines, tile + 2 * LANES), jnp.int32)],
        chip=chip,
    )


# ----------------------------------------------------------------------------------------------------- what both do


def _call(kernel, name: str, x, runs, *, out_shape, tile: int, unit: int, groups: int, block, scratch, chip: Chip):
    """The kernel over two halves of the tiles, scenes, groups of heads, tiles of a half."""
    if x.shape[2] < unit:
        x = _pad(x, unit)
    whole = x.shape[2] // unit * unit
    inputs = [x] if whole == x.shape[2] else [x, _pad(x[:, :, whole:], unit)]
    tiles = -(-out_shape.shape[2] // tile)
    source, target, size = runs
    walk = _Walk(tile, tiles, tiles + source.shape[1], unit, whole)
    shape, at = block

    def out_at(half, scene, group, step, *_):
        return scene, *at(group, walk.block(half, step))

    moved = math.prod(out_shape.shape) * x.dtype.itemsize
    return pl.pallas_call(
        functools.partial(kernel, walk=walk),
        name=name,
        out_shape=out_shape,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(walk.halves, x.shape[0], groups, walk.steps),
            in_specs=[pl.BlockSpec(memory_space=pl.ANY) for _ in inputs],
            out_specs=pl.BlockSpec((1, *shape), out_at),
            scratch_shapes=[pltpu.SemaphoreType.DMA((2,)), *scratch],
        ),
        compiler_params=chip.params("pppa"),
        cost_estimate=pl.CostEstimate(flops=0, transcendentals=0, bytes_accessed=2 * moved),
    )(*_pieces(source, target, size, walk), *inputs)


def _pieces(source, target, size, walk: _Walk) -> tuple[Int32[Array, "_"], Int32[Array, "_"]]:
    """(the first piece of each tile and the end, pieces); per scene, flat. Sums over [pieces, runs], no gathers.

    A piece is x's row that would be the tile's row 0, which may be negative, and the tile's rows [low, high) in one.
    """
    source, target, size = (x.astype(jnp.int32) for x in (source, target, size))
    tile = target // walk.tile
    count = jnp.where(size > 0, (target + size - 1) // walk.tile - tile + 1, 0)
    until = jnp.cumsum(count, axis=1, dtype=jnp.int32)
    before = until - count
    first = jnp.sum(jnp.clip(jnp.arange(walk.tiles + 1)[None, :, None] - tile[:, None], 0, count[:, None]), axis=2)

    index = jnp.arange(walk.pieces, dtype=jnp.int32)[None]
    here = (before[:, None] <= index[..., None]) & (index[..., None] < until[:, None])

    def of_run(x):
        return jnp.sum(jnp.where(here, x[:, None], 0), axis=2)

    row = (index + of_run(tile - before)) * walk.tile
    low = jnp.maximum(of_run(target) - row, 0)
    high = jnp.minimum(of_run(target + size) - row, walk.tile)
    pieces = jnp.stack([row + of_run(source - target), low | high << _HIGH], axis=-1)
    return first.astype(jnp.int32).reshape(-1), pieces.astype(jnp.int32).reshape(-1)


def _each_piece(first_smem_ref, pieces_smem_ref, inputs_hbm_ref, walk: _Walk, copy_of, put, clear: Callable[[], None]):
    """A step of the grid: fetches the next piece ahead, and puts those of the tile in their place.

    copy_of(input, begin, buffer, place, count) is that of `count` rows from `begin` to `place` in a buffer.
    put(buffer, shift, low, high) sets the tile's rows [low, high) to the buffer's, which are `shift` rows further on.
    clear() fills the tile.
    """
    half, scene, step = pl.program_id(0), pl.program_id(1), pl.program_id(3)
    unit, whole = walk.unit, walk.whole
    tile = half * walk.steps + step

    def first_of(tile):
        return first_smem_ref[scene * (walk.tiles + 1) + jnp.minimum(tile, walk.tiles)]

    def look_up(piece):
        line = (scene * walk.pieces + piece) * 2
        row, ends = pieces_smem_ref[line], pieces_smem_ref[line + 1]
        return row, ends & (2**_HIGH - 1), ends >> _HIGH

    def each_copy(buffer, piece, do):
        row, low, high = piece
        start, stop = _down(row + low, unit), _down(row + high + unit - 1, unit)
        place = _down(low, unit) + unit
        count = pl.multiple_of(jnp.minimum(stop, whole) - start, unit)

        if len(inputs_hbm_ref) == 1:
            do(copy_of(inputs_hbm_ref[0], start, buffer, place, count))
            return
        pl.when(count > 0)(lambda: do(copy_of(inputs_hbm_ref[0], start, buffer, place, count)))
        behind = pl.multiple_of(place + whole - start, unit)
        pl.when(stop > whole)(lambda: do(copy_of(inputs_hbm_ref[1], 0, buffer, behind, unit)))

    begin, end, last = first_of(tile), first_of(tile + 1), first_of((half + 1) * walk.steps)

    def one_piece(piece, _):
        after, buffer = piece + 1, lax.rem(piece + 1, 2)  # piece may be -1
        pl.when(after < last)(lambda: each_copy(buffer, look_up(after), lambda copy: copy.start()))

        @pl.when(piece >= begin)
        def _():
            row, low, high = look_up(piece)
            each_copy(1 - buffer, (row, low, high), lambda copy: copy.wait())
            shift = lax.rem(row + low, jnp.int32(unit)) - lax.rem(low, jnp.int32(unit)) + unit
            put(1 - buffer, shift, low, high)

        return 0

    _, low, high = look_up(begin)
    covered = (begin < end) & (high - low == walk.tile)
    pl.when((tile < walk.tiles) & ~covered)(clear)
    lax.fori_loop(jnp.where(step == 0, begin - 1, begin), end, one_piece, 0)


def _blocks(low, high, size: int):
    """[first, end) of the blocks that hold rows of [low, high)."""
    return lax.div(low, jnp.int32(size)), lax.div(high + size - 1, jnp.int32(size))


def _pad(x, size: int):
    """Along the third axis."""
    return jnp.pad(x, ((0, 0), (0, 0), (0, size - x.shape[2]), *((0, 0),) * (x.ndim - 3)))


def _down(x, unit: int):
    return pl.multiple_of(lax.div(x, jnp.int32(unit)) * unit, unit)
