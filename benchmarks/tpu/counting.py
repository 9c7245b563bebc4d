"""How often the loops and branches of a program's kernels run: their own scalar code says it, nothing is repeated here.

A program is traced, not compiled. Its tables of tiles, and how many pairs lie where, are computed as it would compute
them; arrays that are large, or made of what nobody gave, are unknown. Then each kernel goes through its grid, and runs
what decides about loops and branches; branches on what is unknown are not taken.
"""

import collections
import dataclasses
import functools
import itertools
import math
import operator
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

_LARGE = 2**25  # elements of an array that is not computed
_LOOPS = ("scan", "while")
_INNER = ("jaxpr", "call_jaxpr", "call")
Path = tuple[int, ...]
Emulation = Callable[["Call"], list[Any]]
"""The results of a kernel, None for unknown ones."""


@dataclasses.dataclass(frozen=True)
class Call:
    """A kernel in a program."""

    params: dict[str, Any]
    operands: list[Any]  # arrays; None: unknown
    times: int  # that the program calls it

    @property
    def name(self) -> str:
        """The kernel's."""
        return self.params["name"]

    @property
    def code(self) -> str:
        """All that it is compiled from."""
        return f"{self.params['jaxpr']} {self.mapping}"

    @property
    def mapping(self):
        """Its grid, and which blocks a step has."""
        return self.params["grid_mapping"]

    @property
    def grid(self) -> list[int]:
        """Steps along each axis."""
        dynamic = iter(self.operands)
        return [size if isinstance(size, int) else int(next(dynamic)) for size in self.mapping.grid]

    @property
    def scalars(self) -> list[Any]:
        """Prefetched operands."""
        first = self.mapping.num_dynamic_grid_bounds
        return self.operands[first : first + self.mapping.num_index_operands]

    @property
    def inputs(self) -> list[Any]:
        """The operands of which steps have blocks."""
        return self.operands[self.mapping.num_dynamic_grid_bounds + self.mapping.num_index_operands :]


@dataclasses.dataclass(frozen=True)
class Turns:
    """Of one call of a kernel."""

    grid: int
    loops: list[int]
    """Of each loop, in the order in which they stand."""
    optional: list[bool]
    """Whether the compiler may do without the loop: it has one turn, or what unrolling leaves."""
    branches: list[int]
    """How often each branch outside of loops is taken, in their order."""

    def of_loops(self, count: int) -> list[int]:
        """Turns of as many loops, those left out that the compiler did without.

        Raises:
            ValueError: there are no so many.
        """
        left = list(range(len(self.loops)))
        for may_go in (lambda i: self.optional[i], lambda i: not self.loops[i]):
            for i in sorted(filter(may_go, left), key=self.loops.__getitem__)[: len(left) - count]:
                left.remove(i)
        if len(left) != count:
            raise ValueError(f"{count} loops, but {len(left)} of the kernel's turn more than once: {self.loops}")
        return [self.loops[i] for i in left]


# ------------------------------------------------------------------------------------------------- the program


def calls(function: Callable[..., Any], arguments: tuple[Any, ...], emulations: dict[str, Emulation]) -> list[Call]:
    """The kernels of a program, in their order.

    Args:
        function: Of trees of arrays.
        arguments: Arrays, or shapes for unknown ones.
        emulations: By kernels' names: of those whose results decide about others'.
    """
    traced = jax.make_jaxpr(function)(*arguments)
    known = [None if isinstance(x, jax.ShapeDtypeStruct) else x for x in jax.tree.leaves(arguments)]
    found: list[Call] = []
    _run(traced.jaxpr, [*traced.consts, *known], 1, emulations, found)
    return found


def _run(jaxpr, operands: list[Any], times: int, emulations: dict[str, Emulation], found: list[Call]) -> list[Any]:
    known = dict(zip([*jaxpr.constvars, *jaxpr.invars], operands))

    def read(x):
        return x.val if hasattr(x, "val") else known.get(x)

    for equation in jaxpr.eqns:
        results = _results(equation, [read(x) for x in equation.invars], times, emulations, found)
        known.update(zip(equation.outvars, results))
    return [read(x) for x in jaxpr.outvars]


