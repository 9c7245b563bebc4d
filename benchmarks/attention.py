"""How long does one layer's attention take: Mixture of Contexts beside dense attention, on this device?

    python -m benchmarks.attention                                    # all settings, random and correlated routes
    python -m benchmarks.attention --settings multi_shot --profile    # one of them, and each part by itself
    python -m benchmarks.attention --settings scaling                 # forward, 1 to 64 shots of 22 500 tokens
    python -m benchmarks.attention --shrink 64 --heads 2              # small enough for a processor

bfloat16, the whole operation: pooling, routing, sorting, gathers, attention, merge. `bound` is the speed-up that the
attended pairs would allow. `routing` and `sorting` are timed by themselves and given as a share of the forward pass.
`peak` is everything that lives during forward + backward, over the bytes of q, k, v, the output and their gradients.
Random inputs give uniformly random routes; correlated ones, neighbours that route alike, as in video.
"""

import dataclasses
import functools
import gc
import pathlib
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import tyro

from benchmarks import results
from benchmarks.inputs import Inputs, Kind, make_inputs, union_ratio
from benchmarks.measure import (
    Ceilings,
    Effort,
    Program,
    Timing,
    both_ways,
    compile_all,
    dense_attention,
    dense_implementation,
    measure_ceilings,
)
from benchmarks.parts import Case, profile, sort_pairs
from benchmarks.settings import SCALING_SHOTS, SETTINGS, Setting, multi_shot
from benchmarks.tables import attention_tables
from moc_jax.attention.accounting import account
from moc_jax.attention.api import moc_attention, route
from moc_jax.attention.backends import Backend, resolve
from moc_jax.attention.tilings import Tilings, read_tilings
from moc_jax.config import MoCConfig
from moc_jax.scene import ChunkTable

_ROUTES_ON_HOST = 250_000  # tokens up to which pairs are counted from the routes themselves


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """What is measured, and how."""

    settings: tuple[str, ...] = (*SETTINGS, "scaling")
    """Which settings: the names of benchmarks/settings.py, and `scaling`."""
    inputs: tuple[Kind, ...] = ("random", "correlated")
    backend: Literal["auto", "pallas_gpu", "xla"] = "auto"
    tilings: str = ""
    """File of tilings that `moc_jax.commands.autotune` measured."""
    heads: int = 12
    head_dim: int = 128
    profile: bool = False
    """Also time every part by itself."""
    dense: bool = True
    """Measure dense attention too."""
    shrink: int = 1
    """So many times fewer tokens per frame, caption and chunk: to try things out."""
    scaling_shots: tuple[int, ...] = SCALING_SHOTS
    limit_seconds: float = 4.0
    """`scaling` leaves points out that would take longer than this."""
    repeats: int = 7
    """Samples per figure, which is their median; long programs get fewer."""
    out: pathlib.Path = results.FOLDER

    def __post_init__(self):
        unknown = [name for name in self.settings if name not in {*SETTINGS, "scaling"}]
        if unknown:
            raise ValueError(f"--settings {' '.join(unknown)}: known are {', '.join([*SETTINGS, 'scaling'])}")
        if self.shrink < 1:
            raise ValueError(f"--shrink {self.shrink}: it divides sizes, so it must be at least 1")

    @property
    def effort(self) -> Effort:
        """Of each figure."""
        return Effort(samples=self.repeats)


def main(args: Arguments, command: str) -> None:
    """Measures and stores setting after setting, then prints their tables."""
    bench, entries = Bench(args), []
    for name in args.settings:
        for kind in args.inputs:
            if name == "scaling" and kind != "random":
                continue  # the plot has one line for MoC
            entry = bench.scaling() if name == "scaling" else bench.measure(SETTINGS[name].shrunk(args.shrink), kind)
            entry = {"setting": name, "inputs": kind, "shrink": args.shrink, **entry}
            shrunk = f", shrunk {args.shrink}" if args.shrink > 1 else ""
            path = results.store(args.out, "attention", f"{name}, {kind}, {entry['backend']}{shrunk}", command, entry)
            print(f"{name}, {kind}: measured, stored in {path}", flush=True)
            entries.append(entry)
        bench.forget()
    print("\n".join(["", *attention_tables(entries)]))


