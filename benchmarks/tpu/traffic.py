"""Bytes that each operation of a compiled program reads and writes in HBM, and the function that it comes from.

The compiled text gives every array's layout: what lies in vector memory costs nothing here, tiles are counted whole,
and of an operand that a fusion slices only the slice is. Loops inside count as often as the compiler knows that they
turn.
"""

import dataclasses
import functools
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence

_COMPUTATION = re.compile(r"(?P<entry>ENTRY )?%(?P<name>[\w.\-]+) \(.*-> .*\{$")
_INSTRUCTION = re.compile(
    r"\s+(?P<root>ROOT )?%(?P<name>[\w.\-]+) = (?P<type>.+?) (?P<operation>[a-z][\w\-]*)\((?P<rest>.*)"
)
_ARRAY = re.compile(
    r"\b(?P<element>pred|[a-z]+\d+\w*)\[(?P<shape>[\d,]*)\](?:\{(?P<order>[\d,]*):?(?P<layout>[^}]*)\})?"
)
_SECTIONS = ("FileNames", "FunctionNames", "FileLocations", "StackFrames")
_FREE = {"parameter", "constant", "bitcast", "get-tuple-element", "tuple", "while", "call", "after-all", "iota"}
_NO_WORK = re.compile(r'custom_call_target="(AllocateBuffer|AssumeGatherIndicesInBound)"')
_NO_ESTIMATE = 2**63 - 1
_LIBRARY = "moc_jax/"  # the folder whose functions are named


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    type: str
    operation: str
    operands: tuple[str, ...]
    rest: str
    root: bool

    def attribute(self, pattern: str) -> str | None:
        """The first group of what follows the operands, if it is there."""
        found = re.search(pattern, self.rest)
        return found[1] if found else None

    @property
    def called(self) -> str:
        """The computation that a fusion or a loop runs."""
        return self.attribute(r"(?:calls|body)=%([\w.\-]+)") or ""


@dataclasses.dataclass(frozen=True)
class Traffic:
    """One operation, as often as it runs."""

    name: str
    read: int
    """Bytes."""
    written: int
    cycles: float | None
    """XLA's estimate."""
    turns: int
    functions: Counter[str]
    """file:function of the library -> elements that its instructions make; the innermost one of each instruction."""
    products: tuple[str, ...]
    """Of each product in it, how jax calls it: names of transformations and, for an einsum, its subscripts."""
    kernel: bool

    @property
    def bytes(self) -> int:
        """Read and written, of all turns."""
        return self.turns * (self.read + self.written)


