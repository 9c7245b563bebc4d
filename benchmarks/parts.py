"""The parts of an attention, each timed by itself, with the FLOPs and bytes that it can't do without.

The common parts exist for every backend. A backend's own kernels are listed by its function in `_OWN`.

FLOPs are useful ones: 4 D per attended pair and head forward, 2.5 times that backward. Bytes are what a part must read
and write if everything between two kernels goes through memory once.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from benchmarks.inputs import Inputs
from benchmarks.measure import Ceilings, Effort, both_ways, compile_all
from moc_jax.attention.accounting import Accounting, account
from moc_jax.attention.api import backend_name, moc_attention, route
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
    return group_by_chunk(routes[0, :, table.text_tokens :], table.kind.shape[1], _TILE)


def parts_of(case: Case) -> list[Part]:
    """All parts, in the order in which they run."""
    return [*_routing(case), *_attention(case), *_OWN.get(backend_name(case.cfg), lambda case: [])(case)]


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
            function=lambda q, k, table: route(q, k, table, cfg),
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
        forward = functools.partial(moc_attention, cfg=case.anchored)
        flops = heads * case.cost(case.anchored).flops_attention
        found += _pair("anchors", forward, (*qkv, table), d_out, flops, (4, 12))
    if case.cfg.top_k:
        # Each pair's query is gathered and read, its output written and read: 5 rows, backward 10 with d_out and dq.
        rows = 4 + 5 * case.cfg.top_k, 12 + 15 * case.cfg.top_k

        def routed(q, k, v, table, routes):
            return moc_attention(q, k, v, table, case.unanchored, routes=routes)

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


# The kernels of each backend, as parts of a case.
_OWN: dict[str, Callable[[Case], list[Part]]] = {}
