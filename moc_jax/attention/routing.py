"""Which chunks each query token of each head attends to (MoC, sections 3.1 to 3.3). Pure functions, no gradients.

Anchors and candidates depend on a query only through its chunk, so both are boolean tables [B, C, C]:
row = the query's chunk, column = the chunk that may be attended to.

    phi(c)      = mean of the chunk's keys, as attention sees them                              (1)
    score(i, c) = q_i . phi(c)                             float32, no scale                    (2)
    picks(i)    = top_k candidates by score, ties to the lowest chunk                           (3)
    context(i)  = picks(i) and anchors(i)                  one softmax over their tokens        (4)

With `sink_chunks`, the first chunks of earlier shots are picks of every query: no candidates, behind its others. With
several `descriptors` a chunk is several columns of phi (columns.py) and scores as the best of them.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from moc_jax.attention.layout import Queries, running_sum
from moc_jax.config import MoCConfig
from moc_jax.scene import GLOBAL, PAD, TEXT, VIDEO, ChunkTable
from moc_jax.shapes import Array, Bool, Float, Float32, Int, Key, typed

FEW = 8  # keys whose mean is near the others
_WIDTH = 32  # of what the width of routes past the chunks is a multiple
_MOST_COMPARED = 16  # for more, sorting beats comparing all
_NOTHING = -1  # no pick
_RANDOM = 4  # folded into the key that random picks are drawn with; `drop` takes 0 to 3


@typed
def anchor_chunks(table: ChunkTable, cfg: MoCConfig) -> Bool[Array, "B C C"]:
    """Chunks that the queries of each chunk always attend to."""
    kind, shot = table.kind, table.shot
    q_text, k_text = (kind == TEXT)[:, :, None], (kind == TEXT)[:, None, :]
    q_video, k_video = (kind == VIDEO)[:, :, None], (kind == VIDEO)[:, None, :]
    same_shot = shot[:, :, None] == shot[:, None, :]
    seen = _visible(table, cfg)
    if cfg.mode == "dense":
        return seen
    text = {
        "all": k_text,
        "own+global": k_text & (same_shot | (shot == GLOBAL)[:, None, :]),
        "none": jnp.zeros_like(k_text),
    }[cfg.text_anchor]
    own = k_video & _self_anchor(table, cfg)
    return seen & ((q_video & (text | own)) | (q_text & (k_text | (k_video & same_shot))))


@typed
def candidate_chunks(table: ChunkTable, cfg: MoCConfig) -> Bool[Array, "B C C"]:
    """Chunks that the queries of each chunk may pick from: non-empty video chunks that are not their anchors."""
    video = table.kind == VIDEO
    there = pickable_chunks(table) & ~first_chunks(table, cfg)
    candidates = video[:, :, None] & there[:, None, :] & _visible(table, cfg)
    candidates &= ~_self_anchor(table, cfg)
    if cfg.causal_routing:
        chunk = jnp.arange(table.kind.shape[1])
        candidates &= (chunk[None, :] < chunk[:, None])[None]
    return candidates


@typed
def pickable_chunks(table: ChunkTable) -> Bool[Array, "B C"]:
    """Chunks that some query might pick: video, and not empty."""
    return (table.kind == VIDEO) & (table.length > 0)


@typed
def first_chunks(table: ChunkTable, cfg: MoCConfig) -> Bool[Array, "B C"]:
    """The first `cfg.sink_chunks` of each shot that are not empty."""
    there = pickable_chunks(table)
    if not cfg.sink_chunks or cfg.mode == "dense":
        return jnp.zeros_like(there)
    chunk = jnp.arange(there.shape[1])
    before = (table.shot[:, None, :] == table.shot[:, :, None]) & (chunk[None, :] < chunk[:, None])[None]
    return there & (jnp.sum(before & there[:, None, :], axis=2) < cfg.sink_chunks)


@typed
def sink_chunks(table: ChunkTable, cfg: MoCConfig) -> Bool[Array, "B C C"]:
    """Chunks that the queries of each chunk pick whatever their keys: the first ones of every earlier shot."""
    earlier = table.shot[:, None, :] < table.shot[:, :, None]
    return (table.kind == VIDEO)[:, :, None] & first_chunks(table, cfg)[:, None, :] & earlier


def sink_slots(table: ChunkTable, cfg: MoCConfig) -> int:
    """The most of them that a query can have."""
    chunks = table.kind.shape[1]
    shots = chunks if table.max_shots is None else table.max_shots
    return 0 if cfg.mode == "dense" else min(cfg.sink_chunks * max(shots - 1, 0), chunks)


@typed
def candidate_runs(table: ChunkTable, cfg: MoCConfig) -> tuple[Int[Array, "B C"], Int[Array, "B C"], Int[Array, "B C"]]:
    """`candidate_chunks` for kernels: (first, second, end), by the query's chunk.

    The candidates are the columns of phi in [0, first) and [second, end) that are of pickable chunks and not NaN. With
    causal routing or no self anchor the second run is empty.
    """
    candidates = candidate_chunks(table, cfg)
    chunks = candidates.shape[-1]
    chunk = jnp.arange(chunks, dtype=jnp.int32)[None, None]
    barred = (pickable_chunks(table) & ~first_chunks(table, cfg))[:, None] & ~candidates
    first = jnp.min(jnp.where(barred, chunk, chunks), axis=-1)
    second = jnp.min(jnp.where(candidates & (chunk > first[:, :, None]), chunk, chunks), axis=-1)
    end = jnp.max(jnp.where(candidates, chunk + 1, 0), axis=-1)
    first, second, end = (cfg.descriptors * x for x in (jnp.minimum(first, end), second, end))
    return first, second, end


def _visible(table: ChunkTable, cfg: MoCConfig) -> Bool[Array, "B C C"]:
    real = table.kind != PAD
    seen = real[:, :, None] & real[:, None, :]
    own, others = table.shot[:, :, None], table.shot[:, None, :]
    if cfg.visibility == "past":  # the global caption counts as shot -1: seen by all, seeing itself
        seen &= others <= own
    elif cfg.visibility == "own":
        seen &= (others == own) | (others == GLOBAL)
    elif cfg.visibility == "before":
        seen &= (others < own) & (others >= 0)
    return seen


def _self_anchor(table: ChunkTable, cfg: MoCConfig) -> Bool[Array, "B C C"]:
    """For rows and columns that are both video."""
    same_shot = table.shot[:, :, None] == table.shot[:, None, :]
    chunk = jnp.arange(table.kind.shape[1])
    apart = jnp.abs(chunk[:, None] - chunk[None, :])[None]
    return {
        "shot": same_shot,
        "chunk": same_shot & (apart == 0),
        "window": same_shot & (apart <= cfg.window),
        "none": jnp.zeros_like(same_shot),
    }[cfg.self_anchor]


@typed
def descriptors(k: Float[Array, "B N H D"], table: ChunkTable) -> Float32[Array, "B H C D"]:
    """Equation (1), computed as phi = r + mean(k - r) in float32, with r the mean of the chunk's first few keys.

    Where all keys are equal, r is that key but for rounding, and the differences, which are exact, give back what
    rounding took: chunks of equal keys tie exactly, whatever their lengths. 0 for empty chunks.

    Chunks are cut into blocks, each from its own first token on, so that no bit depends on where a chunk lies in
    memory. Blocks are summed, then blocks of blocks: gathers and sums in a fixed order, the same bits on each run.

    Bytes: k once, up to a block more for each chunk and its first few keys again; sums of blocks, which are an eighth
    of that for long chunks.
    """
    block = min(32, max(8, table.max_chunk // 4))  # sums of blocks are few beside k; so is what is read in vain
    few = jnp.minimum(table.length, FEW)
    near = _sum_rows(k, table.start, few, FEW) / jnp.maximum(few, 1)[:, :, None, None]
    sums, start, length, less = k, table.start, table.length, near
    longest = max(1, min(max(table.max_chunk, table.text_tokens), k.shape[1]))
    while longest > block:
        sums, start, length = _sum_blocks(sums, start, length, block, less)
        longest, less = -(-longest // block), None
    mean = near + _sum_rows(sums, start, length, longest, less) / jnp.maximum(table.length, 1)[:, :, None, None]
    return jnp.swapaxes(jnp.where((table.length > 0)[:, :, None, None], mean, 0.0), 1, 2)


def _sum_blocks(x: Array, start: Array, length: Array, block: int, less: Array | None):
    """Runs of x [B, N, H, D] -> the sums of their blocks [B, G, H, D], and as which runs these lie there.

    Runs [B, C] are given by start and length; `less` [B, C, H, D] is what is taken from each of their rows before.
    """
    runs = start.shape[1]
    counts = -(-length // block)
    ends = running_sum(counts)
    index = jnp.arange(x.shape[1] // block + runs)
    ended = jnp.sum(ends[:, None, :] <= index[None, :, None], axis=-1, dtype=jnp.int32)
    of = jnp.minimum(ended, runs - 1)  # each block's run: as many have ended before
    begin, size, before = (jnp.take_along_axis(i, of, axis=1) for i in (start, length, ends - counts))
    inside = (index[None] - before) * block  # from the run's start on; beyond its end where there is no block
    less = None if less is None else _rows(less, of)
    sums = _sum_rows(x, begin + inside, jnp.clip(size - inside, 0, block), block, less)
    return sums, ends - counts, counts


def _sum_rows(x: Array, begin: Array, count: Array, most: int, less: Array | None = None) -> Array:
    """The sum [B, C, H, D] of `count` rows from `begin` on, at most `most`, each less `less`, for x [B, N, H, D].

    Pairwise, and term by term instead of by a reduction, before which some compilers would write down all terms.
    """
    terms = []
    for i in range(most):
        row = _rows(x, begin + i)
        terms.append(jnp.where((i < count)[..., None, None], row if less is None else row - less, 0.0))
    while len(terms) > 1:
        terms = [functools.reduce(jnp.add, terms[i : i + 2]) for i in range(0, len(terms), 2)]
    return terms[0]


def _rows(x: Array, index: Array) -> Array:
    """Rows [B, ..., H, D] of x [B, N, H, D] in float32; for those beyond it, which nobody uses, whatever there is."""
    if x.shape[1] == 0:
        return jnp.zeros((*index.shape, *x.shape[2:]), jnp.float32)
    return jax.vmap(lambda x, i: x.at[i].get(mode="clip"))(x, index).astype(jnp.float32)


@typed
def select(
    q: Float[Array, "B Q H D"],
    phi: Float32[Array, "B H _ D"],
    queries: Queries,
    table: ChunkTable,
    cfg: MoCConfig,
    *,
    block: int | None = None,
) -> Int[Array, "B H Q K"]:
    """Equations (2) and (3): the `top_k` best columns of every query's candidates; none of score NaN or -inf.

    Best first, then -1, in `width` of `top_k`. Text and padding tokens pick nothing. `block` queries are scored at a
    time, so that scores never take more than B * H * block * C floats.
    """

    def one_block(q, candidates, _):
        scores = jnp.einsum("bnhd,bhcd->bhnc", q.astype(jnp.float32), phi, precision="highest")
        candidates = jnp.repeat(candidates, cfg.descriptors, axis=-1) if cfg.descriptors > 1 else candidates
        return _top(scores, jnp.broadcast_to(candidates[:, None], scores.shape), cfg.top_k)

    return _by_block(one_block, q, 1, queries, table, cfg, block)


@typed
def random_picks(
    queries: Queries, table: ChunkTable, cfg: MoCConfig, keys: Key[Array, "B H"], *, block: int | None = None
) -> Int[Array, "B H Q K"]:
    """`top_k` candidates of every query, each as likely as any other, in `width` of `top_k`: what luck is worth.

    The bits depend on the scene's and head's key and on the query's row only.
    """

    def one(mask, key):  # [C], key of one query
        score = jnp.where(mask, jax.random.uniform(jax.random.fold_in(key, _RANDOM), mask.shape), -1.0)
        picks = _largest(score, min(cfg.top_k, mask.shape[0]))
        return jnp.where(jnp.arange(picks.size) < jnp.sum(mask), picks, _NOTHING)

    def one_block(_, candidates, token):
        def one_head(mask, key):
            return jax.vmap(one)(mask, jax.vmap(lambda n: jax.random.fold_in(key, n))(token))

        picks = jax.vmap(jax.vmap(one_head, in_axes=(None, 0)))(candidates, keys)
        return widened(picks, width(cfg.top_k, table.kind.shape[1]))

    return _by_block(one_block, queries.chunk_of, 1, queries, table, cfg, block)


@typed
def recent_picks(queries: Queries, table: ChunkTable, cfg: MoCConfig, heads: int) -> Int[Array, "B H Q K"]:
    """The last `top_k` candidates before every query's own chunk, the nearest first, in `width` of `top_k`.

    All heads' are the same: what sliding windows over the past read.
    """
    chunk = jnp.arange(table.kind.shape[1])
    before = candidate_chunks(table, cfg) & (chunk[None, :] < chunk[:, None])[None]
    return _of_queries(jnp.broadcast_to(chunk.astype(jnp.float32), before.shape), before, cfg.top_k, queries, heads)


@typed
def sinks(queries: Queries, table: ChunkTable, cfg: MoCConfig, heads: int) -> Int[Array, "B H Q K"]:
    """`sink_chunks` of every query, in order."""
    chunk = jnp.arange(table.kind.shape[1])
    mask, slots = sink_chunks(table, cfg), sink_slots(table, cfg)
    return _of_queries(jnp.broadcast_to(-chunk.astype(jnp.float32), mask.shape), mask, slots, queries, heads)


@typed
def drop(
    picks: Int[Array, "B H Q K"],
    queries: Queries,
    table: ChunkTable,
    cfg: MoCConfig,
    keys: Key[Array, "B H"],
    *,
    block: int | None = None,
) -> Int[Array, "B H Q _"]:
    """Context drop-off and drop-in (MoC, section 3.3), after top-k, independently per query.

    The bits depend on the scene's and head's key and on the query's row only, so that every backend, block size
    and sharding draws the same.
    """

    def one_block(picks, candidates, token):
        return _drop(picks, candidates, keys, token, cfg)

    return _by_block(one_block, picks, 2, queries, table, cfg, block)


def _of_queries(scores: Array, mask: Array, count: int, queries: Queries, heads: int) -> Int[Array, "B H Q K"]:
    """The `count` best of each query's chunk, by scores and mask [B, C, C]; the same for all heads."""
    of = jnp.maximum(queries.chunk_of, 0)  # padding reads chunk 0's, which has none
    picks = jnp.take_along_axis(_top(scores, mask, count), of[:, :, None], axis=1)
    return jnp.broadcast_to(picks[:, None], (picks.shape[0], heads, *picks.shape[1:]))