class Program:
    """A compiled program's text, as `as_text` gives it.

    Raises:
        ValueError: the text has no entry.
    """

    def __init__(self, text: str):
        self._bodies: dict[str, dict[str, Instruction]] = {}
        tables: dict[str, dict[int, str]] = {name: {} for name in _SECTIONS}
        self.entry = current = section = ""
        for line in text.splitlines():
            if line in _SECTIONS:
                section = line
            elif begin := _COMPUTATION.match(line):
                current, section = begin["name"], ""
                self._bodies[current] = {}
                self.entry = current if begin["entry"] else self.entry
            elif section and line:
                number, value = line.split(" ", 1)
                tables[section][int(number)] = value
            elif current and (found := _INSTRUCTION.match(line)):
                self._bodies[current][found["name"]] = _instruction(found)
        if not self.entry:
            raise ValueError("no entry: this is not the text of a compiled program")
        self._frames = tables

    def loops(self) -> dict[str, str]:
        """The entry's own loops: name of the source -> computation that a turn runs."""
        loops = [each for each in self._bodies[self.entry].values() if each.operation == "while"]
        return {f"{each.name} {each.attribute('op_name="([^"]*)"') or ''}": each.called for each in loops}

    def walk(self, computation: str = "", times: int = 1) -> Iterator[Traffic]:
        """What a computation, or the entry, moves. Of branches the first is taken."""
        for each in self._bodies[computation or self.entry].values():
            if each.operation == "while":
                turns = each.attribute(r'known_trip_count":\{"n":"(\d+)"')
                yield from self.walk(each.called, times * int(turns or 1))
            elif each.operation in ("call", "conditional"):
                branch = each.attribute(r"(?:to_apply|branch_computations=\{|true_computation)=?%([\w.\-]+)")
                yield from self.walk(branch, times) if branch else ()
            elif not _free(each):
                read, written = self._moved(computation or self.entry, each)
                parts = list(self._parts(each))
                products = [x for x in parts if x.operation in ("convolution", "dot")]
                functions: Counter[str] = Counter()
                for part in parts:
                    functions[self._function(part)] += sum(_elements(found) for found in _ARRAY.finditer(part.type))
                if not any(functions):  # the compiler's own copies: for what they copy
                    functions = Counter({self._made_by(computation or self.entry, each): 1})
                cycles = int(each.attribute(r'"estimated_cycles":"(\d+)"') or _NO_ESTIMATE)
                yield Traffic(
                    each.name,
                    read,
                    written,
                    None if cycles == _NO_ESTIMATE else float(cycles),
                    times,
                    functions,
                    tuple(x.attribute(r'op_name="([^"]*)"') or "" for x in products),
                    each.operation == "custom-call" and "tpu_custom_call" in each.rest,
                )

    def _parts(self, instruction: Instruction) -> Iterator[Instruction]:
        """The instruction, or those of its fusion."""
        if instruction.operation != "fusion":
            yield instruction
            return
        for each in self._bodies[instruction.called].values():
            if each.operation not in ("parameter", "constant", "bitcast"):
                yield from self._parts(each)

    def _function(self, instruction: Instruction) -> str:
        return self._innermost(int(instruction.attribute(r"stack_frame_id=(\d+)") or 0))

    def _made_by(self, computation: str, instruction: Instruction) -> str:
        """The function that made the first operand."""
        body = self._bodies[computation]
        while instruction.operands and instruction.operands[0] in body:
            instruction = body[instruction.operands[0]]
            made = Counter(self._function(part) for part in self._parts(instruction))
            del made[""]
            if made:
                return made.most_common(1)[0][0]
        return ""

    @functools.cache  # noqa: B019 (a program lives as long as the process that reads it)
    def _innermost(self, frame: int) -> str:
        """The innermost function of the library on a stack."""
        files, functions, locations, frames = (self._frames[name] for name in _SECTIONS)
        while frame:
            location, parent = (int(x) for x in re.findall(r"=(\d+)", frames[frame] + "=0")[:2])
            file, function = (int(x) for x in re.findall(r"=(\d+)", locations[location])[:2])
            if _LIBRARY in files[file]:
                return f"{files[file].split(_LIBRARY)[-1]}:{functions[function]}".replace('"', "")
            frame = parent if parent != frame else 0
        return ""

    def _moved(self, computation: str, instruction: Instruction) -> tuple[int, int]:
        """Bytes read and written."""
        body = self._bodies[computation]
        operands = [_bytes(body[x].type) if x in body else 0 for x in instruction.operands]
        kind, written = instruction.operation, _bytes(instruction.type)
        if kind == "fusion":
            read = sum(self._read(instruction.called, i, size) for i, size in enumerate(operands) if size)
            return read, self._written(instruction.called, self._root(instruction.called), instruction.type)
        if kind in ("copy-start", "slice-start"):  # (to, from, ...)
            to = next(_ARRAY.finditer(instruction.type))
            return min(operands[0], _size(to)), _size(to) if _in_hbm(to) else 0
        if kind in ("slice", "dynamic-slice", "gather"):
            return min(operands[0], _anywhere(instruction.type)), written
        if kind == "dynamic-update-slice":
            return operands[1], _anywhere(body[instruction.operands[1]].type) if written else 0
        return sum(operands), written

    def _root(self, computation: str) -> Instruction:
        return next(each for each in self._bodies[computation].values() if each.root)

    def _read(self, computation: str, parameter: int, size: int) -> int:
        """Bytes of a parameter of `size` that a fusion reads."""
        body = self._bodies[computation].values()
        name = next(x.name for x in body if x.operation == "parameter" and x.rest.startswith(f"{parameter})"))
        return self._read_of(computation, name, size)

    def _read_of(self, computation: str, name: str, size: int) -> int:
        read = 0
        for user in self._bodies[computation].values():
            if name not in user.operands:
                continue
            first = user.operands[0] == name
            if user.operation == "bitcast" and not user.root:
                read += self._read_of(computation, user.name, size)
            elif user.operation in ("slice", "dynamic-slice", "gather") and first:
                read += _anywhere(user.type)
            elif user.operation == "fusion":
                inside = [i for i, x in enumerate(user.operands) if x == name]
                read += sum(self._read(user.called, i, size) for i in inside)
            elif user.operation != "dynamic-update-slice" or not first:
                return size
        return min(read, size)

    def _written(self, computation: str, root: Instruction, kind: str) -> int:
        """Bytes of a fusion's result of this type: of what is updated in place, the part that is."""
        body = self._bodies[computation]
        if root.operation == "tuple":
            kinds = [found[0] for found in _ARRAY.finditer(kind)]
            return sum(self._written(computation, body[x], each) for x, each in zip(root.operands, kinds, strict=True))
        if root.operation == "bitcast" and body[root.operands[0]].operation == "dynamic-update-slice":
            root = body[root.operands[0]]
        if root.operation == "dynamic-update-slice":
            return _anywhere(body[root.operands[1]].type) if _bytes(kind) else 0
        return _bytes(kind)


def _instruction(found: re.Match[str]) -> Instruction:
    operands = (
        () if found["operation"] == "constant" else tuple(re.findall(r"%([\w.\-]+)", found["rest"].split(")")[0]))
    )
    return Instruction(found["name"], found["type"], found["operation"], operands, found["rest"], bool(found["root"]))


def _free(instruction: Instruction) -> bool:
    kind = instruction.operation
    return kind in _FREE or kind.endswith("-done") or bool(_NO_WORK.search(instruction.rest))


def _bytes(kind: str) -> int:
    """Of the arrays of a type that are in HBM."""
    return sum(_size(found) for found in _ARRAY.finditer(kind) if _in_hbm(found))


def _anywhere(kind: str) -> int:
    return sum(_size(found) for found in _ARRAY.finditer(kind))


def _in_hbm(array: re.Match[str]) -> bool:
    return "S(" not in (array["layout"] or "")


def _elements(array: re.Match[str]) -> int:
    return math.prod(_numbers(array["shape"]))


def _size(array: re.Match[str]) -> int:
    """Bytes of an array in whole tiles."""
    shape = _numbers(array["shape"])
    sizes = [shape[i] for i in _numbers(array["order"])] or shape
    tile = re.match(r"T\(([\d,]+)\)", array["layout"] or "")
    for i, rows in enumerate(reversed(_numbers(tile[1]))) if tile else ():
        if i < len(sizes):
            sizes[i] = -(-sizes[i] // rows) * rows
    bits = 8 if array["element"] == "pred" else int(re.findall(r"\d+", array["element"])[0])
    return math.prod(sizes) * bits // 8


def _numbers(text: str | None) -> list[int]:
    return [int(x) for x in (text or "").split(",") if x]


def kind_of(moved: Traffic, kinds: Sequence[tuple[str, str]]) -> str:
    """The kind that most of an operation's elements are of, by the patterns of their functions; "other" for none."""
    votes: Counter[str] = Counter()
    for function, elements in moved.functions.items():
        votes[next((kind for kind, pattern in kinds if re.search(pattern, function)), "other")] += elements
    known = {kind: n for kind, n in votes.items() if kind != "other"} or votes
    return max(known, key=lambda kind: known[kind], default="other")