class Bench:
    """Measures settings; dense attention once per number of tokens, since its time depends on nothing else."""

    def __init__(self, args: Arguments) -> None:
        self._args = args
        self._tilings = read_tilings(args.tilings, name="tilings") if args.tilings else Tilings()
        self._dense: dict[tuple[str, int], Timing] = {}
        self._programs: dict[str, Program] = {}

    @functools.cached_property
    def _ceilings(self) -> Ceilings:
        return measure_ceilings(self._args.effort)

    def _backend(self, moc: MoCConfig, table: ChunkTable) -> Backend:
        """What is measured, with its tiling."""
        q = jax.ShapeDtypeStruct((1, 1, self._args.heads, self._args.head_dim), jnp.bfloat16)
        return self._tilings.chosen(resolve(self._args.backend, moc, q, chunks=table.kind.shape[1]), q, table, moc)

    def forget(self) -> None:
        """Frees the programs of a setting."""
        self._programs.clear()
        gc.collect()

    def measure(self, setting: Setting, kind: Kind) -> dict[str, Any]:
        """One entry: all times of a setting on one kind of inputs."""
        args, effort = self._args, self._args.effort
        quoted = setting.quoted
        if quoted and (quoted.heads, quoted.head_dim) != (args.heads, args.head_dim):
            setting = dataclasses.replace(setting, quoted=None)  # of another size
        moc, table = setting.moc, setting.table()
        inputs = make_inputs(kind, setting.shape.tokens, args.heads, args.head_dim)
        q, k, v, d_out = inputs
        if not self._programs:  # both kinds of inputs share them
            self._programs.update(self._compile(inputs, table, moc))
        programs = self._programs
        routes = programs["routing"](q, k, table)

        dense = {}
        if args.dense:
            dense["forward"] = self._dense_time("forward", dense_attention, (q, k, v))
            dense["forward_backward"] = self._dense_time(
                "forward_backward", both_ways(dense_attention), (d_out, q, k, v)
            )
        forward = programs["forward"].time((q, k, v, table), effort)
        both = programs["forward_backward"].time((d_out, q, k, v, table), effort)
        routing = programs["routing"].time((q, k, table), effort)
        sorting = programs["sorting"].time((routes, table), effort)
        entry = {
            **self._describe(setting, moc, table, routes),
            "union_ratio": union_ratio(routes, table.text_tokens),
            "forward": _compared(forward, dense.get("forward"), setting, "forward_ms"),
            "forward_backward": _compared(both, dense.get("forward_backward"), setting, "forward_backward_ms"),
            "routing": dataclasses.asdict(routing),
            "sorting": dataclasses.asdict(sorting),
            "routing_share": (routing.median_ms + sorting.median_ms) / forward.median_ms,
            "memory": {
                "forward": dataclasses.asdict(programs["forward"].memory),
                "forward_backward": dataclasses.asdict(programs["forward_backward"].memory),
                "tensors": 8 * q.nbytes,  # q, k, v, out and a gradient of each
                "peak_over_tensors": programs["forward_backward"].memory.peak / (8 * q.nbytes),
            },
        }
        if setting.quoted:
            entry["quoted"] = dataclasses.asdict(setting.quoted)
        if args.profile:
            entry["ceilings"] = dataclasses.asdict(self._ceilings)
            case = Case(inputs=inputs, table=table, cfg=moc, routes=routes, backend=self._backend(moc, table))
            entry["parts"] = profile(case, self._ceilings, effort)
        return entry

    def scaling(self) -> dict[str, Any]:
        """Forward time against tokens, MoC and dense; each series ends where a point would take too long."""
        args = self._args
        points: list[dict[str, Any]] = []
        for shots in sorted(args.scaling_shots):
            setting = multi_shot(shots).shrunk(args.shrink)
            moc, table = setting.moc, setting.table()
            q, k, v, _ = make_inputs("random", setting.shape.tokens, args.heads, args.head_dim)
            described = self._describe(setting, moc, table, None)
            point = {"shots": shots, "tokens": described["tokens"], "pairs": described["pairs"]}
            if self._affordable(points, "moc", point, "attended"):
                forward = functools.partial(moc_attention, cfg=moc, backend=self._backend(moc, table))
                program = compile_all({"forward": (forward, (q, k, v, table))})["forward"]
                point["moc"] = dataclasses.asdict(program.time((q, k, v, table), args.effort))
            if args.dense and self._affordable(points, "dense", point, "dense"):
                point["dense"] = dataclasses.asdict(self._dense_time("forward", dense_attention, (q, k, v)))
            points.append(point)
            del q, k, v
            gc.collect()
        base = next((p for p in points if p["shots"] == 8 and "moc" in p), points[0])
        for point in points:
            if "moc" in point:
                each = [p["moc"]["median_ms"] / p["tokens"] for p in (point, base)]
                point["per_token_over_base"] = each[0] / each[1]
        shared = ("backend", "heads", "head_dim", "dense_by")
        return {**{name: described[name] for name in shared}, "base_shots": base["shots"], "points": points}

    def _affordable(self, points: list[dict[str, Any]], name: str, point: dict[str, Any], pairs: str) -> bool:
        """Whether the last point's time, grown as the pairs grow, is below the limit."""
        if not points:
            return True
        last = points[-1]
        if name not in last:
            return False
        grown = last[name]["median_ms"] * point["pairs"][pairs] / last["pairs"][pairs]
        return grown <= 1e3 * self._args.limit_seconds

    def _compile(self, inputs: Inputs, table: ChunkTable, moc) -> dict[str, Program]:
        q, k, v, d_out = inputs
        options = dict(cfg=moc, backend=self._backend(moc, table))
        forward, routing = functools.partial(moc_attention, **options), functools.partial(route, **options)
        routes = jax.eval_shape(routing, q, k, table)
        return compile_all(
            {
                # The table is an argument: lengths are data, and no program may be made for one scene.
                "forward": (forward, (q, k, v, table)),
                "forward_backward": (both_ways(forward), (d_out, q, k, v, table)),
                "routing": (routing, (q, k, table)),
                "sorting": (sort_pairs, (routes, table)),
            }
        )

    def _dense_time(self, name: str, function: Callable[..., Any], inputs: tuple[jax.Array, ...]) -> Timing:
        key = name, inputs[0].shape[1]
        if key not in self._dense:
            self._dense[key] = compile_all({name: (function, inputs)})[name].time(inputs, self._args.effort)
        return self._dense[key]

    def _describe(self, setting: Setting, moc, table: ChunkTable, routes) -> dict[str, Any]:
        args = self._args
        counted = routes is not None and setting.shape.tokens <= _ROUTES_ON_HOST
        cost = account(table, moc, args.head_dim, routes if counted else None)
        return {
            "backend": self._backend(moc, table).name,
            "dense_by": dense_implementation(),
            "tokens": cost.tokens,
            "heads": args.heads,
            "head_dim": args.head_dim,
            "chunk": dataclasses.asdict(moc.chunk),
            "top_k": moc.top_k,
            "pairs": {
                "attended": cost.expected_pairs,
                "dense": cost.dense_pairs,
                "bound": cost.dense_pairs / cost.expected_pairs,
            },
        }


def _compared(ours: Timing, dense: Timing | None, setting: Setting, quoted: str) -> dict[str, Any]:
    found: dict[str, Any] = {"moc": dataclasses.asdict(ours)}
    if dense is not None:
        found |= {"dense": dataclasses.asdict(dense), "ratio": dense.median_ms / ours.median_ms}
    if setting.quoted is not None:
        found["quoted_ratio"] = getattr(setting.quoted, quoted) / ours.median_ms
    return found


def run(argv: Sequence[str]) -> None:
    """The command line."""
    args = tyro.cli(Arguments, args=list(argv), description=__doc__)
    main(args, shlex.join(["python", "-m", "benchmarks.attention", *argv]))


if __name__ == "__main__":
    run(sys.argv[1:])
