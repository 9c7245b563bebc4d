"""Mixture of Contexts attention: one function, whatever the device."""

import dataclasses
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import jax

from moc_jax.attention import routing
from moc_jax.attention.backends import Backend, implementation, resolve
from moc_jax.attention.checks import (
    check_key,
    check_query_chunk,
    check_routes,
    check_settings,
    check_table,
    check_vectors,
)
from moc_jax.attention.columns import by_column, chunks_of
from moc_jax.attention.deal import Deal
from moc_jax.attention.dispatch import Dispatch
from moc_jax.attention.homes import Homes
from moc_jax.attention.layout import Queries, queries_of
from moc_jax.attention.links import Links
from moc_jax.attention.residuals import named_routes
from moc_jax.attention.tilings import Tilings, kept_tilings, read_tilings
from moc_jax.config import AttentionConfig, ExchangeKind, MoCConfig
from moc_jax.scene import ChunkTable
from moc_jax.shapes import Array, Float, Float32, Int, Key

_Vectors = Array | jax.ShapeDtypeStruct
_DRAWN = 2**23  # numbers that are drawn at a time: one for each candidate of a query


def moc_attention(
    q: Float[Array, "B Q H D"],
    k: Float[Array, "B N H D"],
    v: Float[Array, "B N H D"],
    table: ChunkTable,
    cfg: MoCConfig,
    *,
    key: Key[Array, ""] | Key[Array, "B H"] | None = None,
    routes: Int[Array, "B H Q K"] | None = None,
    query_chunk: Int[Array, "B Q"] | None = None,
    backend: str | Backend = "auto",
) -> Float[Array, "B Q H D"]:
    """softmax(q_i K^T / sqrt(D)) V over the tokens of the query's anchors and of the chunks it picks (MoC, eq. 2-4).

    Args:
        q, k, v: After QK-norm and rotary embedding; float32, bfloat16 or float16. Padding may hold anything finite, and
            its output's gradient NaN too.
        table: Which of k's and v's tokens form which chunk.
        cfg: What to attend to. `mode="dense"` sees every visible token with the same weights.
        key: Switches context drop-off and drop-in on (training). One key, or one per scene and head. What is drawn
            depends on the row of q. Random routing draws with it too, and without one always the same.
        routes: Picks made before with `route`, for each video query different chunks that are not its anchors; None
            routes now. With routes, `key` does nothing.
        query_chunk: The chunk that each query token belongs to, -1 for padding. The query tokens of a chunk are one
            run, and those of a shot's video chunks follow each other in chunk order: so it is in any slice of the
            table's own tokens; `pallas_gpu` wants all of them in the table's order. None: q's tokens are the table's.
        backend: What computes it: a value of backends.py, or the name of one for its defaults. `auto` takes the
            kernels where there are any for this device.

    Returns:
        Outputs in v's type; 0 for padding tokens and for queries with nothing to attend to.

    Raises:
        TypeError, ValueError: the arguments are of other kinds or disagree with one another; their values are looked at
            where they are concrete, that is, outside of jit.
        NotImplementedError: the backend can't do what `cfg` asks, here or with these types.
    """
    check_settings(cfg)
    q, k, v = check_vectors(q=q, k=k, v=v)
    table = check_table(table, k, cfg)
    queries = queries_of(table, check_query_chunk(query_chunk, q, table))
    if routes is None:
        routes = _route(q, k, queries, table, cfg, key, backend)
    else:
        routes = check_routes(routes, q, queries, table, cfg)
    return _attend(q, k, v, routes, queries, table, cfg, backend)


def _attend(
    q: Array, k: Array, v: Array, routes: Array, queries: Queries, table: ChunkTable, cfg: MoCConfig, backend
) -> Float[Array, "B Q H D"]:
    routes = fitting(routes, table)
    cfg = within(cfg, table)
    value = resolve(backend, cfg, q, k, v)
    return implementation(value).attend(q, k, v, routes, queries, table, cfg, value)


def within(cfg: MoCConfig, table: ChunkTable) -> MoCConfig:
    """No query picks more chunks than there are."""
    return dataclasses.replace(cfg, top_k=min(cfg.top_k, table.kind.shape[1]))


def fitting(routes: Int[Array, "B H Q _"], table: ChunkTable) -> Int[Array, "B H Q K"]:
    """Nor holds more."""
    if routes.shape[-1] <= table.kind.shape[1]:
        return routes
    return jax.numpy.sort(routes, axis=-1, descending=True)[..., : table.kind.shape[1]]


