"""Top-k chunk selection in one Mosaic GPU kernel (Hopper): scores never reach device memory.

(a) Exact scores. q is exact in its 16-bit type; phi is float32 and goes in as a sum of three 16-bit parts, whose
    products with q a warpgroup adds up in one float32 accumulator, the smallest part first. 24 bits of every mean
    count, as in a float32 product; only the order of the sum differs.
(b) Candidates. Chunks that nobody may pick (text, empty, padding) are columns of NaN, and a NaN score is never
    picked. What else a query may not pick is anchors of its own, later chunks and unseen shots: intervals of chunks,
    so its candidates are two runs of columns, [0, first) and [second, end), three integers per row.
(c) Each of three warpgroups scores 64 queries of one head against one block of chunks at a time and takes the largest
    score of each row, then the next, `top_k` times; each goes into the row's list, kept in registers, if it is
    strictly larger than what stands there. Columns come in ascending order, so ties keep the lowest chunk.
(d) A fourth warpgroup loads the blocks of phi. Where all of a head's fit, they are loaded once per program; else they
    go through a ring of two. Blocks past the last candidate of a tile, all three warpgroups' queries, are skipped:
    with causal routing that is half of them.

FLOPs: 3 * 2 * B * H * Q * C * D, halved by (d). Bytes: q once, 4 * B * H * Q * K of picks; phi's blocks come from L2.
The rest is vector work, 5.5 instructions per score and round of (c), which takes longer than the products and hides
them: while one warpgroup waits for its product, the others search.
"""

import dataclasses
import functools
from collections.abc import Hashable
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moc_jax.attention.layout import ALIGN, Queries, candidate_rows, candidates_are_split, round_up, split_in_parts
from moc_jax.attention.pallas_gpu.multiprocessor import SWIZZLED
from moc_jax.attention.pallas_gpu.tiles import Ref
from moc_jax.attention.routing import candidate_runs, pickable_chunks, widened, width
from moc_jax.config import MoCConfig
from moc_jax.scene import ChunkTable
from moc_jax.shapes import Array, Float, Float32, Int, typed

_ROWS = 64  # queries of one warpgroup: the M of wgmma
_WARPGROUPS = 3  # that compute; registers leave room for no fourth
_TILE = _WARPGROUPS * _ROWS  # queries
_PARTS = 3  # 16-bit parts of a float32: 3 * 8 bits in bfloat16, 3 * 11 in float16
_MOST_TILES = 8  # per program: enough to pay for loading phi
_PROGRAMS = 4 * 132  # at least so many, where there is work for them: they fill the last wave
_MOST_COLUMNS = 96  # of a block; more would spill
_MOST_PICKS = 16  # a list of 2 * 2 registers each
_ROW = plgpu.Layout.WGMMA.reduce(1)
_SMEM = 220 * 1024  # of 227 KiB; the rest is for barriers and what the compiler takes


