"""The fastest tiling of a backend for an attention, on the device that there is.

From the tiling that the backend would take, one size at a time is halved or doubled and the attention measured, forward
and with its gradients; what is faster is kept, until nothing is. Sizes that the backend refuses, or that don't compile
for the device, are passed over. All that takes long, on a GPU some 20 seconds for each tiling, most of it compilation:
so each success is given at once.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import jax

from moc_jax.attention.api import moc_attention, route
from moc_jax.attention.backends import Backend, resolve
from moc_jax.attention.tilings import Kind, Tiling, Tuned, tiling_of, with_tiling
from moc_jax.config import MoCConfig
from moc_jax.scene import ChunkTable
from moc_jax.shapes import Array, Float
from moc_jax.timing import Effort, time_launches

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_WORTH = 0.99  # of the best time so far: what is as fast but for chance is left alone

Measure = Callable[[Backend], float]  # milliseconds; raises one of `_CANNOT` where it can't run
_CANNOT = (ValueError, NotImplementedError, jax.errors.JaxRuntimeError)


def autotune(
    q: Float[Array, "B Q H D"],
    k: Float[Array, "B N H D"],
    v: Float[Array, "B N H D"],
    table: ChunkTable,
    cfg: MoCConfig,
    *,
    backend: str | Backend = "auto",
    trials: int = 100,
    effort: Effort = Effort(samples=3),
    report: Callable[[str], None] = print,
) -> Iterator[Tuned]:
    """Of at most `trials` tilings for attention over these arrays each that is faster than those before; the last wins.

    `report` gets a line for every one that is tried.

    Raises:
        NotImplementedError: the backend has no tiles, or can't run here.
    """
    value = resolve(backend, cfg, q, k, v, chunks=table.kind.shape[1])
    start = tiling_of(value, q, table, cfg)
    routes = jax.jit(lambda q, k: route(q, k, table, cfg, backend=value))(q, k)

    def measure(value: Backend) -> float:
        return _milliseconds(value, (q, k, v, routes, table), cfg, effort)

    kind, tokens = Kind.of(value, q, table, cfg), table.chunk_of.shape[1]
    for tiling, milliseconds in descend(value, start, measure, trials=trials, report=report):
        yield Tuned(kind=kind, tokens=tokens, milliseconds=milliseconds, tiling=tiling)


def descend(
    backend: Backend, start: Tiling, measure: Measure, *, trials: int, report: Callable[[str], None]
) -> Iterator[tuple[Tiling, float]]:
    """`start`, and each tiling found from there that is faster than those before, with its milliseconds.

    Raises:
        NotImplementedError: not even `start` runs.
    """
    try:
        milliseconds = measure(with_tiling(backend, start))
    except _CANNOT as error:
        why = _line(error)
        raise NotImplementedError(f"{backend.name} can't run with its own tiling, {start}: {why}") from error
    report(f"{milliseconds:.3f} ms: {start}")
    yield start, milliseconds
    best, tried = start, {start}
    while True:
        options = [(what, tiling) for what, tiling in neighbours(best) if tiling not in tried]
        if not options or len(tried) >= trials:
            return
        for what, tiling in options[: trials - len(tried)]:
            tried.add(tiling)
            try:
                found = measure(with_tiling(backend, tiling))
            except _CANNOT as error:
                report(f"{what}: can't run: {_line(error)}")
                continue
            report(f"{found:.3f} ms: {what}")
            if found < _WORTH * milliseconds:
                best, milliseconds = tiling, found
                yield best, milliseconds
                break  # on from here


def _line(error: Exception) -> str:
    """Why, in one line; compilers say much more."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def neighbours[T: DataclassInstance](tiling: T) -> Iterator[tuple[str, T]]:
    """Tilings with one size half or twice as large, of which it can be, and which size that is."""
    for field in dataclasses.fields(tiling):
        value = getattr(tiling, field.name)
        if dataclasses.is_dataclass(value):
            changed = [(f"{field.name}.{what}", inner) for what, inner in neighbours(value)]
        elif isinstance(value, int) and not isinstance(value, bool):
            changed = [(f"{field.name} {size}", size) for size in (2 * value, value // 2) if size not in (0, value)]
        else:
            continue
        for what, new in changed:
            try:
                yield what, dataclasses.replace(tiling, **{field.name: new})
            except ValueError:
                continue


def _milliseconds(
    backend: Backend, inputs: tuple[Array, Array, Array, Array, ChunkTable], cfg: MoCConfig, effort: Effort
) -> float:
    """Of attention with its gradients."""

    @jax.jit
    def both_ways(q, k, v, routes, table):  # the table too: lengths are data
        out, vjp = jax.vjp(lambda q, k, v: moc_attention(q, k, v, table, cfg, routes=routes, backend=backend), q, k, v)
        return vjp(out)

    program = both_ways.lower(*inputs).compile()
    return time_launches(lambda: program(*inputs), effort).median_ms
