"""Runs of consecutive rows copied to other places: what a gather does whose indices come in runs.

The output is cut into tiles. What a tile has of a run is a *piece*; `_pieces` lists the pieces of all tiles, one tile
after the other, in scalar memory. The kernel's grid goes through the tiles, and through the pieces of each:

(a) Fetch. A piece's rows come from HBM whole tiles of memory of 8 rows at a time, to where they belong in a buffer in
    VMEM but for a shift of less than two such tiles. The next piece's rows, which may be the next tile's, are on their
    way meanwhile, to the other of two buffers.
(b) Shift. Some rows go as 32-bit words to a buffer from which words can be loaded at any offset; bfloat16 has two rows
    in a word, and an odd shift puts the halves of two words together.
(c) Select. Where its pieces don't cover a tile it is cleared first; each piece then leaves the other rows as they are.

The first axis of the grid is two halves of the tiles, for chips of two cores; each half begins its own fetches.

Bytes: rows of runs once, 8 rows more at both ends; the output once. No FLOPs.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from moc_jax.attention.layout import round_up
from moc_jax.attention.pallas_tpu.device import LANES, ROWS, Chip
from moc_jax.shapes import Array, Float, Int, Int32, typed

_ROWS_OF_TILE = 1024
_BUFFER = 2**21  # bytes; four of them fit all chips
_ROWS_AT_ONCE = 256  # that the unrolled code shifts
_HIGH = 16  # bits of the list's second column from which on it says where a piece ends


@dataclasses.dataclass(frozen=True)
class _Walk:
    """What the kernel knows of its work when it is compiled."""

    tile: int  # rows of a tile
    tiles: int  # of a scene
    pieces: int  # at most, of a scene
    whole: int  # rows of x in whole tiles of memory; what is behind comes from an array of its own
    group: int  # heads
    dim: int
    packed: int  # rows in a word

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

    @property
    def at_once(self) -> int:
        return math.gcd(_ROWS_AT_ONCE, self.tile)

    @property
    def words(self) -> int:
        return self.at_once // self.packed

    @property
    def columns(self) -> list[tuple[int, int]]:
        """First and number of those that are shifted at once."""
        return [(first, min(LANES, self.dim - first)) for first in range(0, self.dim, LANES)]


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
    tile = min(tile or _ROWS_OF_TILE, round_up(rows, 2 * ROWS))
    assert tile % (2 * ROWS) == 0, tile
    assert tile < 2**_HIGH // 2, tile
    group = _heads_of_group(heads, (tile + 2 * ROWS) * round_up(dim, LANES) * x.dtype.itemsize)
    x = x if x.shape[2] >= ROWS else _pad(x, ROWS)
    whole, tiles = x.shape[2] // ROWS * ROWS, -(-rows // tile)
    inputs = [x] if whole == x.shape[2] else [x, _pad(x[:, :, whole:], ROWS)]
    walk = _Walk(tile, tiles, tiles + source.shape[1], whole, group, dim, 4 // x.dtype.itemsize)
    return pl.pallas_call(
        functools.partial(_kernel, walk=walk),
        name="moc_move",
        out_shape=jax.ShapeDtypeStruct((batch, heads, rows, dim), x.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(walk.halves, batch, heads // group, walk.steps),
            in_specs=[pl.BlockSpec(memory_space=pl.ANY) for _ in inputs],
            out_specs=pl.BlockSpec(
                (pl.squeezed, group, tile, dim), lambda half, b, heads, step, *_: (b, heads, walk.block(half, step), 0)
            ),
            scratch_shapes=[
                pltpu.VMEM((2, group, tile + 2 * ROWS, dim), x.dtype),
                pltpu.VMEM((walk.words + 2 * ROWS // walk.packed, LANES), jnp.uint32),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        compiler_params=chip.params("pppa"),
        cost_estimate=pl.CostEstimate(
            flops=0, transcendentals=0, bytes_accessed=2 * batch * heads * rows * dim * x.dtype.itemsize
        ),
    )(*_pieces(source, target, size, walk), *inputs)


def _heads_of_group(heads: int, bytes_per_head: int) -> int:
    """As many heads as a buffer has room for, of which there are two for what comes and two for what goes."""
    fit = max(1, _BUFFER // bytes_per_head)
    return max(n for n in range(1, heads + 1) if heads % n == 0 and n <= fit)


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


def _kernel(
    first_smem_ref,  # of each tile the first piece, and the end
    pieces_smem_ref,
    *refs,  # x's whole tiles of memory and what is behind, in HBM; the tile [group, tile, D]; buffers and semaphores
    walk: _Walk,
):
    """A step of the grid: fetches the next piece ahead, and puts those of the tile in their place."""
    *inputs_hbm_ref, out_vmem_ref, buffers_vmem_ref, words_vmem_ref, semaphores = refs
    assert out_vmem_ref.shape == (walk.group, walk.tile, walk.dim)
    assert buffers_vmem_ref.shape == (2, walk.group, walk.tile + 2 * ROWS, walk.dim)
    half, scene, group, step = (pl.program_id(i) for i in range(4))
    tile = half * walk.steps + step

    def first_of(tile):
        return first_smem_ref[scene * (walk.tiles + 1) + jnp.minimum(tile, walk.tiles)]

    def lookround_up(piece):
        line = (scene * walk.pieces + piece) * 2
        row, ends = pieces_smem_ref[line], pieces_smem_ref[line + 1]
        return row, ends & (2**_HIGH - 1), ends >> _HIGH

    def each_copy(buffer, piece, do):
        row, low, high = piece
        start, stop = _down(row + low), _down(row + high + ROWS - 1)
        place = _down(low) + ROWS
        count = pl.multiple_of(jnp.minimum(stop, walk.whole) - start, ROWS)

        def one(source_hbm_ref, begin, place, count):
            heads = pl.ds(group * walk.group, walk.group)
            source = source_hbm_ref.at[scene, heads, pl.ds(begin, count)]
            do(
                pltpu.make_async_copy(
                    source, buffers_vmem_ref.at[buffer, :, pl.ds(place, count)], semaphores.at[buffer]
                )
            )

        if len(inputs_hbm_ref) == 1:
            one(inputs_hbm_ref[0], start, place, count)
            return
        pl.when(count > 0)(lambda: one(inputs_hbm_ref[0], start, place, count))
        behind = pl.multiple_of(place + walk.whole - start, ROWS)
        pl.when(stop > walk.whole)(lambda: one(inputs_hbm_ref[1], 0, behind, ROWS))

    begin, end, last = first_of(tile), first_of(tile + 1), first_of((half + 1) * walk.steps)

    def one_piece(piece, _):
        after, buffer = piece + 1, lax.rem(piece + 1, 2)  # piece may be -1
        pl.when(after < last)(lambda: each_copy(buffer, lookround_up(after), lambda copy: copy.start()))

        @pl.when(piece >= begin)
        def _():
            row, low, high = lookround_up(piece)
            each_copy(1 - buffer, (row, low, high), lambda copy: copy.wait())
            shift = lax.rem(row + low, jnp.int32(ROWS)) - lax.rem(low, jnp.int32(ROWS)) + ROWS
            _put(buffers_vmem_ref.at[1 - buffer], words_vmem_ref, out_vmem_ref, shift, low, high, walk)

        return 0

    def clear():
        def one_head(head, _):
            out_vmem_ref[head] = jnp.zeros((walk.tile, walk.dim), out_vmem_ref.dtype)
            return 0

        lax.fori_loop(0, walk.group, one_head, 0)

    _, low, high = lookround_up(begin)
    covered = (begin < end) & (high - low == walk.tile)
    pl.when((tile < walk.tiles) & ~covered)(clear)
    lax.fori_loop(jnp.where(step == 0, begin - 1, begin), end, one_piece, 0)


def _put(rows_vmem_ref, words_vmem_ref, out_vmem_ref, shift, low, high, walk: _Walk) -> None:
    """(b), (c) Sets the tile's rows [low, high) to the buffer's, which are `shift` rows further on."""
    at_once, packed = walk.at_once, walk.packed
    word, odd = lax.div(shift, jnp.int32(packed)), lax.rem(shift, jnp.int32(packed)) == 1

    def some_rows(i, _):
        first = pl.multiple_of(i * at_once, 2 * ROWS)
        row = first + packed * lax.broadcasted_iota(jnp.int32, (walk.words, min(LANES, walk.dim)), 0)
        mask = _mask_of_words(row, low, high, packed)

        def one_head(head, _):
            for begin, count in walk.columns:
                columns, own = pl.ds(begin, count), mask[:, :count]
                here = head, pl.ds(first, at_once), columns
                more = rows_vmem_ref[head, pl.ds(first, at_once + 2 * ROWS), columns]
                words_vmem_ref[:, pl.ds(0, count)] = pltpu.bitcast(more, jnp.uint32)
                new = words_vmem_ref[pl.ds(word, walk.words), pl.ds(0, count)]
                if packed == 2:
                    after = words_vmem_ref[pl.ds(word + 1, walk.words), pl.ds(0, count)]
                    new = jnp.where(odd, (new >> 16) | (after << 16), new)
                old = pltpu.bitcast(out_vmem_ref[here], jnp.uint32)
                out_vmem_ref[here] = pltpu.bitcast((new & own) | (old & ~own), out_vmem_ref.dtype)
            return 0

        return lax.fori_loop(0, walk.group, one_head, 0)

    lax.fori_loop(lax.div(low, jnp.int32(at_once)), lax.div(high + at_once - 1, jnp.int32(at_once)), some_rows, 0)


def _mask_of_words(row, low, high, packed: int):
    """All bits of the rows in [low, high); `row` is a word's first."""

    def bits(row, mask: int):
        return jnp.where((row >= low) & (row < high), jnp.uint32(mask), jnp.uint32(0))

    return bits(row, 0xFFFFFFFF) if packed == 1 else bits(row, 0xFFFF) | bits(row + 1, 0xFFFF0000)


def _pad(x, size: int):
    """Along the third axis."""
    return jnp.pad(x, ((0, 0), (0, 0), (0, size - x.shape[2]), (0, 0)))


def _down(row):
    return pl.multiple_of(lax.div(row, jnp.int32(ROWS)) * ROWS, ROWS)
