"""What attention can be computed by: frozen, hashable values, so that all they say is part of what jit compiles for.

Each backend's module offers the functions of `Implementation`; `resolve` picks one where nobody says which.
"""

import functools
import importlib
import logging
from typing import Protocol, cast

import jax

from moc_jax.attention.layout import Queries
from moc_jax.attention.pallas_gpu import device as gpu
from moc_jax.attention.pallas_gpu.device import Hopper
from moc_jax.attention.pallas_tpu import device as tpu
from moc_jax.attention.pallas_tpu.device import Tpu
from moc_jax.attention.reference import Reference
from moc_jax.attention.statistics import Part
from moc_jax.attention.xla import Xla
from moc_jax.config import MoCConfig
from moc_jax.scene import ChunkTable
from moc_jax.shapes import Array, Float, Float32, Int

Backend = Reference | Xla | Hopper | Tpu
Gradients = tuple[Array, Array, Array]

BY_NAME: dict[str, type[Backend]] = {kind.name: kind for kind in (Reference, Xla, Hopper, Tpu)}
_log = logging.getLogger(__name__)


class Implementation(Protocol):
    """The functions of a backend's module. Inputs are checked, and `backend` is a value of the backend's own type."""

    def means(
        self, k: Float[Array, "B N H D"], table: ChunkTable, cfg: MoCConfig, backend
    ) -> Float32[Array, "B H _ D"]:
        """phi: `columns.columns` of the keys."""
        ...

    def select(
        self,
        q: Float[Array, "B Q H D"],
        phi: Float32[Array, "B H _ D"],
        queries: Queries,
        table: ChunkTable,
        cfg: MoCConfig,
        backend,
    ) -> Int[Array, "B H Q K"]:
        """The best `top_k` columns of phi of every query, best first; no gradient is needed."""
        ...

    def attend(
        self,
        q: Float[Array, "B Q H D"],
        k: Float[Array, "B N H D"],
        v: Float[Array, "B N H D"],
        routes: Int[Array, "B H Q K"],
        queries: Queries,
        table: ChunkTable,
        cfg: MoCConfig,
        backend,
    ) -> Float[Array, "B Q H D"]:
        """Attention over anchors and picks, with its gradients."""
        ...

    def part(
        self,
        q: Float[Array, "B Q H D"],
        k: Float[Array, "B N H D"],
        v: Float[Array, "B N H D"],
        routes: Int[Array, "B H Q K"] | None,
        queries: Queries,
        table: ChunkTable,
        cfg: MoCConfig,
        backend,
    ) -> Part:
        """Attention over the picks alone or, without routes, over the anchors alone, as parts.py says."""
        ...

    def part_gradients(
        self,
        q: Float[Array, "B Q H D"],
        k: Float[Array, "B N H D"],
        v: Float[Array, "B N H D"],
        routes: Int[Array, "B H Q K"] | None,
        d_out: Float[Array, "B Q H D"],
        lse: Float32[Array, "B H Q"],
        delta: Float32[Array, "B H Q"],
        queries: Queries,
        table: ChunkTable,
        cfg: MoCConfig,
        backend,
    ) -> Gradients:
        """(dq, dk, dv) of that part, as parts.py says."""
        ...


_IMPLEMENTATIONS: dict[type[Backend], str] = {  # loaded when they are used: a GPU's kernels alone take half a second
    Reference: "reference",
    Xla: "xla",
    Hopper: "pallas_gpu.attend",
    Tpu: "pallas_tpu.attend",
}


def implementation(backend: Backend) -> Implementation:
    """The module that computes for such a value."""
    module = importlib.import_module(f"moc_jax.attention.{_IMPLEMENTATIONS[type(backend)]}")
    return cast(Implementation, module)


def resolve(
    backend: str | Backend,
    cfg: MoCConfig,
    q: Array | jax.ShapeDtypeStruct | None = None,
    *others: Array | jax.ShapeDtypeStruct,
    chunks: int | None = None,
) -> Backend:
    """The value that a name stands for: a backend's defaults, or with `auto` what this machine is best at.

    `auto` takes the kernels where they run (if they know q's type and head dimension, and `others`, k and v, have the
    same type), else plain XLA, and reports once for each kind of attention which. `chunks` is how many the table has:
    no query picks more.

    Raises:
        TypeError, ValueError: `backend` is neither a backend nor a name of one.
    """
    if isinstance(backend, Backend):
        return backend
    if not isinstance(backend, str):
        raise TypeError(f"backend is a {type(backend).__name__}; give a name or one of {_values()}")
    if backend != "auto":
        if backend not in BY_NAME:
            raise ValueError(f"backend is {backend!r}; choose one of auto, {', '.join(BY_NAME)}")
        return BY_NAME[backend]()
    picks = 0 if cfg.mode == "dense" else cfg.top_k if chunks is None else min(cfg.top_k, chunks)
    picks *= cfg.descriptors
    chosen, kind = _kernels_for(picks, q) or Xla(), ""
    if q is not None:
        if any(x.dtype != q.dtype for x in others):
            chosen = Xla()
        types = "/".join(dict.fromkeys(str(x.dtype) for x in (q, *others)))
        kind = f"{types}, head dimension {q.shape[-1]}, "
    _say_which(chosen.name, f"{kind}{picks} picks on {jax.devices()[0].device_kind}")
    return chosen


def _values() -> str:
    return ", ".join(f"{kind.__name__}()" for kind in BY_NAME.values())


def _kernels_for(picks: int, q: Array | jax.ShapeDtypeStruct | None) -> Hopper | Tpu | None:
    """The kernels that run here, if they can do so many picks and such a q."""
    if gpu.is_hopper():
        from moc_jax.attention.pallas_gpu import router as gpu_router

        return Hopper() if gpu_router.can_select(picks) and (q is None or gpu.can_do(q)) else None
    if tpu.is_tpu():
        return Tpu() if q is None or tpu.can_do(q) else None
    return None


@functools.cache
def _say_which(backend: str, what: str) -> None:
    """Once for each kind of attention: which backend `auto` took."""
    if backend != Xla.name:
        _log.info("attention by the kernels of %s: %s", backend, what)
    else:
        level = logging.INFO if jax.default_backend() == "cpu" else logging.WARNING  # nobody expects kernels on a CPU
        _log.log(level, "attention by plain XLA: there are no kernels for %s", what)