@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterTiling:
    """How queries, and the chunks of one head, go through shared memory."""

    tiles: int  # of queries, per program
    blocks: int  # of chunks
    columns: int  # chunks of a block
    buffers: int  # blocks that fit at once: all of them, or a ring

    @property
    def resident(self) -> bool:
        """Whether all blocks fit at once."""
        return self.buffers == self.blocks

    @classmethod
    def of(cls, queries: int, chunks: int, head_dim: int) -> Self:
        """For so many queries of all heads: as many chunks at once as shared memory and registers have room for."""
        tiles = max(1, min(_MOST_TILES, queries // (_TILE * _PROGRAMS)))
        column = _PARTS * head_dim * 2
        room = (_SMEM - _TILE * head_dim * 2) // column
        blocks = -(-chunks // _MOST_COLUMNS)
        columns = round_up(-(-chunks // blocks), 8)
        if blocks * columns <= room:
            return cls(tiles=tiles, blocks=blocks, columns=columns, buffers=blocks)
        columns = min(_MOST_COLUMNS, room // 2 // 8 * 8)
        return cls(tiles=tiles, blocks=-(-chunks // columns), columns=columns, buffers=2)


def can_select(picks: int) -> bool:
    """Whether so many picks of a query are within the kernel's reach, however many chunks there are."""
    return picks <= _MOST_PICKS


@typed
def select(
    q: Float[Array, "B Q H D"],
    phi: Float32[Array, "B H _ D"],
    queries: Queries,
    table: ChunkTable,
    cfg: MoCConfig,
    *,
    tiling: RouterTiling | None = None,
    interpret: Hashable | None = None,
) -> Int[Array, "B H Q K"]:
    """As `routing.select`: the best candidates of every query, best first; -1 where there are no more.

    Args:
        q: After QK-norm and rotary embedding, as `device.check` wants it.
        phi: `columns.columns`.
        tiling: None: what suits the sizes.
        interpret: As `Hopper.interpret`.

    Raises:
        NotImplementedError: neither `top_k` nor the number of chunks is within the kernel's reach.
    """
    batch, rows, heads, head_dim = q.shape
    chunks = phi.shape[2]
    top_k = min(cfg.top_k, chunks)  # no query has more candidates than there are chunks
    if top_k > _MOST_PICKS:
        raise NotImplementedError(
            f"moc.top_k is {cfg.top_k // cfg.descriptors} of {chunks // cfg.descriptors} chunks, moc.descriptors is "
            f"{cfg.descriptors}; the routing kernel keeps at most {_MOST_PICKS} picks x descriptors in "
            'registers: pick fewer, larger chunks, or use backend="xla"'
        )
    q = jnp.pad(q, ((0, 0), (0, -rows % ALIGN), (0, 0), (0, 0)))
    tiling = tiling or RouterTiling.of(batch * heads * rows, chunks, head_dim)
    programs = -(-rows // (_TILE * tiling.tiles))
    runs = candidate_runs(table, cfg)
    row, start, end = jnp.arange(programs * tiling.tiles) * _TILE, queries.start, queries.start + queries.length
    blocks = jnp.where(start < end, -(-runs[2] // tiling.columns), 0)  # that hold candidates of a chunk's queries
    here = (start[:, None] < row[None, :, None] + _TILE) & (row[None, :, None] < end[:, None])
    used = jnp.max(jnp.where(here, blocks[:, None], 0), axis=2).astype(jnp.int32)  # [B, programs * tiles]
    runs = candidate_rows(runs, queries, programs * tiling.tiles * _TILE)
    picks = plgpu.kernel(
        functools.partial(_kernel, tiling=tiling, split=candidates_are_split(cfg)),
        out_type=jax.ShapeDtypeStruct((batch, heads, top_k, round_up(rows, _ROWS)), jnp.int32),
        kernel_name="moc_router",
        grid=(heads, programs, batch),
        grid_names=("heads", "programs", "batch"),
        num_threads=_WARPGROUPS + 1,
        thread_name="warpgroup",
        scratch_types=_scratch(tiling, head_dim, q.dtype),
        interpret=interpret,
    )(q, _parts(phi, table, tiling, q.dtype), runs, used)
    return widened(jnp.swapaxes(picks, 2, 3)[:, :, :rows], width(cfg.top_k, chunks))


def _parts(phi, table, tiling, dtype):
    """phi [B, H, C, D] as a sum of `_PARTS` 16-bit parts, largest first: [B * H * blocks * parts, columns, D].

    float16 has the bits but not the range, so each head is scaled by a power of two (which changes no comparison) to
    put its largest mean just below float16's largest number.
    """
    batch, heads, chunks, head_dim = phi.shape
    pickable = jnp.repeat(pickable_chunks(table), chunks // table.kind.shape[1], axis=1)[:, None, :, None]
    if dtype == jnp.float16:
        size = jnp.where(pickable & jnp.isfinite(phi), jnp.abs(phi), 0.0)
        _, exponent = jnp.frexp(jnp.max(size, axis=(2, 3), keepdims=True))
        phi = jnp.ldexp(phi, 15 - exponent)
    phi = jnp.where(pickable, phi, jnp.nan)
    padding = tiling.blocks * tiling.columns - chunks
    phi = jnp.pad(phi, ((0, 0), (0, 0), (0, padding), (0, 0)), constant_values=jnp.nan)
    phi = phi.reshape(batch, heads, tiling.blocks, tiling.columns, head_dim)
    return jnp.stack(split_in_parts(phi, dtype, _PARTS), axis=3).reshape(-1, tiling.columns, head_dim)


def _scratch(tiling, head_dim, dtype):
    return [
        plgpu.SMEM((_WARPGROUPS, _ROWS, head_dim), dtype, transforms=SWIZZLED),
        plgpu.SMEM((tiling.buffers, _PARTS, tiling.columns, head_dim), dtype, transforms=SWIZZLED),
        plgpu.Barrier(num_barriers=_WARPGROUPS),
        plgpu.Barrier(num_barriers=tiling.buffers),
        plgpu.Barrier(num_arrivals=_WARPGROUPS, num_barriers=tiling.buffers),
    ]


class _Refs(NamedTuple):
    q_gmem_ref: Ref  # [B, Q, H, D]
    phi_gmem_ref: Ref  # [B * H * blocks * parts, columns, D]
    runs_gmem_ref: Ref  # [B, 3, padded Q]
    used_gmem_ref: Ref  # [B, programs * tiles]: blocks of phi that hold candidates of a tile's queries
    picks_gmem_ref: Ref  # [B, H, K, Q rounded up to _ROWS]
    q_smem_ref: Ref
    phi_smem_ref: Ref
    q_loaded_barrier_ref: Ref
    phi_loaded_barrier_ref: Ref
    phi_free_barrier_ref: Ref


def _kernel(*refs, tiling: RouterTiling, split: bool):
    warpgroup = lax.axis_index("warpgroup")
    # The last queries have the most candidates, so they start first.
    first = (lax.axis_size("programs") - 1 - lax.axis_index("programs")) * tiling.tiles
    where = lax.axis_index("batch"), lax.axis_index("heads"), first

    @pl.when(warpgroup == _WARPGROUPS)
    def _():
        plgpu.set_max_registers(24, action="decrease")
        _load_phi(_Refs(*refs), where, tiling)

    @pl.when(warpgroup < _WARPGROUPS)
    def _():
        plgpu.set_max_registers(160, action="increase")
        _pick(_Refs(*refs), where, warpgroup, tiling, split)


def _load_phi(refs: _Refs, where, tiling: RouterTiling):
    batch, head, first = where

    def load(block, buffer):
        row = ((batch * refs.q_gmem_ref.shape[2] + head) * tiling.blocks + block) * _PARTS
        source, loaded = refs.phi_gmem_ref.at[pl.ds(row, _PARTS)], refs.phi_loaded_barrier_ref.at[buffer]
        plgpu.copy_gmem_to_smem(source, refs.phi_smem_ref.at[buffer], loaded)

    def load_next(block, loaded):
        buffer = lax.rem(loaded, tiling.buffers)
        free = functools.partial(plgpu.barrier_wait, refs.phi_free_barrier_ref.at[buffer])
        pl.when(loaded >= tiling.buffers)(free)
        load(block, buffer)
        return loaded + 1

    def one_tile(tile, loaded):
        return lax.fori_loop(0, refs.used_gmem_ref[batch, first + tile], load_next, loaded)

    if not tiling.resident:
        lax.fori_loop(0, tiling.tiles, one_tile, 0)
        return
    for block in range(tiling.blocks):
        load(block, block)


def _pick(refs: _Refs, where, warpgroup, tiling: RouterTiling, split: bool):
    """One warpgroup's part of each tile; `split`: whether candidates go on behind the anchors."""
    batch, head, first = where
    q_smem_ref, q_loaded = refs.q_smem_ref.at[warpgroup], refs.q_loaded_barrier_ref.at[warpgroup]
    picks_gmem_ref = refs.picks_gmem_ref

    def row_of(tile):
        return ((first + tile) * _WARPGROUPS + warpgroup) * _ROWS

    def load_q(tile):  # rows past the last token come as zeros
        source = refs.q_gmem_ref.at[batch, pl.ds(row_of(tile), _ROWS), head]
        plgpu.copy_gmem_to_smem(source, q_smem_ref, q_loaded)

    def one_tile(tile, seen):
        row, used = row_of(tile), refs.used_gmem_ref[batch, first + tile]

        def load_next_q():
            pl.when(tile + 1 < tiling.tiles)(lambda: load_q(tile + 1))

        runs = [
            plgpu.load(refs.runs_gmem_ref.at[batch, i, pl.ds(row, _ROWS)], layout=_ROW, optimized=False)
            for i in range(3 if split else 1)
        ]
        plgpu.barrier_wait(q_loaded)

        def one_block(block, carry):
            seen, best = carry
            buffer = block if tiling.resident else lax.rem(seen, tiling.buffers)
            if not tiling.resident:
                plgpu.barrier_wait(refs.phi_loaded_barrier_ref.at[buffer])
            scores = _scores(q_smem_ref, refs.phi_smem_ref.at[buffer])
            if not tiling.resident:
                plgpu.barrier_arrive(refs.phi_free_barrier_ref.at[buffer])
            pl.when(block == used - 1)(load_next_q)
            return seen + 1, _merge(scores, [run - block * tiling.columns for run in runs], best, block)

        pl.when(used == 0)(load_next_q)
        seen, (_, picks) = lax.fori_loop(0, used, one_block, (seen, _nothing(picks_gmem_ref.shape[2])))

        @pl.when(row < picks_gmem_ref.shape[3])
        def _():
            for i, pick in enumerate(picks):
                picks_gmem_ref[batch, head, i, pl.ds(row, _ROWS)] = pick

        return seen

    load_q(0)
    if tiling.resident:
        for buffer in range(tiling.buffers):
            plgpu.barrier_wait(refs.phi_loaded_barrier_ref.at[buffer])
    lax.fori_loop(0, tiling.tiles, one_tile, 0)


def _scores(q_smem_ref, phi_smem_ref):
    """q [64, D] times the sum of phi's parts [columns, D]: [64, columns] float32."""

    def products(acc_ref):
        for part in reversed(range(_PARTS)):
            plgpu.wgmma(acc_ref, q_smem_ref, phi_smem_ref.at[part].transpose((1, 0)))
        return acc_ref[...]

    return pl.run_scoped(products, plgpu.ACC((_ROWS, phi_smem_ref.shape[1]), jnp.float32))


def _nothing(top_k):
    """Empty lists: scores and chunks of the best picks so far, `top_k` vectors [64] each."""
    value, pick = jnp.full((_ROWS,), -jnp.inf, jnp.float32), jnp.full((_ROWS,), -1, jnp.int32)
    return [plgpu.layout_cast(value, _ROW)] * top_k, [plgpu.layout_cast(pick, _ROW)] * top_k


def _merge(scores, runs, best, block):
    """Folds a block's scores [64, columns] into the lists; `runs` count columns from the block's first."""
    columns = scores.shape[1]
    across = functools.partial(lax.broadcast_in_dim, shape=scores.shape, broadcast_dimensions=[0])
    column = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=plgpu.Layout.WGMMA)
    candidate = column < across(runs[0])
    if len(runs) > 1:
        candidate |= (column >= across(runs[1])) & (column < across(runs[2]))
    scores = jnp.where(candidate & (scores == scores), scores, -jnp.inf)
    (values, picks), chosen = best, None
    for i in range(min(len(values), columns)):
        if chosen is not None:
            scores = jnp.where(column == across(chosen), -jnp.inf, scores)
        largest = jnp.max(scores, axis=1)
        chosen = jnp.min(jnp.where(scores == across(largest), column, columns), axis=1)
        # A block's i-th largest can't come before the i-th place.
        values, picks = _insert(values, picks, largest, chosen + block * columns, i)
    return values, picks


def _insert(values, picks, value, pick, start):
    """Puts `value` where it is strictly larger than what stands there; what stands behind moves down."""
    larger = [value > v for v in values]
    new_values, new_picks = list(values), list(picks)
    for i in range(start, len(values)):
        new_values[i] = jnp.where(larger[i], value, values[i])
        new_picks[i] = jnp.where(larger[i], pick, picks[i])
        if i > start:
            new_values[i] = jnp.where(larger[i - 1], values[i - 1], new_values[i])
            new_picks[i] = jnp.where(larger[i - 1], picks[i - 1], new_picks[i])
    return new_values, new_picks
