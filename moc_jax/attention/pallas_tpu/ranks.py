"""How many earlier tokens of a span picked the same chunk: a counting sort's ranks, without a sort.

Chunks lie on sublanes and tokens on lanes.

(a) Membership. m[c, n] = 1 if one of token n's picks is chunk c: K comparisons of the picks [1, 128] with the chunks.
(b) Prefix. m times a triangle of ones counts, for each token and chunk, the tokens of the same 128 that picked the
    chunk, up to the token itself. 0 and 1 are exact in bfloat16, and so are the sums in float32.
(c) Running counts [C, 128], the same in every lane, stay in VMEM from one block of tokens to the next; (b) plus those,
    less one, is the rank of whoever picked the chunk, and the last token's prefix adds to them. They begin where the
    ranks of a chunk shall begin.
(d) rank_i = the sum over chunks of (c) where the chunk is pick i: K selections and sums of 8 x 128. Read with a stride,
    the sums of 8 x 128 tokens fill a register, so that the last sum, over sublanes, is elementwise too.

Tiles of chunks past the last pick of a block of tokens are skipped: with causal routing that is half of them. FLOPs:
2 * spans * R * 128 * C, halved by that. Bytes: 8 * spans * R * K, the picks and their ranks. The vector work, 4 K + 6
instructions for 8 x 128 pairs of chunk and token, hides the products.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from moc_jax.attention.layout import round_up
from moc_jax.attention.pallas_tpu import device
from moc_jax.shapes import Array, Int, Int32, typed

_NOTHING = -1
_SUBLANES, _LANES = device.ROWS, device.LANES


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScanTiling:
    """How a kernel goes through all chunks for all tokens: tokens of a grid step, and chunks at a time."""

    block: int
    chunks: int = 32

    def __post_init__(self):
        if self.block % _LANES or self.chunks % (2 * _SUBLANES):
            raise ValueError(
                f"{self}: block must be a multiple of {_LANES}, and chunks of {2 * _SUBLANES}, which is what a "
                "register of bfloat16 holds"
            )


def tiling_of(tokens: int, picks: int) -> ScanTiling:
    """What suits so many tokens with so many picks: blocks as long as the unrolled code stays small."""
    most, unit = 4096 if picks <= 8 else 1024, _SUBLANES * _LANES
    if tokens <= unit:
        return ScanTiling(block=round_up(tokens, _LANES))
    # What a block must be a multiple of, if there are several; of those, what pads least, and then the largest.
    sizes = range(min(most, tokens) // unit * unit, 0, -unit)
    return ScanTiling(block=min(sizes, key=lambda block: round_up(tokens, block)))


@typed
def ranks(
    routes: Int[Array, "spans K R"],
    begin: Int[Array, "spans C"],
    *,
    tiling: ScanTiling | None = None,
) -> tuple[Int32[Array, "spans K R"], Int32[Array, "spans C"]]:
    """The rank of each pick among its span's picks of the same chunk, in the order of tokens, and where ranks end.

    Args:
        routes: Picked chunks; a token picks none twice, and -1 is not a chunk: its rank is -1.
        begin: The rank of each chunk's first pick; ranks are exact up to 2^24.
        tiling: None: what suits the sizes.
    """
    spans, picks, tokens = routes.shape
    if picks == 0 or tokens == 0:
        return jnp.zeros(routes.shape, jnp.int32), begin.astype(jnp.int32)
    tiling = tiling or tiling_of(tokens, picks)
    routes = jnp.pad(routes.astype(jnp.int32), ((0, 0), (0, 0), (0, -tokens % tiling.block)), constant_values=_NOTHING)
    routes = routes.reshape(spans, picks, -1, _LANES)
    rank, end = _call(routes, begin.astype(jnp.int32), tiling)
    return rank.reshape(spans, picks, -1)[:, :, :tokens], end[:, : begin.shape[1], 0]


def _call(routes, begin, tiling):
    """The ranks of routes [spans, K, R / 128, 128], and their ends [spans, padded C, 128], the same in every lane."""
    spans, picks, groups, _ = routes.shape
    chunks = begin.shape[1]
    rows, padded = tiling.block // _LANES, pl.cdiv(chunks, tiling.chunks) * tiling.chunks
    blocks = groups // rows
    last = jnp.max(routes.reshape(spans, picks, blocks, tiling.block), axis=(1, 3))
    used = (last + tiling.chunks) // tiling.chunks
    block = pl.BlockSpec((None, picks, rows, _LANES), lambda x, n, _: (x, 0, n, 0))
    return pl.pallas_call(
        functools.partial(_kernel, tiling=tiling),
        name="moc_ranks",
        out_shape=(
            jax.ShapeDtypeStruct(routes.shape, jnp.int32),
            jax.ShapeDtypeStruct((spans, padded, _LANES), jnp.int32),
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(spans, blocks),
            in_specs=[
                pl.BlockSpec((None, 1, chunks), lambda x, n, _: (x, 0, 0), memory_space=pltpu.SMEM),
                block,
            ],
            out_specs=(block, pl.BlockSpec((None, padded, _LANES), lambda x, n, _: (x, 0, 0))),
            scratch_shapes=[
                pltpu.VMEM((padded, _LANES), jnp.float32),
                pltpu.VMEM((picks, rows * _SUBLANES, _LANES), jnp.float32),
            ],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=2 * spans * groups * _LANES**2 * padded, bytes_accessed=2 * routes.nbytes, transcendentals=0
        ),
    )(used.astype(jnp.int32).reshape(-1), begin[:, None], routes)


def _kernel(
    used_smem_ref,  # [spans * blocks]: tiles of chunks that hold picks of the block's tokens
    begin_smem_ref,  # [1, C]
    routes_vmem_ref,  # [K, block / 128, 128]
    rank_vmem_ref,  # the same
    end_vmem_ref,  # [padded C, 128]
    seen_vmem_ref,  # [padded C, 128]: where ranks go on, the same in every lane
    sums_vmem_ref,  # [K, block / 16, 128]: rows 8 g to 8 g + 7 add up to the rank of the g-th 128 tokens
    *,
    tiling,
):
    assert routes_vmem_ref.shape == rank_vmem_ref.shape
    assert end_vmem_ref.shape == seen_vmem_ref.shape
    rows = routes_vmem_ref.shape[1]
    assert rows * _LANES == tiling.block

    @pl.when(pl.program_id(1) == 0)
    def _start():
        seen_vmem_ref[...] = jnp.zeros(seen_vmem_ref.shape, jnp.float32)

        @pl.loop(0, begin_smem_ref.shape[1])
        def _begin(chunk):
            first = begin_smem_ref[0, chunk].astype(jnp.float32)
            seen_vmem_ref[pl.ds(chunk, 1)] = jnp.full((1, _LANES), first)

    used = used_smem_ref[pl.program_id(0) * pl.num_programs(1) + pl.program_id(1)]

    @pl.when(used == 0)
    def _nothing_picked():
        rank_vmem_ref[...] = jnp.full(rank_vmem_ref.shape, _NOTHING, jnp.int32)

    @pl.when(used > 0)
    def _rank():
        one_tile = functools.partial(_one_tile, routes_vmem_ref, seen_vmem_ref, sums_vmem_ref, tiling)
        one_tile(0, first=True)
        pl.loop(1, used)(one_tile)
        for i in range(routes_vmem_ref.shape[0]):
            parts = [sums_vmem_ref[i, pl.ds(s, rows, _SUBLANES)] for s in range(_SUBLANES)]
            rank = functools.reduce(jnp.add, parts).astype(jnp.int32)
            rank_vmem_ref[i] = jnp.where(routes_vmem_ref[i] < 0, _NOTHING, rank)

    @pl.when(pl.program_id(1) == pl.num_programs(1) - 1)
    def _finish():
        end_vmem_ref[...] = seen_vmem_ref[...].astype(jnp.int32)


def _one_tile(routes_vmem_ref, seen_vmem_ref, sums_vmem_ref, tiling, tile, *, first=False):
    """Adds what a tile of chunks has to the ranks of all tokens, which the first tile starts."""
    picks = routes_vmem_ref.shape[0]
    groups = range(0, tiling.chunks, _SUBLANES)
    sublane = lax.broadcasted_iota(jnp.int32, (_SUBLANES, _LANES), 0)
    earlier = lax.broadcasted_iota(jnp.int32, (_LANES, _LANES), 0)
    up_to = jnp.where(earlier <= lax.broadcasted_iota(jnp.int32, (_LANES, _LANES), 1), 1.0, 0.0).astype(jnp.bfloat16)
    begin = pl.multiple_of(tile * tiling.chunks, tiling.chunks)
    seen = [seen_vmem_ref[pl.ds(begin + i, _SUBLANES)] for i in groups]
    for group in range(routes_vmem_ref.shape[1]):
        # Picks less the sublane are equal to the first of eight chunks.
        routes = [routes_vmem_ref[i, group : group + 1] - sublane for i in range(picks)]
        rows = slice(group * _SUBLANES, (group + 1) * _SUBLANES)
        picked = [[route == begin + i for route in routes] for i in groups]
        members = [jnp.where(functools.reduce(jnp.logical_or, each), 1.0, 0.0) for each in picked]
        prefix = jnp.dot(
            jnp.concatenate(members).astype(jnp.bfloat16), up_to, preferred_element_type=jnp.float32
        )  # [chunks, 128]
        sums = [jnp.zeros(sublane.shape) if first else sums_vmem_ref[i, rows] for i in range(picks)]
        for j, i in enumerate(groups):
            rank = prefix[i : i + _SUBLANES] + (seen[j] - 1)
            for pick in range(picks):
                sums[pick] += jnp.where(picked[j][pick], rank, 0.0)
            seen[j] += jnp.broadcast_to(prefix[i : i + _SUBLANES, _LANES - 1 :], sublane.shape)
        for pick in range(picks):
            sums_vmem_ref[pick, rows] = sums[pick]
    for j, i in enumerate(groups):
        seen_vmem_ref[pl.ds(begin + i, _SUBLANES)] = seen[j]
