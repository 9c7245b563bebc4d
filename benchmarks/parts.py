"""The parts of an attention, each timed by itself, with the FLOPs and bytes that it can't do without.

The common parts exist for every backend. A backend's own kernels are listed by its function in `_OWN`.

FLOPs are useful ones: 4 D per attended pair and head forward, 2.5 times that backward; those of a single kernel are all
that it does. Bytes are what a part must read
and write if everything between two kernels goes through memory once.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.inputs import Inputs
from benchmarks.measure import Ceilings, Effort, both_ways, compile_all
from moc_jax.attention.accounting import Accounting, account
from moc_jax.attention.api import moc_attention, route
from moc_jax.attention.backends import Backend, resolve
from moc_jax.attention.layout import ALIGN, Heads, queries_of
from moc_jax.attention.pallas_gpu import attend, flash, flash_backward
from moc_jax.attention.pallas_gpu.device import Hopper
from moc_jax.attention.pallas_gpu.plan import anchor_tiles, pick_tiles
from moc_jax.attention.routing import descriptors
from moc_jax.attention.schedule import Schedule, group_by_chunk
from moc_jax.config import MoCConfig
from moc_jax.scene import ChunkTable
from moc_jax.shapes import Array, Int

_TILE = 128  # pairs per tile of the sorted walk


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One attention on its inputs, with the routes that they have."""

    inputs: Inputs
    table: ChunkTable
    cfg: MoCConfig
    routes: Int[Array, "1 H N K"]
    backend: str | Backend = "auto"

    @property
    def elements(self) -> int:
        """Numbers in q."""
        return self.inputs.q.size

    @functools.cached_property
    def anchored(self) -> MoCConfig:
        """The same without picks."""
        return dataclasses.replace(self.cfg, top_k=0)

    @functools.cached_property
    def unanchored(self) -> MoCConfig:
        """The same without anchors; to be given the routes."""
        return dataclasses.replace(self.cfg, self_anchor="none", text_anchor="none")

    def cost(self, cfg: MoCConfig) -> Accounting:
        """Of one head; the routes count where `cfg` routes."""
        return account(self.table, cfg, self.inputs.q.shape[-1], self.routes if cfg.top_k else None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """A function of its inputs, and what it costs at least, over all heads."""

    name: str
    function: Callable[..., Any]
    inputs: tuple[Any, ...]
    flops: float
    bytes: float


def sort_pairs(routes: Int[Array, "1 H N K"], table: ChunkTable) -> Schedule:
    """Picked chunks -> pairs sorted by chunk, as the backends do it."""
    return group_by_chunk(routes[0], table.kind.shape[1], _TILE)


def parts_of(case: Case) -> list[Part]:
    """All parts, in the order in which they run."""
    own = _OWN.get(
        resolve(case.backend, case.cfg, case.inputs.q, chunks=case.table.kind.shape[1]).name, lambda case: []
    )
    return [*_routing(case), *_attention(case), *own(case)]


def profile(case: Case, ceilings: Ceilings, effort: Effort) -> list[dict[str, Any]]:
    """Times every part; milliseconds beside the least that data sheet and measured rates allow."""
    parts = parts_of(case)
    programs = compile_all({part.name: (part.function, part.inputs) for part in parts})
    return [
        {
            "part": part.name,
            "gflop": part.flops / 1e9,
            "gigabytes": part.bytes / 1e9,
            "floor_ms": ceilings.floor_ms(part.flops, part.bytes),
            "measured_floor_ms": ceilings.measured_ms(part.flops, part.bytes),
            "time": dataclasses.asdict(programs[part.name].time(part.inputs, effort)),
        }
        for part in parts
    ]


def _routing(case: Case) -> list[Part]:
    q, k, _, _ = case.inputs
    table, cfg, routes = case.table, case.cfg, case.routes
    if not cfg.top_k:
        return []
    cost, heads = case.cost(cfg), q.shape[2]
    read = k.nbytes
    return [
        Part(
            name="pooling",
            function=descriptors,
            inputs=(k, table),
            flops=heads * cost.flops_pool,
            bytes=read,
        ),
        Part(
            name="pooling + routing",
            function=functools.partial(route, cfg=cfg, backend=case.backend),
            inputs=(q, k, table),
            flops=heads * (cost.flops_pool + cost.flops_route),
            bytes=q.nbytes + read + routes.nbytes,
        ),
        Part(
            name="sorting",
            function=sort_pairs,
            inputs=(routes, table),
            flops=0,
            bytes=3 * routes.nbytes,  # picks in; the order and its inverse out
        ),
    ]


def _attention(case: Case) -> list[Part]:
    """Anchors and routed part, each as a whole attention of its own."""
    d_out, qkv = case.inputs.d_out, case.inputs[:3]
    table, heads = case.table, d_out.shape[2]
    has_anchors = case.cfg.self_anchor != "none" or case.cfg.text_anchor != "none"
    found = []
    if has_anchors:
        # Read q, k, v and write out; backward reads those and d_out, and writes three gradients.
        forward = functools.partial(moc_attention, cfg=case.anchored, backend=case.backend)
        flops = heads * case.cost(case.anchored).flops_attention
        found += _pair("anchors", forward, (*qkv, table), d_out, flops, (4, 12))
    if case.cfg.top_k:
        # Each pair's query is gathered and read, its output written and read: 5 rows, backward 10 with d_out and dq.
        rows = 4 + 5 * case.cfg.top_k, 12 + 15 * case.cfg.top_k

        def routed(q, k, v, table, routes):
            return moc_attention(q, k, v, table, case.unanchored, routes=routes, backend=case.backend)

        flops = heads * case.cost(case.unanchored).flops_attention
        found += _pair("routed (sorting to merge)", routed, (*qkv, table, case.routes), d_out, flops, rows)
    return found


def _pair(name, forward, inputs, d_out, flops, rows) -> list[Part]:
    """The part forward, and forward + backward; `rows`: how often each moves an array as large as q."""
    both = both_ways(forward)
    size = d_out.nbytes
    return [
        Part(name=name, function=forward, inputs=inputs, flops=flops, bytes=rows[0] * size),
        Part(
            name=f"{name}, forward + backward",
            function=both,
            inputs=(d_out, *inputs),
            flops=3.5 * flops,
            bytes=rows[1] * size,
        ),
    ]


def _hopper(case: Case) -> list[Part]:
    """Each kernel of `pallas_gpu`, and what XLA does between them, for all heads at once."""
    q, k, v, d_out = case.inputs
    batch, tokens, heads, _ = q.shape
    if tokens % ALIGN:
        raise ValueError(f"{tokens} tokens: the kernels' profile wants a multiple of {ALIGN}; change the setting")
    backend = resolve(case.backend, case.cfg, q, chunks=case.table.kind.shape[1])
    assert isinstance(backend, Hopper)
    plan = jax.jit(anchor_tiles, static_argnames=("cfg", "heads", "backend"))
    anchors = plan(queries_of(case.table), case.table, cfg=case.cfg, heads=heads, backend=backend)
    all_heads, size = Heads(0, heads), q.nbytes
    zero = jnp.zeros(1, jnp.int32)
    lse = jnp.full((batch, heads, tokens), math.log2(tokens), jnp.float32)  # of small weights, as the real one
    delta = jnp.zeros_like(lse)
    found = []

    def kernels(where, inputs, queries, keys, flops, rows, order, backend=backend):
        """Both kernels on q, k, v, d_out, lse, delta; `rows`: arrays as large as q that q's side fills."""
        names = ("forward", "gradients")
        earlier = jnp.zeros((batch, 1, 1), jnp.int32) if order else anchors.earlier
        functions = (
            lambda q, k, v, d_out, lse, delta: flash.forward(q, k, v, queries, zero, backend, sorted_rows=order),
            lambda q, k, v, d_out, lse, delta: flash_backward.gradients(
                flash_backward.Inputs(q, k, v, d_out, lse, delta, earlier, zero, order), keys, backend
            ),
        )
        moved = (2 + 2 * rows, 4 + 4 * rows)  # dq is in float32
        for name, function, share, arrays in zip(names, functions, (1, 2.5), moved, strict=True):
            found.append(
                Part(
                    name=f"kernel: {where}, {name}",
                    function=function,
                    inputs=inputs,
                    flops=share * flops,
                    bytes=arrays * size,
                )
            )

    if anchors is not None:
        flops = heads * case.cost(case.anchored).flops_attention
        kernels("anchors", (q, k, v, d_out, lse, delta), anchors.queries, anchors.keys, flops, 1, False)
    if case.cfg.top_k:
        picks = jax.jit(pick_tiles)(case.routes, case.table)
        assert picks is not None
        rows = picks.query_of_slot
        gather = functools.partial(attend.take_rows, heads=all_heads)
        q_rows, d_rows = (jax.jit(gather)(x, rows) for x in (q, d_out))
        scalars = (jnp.full(rows.shape, x, jnp.float32) for x in (math.log2(tokens), 0.0))
        flops, count = heads * case.cost(case.unanchored).flops_attention, case.cfg.top_k
        kernels("picks", (q_rows, k, v, d_rows, *scalars), picks.queries, picks.keys, flops, count, True)
        found.append(Part(name="gather of q", function=gather, inputs=(q, rows), flops=0, bytes=2 * count * size))

        def merge(rows, lse):
            slots = attend.slots_of_pairs(picks, all_heads)
            return attend.merge([attend.Part(rows, slot, slot >= 0, 0, lse) for slot in slots], heads, q.dtype)

        log_sums = jnp.zeros(rows.shape, jnp.float32)
        found.append(
            Part(name="merge of picks", function=merge, inputs=(q_rows, log_sums), flops=0, bytes=(count + 1) * size)
        )
    return found


# The kernels of each backend, as parts of a case.
_OWN: dict[str, Callable[[Case], list[Part]]] = {"pallas_gpu": _hopper}
