"""Top-k chunk selection in one Mosaic GPU kernel (Hopper): scores never reach device memory.

(a) Exact scores. q is exact in its 16-bit type; phi is float32 and goes in as a sum of three 16-bit parts, whose
    products with q a warpgroup adds up in one float32 accumulator, the smallest part first. 24 bits of every mean
    count, as in a float32 product; only the order of the sum differs.
(b) Candidates. Chunks that nobody may pick (text, empty, padding) are columns of NaN, and a NaN score is never
    picked. What else a query may not pick is anchors of its own, later chunks and unseen shots: intervals of chunks,
    so its candidates are two runs of columns, [0, first) and [second, end), three integers per row.
(c) Each of three warpgroups scores 64 queries of one head against one tile of chunks at a time and takes the largest
    score of each row, then the next, `top_k` times; each goes into the row's list, kept in registers, if it is
    strictly larger than what stands there. Columns come in ascending order, so ties keep the lowest chunk.
(d) A fourth warpgroup loads the tiles of phi. Where all of a head's fit, they are loaded once per block of queries;
    else they go through a ring of two. Tiles past the last candidate of all three warpgroups' queries are skipped:
    with causal routing that is half of them.

FLOPs: 3 * 2 * B * H * N * C * D, halved by (d). Bytes: q once, 4 * B * H * N * K of picks; phi's tiles come from L2.
The rest is vector work, 5.5 instructions per score and round of (c), which takes longer than the products and hides
them: while one warpgroup waits for its product, the others search.
"""

import dataclasses
import functools
from collections.abc import Hashable
from typing import Self

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moc_jax.attention.layout import (
    ALIGN,
    Queries,
    candidate_rows,
    candidates_are_split,
    round_up,
    split_in_parts,
)
from moc_jax.attention.routing import candidate_runs, pickable_chunks, widened, width
from moc_jax.config import MoCConfig
from moc_jax.scene import ChunkTable
from moc_jax.shapes import Array, Float, Float32, Int, typed

_ROWS = 64  # queries of one warpgroup: the M of wgmma
_GROUPS = 3  # warpgroups that compute; registers leave room for no fourth
_STEP = _GROUPS * _ROWS  # queries of a block
_PARTS = 3  # 16-bit parts of a float32: 3 * 8 bits in bfloat16, 3 * 11 in float16
_MOST_STEPS = 8  # tiles of queries per program: enough to pay for loading phi
_PROGRAMS = 4 * 132  # at least so many, where there is work for them: they fill the last wave
_MOST_COLUMNS = 96  # of a tile; more would spill
_MOST_PICKS = 16  # a list of 2 * 2 registers each
_SMEM = 220 * 1024  # of 227 KiB; the rest is for barriers and what the compiler takes


