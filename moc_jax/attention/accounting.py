"""What attention costs: attended pairs, sparsity, FLOPs and K/V bytes of any chunk table under any `MoCConfig`.

All figures are per head and count the real tokens of all scenes in the table; padding costs nothing. With L tokens,
V of them video, C non-empty video chunks and heads of size d (MoC, arXiv 2508.21058, section 3.3),

    pooling    V d               every video key is added to its chunk's mean
    routing    2 V C d           every video query is scored against every chunk, as often as it has descriptors
    attention  4 (attended pairs) d
    dense      4 L^2 d           what full attention would cost
    sparsity   1 - (attended pairs) / L^2

What a query picks depends on the data, so without routes two counts are given: the worst case, in which each query
picks the longest chunks it may, and the mean over uniformly random picks. All work is per chunk, on the host.

`python -m moc_jax.attention.accounting` prints the published settings, and what several devices of a scene exchange.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from moc_jax.attention.deal import Deal, head_groups
from moc_jax.attention.homes import Homes, holders
from moc_jax.attention.layout import Queries, queries_of
from moc_jax.attention.routing import anchor_chunks, candidate_chunks, sink_chunks
from moc_jax.attention.usual import usual_pick_rounds, usual_ring_rounds
from moc_jax.config import ChunkConfig, ExchangeKind, MoCConfig
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
    of_queries, (anchors, sinks, candidates) = np.asarray(queries.length, np.int64), map(np.asarray, sets)
    routed = cfg.mode == "moc" and cfg.top_k > 0
    always = anchors if routes is not None else anchors | sinks  # routes have the sinks
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
            of_queries[b], length[b], always[b], candidates[b], cfg.top_k if routed and routes is None else 0
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
            route += 2 * int(of_queries[b][is_video].sum()) * int(is_video.sum()) * cfg.descriptors * head_dim
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
) -> tuple[Queries, Bool[Array, "B C C"], Bool[Array, "B C C"], Bool[Array, "B C C"]]:
    sets = (rule(table, cfg) for rule in (anchor_chunks, sink_chunks, candidate_chunks))
    return queries_of(table, query_chunk), *sets


def _scene_pairs(queries, length, always, candidates, top_k: int) -> tuple[float, float]:
    """Attended pairs of one scene with `top_k` picks per query: the worst case, and the mean over random picks.

    `queries` and `length` [C] are those of each chunk; `always` (anchors and sinks) and `candidates` [C, C] are those
    of routing.py: row = the query's chunk.
    """
    worst = expected = 0.0
    for c in np.flatnonzero(queries):
        held = length[always[c]].sum()
        choice = length[candidates[c]]
        k = min(top_k, len(choice))
        picked = np.sort(choice)[len(choice) - k :].sum()
        worst += queries[c] * (held + picked)
        expected += queries[c] * (held + (k * choice.mean() if k else 0))
    return float(worst), float(expected)


# ------------------------------------------------------------------------------------------------ over devices


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exchange:
    """Bytes that one device of a scene receives in a layer's forward pass; as many leave it."""

    kind: ExchangeKind
    """`gather` or `dispatch`."""
    heads: int
    """q, k and v by their heads, and the outputs back: all_to_all within a group of tokens."""
    keys: int
    """Keys and values of the other groups: all_gather. With dispatch, all that lengths and routes don't change."""
    keys_backward: int
    """Their gradients."""
    rounds: tuple[int, int] = (0, 0)
    """Of dispatch, for equal shots and random picks: in which keys are passed on, and in which picks are served."""
    of_round: tuple[int, int] = (0, 0)
    """Bytes of one such round."""
    of_round_backward: tuple[int, int] = (0, 0)

    @property
    def at_once(self) -> int:
        """Bytes between groups of tokens that a device holds together, about."""
        return self.keys + sum(self.of_round)

    @property
    def between(self) -> int:
        """All of what groups of tokens exchange."""
        return self.keys + sum(n * size for n, size in zip(self.rounds, self.of_round))

    @property
    def between_backward(self) -> int:
        """The same for gradients."""
        return self.keys_backward + sum(n * size for n, size in zip(self.rounds, self.of_round_backward))

    @property
    def forward(self) -> int:
        """All of them."""
        return self.heads + self.between

    @property
    def backward(self) -> int:
        """Their gradients; what is recomputed is exchanged as in the forward pass, beside it."""
        return self.heads + self.between_backward