def _results(equation, operands, times: int, emulations, found: list[Call]) -> list[Any]:
    name, params = equation.primitive.name, equation.params
    unknown = [None] * len(equation.outvars)
    if name == "pallas_call":
        found.append(Call(params, operands, times))
        return emulations[params["name"]](found[-1]) if params["name"] in emulations else unknown
    if name == "scan" and any(x is None for x in operands):  # groups of heads, of which one is as good as any other
        _run(params["jaxpr"].jaxpr, [*params["jaxpr"].consts, *operands], times * params["length"], emulations, found)
        return unknown
    if name == "optimization_barrier":
        return operands
    inner = next((params[key] for key in _INNER if key in params and name not in _LOOPS), None)
    if inner is not None:
        return _run(inner.jaxpr, [*inner.consts, *operands], times, emulations, found)
    if any(x is None for x in operands) or any(math.prod(x.aval.shape) > _LARGE for x in equation.outvars):
        return unknown
    results = equation.primitive.bind(*operands, **params)
    return list(results) if equation.primitive.multiple_results else [results]


# ------------------------------------------------------------------------------------------------- its kernels


def turns(call: Call) -> Turns:
    """Of all steps of a call's grid."""
    jaxpr, counts = call.params["jaxpr"], collections.Counter()
    loops = list(_loops(jaxpr))
    branches = [(i,) for i, equation in enumerate(jaxpr.eqns) if equation.primitive.name == "cond"]
    scalars, maps = [x if x is None else np.asarray(x) for x in call.scalars], call.mapping.block_mappings
    inputs = [x if x is None else np.asarray(x) for x in call.inputs]
    others = [None] * (len(jaxpr.invars) - len(scalars) - len(inputs))
    in_scalar_memory = ["smem" in str(var.aval) for var in jaxpr.invars[len(scalars) :]]
    for step in itertools.product(*map(range, call.grid)):
        blocks = [
            _block(x, mapping, step, scalars) if x is not None and scalar else None
            for x, mapping, scalar in zip(inputs, maps, in_scalar_memory)
        ]
        _Scalars(step, call.grid, counts).run(jaxpr, [*scalars, *blocks, *others], (), branches=True)
    found = [[*_unrolled(counts[path], length, unroll)] for path, length, unroll in loops]
    return Turns(
        grid=math.prod(call.grid),
        loops=[n for each in found for n, _ in each],
        optional=[is_optional for each in found for _, is_optional in each],
        branches=[counts[path] for path in branches],
    )