def route(
    q: Float[Array, "B Q H D"],
    k: Float[Array, "B N H D"],
    table: ChunkTable,
    cfg: MoCConfig,
    *,
    key: Key[Array, ""] | Key[Array, "B H"] | None = None,
    query_chunk: Int[Array, "B Q"] | None = None,
    backend: str | Backend = "auto",
) -> Int[Array, "B H Q K"]:
    """The chunks that each query picks, best first; -1 where it has no more (text and padding: none at all).

    K is `top_k`; with a key, `top_k + max_drop_in`; 0 in dense mode and for top_k = 0. Of a `top_k` or `max_drop_in`
    beyond the table's chunks, only as many are kept as there are chunks, rounded up to a multiple of 32. `sink_chunks`
    come behind these, for all shots of the table but one. No gradient flows through it.

    Raises:
        TypeError, ValueError, NotImplementedError: as `moc_attention`.
    """
    check_settings(cfg)
    q, k = check_vectors(q=q, k=k)
    table = check_table(table, k, cfg)
    return _route(q, k, queries_of(table, check_query_chunk(query_chunk, q, table)), table, cfg, key, backend)


def _route(
    q: Array, k: Array, queries: Queries, table: ChunkTable, cfg: MoCConfig, key, backend: str | Backend, luck=None
) -> Int[Array, "B H Q K"]:
    """`luck`: keys that random routing draws with where there is no `key`."""
    value = resolve(backend, cfg, q, k, chunks=table.kind.shape[1])

    def phi():
        return implementation(value).means(jax.lax.stop_gradient(k), table, cfg, value)

    return route_by(q, phi, queries, table, cfg, value, key=key, luck=luck)