def exchange(deal: Deal, heads: int, head_dim: int, *, scenes: int = 1, element_bytes: int = 2) -> Exchange:
    """What attention over a mesh moves (sharded.py), with N tokens, those of runs that are longer than others included,

        heads   4 N / (U R) H D (U - 1) / U           keys   2 N H / U D (R - 1) / R           numbers

    Args:
        heads: H, of one tensor shard.
        scenes: That one device has a part of.
    """
    number = scenes * head_dim * element_bytes
    rows = (deal.text_rows + deal.video_rows) // deal.devices
    gathered = deal.text_rows // deal.groups + deal.frames * deal.part
    of_group = heads // deal.head_groups
    keys = 2 * gathered * of_group * (deal.groups - 1) * number
    moved = 4 * rows * of_group * (deal.head_groups - 1) * number
    return Exchange(kind="gather", heads=moved, keys=keys, keys_backward=keys)


def dispatch_exchange(
    deal: Deal,
    table: ChunkTable,
    cfg: MoCConfig,
    heads: int,
    head_dim: int,
    *,
    picks: int | None = None,
    scenes: int = 1,
    element_bytes: int = 2,
) -> Exchange:
    """What it moves if queries go to their picks (dispatch.py): numbers of a head, with n = N / R, S = 4 bytes,

        always      (R - 1) / R n (4 D + S)  to and from home     2 D n  to holders     text and means of chunks
        passed      4 D n                                         each round: two homes' keys and values
        picks       (R - 1) / R n' (2 D + S + K)                  each round: n' queries, their picks, and outputs

    Sizes are static; of `table` only they matter, and rounds are those of equal shots.

    Args:
        picks: The width of routes; None: as for sampling.
    """
    homes, others, shots = Homes.of(deal, table, cfg, picks), deal.groups - 1, table.max_shots or 1
    vector, one = head_dim * element_bytes, 4  # a number of the softmax
    each = scenes * heads // deal.head_groups
    home = homes.frames * deal.part
    holder = homes.slots * homes.part
    means = (
        homes.slots * cfg.descriptors * head_dim * 4 if cfg.routing == "keys" and cfg.mode == "moc" and cfg.top_k else 0
    )
    served = homes.batch * others * (homes.named * element_bytes + 2 * vector + one) if homes.picks else 0
    returned = homes.batch * others * (homes.named * element_bytes + 3 * vector + 2 * one) if homes.picks else 0
    copied = 2 * holder * vector if homes.picks else 0
    around = 4 * homes.rows * vector
    return dataclasses.replace(
        exchange(deal, heads, head_dim, scenes=scenes, element_bytes=element_bytes),
        kind="dispatch",
        keys=each * others * ((home + homes.text_run) * (4 * vector + one) + copied + means),
        keys_backward=each * others * ((home + homes.text_run) * (4 * vector + 2 * one) + copied),
        rounds=(usual_ring_rounds(cfg, homes, shots), usual_pick_rounds(cfg, homes, shots)),
        of_round=(each * around, each * served),
        of_round_backward=(each * 2 * around, each * returned),
    )


def chosen_exchange(
    deal: Deal, table: ChunkTable, cfg: MoCConfig, kind: ExchangeKind, heads: int, head_dim: int, **sizes: int
) -> Exchange:
    """What moves with `attention.exchange` = `kind`: with `auto` what moves less, forward and backward.

    Args:
        sizes: `scenes` and `element_bytes` of `exchange`.
    """
    gathered = exchange(deal, heads, head_dim, **sizes)
    if kind == "gather" or deal.groups == 1:
        return gathered
    dispatched = dispatch_exchange(deal, table, cfg, heads, head_dim, **sizes)
    cheaper = dispatched.forward + dispatched.backward < gathered.forward + gathered.backward
    return dispatched if kind == "dispatch" or cheaper else gathered