@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterTiling:
    """How queries and the chunks of one head go through shared memory."""

    tiles: int
    columns: int  # of one tile
    slots: int  # tiles that fit at once: all of them, or a ring
    steps: int  # blocks of queries per program

    @property
    def resident(self) -> bool:
        return self.slots == self.tiles

    @classmethod
    def of(cls, chunks: int, head_dim: int, queries: int) -> Self:
        """As many chunks at once as shared memory and registers have room for; for so many queries of all heads."""
        steps = max(1, min(_MOST_STEPS, queries // (_STEP * _PROGRAMS)))
        column = _PARTS * head_dim * 2
        room = (_SMEM - _STEP * head_dim * 2) // column
        tiles = -(-chunks // _MOST_COLUMNS)
        columns = round_up(-(-chunks // tiles), 8)
        if tiles * columns <= room:
            return cls(tiles=tiles, columns=columns, slots=tiles, steps=steps)
        columns = min(_MOST_COLUMNS, room // 2 // 8 * 8)
        return cls(tiles=-(-chunks // columns), columns=columns, slots=2, steps=steps)


def can_select(cfg: MoCConfig) -> bool:
    """Whether `top_k` is within the kernel's reach, however many chunks there are."""
    return cfg.top_k <= _MOST_PICKS


@typed
def select(
    q: Float[Array, "B Q H D"],
    phi: Float32[Array, "B H C D"],
    queries: Queries,
    table: ChunkTable,
    cfg: MoCConfig,
    *,
    tiling: RouterTiling | None = None,
    interpret: Hashable | None = None,
) -> Int[Array, "B H Q K"]:
    """As `routing.select`: the best candidates of every query, best first; -1 fills slots that hold none.

    Args:
        q: After QK-norm and rotary embedding; bfloat16 or float16.
        phi: The chunks' descriptors, `routing.descriptors`.
        tiling: None: what suits the sizes.
        interpret: As `Hopper.interpret`.

    Raises:
        NotImplementedError: q's type, D or `top_k` (and the number of chunks) is none that the kernel can do.
    """
    _check(q, phi.shape[2], cfg)
    batch, count, heads, head_dim = q.shape
    q = jnp.pad(q, ((0, 0), (0, -count % ALIGN), (0, 0), (0, 0)))
    tiling = tiling or RouterTiling.of(phi.shape[2], head_dim, batch * heads * count)
    blocks = -(-count // (_STEP * tiling.steps))
    runs = candidate_rows(candidate_runs(table, cfg), queries, blocks * tiling.steps * _STEP)
    used = -(-jnp.max(runs[:, 2].reshape(batch, -1, _STEP), axis=-1) // tiling.columns)  # [B, blocks * steps]

    top_k = min(cfg.top_k, phi.shape[2])  # no query has more candidates than there are chunks
    picks = plgpu.kernel(
        functools.partial(_kernel, tiling=tiling, split=candidates_are_split(cfg)),
        out_type=jax.ShapeDtypeStruct((batch, heads, top_k, round_up(count, _ROWS)), jnp.int32),
        kernel_name="moc_router",
        grid=(heads, blocks, batch),
        grid_names=("heads", "blocks", "batch"),
        num_threads=_GROUPS + 1,
        thread_name="group",
        scratch_types=_scratch(tiling, head_dim, q.dtype),
        interpret=interpret,
    )(q, _parts(phi, table, tiling, q.dtype), runs, used)
    picks = jnp.swapaxes(picks, 2, 3)[:, :, :count]
    return widened(picks, width(cfg.top_k, phi.shape[2]))


def _check(q, chunks: int, cfg):
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(
            f'q is {q.dtype}; the routing kernel takes bfloat16 or float16: cast q and k, or use backend="xla"'
        )
    if q.shape[-1] % 64 or q.shape[-1] > 256:
        raise NotImplementedError(
            f'heads of size {q.shape[-1]}; the routing kernel takes 64, 128, 192 and 256: use backend="xla"'
        )
    if min(cfg.top_k, chunks) > _MOST_PICKS:
        raise NotImplementedError(
            f"moc.top_k is {cfg.top_k} of {chunks} chunks; the routing kernel keeps at most {_MOST_PICKS} picks in "
            'registers: pick fewer, larger chunks, or use backend="xla"'
        )


def _parts(phi, table, tiling, dtype):
    """phi [B, H, C, D] as a sum of `_PARTS` 16-bit parts, largest first: [B * H * tiles * parts, columns, D].

    float16 has the bits but not the range, so each head is scaled by a power of two (which changes no comparison) to
    put its largest mean just below float16's largest number.
    """
    batch, heads, chunks, head_dim = phi.shape
    pickable = pickable_chunks(table)[:, None, :, None]
    if dtype == jnp.float16:
        size = jnp.where(pickable & jnp.isfinite(phi), jnp.abs(phi), 0.0)
        _, exponent = jnp.frexp(jnp.max(size, axis=(2, 3), keepdims=True))
        phi = jnp.ldexp(phi, 15 - exponent)
    phi = jnp.where(pickable, phi, jnp.nan)
    padding = tiling.tiles * tiling.columns - chunks
    phi = jnp.pad(phi, ((0, 0), (0, 0), (0, padding), (0, 0)), constant_values=jnp.nan)
    phi = phi.reshape(batch, heads, tiling.tiles, tiling.columns, head_dim)
    return jnp.stack(split_in_parts(phi, dtype, _PARTS), axis=3).reshape(-1, tiling.columns, head_dim)


def _scratch(tiling, head_dim, dtype):
    layout = plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)
    return dict(
        q_smem_ref=plgpu.SMEM((_GROUPS, _ROWS, head_dim), dtype, transforms=layout),
        phi_smem_ref=plgpu.SMEM((tiling.slots, _PARTS, tiling.columns, head_dim), dtype, transforms=layout),
        q_loaded_barrier_ref=plgpu.Barrier(num_barriers=_GROUPS),
        phi_loaded_barrier_ref=plgpu.Barrier(num_barriers=tiling.slots),
        phi_free_barrier_ref=plgpu.Barrier(num_arrivals=_GROUPS, num_barriers=tiling.slots),
    )


def _kernel(
    q_gmem_ref,  # [B, Q, H, D]
    phi_gmem_ref,  # [B * H * tiles * parts, columns, D]
    runs_gmem_ref,  # [B, 3, padded Q]
    used_gmem_ref,  # [B, steps of all blocks]: tiles of phi that hold candidates of the step's queries
    picks_gmem_ref,  # [B, H, K, Q rounded up to _ROWS]
    *,
    q_smem_ref,
    phi_smem_ref,
    q_loaded_barrier_ref,
    phi_loaded_barrier_ref,
    phi_free_barrier_ref,
    tiling,
    split,  # whether candidates go on behind the anchors: with causal routing they don't
):
    batch, head, group = lax.axis_index("batch"), lax.axis_index("heads"), lax.axis_index("group")
    heads, steps = q_gmem_ref.shape[2], tiling.steps
    # The last queries have the most candidates, so they start first.
    block = lax.axis_size("blocks") - 1 - lax.axis_index("blocks")

    @pl.when(group == _GROUPS)
    def _load_phi():
        plgpu.set_max_registers(24, action="decrease")

        def load(tile, slot):
            first = ((batch * heads + head) * tiling.tiles + tile) * _PARTS
            plgpu.copy_gmem_to_smem(
                phi_gmem_ref.at[pl.ds(first, _PARTS)], phi_smem_ref.at[slot], phi_loaded_barrier_ref.at[slot]
            )

        if tiling.resident:
            for tile in range(tiling.tiles):
                load(tile, tile)
            return

        def load_next(tile, loaded):
            slot = lax.rem(loaded, tiling.slots)

            @pl.when(loaded >= tiling.slots)
            def _():
                plgpu.barrier_wait(phi_free_barrier_ref.at[slot])

            load(tile, slot)
            return loaded + 1

        def one_step(step, loaded):
            return lax.fori_loop(0, used_gmem_ref[batch, block * steps + step], load_next, loaded)

        lax.fori_loop(0, steps, one_step, 0)

    @pl.when(group < _GROUPS)
    def _pick():
        plgpu.set_max_registers(160, action="increase")
        load_q = functools.partial(_load_q, q_gmem_ref, q_smem_ref, q_loaded_barrier_ref, batch, head, group)

        def row_of(step):
            return ((block * steps + step) * _GROUPS + group) * _ROWS

        load_q(row_of(0))
        if tiling.resident:
            for slot in range(tiling.slots):
                plgpu.barrier_wait(phi_loaded_barrier_ref.at[slot])

        def one_step(step, seen):
            row, used = row_of(step), used_gmem_ref[batch, block * steps + step]

            def load_next_q():
                pl.when(step + 1 < steps)(lambda: load_q(row_of(step + 1)))

            runs = [
                plgpu.load(runs_gmem_ref.at[batch, i, pl.ds(row, _ROWS)], layout=_ROW, optimized=False)
                for i in range(3 if split else 1)
            ]
            plgpu.barrier_wait(q_loaded_barrier_ref.at[group])

            def one_tile(tile, carry):
                seen, best = carry
                slot = tile if tiling.resident else lax.rem(seen, tiling.slots)
                if not tiling.resident:
                    plgpu.barrier_wait(phi_loaded_barrier_ref.at[slot])
                scores = _scores(q_smem_ref.at[group], phi_smem_ref.at[slot])
                if not tiling.resident:
                    plgpu.barrier_arrive(phi_free_barrier_ref.at[slot])
                pl.when(tile == used - 1)(load_next_q)
                return seen + 1, _merge(scores, [run - tile * tiling.columns for run in runs], best, tile)

            pl.when(used == 0)(load_next_q)
            seen, (_, picks) = lax.fori_loop(0, used, one_tile, (seen, _nothing(picks_gmem_ref.shape[2])))

            @pl.when(row < picks_gmem_ref.shape[3])
            def _():
                for i, pick in enumerate(picks):
                    picks_gmem_ref[batch, head, i, pl.ds(row, _ROWS)] = pick

            return seen

        lax.fori_loop(0, steps, one_step, 0)


_TILE, _ROW = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1)


def _load_q(q_gmem_ref, q_smem_ref, q_loaded_barrier_ref, batch, head, group, row):
    """Rows past the last token come as zeros."""
    plgpu.copy_gmem_to_smem(
        q_gmem_ref.at[batch, pl.ds(row, _ROWS), head], q_smem_ref.at[group], q_loaded_barrier_ref.at[group]
    )


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


def _merge(scores, runs, best, tile):
    """Folds a tile's scores [64, columns] into the lists; `runs` count columns from the tile's first."""
    columns = scores.shape[1]
    across = functools.partial(lax.broadcast_in_dim, shape=scores.shape, broadcast_dimensions=[0])
    column = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=_TILE)
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
        # A tile's i-th largest can't come before the i-th place.
        values, picks = _insert(values, picks, largest, chosen + tile * columns, i)
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
