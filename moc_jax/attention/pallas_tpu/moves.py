"""Runs of consecutive rows, or of columns, copied to other places: what a gather does whose indices come in runs.

The output is cut into tiles, and at every begin of a run once more: what lies between two cuts is a *piece*. A grid
goes through the pieces. Each reads a *stretch*: the part of x that its tile would hold if all of it were the piece's.
Stretches begin at whole tiles of memory (8 rows, or 128 columns), so that rows shift in the kernel:

(a) Rows go as float32 to a buffer that can be loaded from any row on; columns rotate by lanes.
(b) A tile's first piece fills what isn't its own; the others leave the rest as it is.

Bytes: a stretch of x for each piece, of which there are as many as tiles and runs; the output once. No FLOPs.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from moc_jax.attention.layout import round_up
from moc_jax.attention.pallas_tpu.device import LANES, ROWS, Chip, heads_of_block
from moc_jax.shapes import Array, Float, Int, Shaped, typed

_LEAST, _MOST = 256, 1024  # rows or columns of a tile
_BUFFER = 2**21  # bytes; four of them fit all chips
_ROWS_AT_ONCE = 256  # that the unrolled code shifts
_REGISTERS = 32  # that the unrolled code of columns shifts
_FIELDS = 5  # of a piece: see `_pieces`


@typed
def move(
    x: Float[Array, "B H _ D"],
    source: Int[Array, "B runs"],
    target: Int[Array, "B runs"],
    size: Int[Array, "B runs"],
    rows: int,
    *,
    chip: Chip,
    tile: int | None = None,
) -> Float[Array, "B H R D"]:
    """Row target[s] + i of the output [B, H, rows, D] is x's row source[s] + i, for i < size[s]; all others are 0.

    Runs lie inside of x and of the output, where they don't overlap; those without rows may say anything. bfloat16 and
    float32.

    Args:
        chip: That the program is for.
        tile: Rows of a tile, a multiple of 16; None: what suits the runs.
    """
    batch, heads, _, dim = x.shape
    tile = tile or _tile(rows, source.shape[1], 2 * ROWS)
    assert tile % (2 * ROWS) == 0, tile
    group = heads_of_block(heads, tile * round_up(dim, LANES) * x.dtype.itemsize, _BUFFER)
    at_once = math.gcd(_ROWS_AT_ONCE, tile)

    def put(x_vmem_ref, out_vmem_ref, here, start, ahead, choose, rows_vmem_ref):
        def one_head(head, _):
            loaded = x_vmem_ref[head, pl.ds(start, at_once + 2 * ROWS)]
            rows_vmem_ref[pl.ds(at_once, at_once + 2 * ROWS)] = loaded.astype(jnp.float32)
            new = rows_vmem_ref[pl.ds(at_once + ahead, at_once)]
            out_vmem_ref[head, here] = choose(new, out_vmem_ref[head, here])
            return 0

        lax.fori_loop(0, group, one_head, 0)

    return _call(
        put,
        "moc_move",
        x,
        (source, target, size),
        (batch, heads, rows, dim),
        (group, tile, dim),
        fill=0,
        at_once=at_once,
        units=(ROWS, 2 * ROWS),
        scratch=[pltpu.VMEM((3 * at_once + 4 * ROWS, dim), jnp.float32)],
        chip=chip,
    )


@typed
def move_lanes(
    x: Shaped[Array, "B lines _"],
    source: Int[Array, "B runs"],
    target: Int[Array, "B runs"],
    size: Int[Array, "B runs"],
    columns: int,
    fill: int,
    *,
    chip: Chip,
    tile: int | None = None,
) -> Shaped[Array, "B lines R"]:
    """`move` along the last axis: column target[s] + i of the output [B, lines, columns] is x's column source[s] + i.

    Columns of no run are `fill`. For numbers of 32 bits.

    Args:
        tile: Columns of a tile, a multiple of 128.
    """
    lines, tile = x.shape[1], tile or _tile(columns, source.shape[1], LANES)
    assert tile % LANES == 0, tile
    at_once = LANES * math.gcd(tile // LANES, max(1, _REGISTERS // -(-lines // ROWS)))
    width = at_once + LANES

    def put(x_vmem_ref, out_vmem_ref, here, start, ahead, choose):
        new = pltpu.roll(x_vmem_ref[0, :, pl.ds(start, width)], lax.rem(2 * width - ahead, jnp.int32(width)), 1)
        out_vmem_ref[0, :, here] = choose(new[:, :at_once], out_vmem_ref[0, :, here])

    return _call(
        put,
        "moc_move_lanes",
        x[:, None],
        (source, target, size),
        (len(x), 1, lines, columns),
        (1, lines, tile),
        fill=fill,
        at_once=at_once,
        units=(LANES, LANES),
        chip=chip,
    )[:, 0]


# ----------------------------------------------------------------------------------------------------- what both do


def _tile(length: int, runs: int, unit: int) -> int:
    """About as many rows as a run has: what a stretch holds beyond its run is read in vain."""
    return min(max(_LEAST, min(1 << max(1, length // runs).bit_length() - 1, _MOST)), round_up(length, unit))


def _call(put, name: str, x, runs, shape, block, *, fill: int, at_once: int, units, chip: Chip, scratch=()):
    """The kernel over scenes, groups of heads, pieces: x [B, H, rows, columns] to `shape`, block by block.

    put(x, output, place, start, ahead, choose, *scratch) sets `at_once` rows, or columns, of the output. They are the
    stretch's from `start`, a multiple of the second unit, and `ahead` on, which may be less than 0; choose(these, those
    there before) has what they become.

    Args:
        units: What places in memory and in a stretch are multiples of.
    """
    axis = 3 if units[0] == LANES else 2
    group, tile, length = block[0], block[axis - 1], shape[axis]
    stretch, tiles = tile + units[1], -(-length // tile)
    more = max(round_up(x.shape[axis], units[0]), stretch) - x.shape[axis]
    x = jnp.pad(x, [(0, more * (i == axis)) for i in range(4)]) if more else x
    pieces, most = _pieces(runs, tile, tiles, x.shape[axis] - stretch, units[0])
    count = pieces.shape[1]

    def field(pieces_smem_ref, scene, piece, i: int):
        return pieces_smem_ref[(scene * count + piece) * _FIELDS + i]

    def kernel(pieces_smem_ref, x_vmem_ref, out_vmem_ref, *scratch):
        shift, low, high = (field(pieces_smem_ref, pl.program_id(0), pl.program_id(2), i) for i in range(2, _FIELDS))

        def some(i, _):
            first = pl.multiple_of(i * at_once, at_once)
            start = _down(jnp.clip(first + shift, 0, tile - at_once), units[1])
            ahead = jnp.clip(first + shift - start, -at_once, at_once + units[1])

            def choose(new, old):
                place = first + lax.broadcasted_iota(jnp.int32, new.shape, axis - 2)
                old = jnp.where(low == 0, jnp.asarray(fill, new.dtype), old.astype(new.dtype))
                return jnp.where((place >= low) & (place < high), new, old).astype(x.dtype)

            put(x_vmem_ref, out_vmem_ref, pl.ds(first, at_once), start, ahead, choose, *scratch)
            return 0

        end = jnp.where(low == 0, tile, high)
        lax.fori_loop(lax.div(low, jnp.int32(at_once)), lax.div(end + at_once - 1, jnp.int32(at_once)), some, 0)

    def at(scene, head, place):
        return (scene, head, 0, place) if axis == 3 else (scene, head, place, 0)

    def stretch_at(scene, i, piece, pieces_smem_ref):
        return at(scene, i * group, pl.multiple_of(field(pieces_smem_ref, scene, piece, 1), units[0]))

    def tile_at(scene, i, piece, pieces_smem_ref):
        return at(scene, i, field(pieces_smem_ref, scene, piece, 0))

    sizes = [pl.Element(stretch if i == axis else n) for i, n in enumerate(block, 1)]
    moved = math.prod(shape) // length * (length + tiles * stretch)  # if few pieces are less than tiles
    return pl.pallas_call(
        kernel,
        name=name,
        out_shape=jax.ShapeDtypeStruct(shape, x.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(shape[0], shape[1] // group, most),
            in_specs=[pl.BlockSpec((pl.squeezed, *sizes), stretch_at)],
            out_specs=pl.BlockSpec((pl.squeezed, *block), tile_at),
            scratch_shapes=scratch,
        ),
        compiler_params=chip.params("ppa"),
        cost_estimate=pl.CostEstimate(flops=0, transcendentals=0, bytes_accessed=moved * x.dtype.itemsize),
    )(pieces.reshape(-1), x)


def _pieces(runs, tile: int, tiles: int, last: int, unit: int):
    """(pieces [B, pieces, 5], the most that a scene has).

    A piece is its tile, where its stretch begins, which of the stretch's rows would be the tile's first, and low and
    high: the tile's rows [low, high) are the piece's. `last` is the last row where a stretch may begin. Sums over
    [pieces, runs], no gathers.
    """
    source, target, size = (x.astype(jnp.int32) for x in runs)
    end = tile * tiles
    cuts = jnp.broadcast_to(jnp.arange(tiles, dtype=jnp.int32) * tile, (len(size), tiles))
    begin = jnp.sort(jnp.concatenate([cuts, jnp.where(size > 0, target, end)], axis=1), axis=1)
    until = jnp.append(begin[:, 1:], jnp.full((len(size), 1), end), axis=1)
    before = (size > 0)[:, None] & (target[:, None] <= begin[..., None])  # [B, pieces, runs]
    start = jnp.max(jnp.where(before, target[:, None], -1), axis=2)  # of the last of these runs, whose piece it is
    stop = jnp.max(jnp.where(before, (target + size)[:, None], 0), axis=2)
    own = before & (target[:, None] == start[..., None])
    first = jnp.minimum(begin // tile, tiles - 1) * tile
    row = first + jnp.sum(jnp.where(own, (source - target)[:, None], 0), axis=2)  # of x: the tile's first
    stretch = jnp.clip(row // unit * unit, 0, last)
    # Where a run begins with its tile, the cut before has nothing, and must not count as the tile's first piece.
    low, high = jnp.where(begin == until, tile, begin - first), jnp.minimum(until, stop) - first
    most = tiles + jnp.max(jnp.sum(size > 0, axis=1))
    return jnp.stack([first // tile, stretch, row - stretch, low, high], axis=-1), most


def _down(x, unit: int):
    return pl.multiple_of(lax.div(x, jnp.int32(unit)) * unit, unit)
