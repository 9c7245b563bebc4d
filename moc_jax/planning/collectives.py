"""What devices exchange in a compiled program: which arrays, by which collective, in which loop.

On a TPU a reduce-scatter is a fusion with an all-reduce in it, and what runs in the background is a pair of start and
done; both are counted as what they are for.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

_KINDS = "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute"
_COMPUTATION = re.compile(r"(?:ENTRY )?%(?P<name>[\w.\-]+) \(.*-> .*\{$")
_COLLECTIVE = re.compile(rf" = (?P<type>.*?) (?P<kind>{'|'.join(_KINDS)})(?:-start)?\(")
_CALLED = re.compile(r"(?:calls|body|condition|to_apply|true_computation|false_computation)=%([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One array of one collective: of a gather the whole that comes of it, of a sum the whole that goes into it."""

    kind: str
    element: str
    """As HLO has it: bf16."""
    shape: tuple[int, ...]
    loop: str
    """How jax calls the outermost loop that it runs in, or nothing."""

    @property
    def bytes(self) -> int:
        """Of the whole array."""
        return math.prod(self.shape) * (int(re.sub(r"\D", "", self.element) or 8) // 8)


def collectives(text: str, least: int = 0) -> list[Collective]:
    """Those of a compiled program, `as_text()`, that are of at least so many bytes."""
    found, callers, loops = list(_read(text)), *_calls(text)

    def loop(computation: str) -> str:
        name = ""
        while computation in callers:
            name = loops.get(computation, name)
            computation = callers[computation]
        return name

    placed = [dataclasses.replace(each, loop=loop(each.loop)) for each in found]
    return [each for each in placed if each.bytes >= least]


def _read(text: str) -> Iterator[Collective]:
    """With the computation in place of the loop."""
    computation = ""
    for line in text.splitlines():
        if begin := _COMPUTATION.match(line):
            computation = begin["name"]
        elif of := _COLLECTIVE.search(line):
            kind = "reduce-scatter" if computation.startswith("all-reduce-scatter") else of["kind"]
            arrays = [
                array for array in _ARRAY.findall(of["type"]) if array[2]
            ]  # but for counters of what is under way
            if of["kind"] != "all-reduce" and "-start(" in line:  # operands come first
                arrays = arrays[len(arrays) // 2 :]
            for element, _, sizes in arrays:
                yield Collective(kind, element, tuple(int(n) for n in sizes.split(",") if n), computation)


def _calls(text: str) -> tuple[dict[str, str], dict[str, str]]:
    """Who calls each computation; and of the bodies of loops, what jax calls the loop."""
    callers, loops, computation = {}, {}, ""
    for line in text.splitlines():
        if begin := _COMPUTATION.match(line):
            computation = begin["name"]
            continue
        branches = [name.strip(" %") for group in _BRANCHES.findall(line) for name in group.split(",")]
        for called in [*_CALLED.findall(line), *branches]:
            callers.setdefault(called, computation)
            if f"body=%{called}" in line:
                name = re.search(r'op_name="([^"]*)"', line)
                loops[called] = name[1] if name else called
    return callers, loops


def by_kind(found: list[Collective], turns: int = 1) -> dict[str, tuple[int, int]]:
    """Kind -> (arrays, their bytes), each loop taking so many turns."""
    sizes: dict[str, list[int]] = collections.defaultdict(list)
    for each in found:
        sizes[each.kind] += [each.bytes] * (turns if each.loop else 1)
    return {kind: (len(sizes[kind]), sum(sizes[kind])) for kind in sorted(sizes)}


def summed(found: list[Collective]) -> collections.Counter[tuple[str, str, str]]:
    """Bytes by loop, kind and element type, of one turn of each loop."""
    total: collections.Counter[tuple[str, str, str]] = collections.Counter()
    for each in found:
        total[each.loop, each.kind, each.element] += each.bytes
    return total
