"""Mixture of Contexts attention: one function, whatever the device."""

import dataclasses
import functools
import logging

import jax

from moc_jax.attention import reference, routing, xla
from moc_jax.attention.checks import check_key, check_routes, check_settings, check_table, check_vectors
from moc_jax.attention.pallas_gpu import attend as pallas_gpu
from moc_jax.attention.pallas_gpu import device as gpu
from moc_jax.attention.pallas_gpu import router as gpu_router
from moc_jax.attention.pallas_tpu import attend as pallas_tpu
from moc_jax.attention.pallas_tpu import device as tpu
from moc_jax.attention.pallas_tpu import pool as tpu_pool
from moc_jax.attention.pallas_tpu import router as tpu_router
from moc_jax.config import MoCConfig
from moc_jax.scene import ChunkTable
from moc_jax.shapes import Array, Float, Int, Key

_ROUTE_BLOCK = 2048  # queries scored at a time
_DROP_BLOCK = 4096  # queries whose picks are dropped at a time, where scores take no memory
_BACKENDS = {"reference": reference, "xla": xla, "pallas_gpu": pallas_gpu, "pallas_tpu": pallas_tpu}
_KERNELS = {
    "pallas_gpu": (gpu, gpu_router, routing.descriptors),
    "pallas_tpu": (tpu, tpu_router, tpu_pool.descriptors),
}
_log = logging.getLogger(__name__)


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
        q, k, v: After QK-norm and rotary embedding; float32, bfloat16 or float16. Padding may hold anything finite, and
            its output's gradient NaN too.
        table: Which tokens form which chunk.
        cfg: What to attend to. `mode="dense"` sees every visible token with the same weights.
        key: Switches context drop-off and drop-in on (training). One key, or one per scene and head.
        routes: Picks made before with `route`, for each video query different chunks that are no anchors of its; None
            routes now.

    Returns:
        Outputs in v's type; 0 for padding tokens and for queries with nothing to attend to.

    Raises:
        TypeError, ValueError: the arguments are of other kinds or disagree with one another; their values are looked at
            where they are concrete, that is, outside of jit.
        NotImplementedError: the backend can't do what `cfg` asks, here or with these types.
    """
    check_settings(cfg, tuple(_BACKENDS))
    q, k, v = check_vectors(q=q, k=k, v=v)
    table = check_table(table, q, cfg)
    routes = _route(q, k, table, cfg, key) if routes is None else check_routes(routes, q, table, cfg)
    if routes.shape[-1] > table.kind.shape[1]:  # no query holds more picks than there are chunks
        routes = jax.numpy.sort(routes, axis=-1, descending=True)[..., : table.kind.shape[1]]
    cfg = _within(cfg, table)
    return _BACKENDS[backend_name(cfg, q, k, v)].attend(q, k, v, routes, table, cfg)


def route(
    q: Float[Array, "B N H D"],
    k: Float[Array, "B N H D"],
    table: ChunkTable,
    cfg: MoCConfig,
    *,
    key: Key[Array, ""] | Key[Array, "B H"] | None = None,
) -> Int[Array, "B H N K"]:
    """The chunks that each query picks, best first; -1 where a slot holds none (text and padding: all of them).

    K is `top_k`; with a key, `top_k + max_drop_in`; 0 in dense mode and for top_k = 0. Of a `top_k` or `max_drop_in`
    beyond the table's chunks, only as many slots are kept as there are chunks, rounded up to a multiple of 32. No
    gradient flows through it.

    Raises:
        TypeError, ValueError, NotImplementedError: as `moc_attention`.
    """
    check_settings(cfg, tuple(_BACKENDS))
    q, k = check_vectors(q=q, k=k)
    return _route(q, k, check_table(table, q, cfg), cfg, key)


def _route(q: Array, k: Array, table: ChunkTable, cfg: MoCConfig, key) -> Int[Array, "B H N K"]:
    check_key(key, q.shape[0], q.shape[2])
    if cfg.mode == "dense" or cfg.top_k == 0:
        return jax.numpy.zeros((q.shape[0], q.shape[2], q.shape[1], 0), jax.numpy.int32)
    if key is not None and key.ndim == 0:
        key = scene_keys(key, q.shape[0], q.shape[2])
    backend = backend_name(_within(cfg, table), q, k)
    if backend in _KERNELS:
        device, router, descriptors = _KERNELS[backend]
        device.check(q, k, k)
        q, k = jax.lax.stop_gradient((q, k))
        picks = router.select(q, descriptors(k, table), table, cfg, interpret=device.interpreter())
        return picks if key is None else routing.drop(picks, table, cfg, key, block=_DROP_BLOCK)
    block = None if backend == "reference" else _ROUTE_BLOCK
    return routing.route(q, k, table, cfg, keys=key, block=block)


def _within(cfg: MoCConfig, table: ChunkTable) -> MoCConfig:
    """`cfg` with no more picks than there are chunks."""
    return dataclasses.replace(cfg, top_k=min(cfg.top_k, table.kind.shape[1]))


def scene_keys(key: Key[Array, ""], batch: int, heads: int) -> Key[Array, "B H"]:
    """One key per scene and head: what makes drop-off and drop-in the same however the batch is sharded."""
    return jax.random.split(key, (batch, heads))


def backend_name(cfg: MoCConfig, q: Array | jax.ShapeDtypeStruct | None = None, *others: Array) -> str:
    """The backend that `cfg` runs on. `auto` takes the kernels where they run (if they know q's type and head
    dimension, and `others`, k and v, have the same type), else `xla`.

    Raises:
        TypeError, ValueError: `cfg` is no MoCConfig, or its backend none that exists.
    """
    check_settings(cfg, tuple(_BACKENDS))
    if cfg.backend != "auto":
        return cfg.backend
    here = "pallas_gpu" if gpu.is_hopper() else "pallas_tpu" if tpu.is_target() else "xla"
    kernels, kind = here in _KERNELS, ""
    if kernels:
        device, router, _ = _KERNELS[here]
        kernels = router.can_select(cfg) and (q is None or device.can_do(q))
    if q is not None:
        kernels &= all(x.dtype == q.dtype for x in others)
        types = "/".join(dict.fromkeys(str(x.dtype) for x in (q, *others)))
        kind = f"{types}, head dimension {q.shape[-1]}, "
    _say_which(here if kernels else "xla", f"{kind}top_k {cfg.top_k} on {_where()}")
    return here if kernels else "xla"


def _where() -> str:
    return f"TPU {tpu.chip()}" if tpu.is_target() else jax.devices()[0].device_kind


@functools.cache
def _say_which(backend: str, what: str) -> None:
    """Once for each kind of attention: which backend `auto` took."""
    if backend in _KERNELS:
        _log.info("attention by the kernels of %s: %s", backend, what)
    else:
        level = logging.INFO if jax.default_backend() == "cpu" else logging.WARNING  # nobody expects kernels on a CPU
        _log.log(level, "attention by plain XLA: there are no kernels for %s", what)
