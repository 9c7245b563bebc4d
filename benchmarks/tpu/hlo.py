"""What XLA expects its own operations of a compiled program to take, kernels left out.

The compiled text gives cycles of most operations. Where it gives none (gathers, and whatever SparseCores do), the bytes
of the result count, read once and written once at the peak rate of HBM.
"""

import dataclasses
import math
import re
from collections.abc import Iterable

_COMPUTATION = re.compile(r"(?P<entry>ENTRY )?%(?P<name>[\w.\-]+) \(.*-> .*\{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%(?P<name>[\w.\-]+) = (?P<type>.+?) (?P<operation>[a-z][\w\-]*)\((?P<rest>.*)")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+)\[([\d,]*)\]")
_NO_ESTIMATE = 2**63 - 1
_FREE = {"parameter", "bitcast", "get-tuple-element", "tuple", "constant", "while", "call", "conditional", "after-all"}
_PARTS = re.compile(r"call-(start|update)|(?!call).*-done")  # of asynchronous operations, whose other part counts
_NO_WORK = re.compile(r'custom_call_target="(AllocateBuffer|AssumeGatherIndicesInBound)"')


@dataclasses.dataclass(frozen=True)
class Operation:
    """One operation, as often as it runs."""

    name: str
    cycles: float | None
    """XLA's estimate."""
    bytes: int
    """Of the result."""
    turns: int


def operations(text: str, turns: int = 1, kernels: str = "moc_") -> list[Operation]:
    """Those of a compiled program that take time, by the text of `as_text`.

    Args:
        text: Of one program.
        turns: Of each loop.
        kernels: How names of kernels start; those are left out.

    Raises:
        ValueError: the text has no entry.
    """
    bodies: dict[str, list[re.Match[str]]] = {}
    entry = current = None
    for line in text.splitlines():
        if begin := _COMPUTATION.match(line):
            current = begin["name"]
            bodies[current] = []
            entry = current if begin["entry"] else entry
        elif current and (found := _INSTRUCTION.match(line)):
            bodies[current].append(found)
    if entry is None:
        raise ValueError("no entry: this is not the text of a compiled program")
    return list(_walk(bodies, entry, 1, turns, kernels))


def _walk(bodies, computation: str, times: int, turns: int, kernels: str) -> Iterable[Operation]:
    for found in bodies[computation]:
        operation, rest = found["operation"], found["rest"]
        if operation == "while":
            for part in re.findall(r"(?:condition|body)=%([\w.\-]+)", rest):
                yield from _walk(bodies, part, times * turns, turns, kernels)
        elif operation == "call":
            for part in re.findall(r"to_apply=%([\w.\-]+)", rest):
                yield from _walk(bodies, part, times, turns, kernels)
        if operation in _FREE or _PARTS.fullmatch(operation) or _NO_WORK.search(rest):
            continue
        if operation == "custom-call" and found["name"].startswith(kernels):
            continue
        estimate = _CYCLES.search(rest)
        cycles = int(estimate[1]) if estimate else _NO_ESTIMATE
        yield Operation(
            found["name"], None if cycles == _NO_ESTIMATE else float(cycles), _largest(found["type"]), times
        )


def _largest(kind: str) -> int:
    """Bytes of the largest array of a type."""
    return max((_bytes(*found) for found in _ARRAY.findall(kind)), default=0)


def _bytes(element: str, shape: str) -> int:
    bits = 8 if element == "pred" else int(re.sub(r"\D", "", element))
    return math.prod(int(size) for size in shape.split(",") if size) * bits // 8
