"""How many earlier queries of the same head picked the same chunk: a counting sort's ranks, without a sort.

(a) Membership. m[n, c] = 1 if one of query n's picks is chunk c: K comparisons of the picks [64] with the chunks.
(b) Ranks. A strictly lower triangle of ones times m counts, for each query and chunk, the earlier queries of the 64
    that picked the chunk; the other triangle adds the rest, so that every row of the accumulator holds the counts
    before the next 64. 0 and 1 are exact in 16 bits, and so are the sums in float32.
(c) The rank of pick i is the sum over chunks of (b) where the chunk is pick i.

A thread block takes some 64s of queries, one after the other. Ranks are among its queries; the counts of all say how
many came before. It is one warpgroup: what warps exchange for a maximum over rows goes through memory that all the
warpgroups of a thread block would share.

FLOPs: 2 * 2 * B * H * Q * 64 * C. Bytes: the picks, and their ranks. The vector work, 4 K + 3 instructions per query
and chunk, hides the products.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moc_jax.attention.layout import round_up
from moc_jax.attention.pallas_gpu.device import Hopper
from moc_jax.attention.pallas_gpu.multiprocessor import SWIZZLED, multiplied
from moc_jax.attention.pallas_gpu.tiles import ROWS
from moc_jax.shapes import Array, Int, Int32, typed

MOST_CHUNKS = 64  # the columns of an accumulator; for more, sorting is faster
_BLOCKS = 4  # thread blocks on a multiprocessor: as many as registers have room for
_MOST_TILES = 8  # of 64 queries, per thread block
_ROW = plgpu.Layout.WGMMA.reduce(1)


@typed
def ranks(
    routes: Int[Array, "B H K Q"], chunks: int, backend: Hopper
) -> tuple[Int32[Array, "B H K R"], Int32[Array, "B H P C"], int]:
    """Ranks of picks among a thread block's, R >= Q; its picks of each chunk; its queries.

    Args:
        routes: Picked chunks; -1 for none, as then the rank.
        chunks: C, at most `MOST_CHUNKS`.
        backend: What it is compiled for.
    """
    batch, heads, _, queries = routes.shape
    tiles = min(_MOST_TILES, -(-batch * heads * queries // (ROWS * _BLOCKS * backend.thread_blocks)))
    padded = round_up(queries, tiles * ROWS)
    routes = jnp.pad(routes, ((0, 0), (0, 0), (0, 0), (0, padded - queries)), constant_values=-1)
    rank, counts = plgpu.kernel(
        functools.partial(_kernel, tiles=tiles, backend=backend),
        out_type=(
            jax.ShapeDtypeStruct(routes.shape, jnp.int32),
            jax.ShapeDtypeStruct((batch, heads, padded // (tiles * ROWS), MOST_CHUNKS), jnp.int32),
        ),
        kernel_name="moc_ranks",
        grid=(padded // (tiles * ROWS), heads, batch),
        grid_names=("blocks", "heads", "batch"),
        scratch_types=[plgpu.SMEM((ROWS, MOST_CHUNKS), jnp.bfloat16, transforms=SWIZZLED)],
        interpret=backend.interpret,
    )(routes)
    return rank, counts[..., :chunks], tiles * ROWS


def _kernel(routes_gmem_ref, rank_gmem_ref, counts_gmem_ref, picked_smem_ref, *, tiles, backend):
    batch, head, block = (lax.axis_index(name) for name in ("batch", "heads", "blocks"))
    iota = functools.partial(plgpu.broadcasted_iota, jnp.int32, layout=plgpu.Layout.WGMMA)
    row, earlier, column = iota((ROWS, ROWS), 0), iota((ROWS, ROWS), 1), iota((ROWS, MOST_CHUNKS), 1)
    before, rest = (jnp.where(x, 1.0, 0.0).astype(jnp.bfloat16) for x in (earlier < row, earlier >= row))

    def one_tile(tile, seen):
        rows = pl.ds((block * tiles + tile) * ROWS, ROWS)
        routes = [
            plgpu.load(routes_gmem_ref.at[batch, head, i, rows], layout=_ROW, optimized=False)
            for i in range(routes_gmem_ref.shape[2])
        ]
        here = [column == lax.broadcast_in_dim(route, column.shape, [0]) for route in routes]
        picked = functools.reduce(jnp.add, [jnp.where(mine, 1.0, 0.0) for mine in here])
        plgpu.commit_smem()  # each warp has its product of the tile before only for itself
        picked_smem_ref[...] = picked.astype(jnp.bfloat16)
        plgpu.commit_smem()
        ranks = multiplied(seen, before, picked_smem_ref, backend)
        for i, mine in enumerate(here):
            rank = jnp.where(mine, ranks, 0.0).sum(axis=1).astype(jnp.int32)
            for other in routes[:i]:  # a query should pick no chunk twice, but then both picks count
                rank += jnp.where(other == routes[i], 1, 0)
            rank_gmem_ref[batch, head, i, rows] = jnp.where(routes[i] < 0, -1, rank)
        return multiplied(ranks, rest, picked_smem_ref, backend)

    seen = plgpu.layout_cast(jnp.zeros((ROWS, MOST_CHUNKS), jnp.float32), plgpu.Layout.WGMMA)
    counts = lax.fori_loop(0, tiles, one_tile, seen).max(axis=0)  # all rows are the same
    counts_gmem_ref[batch, head, block] = counts.astype(jnp.int32)
