"""Top-k chunk selection in one Mosaic TPU kernel: scores never reach device memory.

Chunks lie on sublanes and tokens on lanes, so that all work on scores is elementwise and no lane waits for another.

(a) Exact scores. q is exact in bfloat16; phi is float32 and goes in as a sum of three bfloat16 parts, whose products
    with q are added up in float32, the smallest part first. 24 bits of every mean count, as in a float32 product; only
    the order of the sum differs. The parts' rows alternate, eight of each, so that the three products of a score
    leave the matrix unit one after the other. float32 queries take one product of six passes.
(b) Candidates. Chunks that nobody may pick (text, empty, padding) are rows of NaN, and a NaN score is never picked.
    What else a query may not pick is anchors of its own, later chunks and unseen shots: `routing.candidate_runs`, three
    integers per token.
(c) Lists. Chunk c belongs to sublane c % 8. Every (sublane, token) keeps its own `top_k` best, in VMEM between tiles of
    chunks. A score goes in front of what is strictly smaller; chunks come in ascending order, so ties keep the lowest.
    Tiles past the last candidate of a block of tokens are skipped: with causal routing that is half of them.
(d) The eight lists of each token are merged at the end of its block: `top_k` times the best head, by score and then by
    chunk. Read with a stride, 8 x 128 tokens fill a register, so that this too is elementwise.

FLOPs: 3 * 2 * B * H * N * C * D, halved by (c). Bytes: q once, 4 * B * H * N * K of picks, and 6 * C * D of phi's parts
per head. The vector work of (c), 5 K + 2 instructions for 8 x 128 scores against 24 slots of the matrix unit for each
128 of D, takes a little longer than the products and overlaps with them; a tile of chunks is done for many tokens at
once because a product's first result takes some 250 cycles.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from moc_jax.attention import routing
from moc_jax.attention.layout import Queries, candidate_rows, candidates_are_split, round_up, split_in_parts
from moc_jax.attention.pallas_tpu import device
from moc_jax.attention.pallas_tpu.batching import more_scenes
from moc_jax.attention.pallas_tpu.flash import product
from moc_jax.attention.pallas_tpu.ranks import ScanTiling
from moc_jax.attention.routing import candidate_runs, pickable_chunks
from moc_jax.config import MoCConfig
from moc_jax.scene import ChunkTable
from moc_jax.shapes import Array, Float, Float32, Int, typed

_MOST_PICKS = 16  # registers hold two lists of so many, and merging takes 8 top_k ** 2 instructions, unrolled
_XLA_BLOCK = 2048  # queries that XLA scores at a time
_NOTHING = -1
_SUBLANES, _LANES = device.ROWS, device.LANES


def tiling_of(tokens: int, top_k: int) -> ScanTiling:
    """What suits so many tokens: blocks as long as the unrolled code stays small."""
    unit = _SUBLANES * _LANES  # what a block of picks must be a multiple of, if there are several
    block = min(4096 if top_k <= 8 else 2048, round_up(tokens, _LANES))
    return ScanTiling(block=block if block <= unit else block // unit * unit)


@typed
def select(
    q: Float[Array, "B Q H D"],
    phi: Float32[Array, "B H _ D"],
    queries: Queries,
    table: ChunkTable,
    cfg: MoCConfig,
    *,
    chip: device.Chip,
    tiling: ScanTiling | None = None,
) -> Int[Array, "B H Q K"]:
    """As `routing.select`: the best candidates of every query, best first; -1 fills slots that hold none.

    More than 16 picks would leave the kernel too few registers; they are plain XLA's, scored in blocks.

    Args:
        q: After QK-norm and rotary embedding, as `device.check` wants it.
        phi: `columns.columns`.
        chip: That the program is for.
        tiling: None: what suits the sizes.
    """
    top_k = min(cfg.top_k, phi.shape[2])
    if top_k > _MOST_PICKS:
        return routing.select(q, phi, queries, table, cfg, block=_XLA_BLOCK)
    if top_k < cfg.top_k:
        few = select(q, phi, queries, table, dataclasses.replace(cfg, top_k=top_k), chip=chip, tiling=tiling)
        return routing.widened(few, routing.width(cfg.top_k, phi.shape[2]))
    batch, tokens, heads, _ = q.shape
    if cfg.top_k == 0 or tokens == 0:
        return jnp.full((batch, heads, tokens, cfg.top_k), _NOTHING, jnp.int32)
    tiling = tiling or tiling_of(tokens, cfg.top_k)

    def picks(q, phi, queries, table):
        runs = candidate_rows(candidate_runs(table, cfg), queries, round_up(tokens, tiling.block))
        found = _call(jnp.swapaxes(q, 1, 2), _parts(phi, table, tiling, q.dtype), runs, cfg, tiling, chip)
        return jnp.swapaxes(found.reshape(*found.shape[:3], -1), 2, 3)[:, :, :tokens]

    return more_scenes(picks)(q, phi, queries, table)


def _parts(phi, table, tiling, dtype):
    """phi [B, H, C, D] as rows for the matrix unit: [B * H, tiles, parts * chunks, D] in `dtype`.

    Each eight chunks are so many rows of every part, smallest part first.
    """
    head_dim = phi.shape[3]
    pickable = jnp.repeat(pickable_chunks(table), phi.shape[2] // table.kind.shape[1], axis=1)
    phi = jnp.where(pickable[:, None, :, None], phi, jnp.nan)
    phi = jnp.pad(phi, ((0, 0), (0, 0), (0, -phi.shape[2] % tiling.chunks), (0, 0)), constant_values=jnp.nan)
    tiles = phi.shape[2] // tiling.chunks
    phi = phi.reshape(-1, tiles, tiling.chunks // _SUBLANES, _SUBLANES, head_dim)
    parts = [phi] if dtype == jnp.float32 else split_in_parts(phi, dtype)
    return jnp.stack(parts[::-1], axis=3).reshape(phi.shape[0], tiles, len(parts) * tiling.chunks, head_dim)


def _call(q, parts, runs, cfg, tiling, chip):
    """The picks [B, H, K, Q / 128, 128] of q [B, H, Q, D], Q padded to blocks."""
    batch, heads, tokens, head_dim = q.shape
    blocks = pl.cdiv(tokens, tiling.block)
    used = -(-jnp.max(runs[:, 2].reshape(-1, tiling.block), axis=-1) // tiling.chunks)
    rows = tiling.block // _LANES

    def of_head(i, n, _):
        return lax.div(i, heads), lax.rem(i, heads), n, 0

    return pl.pallas_call(
        functools.partial(_kernel, tiling=tiling, heads=heads, split=candidates_are_split(cfg)),
        name="moc_router",
        out_shape=jax.ShapeDtypeStruct((batch, heads, cfg.top_k, blocks * rows, _LANES), jnp.int32),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch * heads, blocks),
            in_specs=[
                pl.BlockSpec((None, None, tiling.block, head_dim), of_head),
                pl.BlockSpec((None, *parts.shape[1:]), lambda i, n, _: (i, 0, 0, 0)),
                pl.BlockSpec((None, 3, tiling.block), lambda i, n, _: (lax.div(i, heads), 0, n)),
            ],
            out_specs=pl.BlockSpec(
                (None, None, cfg.top_k, rows, _LANES), lambda i, n, _: (lax.div(i, heads), lax.rem(i, heads), 0, n, 0)
            ),
            scratch_shapes=[
                pltpu.VMEM((cfg.top_k, rows * _SUBLANES, _LANES), dtype) for dtype in (jnp.float32, jnp.int32)
            ],
        ),
        compiler_params=chip.params("pa"),
        cost_estimate=pl.CostEstimate(
            flops=2 * batch * heads * tokens * head_dim * parts.shape[1] * parts.shape[2],
            bytes_accessed=q.nbytes + parts.nbytes + heads * runs.nbytes + 4 * batch * heads * tokens * cfg.top_k,
            transcendentals=0,
        ),
    )(used.astype(jnp.int32), q, parts, runs)


def _kernel(
    used_smem_ref,  # [B * blocks]: tiles of phi that hold candidates of the block's queries
    q_vmem_ref,  # [block, D]
    phi_vmem_ref,  # [tiles, parts * chunks, D]
    runs_vmem_ref,  # [3, block]
    picks_vmem_ref,  # [K, block / 128, 128]
    values_vmem_ref,  # [K, block / 16, 128]: row 8 g + s is sublane s of the g-th 128 tokens
    chunks_vmem_ref,  # the same
    *,
    tiling,
    heads,
    split,  # whether candidates go on behind the anchors
):
    assert q_vmem_ref.shape[0] == runs_vmem_ref.shape[1] == picks_vmem_ref.shape[1] * _LANES == tiling.block
    assert values_vmem_ref.shape == chunks_vmem_ref.shape
    lists = values_vmem_ref, chunks_vmem_ref
    used = used_smem_ref[lax.div(pl.program_id(0), heads) * pl.num_programs(1) + pl.program_id(1)]

    @pl.when(used == 0)
    def _nothing_to_pick():
        picks_vmem_ref[...] = jnp.full(picks_vmem_ref.shape, _NOTHING, jnp.int32)

    @pl.when(used > 0)
    def _pick():
        one_tile = functools.partial(_one_tile, q_vmem_ref, phi_vmem_ref, runs_vmem_ref, lists, tiling, split)
        one_tile(0, first=True)
        pl.loop(1, used)(one_tile)

        @pl.loop(0, picks_vmem_ref.shape[1] // _merged(tiling))
        def _merge(i):
            _merge_lists(lists, picks_vmem_ref, pl.multiple_of(i * _merged(tiling), _merged(tiling)), _merged(tiling))


def _merged(tiling: ScanTiling) -> int:
    """Groups of `_LANES` tokens whose lists are merged at once."""
    return min(_SUBLANES, tiling.block // _LANES)


def _one_tile(q_vmem_ref, phi_vmem_ref, runs_vmem_ref, lists, tiling, split, tile, *, first=False):
    """Scores a tile of chunks and puts the scores into all tokens' lists, which the first tile starts."""
    values_vmem_ref, chunks_vmem_ref = lists
    top_k = values_vmem_ref.shape[0]
    sublane = lax.broadcasted_iota(jnp.int32, (_SUBLANES, _LANES), 0)
    scores = _scores(q_vmem_ref[...], phi_vmem_ref[tile], tiling.chunks)
    for group in range(tiling.block // _LANES):
        lanes = slice(group * _LANES, (group + 1) * _LANES)
        rows = slice(group * _SUBLANES, (group + 1) * _SUBLANES)
        runs = [runs_vmem_ref[i : i + 1, lanes] - sublane for i in range(3 if split else 1)]
        best = [], []
        if not first:
            best = tuple([ref[i, rows] for i in range(top_k)] for ref in lists)
        for r, row in enumerate(scores):
            best = _insert(best, row[:, lanes], tile * tiling.chunks + r * _SUBLANES, runs, top_k)
        for i in range(top_k):
            held = i < len(best[0])
            values_vmem_ref[i, rows] = best[0][i] if held else jnp.full(sublane.shape, -jnp.inf)
            chunks_vmem_ref[i, rows] = best[1][i] if held else jnp.full(sublane.shape, _NOTHING)


def _scores(q, phi, chunks):
    """Scores of q [block, D] with phi [parts * chunks, D]: chunks / 8 times [8, block]."""
    products = product(phi, q, 1, 1)
    rows = phi.shape[0] // chunks * _SUBLANES
    parts = range(0, rows, _SUBLANES)
    return [
        functools.reduce(jnp.add, [products[i + part : i + part + _SUBLANES] for part in parts])
        for i in range(0, phi.shape[0], rows)
    ]


def _insert(best, scores, chunk, runs, top_k):
    """Puts the scores [8, 128] of the chunks from `chunk` on into the lists, which grow up to `top_k`.

    `runs` are less by the sublane; so are the chunks in the lists.
    """
    values, chunks = best
    candidate = runs[0] > chunk
    if len(runs) > 1:
        candidate |= (runs[1] <= chunk) & (runs[2] > chunk)
    growing = len(values) < top_k
    if growing:  # else NaN is not larger than anything and stays out
        candidate &= scores == scores
    scores = jnp.where(candidate, scores, -jnp.inf)
    chunk = jnp.broadcast_to(jnp.int32(chunk), scores.shape)
    # What is behind the new one moves down by one.
    larger = [scores > value for value in values]
    new_values, new_chunks = [], []
    for i in range(len(values) + growing):
        value, pick = scores, chunk
        if i > 0:
            value, pick = (jnp.where(larger[i - 1], x[i - 1], new) for x, new in ((values, value), (chunks, pick)))
        if i < len(values):
            value, pick = (jnp.where(larger[i], new, x[i]) for x, new in ((values, value), (chunks, pick)))
        new_values.append(value)
        new_chunks.append(pick)
    return new_values, new_chunks


def _merge_lists(lists, picks_vmem_ref, group, groups):
    """The picks of `groups` x 128 tokens, from the 8 lists of each."""
    values_vmem_ref, chunks_vmem_ref = lists
    top_k = values_vmem_ref.shape[0]

    def of_sublane(ref, i, s):
        return ref[i, pl.ds(group * _SUBLANES + s, groups, _SUBLANES)]

    values = [[of_sublane(values_vmem_ref, i, s) for i in range(top_k)] for s in range(_SUBLANES)]
    chunks = [[of_sublane(chunks_vmem_ref, i, s) + s for i in range(top_k)] for s in range(_SUBLANES)]
    for i in range(top_k):
        value, pick = values[0][0], chunks[0][0]
        for s in range(1, _SUBLANES):
            before = (values[s][0] > value) | ((values[s][0] == value) & (chunks[s][0] < pick))
            value, pick = jnp.where(before, values[s][0], value), jnp.where(before, chunks[s][0], pick)
        picks_vmem_ref[i, pl.ds(group, groups)] = jnp.where(value == -jnp.inf, _NOTHING, pick)
        for s in range(_SUBLANES):
            taken = chunks[s][0] == pick
            for list_ in (values[s], chunks[s]):
                # A list that gave i picks has no more than top_k - i that count.
                list_[:-1] = [jnp.where(taken, after, x) for x, after in itertools.pairwise(list_)]
                del list_[top_k - 1 - i :]