def _by_block(function, x: Array, axis: int, queries: Queries, table: ChunkTable, cfg: MoCConfig, block: int | None):
    """function(rows of x, their candidates [B, n, C], their tokens [n]) -> [B, H, n, K], `block` tokens at a time.

    `axis` is x's axis of tokens.
    """
    tokens, chunks = queries.chunk_of.shape[1], table.kind.shape[1]
    # One more row, all False, for the padding tokens' chunk -1.
    candidates = jnp.pad(candidate_chunks(table, cfg), ((0, 0), (0, 1), (0, 0)))
    block = max(1, min(block or tokens, tokens))
    padding = -tokens % block
    x = jnp.pad(x, [(0, padding if i == axis else 0) for i in range(x.ndim)])
    chunk_of = jnp.pad(queries.chunk_of, ((0, 0), (0, padding)), constant_values=_NOTHING)
    token = jnp.arange(tokens + padding) if queries.row is None else jnp.pad(queries.row, (0, padding))

    def one(i):
        rows = lax.dynamic_slice_in_dim(x, i * block, block, axis=axis)
        of = lax.dynamic_slice_in_dim(chunk_of, i * block, block, axis=1)
        mask = jnp.take_along_axis(candidates, jnp.where(of < 0, chunks, of)[:, :, None], axis=1)
        return function(rows, mask, lax.dynamic_slice_in_dim(token, i * block, block))

    picks = lax.map(one, jnp.arange((tokens + padding) // block))  # [blocks, B, H, block, K]
    return jnp.moveaxis(picks, 0, 2).reshape(*picks.shape[1:3], tokens + padding, picks.shape[-1])[:, :, :tokens]


def _top(scores: Array, mask: Array, top_k: int) -> Int[Array, "... K"]:
    chunks = scores.shape[-1]
    mask = mask & (scores > -jnp.inf)  # neither NaN nor what is as bad as no candidate
    # lax.top_k puts the lowest index first among equals, for which it doesn't take 0 and -0.
    scores = jnp.where(mask, jnp.where(scores == 0, 0.0, scores), -jnp.inf)
    _, picks = lax.top_k(scores, min(top_k, chunks))
    picks = jnp.where(jnp.take_along_axis(mask, picks, axis=-1), picks, _NOTHING)
    return widened(picks, width(top_k, chunks))


def width(most: int, chunks: int) -> int:
    """K for up to `most` picks: as many, but none past the chunks rounded up to a multiple of 32.

    So a setting has the same width for scenes of all sizes, unless it asks for more than any of them could fill.
    """
    return min(most, -(-chunks // _WIDTH) * _WIDTH)


def widened(picks: Int[Array, "... _"], count: int) -> Int[Array, "... _"]:
    """`picks` with -1 behind, `count` in all."""
    return jnp.pad(picks, ((0, 0),) * (picks.ndim - 1) + ((0, count - picks.shape[-1]),), constant_values=_NOTHING)


def _drop(picks: Array, mask: Array, keys: Array, token: Array, cfg: MoCConfig) -> Int[Array, "B H N K"]:
    """`drop` for the queries `token` [n]: picks [B, H, n, K] and candidates [B, n, C]."""
    chunks = mask.shape[-1]
    most = min(cfg.max_drop_in, chunks)
    below = jnp.cumsum(jnp.asarray(_poisson(cfg.drop_in_rate, most), jnp.float32))  # P(Poisson <= m)

    def one(picks, mask, key):  # [K], [C], key of one query
        off, order, count, priority = (jax.random.fold_in(key, i) for i in range(4))
        held = picks >= 0
        drop = jnp.floor(jax.random.uniform(off, maxval=cfg.drop_off_max) * jnp.sum(held))
        order = jnp.where(held, jax.random.uniform(order, picks.shape), jnp.inf)
        kept = jnp.where(held & (_rank(order) >= drop), picks, _NOTHING)

        free = mask & ~jnp.any(picks[:, None] == jnp.arange(chunks)[None], axis=0)
        more = jnp.minimum(jnp.sum(jax.random.uniform(count) >= below), jnp.sum(free))
        added = _largest(jnp.where(free, jax.random.uniform(priority, (chunks,)), -1.0), most)
        added = jnp.where(jnp.arange(most) < more, added, _NOTHING)
        return jnp.concatenate([kept, added])

    def one_head(picks, mask, key):  # [N, K], [N, C]
        return jax.vmap(one)(picks, mask, jax.vmap(lambda n: jax.random.fold_in(key, n))(token))

    drawn = jax.vmap(jax.vmap(one_head, in_axes=(0, None, 0)))(picks, mask, keys)
    return widened(drawn, picks.shape[-1] + width(cfg.max_drop_in, chunks))


def _poisson(rate: float, count: int) -> list[float]:
    """P(Poisson = m) for m < count."""
    steps = [math.exp(-rate)]
    for m in range(1, count):
        steps.append(steps[-1] * rate / m)
    return steps[:count]


def _rank(x: Array) -> Array:
    """Each element's place [K] in ascending order, equals in order."""
    if x.shape[0] > _MOST_COMPARED:
        return jnp.argsort(jnp.argsort(x))
    place = jnp.arange(x.shape[0])
    before = (x[None] < x[:, None]) | ((x[None] == x[:, None]) & (place[None] < place[:, None]))
    return jnp.sum(before, axis=1)


def _largest(x: Array, count: int) -> Array:
    """Indices [count] of the largest elements, equals by index."""
    if count > _MOST_COMPARED:
        return lax.top_k(x, count)[1]
    found = []
    for _ in range(count):
        found.append(jnp.argmax(x))
        x = jnp.where(jnp.arange(x.shape[0]) == found[-1], -jnp.inf, x)
    return jnp.stack(found) if found else jnp.zeros(0, jnp.int32)