def _unrolled(count: int, length: int | None, unroll: int) -> Iterator[tuple[int, bool]]:
    """(turns, whether the compiler may do without) of the loops that a loop becomes."""
    if length is None or unroll == 1:
        yield count, length == 1
        return
    times = count // max(1, length)
    yield times * (length // unroll), length // unroll <= 1
    if length % unroll:
        yield times * (length % unroll), True


def _block(x: np.ndarray, mapping, step: tuple[int, ...], scalars) -> np.ndarray | None:
    """A step's block of an array in scalar memory."""
    index = _Scalars(step, [], collections.Counter()).run(mapping.index_map_jaxpr.jaxpr, [*step, *scalars], ())
    if any(i is None for i in index[: x.ndim]):
        return None
    sizes = [getattr(size, "block_size", None) for size in mapping.block_shape]
    return x[tuple(i if n is None else slice(i * n, (i + 1) * n) for i, n in zip(index, sizes))]


def _loops(jaxpr, path: Path = ()) -> Iterator[tuple[Path, int | None, int]]:
    """(path, turns if static, unrolling) of each loop."""
    for i, equation in enumerate(jaxpr.eqns):
        here = (*path, i)
        if equation.primitive.name in _LOOPS:
            yield here, equation.params.get("length"), equation.params.get("unroll", 1)
        for j, inner in enumerate(_inner(equation)):
            yield from _loops(inner, (*here, j))


def _inner(equation) -> list[Any]:
    """What an equation runs, loops' conditions left out."""
    params, name = equation.params, equation.primitive.name
    found = params["branches"] if name == "cond" else [params["body_jaxpr"]] if name == "while" else [
        params[key] for key in _INNER if key in params
    ]  # fmt: skip
    return [getattr(x, "jaxpr", x) for x in found]


@functools.cache
def _relevant(jaxpr, branches: bool) -> list[int]:
    """Equations that decide about loops, and about outer branches, if asked for these alone, or else about results."""
    needed = set() if branches else {x for x in jaxpr.outvars if not hasattr(x, "val")}
    kept = []
    for i, equation in reversed([*enumerate(jaxpr.eqns)]):
        decides = _is_loop_or_has(equation) or (branches and equation.primitive.name == "cond")
        if decides or any(x in needed for x in equation.outvars):
            kept.append(i)
            needed.update(x for x in equation.invars if not hasattr(x, "val"))
    return kept[::-1]


@functools.cache
def _has_loops(jaxpr) -> bool:
    return any(map(_is_loop_or_has, jaxpr.eqns))


def _is_loop_or_has(equation) -> bool:
    return equation.primitive.name in _LOOPS or any(map(_has_loops, _inner(equation)))


class _Scalars:
    """Runs scalar code for a step of a grid; values are numbers, arrays in scalar memory, or None."""

    def __init__(self, step: tuple[int, ...], grid: list[int], counts: collections.Counter):
        self.step, self.grid, self.counts = step, grid, counts

    def run(self, jaxpr, operands, path: Path, branches: bool = False) -> list[Any]:
        """The results of some code; of the kernel's own only its `branches`, and loops, are run."""
        known = dict(zip([*jaxpr.constvars, *jaxpr.invars], operands))

        def read(x):
            return x.val if hasattr(x, "val") else known.get(x)

        for i in _relevant(jaxpr, branches):
            equation = jaxpr.eqns[i]
            results = self._results(equation, [read(x) for x in equation.invars], (*path, i))
            known.update(zip(equation.outvars, results))
        return [read(x) for x in jaxpr.outvars]

    def _results(self, equation, operands, path: Path) -> list[Any]:
        name, params = equation.primitive.name, equation.params
        unknown = [None] * len(equation.outvars)
        if name == "program_id":
            return [self.step[params["axis"]]]
        if name == "num_programs":
            return [self.grid[params["axis"]]]
        if name == "get":
            return [_look_up(operands[0], jax.tree.unflatten(params["tree"], operands[1:]))]
        if name == "cond":
            index = int(operands[0] or 0)
            self.counts[path] += index > 0
            return self.run(getattr(x := params["branches"][index], "jaxpr", x), operands[1:], (*path, index))
        if name == "scan":
            return self._scan(params, operands, path, len(unknown))
        if name == "while":
            return self._while(params, operands, path)
        if any(key in params for key in _INNER):
            (inner,) = _inner(equation)
            return self.run(inner, operands, (*path, 0))
        function = _SCALAR.get(name)
        if function is None or any(x is None or np.ndim(x) for x in operands):
            return unknown
        return [function(*operands)]

    def _scan(self, params, operands, path: Path, carried: int) -> list[Any]:
        body, length = params["jaxpr"].jaxpr, params["length"]
        self.counts[path] += length
        if not _has_loops(body):
            return [None] * carried
        consts, carry = operands[: len(operands) - carried], operands[len(operands) - carried :]
        for _ in range(length):
            carry = self.run(body, [*consts, *carry], (*path, 0))
        return carry

    def _while(self, params, operands, path: Path) -> list[Any]:
        of_cond, of_body = params["cond_nconsts"], params["body_nconsts"]
        consts, own, carry = operands[:of_cond], operands[of_cond : of_cond + of_body], operands[of_cond + of_body :]
        cond, body = params["cond_jaxpr"].jaxpr, params["body_jaxpr"].jaxpr
        if not _has_loops(body) and [e.primitive.name for e in cond.eqns] == ["lt"] and not consts:
            low, high = (carry[cond.invars.index(x)] for x in cond.eqns[0].invars)  # lax.fori_loop's
            if low is not None and high is not None:
                self.counts[path] += max(0, int(high) - int(low))
            return [None] * len(carry)
        while self.run(cond, [*consts, *carry], ())[0]:
            self.counts[path] += 1
            carry = self.run(body, [*own, *carry], (*path, 0))
        return carry


def _look_up(array, indexers) -> Any:
    """A number in scalar memory, if its place is known."""
    for indexer in indexers if array is not None else ():
        index = getattr(indexer, "indices", None)
        if index is None or any(i is None or (not np.isscalar(i) and np.ndim(i)) for i in index):
            return None
        if any(hasattr(i, "start") for i in index):
            return None
        array = array[tuple(int(i) for i in index)]
    return None if array is None or np.ndim(array) else int(array)


_SCALAR: dict[str, Callable[..., Any]] = {
    **{name: getattr(operator, name) for name in ("add", "sub", "mul", "eq", "ne", "lt", "le", "gt", "ge", "neg")},
    **{"and": operator.and_, "or": operator.or_, "xor": operator.xor, "max": max, "min": min},
    "div": lambda a, b: math.trunc(a / b),
    "rem": lambda a, b: int(math.fmod(a, b)),
    "not": lambda a: not a if isinstance(a, bool | np.bool_) else ~a,
    "select_n": lambda which, *cases: cases[int(which)],
    "clamp": lambda low, x, high: min(max(x, low), high),
    "convert_element_type": lambda x: int(x),
    "multiple_of": lambda x: x,
    "squeeze": lambda x: x,
    "reshape": lambda x: x,
    "shift_right_arithmetic": operator.rshift,
    "shift_right_logical": operator.rshift,
    "shift_left": operator.lshift,
}
