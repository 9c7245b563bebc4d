"""Mixture of Contexts attention: one function, whatever the device."""

import jax

from moc_jax.attention import reference, routing, xla
from moc_jax.config import MoCConfig
from moc_jax.scene import ChunkTable
from moc_jax.shapes import Array, Float, Int, Key, typed

_ROUTE_BLOCK = 256  # queries scored at a time


@typed
def moc_attention(
    q: Float[Array, "B N H D"],
    k: Float[Array, "B N H D"],
    v: Float[Array, "B N H D"],
    table: ChunkTable,
    cfg: MoCConfig,
    *,
    key: Key[Array, ""] | Key[Array, "B H"] | None = None,
    routes: Int[Array, "B H N K"] | None = None,
) -> Float[Array, "B N H D"]:
    """softmax(q_i K^T / sqrt(D)) V over the tokens of the query's anchors and of the chunks it picks (MoC, eq. 2-4).

    Args:
        q, k, v: After QK-norm and rotary embedding; float32, bfloat16 or float16.
        table: Which tokens form which chunk.
        cfg: What to attend to. `mode="dense"` sees every visible token with the same weights.
        key: Switches context drop-off and drop-in on (training). One key, or one per scene and head.
        routes: Picks made before with `route`; None routes now.

    Returns:
        Outputs in v's type; 0 for padding tokens and for queries with nothing to attend to.

    Raises:
        ValueError: q, k, v and the table disagree about sizes.
        NotImplementedError: the backend can't do what `cfg` asks.
    """
    _check_sizes(q, table)
    if routes is None:
        routes = route(q, k, table, cfg, key=key)
    backend = {"reference": reference.attend, "xla": xla.attend}[backend_name(cfg)]
    return backend(q, k, v, routes, table, cfg)


@typed
def route(
    q: Float[Array, "B N H D"],
    k: Float[Array, "B N H D"],
    table: ChunkTable,
    cfg: MoCConfig,
    *,
    key: Key[Array, ""] | Key[Array, "B H"] | None = None,
) -> Int[Array, "B H N K"]:
    """The chunks that each query picks, best first; -1 where a slot holds none (text and padding: all of them).

    K is `top_k`; with a key, `top_k + max_drop_in`; 0 in dense mode and for top_k = 0. No gradient flows through it.
    """
    _check_sizes(q, table)
    if cfg.mode == "dense" or cfg.top_k == 0:
        return jax.numpy.zeros((q.shape[0], q.shape[2], q.shape[1], 0), jax.numpy.int32)
    if key is not None and key.ndim == 0:
        key = scene_keys(key, q.shape[0], q.shape[2])
    block = None if backend_name(cfg) == "reference" else _ROUTE_BLOCK
    return routing.route(q, k, table, cfg, keys=key, block=block)


def scene_keys(key: Key[Array, ""], batch: int, heads: int) -> Key[Array, "B H"]:
    """One key per scene and head: what makes drop-off and drop-in the same however the batch is sharded."""
    return jax.random.split(key, (batch, heads))


def _check_sizes(q: Array, table: ChunkTable) -> None:
    if table.chunk_of.shape != q.shape[:2]:
        raise ValueError(
            f"q has {q.shape[0]} scenes of {q.shape[1]} tokens, but the chunk table is for "
            f"{table.chunk_of.shape[0]} scenes of {table.chunk_of.shape[1]}; build it from the same SceneShape"
        )


def backend_name(cfg: MoCConfig) -> str:
    """The backend that `cfg` runs on; `auto` takes `xla`, the only fast one built so far, on any device."""
    return "xla" if cfg.backend == "auto" else cfg.backend
