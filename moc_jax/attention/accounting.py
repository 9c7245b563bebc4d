"""What attention costs: attended pairs, sparsity, FLOPs and K/V bytes of any chunk table under any `MoCConfig`.

All figures are per head and count the real tokens of all scenes in the table; padding costs nothing. With L tokens,
V of them video, C non-empty video chunks and heads of size d (MoC, arXiv 2508.21058, section 3.3),

    pooling    V d               every video key is added to its chunk's mean
    routing    2 V C d           every video query is scored against every chunk
    attention  4 (attended pairs) d
    dense      4 L^2 d           what full attention would cost
    sparsity   1 - (attended pairs) / L^2

What a query picks depends on the data, so without routes two counts are given: the worst case, in which each query
picks the longest chunks it may, and the mean over uniformly random picks. All work is per chunk, on the host.

`python -m moc_jax.attention.accounting` prints the published settings.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from moc_jax.attention.layout import Queries, queries_of
from moc_jax.attention.routing import anchor_chunks, candidate_chunks
from moc_jax.config import ChunkConfig, MoCConfig
from moc_jax.scene import VIDEO, ChunkTable, SceneLengths, SceneShape, chunk_table
from moc_jax.shapes import Array, Bool, Int, typed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Accounting:
    """Counts per head, over all scenes of a table."""

    tokens: int
    """Text and video tokens that keys are of, padding left out."""
    pairs: float
    """(query, key) pairs attended to: the mean over heads if the routes were given, else the worst case."""
    expected_pairs: float
    """The same if picks are uniformly random; equal to `pairs` if the routes were given."""
    dense_pairs: int
    """All (query, key) pairs within each scene."""
    flops_pool: int
    flops_route: int
    flops_attention: float
    flops_dense: int
    kv_bytes: int
    """Keys and values of all tokens: what a cache of the scenes holds."""
    kv_bytes_read: float
    """Keys and values of all attended pairs: what is read if no two queries share a read."""

    @property
    def sparsity(self) -> float:
        """The share of all pairs that is left out, by `pairs`."""
        return 1 - self.pairs / self.dense_pairs if self.dense_pairs else 0.0

    @property
    def expected_sparsity(self) -> float:
        """The same by `expected_pairs`."""
        return 1 - self.expected_pairs / self.dense_pairs if self.dense_pairs else 0.0

    @property
    def flops(self) -> float:
        """Pooling, routing and attention."""
        return self.flops_pool + self.flops_route + self.flops_attention


@typed
def account(
    table: ChunkTable,
    cfg: MoCConfig,
    head_dim: int,
    routes: Int[Array, "B H Q K"] | None = None,
    *,
    query_chunk: Int[Array, "B Q"] | None = None,
    element_bytes: int = 2,
) -> Accounting:
    """Counts what attention over `table` costs per head; exactly if the `routes` of `attention.api.route` are given.

    Where queries are not the table's tokens, give their `query_chunk` as to `moc_attention`.

    Raises:
        ValueError: `routes` are not for the scenes of `table` and its queries.
    """
    kind, length = np.asarray(table.kind), np.asarray(table.length, np.int64)
    queries, *sets = _chunk_sets(table, query_chunk, cfg)
    of_queries, (anchors, candidates) = np.asarray(queries.length, np.int64), map(np.asarray, sets)
    routed = cfg.mode == "moc" and cfg.top_k > 0
    if routes is not None and (routes.shape[0], routes.shape[2]) != queries.chunk_of.shape:
        raise ValueError(
            f"routes are for {routes.shape[0]} scenes of {routes.shape[2]} tokens, but the chunk table has "
            f"{queries.chunk_of.shape[0]} of {queries.chunk_of.shape[1]}; pass this table's routes, or query_chunk"
        )
    worst = expected = 0.0
    tokens = dense = pool = route = 0
    for b in range(len(kind)):
        is_video = (kind[b] == VIDEO) & (length[b] > 0)
        scene_worst, scene_expected = _scene_pairs(
            of_queries[b], length[b], anchors[b], candidates[b], cfg.top_k if routed and routes is None else 0
        )
        if routes is not None:
            picks = np.asarray(routes[b])
            scene_worst += np.where(picks >= 0, length[b][picks], 0).sum() / picks.shape[0]
            scene_expected = scene_worst
        worst, expected = worst + scene_worst, expected + scene_expected
        scene_tokens = int(length[b].sum())
        tokens, dense = tokens + scene_tokens, dense + int(of_queries[b].sum()) * scene_tokens
        if routed and cfg.routing == "keys":
            pool += int(length[b][is_video].sum()) * head_dim
            route += 2 * int(of_queries[b][is_video].sum()) * int(is_video.sum()) * head_dim
    return Accounting(
        tokens=tokens,
        pairs=worst,
        expected_pairs=expected,
        dense_pairs=dense,
        flops_pool=pool,
        flops_route=route,
        flops_attention=4 * worst * head_dim,
        flops_dense=4 * dense * head_dim,
        kv_bytes=2 * tokens * head_dim * element_bytes,
        kv_bytes_read=2 * worst * head_dim * element_bytes,
    )


@functools.partial(jax.jit, static_argnums=2)  # one program instead of some thirty
def _chunk_sets(
    table: ChunkTable, query_chunk: Int[Array, "B Q"] | None, cfg: MoCConfig
) -> tuple[Queries, Bool[Array, "B C C"], Bool[Array, "B C C"]]:
    return queries_of(table, query_chunk), anchor_chunks(table, cfg), candidate_chunks(table, cfg)


def _scene_pairs(queries, length, anchors, candidates, top_k: int) -> tuple[float, float]:
    """Attended pairs of one scene with `top_k` picks per query: the worst case, and the mean over random picks.

    `queries` and `length` [C] are those of each chunk; `anchors` and `candidates` [C, C] are those of routing.py: row =
    the query's chunk.
    """
    worst = expected = 0.0
    for c in np.flatnonzero(queries):
        always = length[anchors[c]].sum()
        choice = length[candidates[c]]
        k = min(top_k, len(choice))
        picked = np.sort(choice)[len(choice) - k :].sum()
        worst += queries[c] * (always + picked)
        expected += queries[c] * (always + (k * choice.mean() if k else 0))
    return float(worst), float(expected)


# ------------------------------------------------------------------------------------------------ published settings


def uniform_shots(shots: int, tokens: int, chunk: ChunkConfig, *, frame: int = 1) -> ChunkTable:
    """The chunk table of `shots` equal shots of `tokens` tokens each, in frames of `frame` tokens, without text."""
    shape = SceneShape(shots=shots, frames=shots * tokens // frame, rows=1, columns=frame, text_tokens=0)
    lengths = SceneLengths(
        shot_frames=jnp.full((1, shots), tokens // frame), text_lengths=jnp.zeros((1, shots + 1), int)
    )
    return jax.jit(chunk_table, static_argnums=(1, 2))(lengths, shape, chunk)


def published_settings() -> dict[str, tuple[ChunkTable, MoCConfig]]:
    """The settings whose figures are published: the single-shot ablation, multi-shot, the FLOPs headline, Wan 2.1."""
    settings = {}

    def add(name, cfg: MoCConfig, shots, tokens, *, frame=1):
        settings[f"{name}, k {cfg.top_k}"] = (uniform_shots(shots, tokens, cfg.chunk, frame=frame), cfg)

    for size, k in [(64, 3), (128, 3), (256, 3), (512, 3), (1024, 3), (256, 1), (256, 2), (256, 4), (256, 5), (256, 6)]:
        chunk = ChunkConfig(size=size, remainder="tail")
        cfg = MoCConfig(chunk=chunk, top_k=k, self_anchor="chunk", causal_routing=False)
        add(f"single-shot, chunk {size}", cfg, 1, 6300)
    for size in (10240, 5120, 2560, 1280):
        add(f"multi-shot, chunk {size}", MoCConfig(chunk=ChunkConfig(size=size), top_k=5), 8, 22500)
    chunk = ChunkConfig(size=1024, remainder="tail")
    add("headline, chunk 1024", MoCConfig(chunk=chunk, top_k=5, causal_routing=False), 9, 20000)
    chunk = ChunkConfig(unit="frames", size=1)
    cfg = MoCConfig(chunk=chunk, top_k=3, self_anchor="chunk", causal_routing=False)
    add("Wan 2.1, chunk 1 frame", cfg, 1, 32760, frame=1560)
    return settings


def print_settings(head_dim: int = 128) -> None:
    """Prints sparsity and FLOPs per head of every published setting."""
    print(f"{'setting':<28} {'tokens':>8} {'sparsity':>9} {'expected':>9} {'FLOPs':>9} {'dense':>9} {'ratio':>7}")
    for name, (table, cfg) in published_settings().items():
        a = account(table, cfg, head_dim)
        print(
            f"{name:<28} {a.tokens:>8} {a.sparsity:>9.1%} {a.expected_sparsity:>9.1%} "
            f"{a.flops:>9.2e} {a.flops_dense:>9.2e} {a.flops_dense / a.flops:>6.2f}x"
        )


if __name__ == "__main__":
    print_settings()