def route_by(
    q: Float[Array, "B Q H D"],
    phi: Callable[[], Float32[Array, "B H _ D"]],
    queries: Queries,
    table: ChunkTable,
    cfg: MoCConfig,
    backend: Backend,
    *,
    key: Key[Array, ""] | Key[Array, "B H"] | None = None,
    luck: Key[Array, "B H"] | None = None,
) -> Int[Array, "B H Q K"]:
    """`route` by descriptors, which are asked for where something depends on them.

    Args:
        luck: Keys that random routing draws with where there is no `key`; None: `luck_keys` of these.
    """
    check_key(key, q.shape[0], q.shape[2])
    if cfg.mode == "dense" or cfg.top_k == cfg.sink_chunks == 0:
        return jax.numpy.zeros((q.shape[0], q.shape[2], q.shape[1], 0), jax.numpy.int32)
    sinks = [routing.sinks(queries, table, cfg, q.shape[2])] if cfg.sink_chunks else []
    if cfg.top_k == 0:
        return named_routes(sinks[0])
    if key is not None and key.ndim == 0:
        key = scene_keys(key, q.shape[0], q.shape[2])
    q = jax.lax.stop_gradient(q)
    of_query = q.shape[0] * q.shape[2] * table.kind.shape[1]
    block = max(_DRAWN // of_query // 1024, 1) * 1024
    if cfg.routing == "random":
        luck = luck_keys(q.shape[0], q.shape[2]) if luck is None else luck
        picks = routing.random_picks(queries, table, cfg, luck if key is None else key, block=block)
    elif cfg.routing == "recent":
        picks = routing.recent_picks(queries, table, cfg, q.shape[2])
    else:
        found = implementation(backend).select(q, phi(), queries, table, by_column(cfg, table), backend)
        picks = chunks_of(found, table, cfg)
    if key is not None:
        picks = routing.drop(picks, queries, table, cfg, key, block=block)
    return named_routes(jax.numpy.concatenate([picks, *sinks], axis=-1) if sinks else picks)


def scene_keys(key: Key[Array, ""], batch: int, heads: int) -> Key[Array, "B H"]:
    """One key per scene and head: what makes drop-off and drop-in the same however the batch is sharded."""
    return jax.random.split(key, (batch, heads))


def luck_keys(batch: int, heads: int) -> Key[Array, "B H"]:
    """What random routing draws with where nobody gives a key: always the same."""
    return scene_keys(jax.random.key(0), batch, heads)


@runtime_checkable
class SceneAttention(Protocol):
    """What a model calls for the joint attention of its tokens."""

    def __call__(
        self,
        q: Float[Array, "B N H D"],
        k: Float[Array, "B N H D"],
        v: Float[Array, "B N H D"],
        table: ChunkTable,
        cfg: MoCConfig,
        *,
        key: Key[Array, "B H"] | None = None,
    ) -> tuple[Float[Array, "B N H D"], Int[Array, "B H N K"]]:
        """Outputs, and the chunks that each query picked."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoutedAttention:
    """`SceneAttention` by `route` and `moc_attention`."""

    backend: str | Backend = "auto"
    tilings: Tilings = Tilings()
    head_groups: int = 0
    exchange_parts: int = 1
    exchange: ExchangeKind = "auto"
    """See `AttentionConfig`."""

    def backend_for(self, q: _Vectors, k: _Vectors, v: _Vectors, table: ChunkTable, cfg: MoCConfig) -> Backend:
        """What computes such an attention, with its tiling if one was measured."""
        value = resolve(self.backend, cfg, q, k, v, chunks=table.kind.shape[1])
        return self.tilings.chosen(value, q, table, cfg)

    def __call__(self, q, k, v, table, cfg, *, key=None):
        return self.of_queries(q, k, v, queries_of(table), table, cfg, key=key)

    def of_queries(
        self,
        q: Float[Array, "B Q H D"],
        k: Float[Array, "B N H D"],
        v: Float[Array, "B N H D"],
        queries: Queries,
        table: ChunkTable,
        cfg: MoCConfig,
        *,
        key: Key[Array, "B H"] | None = None,
        luck: Key[Array, "B H"] | None = None,
    ) -> tuple[Float[Array, "B Q H D"], Int[Array, "B H Q K"]]:
        """The same of queries that need not be the keys.

        Args:
            luck: Keys that random routing draws with where there is no `key`; None: `luck_keys` of these.
        """
        check_settings(cfg)
        q, k, v = check_vectors(q=q, k=k, v=v)
        table = check_table(table, k, cfg)
        backend = self.backend_for(q, k, v, table, cfg)
        routes = _route(q, k, queries, table, cfg, key, backend, luck)
        return _attend(q, k, v, routes, queries, table, cfg, backend), routes

    def dispatched(
        self,
        q: Float[Array, "B Q H D"],
        k: Float[Array, "B Q H D"],
        v: Float[Array, "B Q H D"],
        table: ChunkTable,
        cfg: MoCConfig,
        deal: Deal,
        axes: tuple[str, ...],
        *,
        key: Key[Array, "B H"] | None = None,
        luck: Key[Array, "B H"] | None = None,
    ) -> tuple[Float[Array, "B Q H D"], Int[Array, "B H Q K"]]:
        """`of_queries` of the tokens that a group has as `deal` says, in a shard_map over `axes`: see dispatch.py."""
        check_settings(cfg)
        chunks, links = table.kind.shape[1], Links.of(deal)
        backend = resolve(self.backend, cfg, q, k, v, chunks=chunks)
        few = dataclasses.replace(cfg, top_k=min(cfg.top_k, chunks))
        static = Dispatch(Homes.of(deal, table, cfg), links, axes, few, backend)
        held, queries = static.held(k, v, table), deal.queries(table, links.group)

        def phi():
            return static.phi(held[..., : k.shape[-1]], table)

        routes = route_by(q, phi, queries, table, cfg, backend, key=key, luck=luck)
        static = static._replace(homes=Homes.of(deal, table, cfg, routes.shape[-1]))
        return static(q, k, v, held, routes, table), routes


def routed_attention(cfg: AttentionConfig) -> RoutedAttention:
    """Attention as the settings say.

    Raises:
        ConfigError: `cfg.tilings` is not a file of tilings.
    """
    if cfg.tilings == "auto":  # every process of a run has to compile the same, and machines may hold different files
        tilings = kept_tilings() if jax.process_count() == 1 else Tilings()
    else:
        tilings = given_tilings(cfg)
    return RoutedAttention(
        backend=cfg.backend,
        tilings=tilings,
        head_groups=cfg.head_groups,
        exchange_parts=cfg.exchange_parts,
        exchange=cfg.exchange,
    )


def given_tilings(cfg: AttentionConfig) -> Tilings:
    """Those in a file that the settings name, which needs no device; ConfigError as `routed_attention`."""
    return read_tilings(cfg.tilings) if cfg.tilings not in ("", "auto") else Tilings()