def group_pairs(table: ChunkTable, cfg: MoCConfig, deal: Deal, kind: ExchangeKind = "gather") -> np.ndarray:
    """(query, key) pairs that each scene's groups of tokens compute [B, R], if picks are uniformly random."""
    length = np.asarray(table.length, np.int64)
    _, *sets = _chunk_sets(table, None, cfg)
    anchors, sinks, candidates = map(np.asarray, sets)
    picks = cfg.top_k if cfg.mode == "moc" else 0
    if kind == "dispatch":
        return _dispatched_pairs(table, cfg, deal, anchors, sinks, candidates)
    found = np.zeros((len(length), deal.groups))
    for group in range(deal.groups):
        of_queries = np.asarray(_group_queries(table, group, deal), np.int64)
        for b in range(len(length)):
            found[b, group] = _scene_pairs(of_queries[b], length[b], (anchors | sinks)[b], candidates[b], picks)[1]
    return found


def _dispatched_pairs(table: ChunkTable, cfg: MoCConfig, deal: Deal, anchors, sinks, candidates) -> np.ndarray:
    """Anchors of video at its home, and of text at that of its keys; picks at their holders."""
    homes, every = Homes.of(deal, table, cfg), np.arange(deal.groups)
    length, kind = np.asarray(table.length, np.int64), np.asarray(table.kind)
    video, holder = kind == VIDEO, np.asarray(holders(table, homes).holder)
    edges = (np.asarray(table.start) - table.text_tokens)[..., None] - homes.rows * every
    begin, end = (np.clip(x, 0, homes.rows) for x in (edges, edges + length[..., None]))
    at_home = np.where(video[..., None], end - begin, 0)  # tokens [B, C, R]
    at_home[..., 0] += np.where(video, 0, length)
    choice = candidates.sum(axis=2, keepdims=True)
    chance = sinks + candidates * np.minimum(cfg.top_k if cfg.mode == "moc" else 0, choice) / np.maximum(choice, 1)
    of_video, of_text = np.where(video, length, 0), np.where(video, 0, length)
    read = np.where(video, (anchors @ length[..., None])[..., 0], 0)  # keys of each query
    readers = (of_text[:, None] @ anchors)[:, 0]  # text of each key
    served = (of_video[:, None] @ chance)[:, 0] * length
    of_homes = ((read + readers)[:, None] @ at_home)[:, 0]
    return of_homes + (served[:, None] @ (holder[..., None] == every))[:, 0]


@functools.partial(jax.jit, static_argnums=2)
def _group_queries(table: ChunkTable, group: Int[Array, ""], deal: Deal) -> Int[Array, "B C"]:
    return deal.queries(table, group).length


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


_WIDTHS = 9, 5, 7, 6, 10, 8, 8, 6


def print_exchanges(head_dim: int = 128) -> None:
    """Prints what a device receives for a layer, forward and backward, of shots of 25 frames of 900 tokens, top 5."""
    named = zip(("tokens", "heads", "devices", "split", "heads, MB", "gather", "dispatch", "added"), _WIDTHS)
    print("\n" + " ".join(f"{name:>{size}}" for name, size in named))
    cfg, kinds = MoCConfig(chunk=ChunkConfig(size=1280)), ("gather", "dispatch")
    for shots, heads, devices in itertools.product((8, 64), (12, 24), (4, 8, 16, 32, 64, 128, 256)):
        shape = SceneShape(shots=shots, frames=25 * shots, rows=30, columns=30, text_tokens=0)
        groups = head_groups(heads, devices)
        deal = Deal.of(shape, groups=devices // groups, head_groups=groups, sharing=1)
        table = jax.eval_shape(lambda shots=shots: uniform_shots(shots, 22500, cfg.chunk, frame=900))
        moved = [chosen_exchange(deal, table, cfg, kind, heads, head_dim) for kind in kinds]
        between = [f"{(x.between + x.between_backward) / 1e6:.1f}" for x in moved]
        split, added = f"{groups}x{deal.groups}", f"{deal.video_rows / shape.tokens - 1:.1%}"
        found = shape.tokens, heads, devices, split, f"{2 * moved[0].heads / 1e6:.1f}", *between, added
        print(" ".join(f"{x:>{size}}" for x, size in zip(found, _WIDTHS)))


if __name__ == "__main__":
    print_settings()
    print_exchanges()
