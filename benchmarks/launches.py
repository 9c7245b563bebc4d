"""What a device launches for one attention, and how long each launch takes, by what it is for.

    python -m benchmarks.launches --settings single_shot short_shots     # forward, and forward + backward

Times are the device's own, from a profile of some calls one after the other. `busy` is the sum of all launches, `call`
the time from call to call: what it is longer by, the device waited.
"""

import collections
import dataclasses
import functools
import re
import sys

import jax
import tyro

from benchmarks.inputs import make_inputs
from benchmarks.measure import Effort, both_ways, time_launches
from benchmarks.settings import SETTINGS
from benchmarks.trace import kernels, profiled
from moc_jax.attention.api import moc_attention

_CALLS = 10  # in a profile
_STAGES = ("route", "sort", "plan", "gather", "merge")  # named scopes
_KERNELS = {"moc_router": "route", "moc_": "attend"}  # ours, whose launches have names of their own


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """What is traced."""

    settings: tuple[str, ...] = ("single_shot", "short_shots")
    heads: int = 12
    head_dim: int = 128
    all: bool = False
    """Each launch, not their sums alone."""


def stage_of(launch: str, op_name: str) -> str:
    """What a launch is for, by its kernel's name or the innermost scope of its operation's."""
    found = re.findall(rf"moc_({'|'.join(_STAGES)})\b", op_name)
    kernel = next((stage for name, stage in _KERNELS.items() if launch.startswith(name)), "other")
    return found[-1] if found else kernel


def launches(compiled: jax.stages.Compiled, inputs) -> list[tuple[str, str, float, float]]:
    """(stage, kernel, launches per call, microseconds per call) of a compiled function, longest first."""
    names = dict(re.findall(r'%?([\w.\-]+) = [^\n]*op_name="([^"]*)"', compiled.as_text() or ""))
    names = {name.replace(".", "_").replace("-", "_"): op for name, op in names.items()}
    jax.block_until_ready(compiled(*inputs))
    counts, times = collections.Counter(), collections.Counter()

    def calls():
        for _ in range(_CALLS - 1):
            compiled(*inputs)
        return compiled(*inputs)

    for event in kernels(profiled(calls)):
        stats = {key: value for key, value in event.stats if key}
        ops = [str(x).replace(".", "_").replace("-", "_") for x in (event.name, stats.get("hlo_op", ""))]
        key = stage_of(event.name, next((names[op] for op in ops if op in names), "")), event.name[:60]
        counts[key] += 1
        times[key] += event.duration_ns / 1e3
    return [(*key, counts[key] / _CALLS, time / _CALLS) for key, time in times.most_common()]


def main(args: Arguments) -> None:
    """Prints a table for each setting and direction."""
    for name in args.settings:
        setting = SETTINGS[name]
        table = setting.table()
        q, k, v, d_out = make_inputs("random", setting.shape.tokens, args.heads, args.head_dim)
        forward = functools.partial(moc_attention, cfg=setting.moc)
        for way, function, inputs in (
            ("forward", forward, (q, k, v, table)),
            ("forward + backward", both_ways(forward), (d_out, q, k, v, table)),
        ):
            compiled = jax.jit(function).lower(*inputs).compile()
            call = time_launches(functools.partial(compiled, *inputs), Effort()).median_ms * 1e3
            found = launches(compiled, inputs)
            print(f"\n{name}, {way}: call {call:.1f} us, busy {sum(x[3] for x in found):.1f} us")
            stages = {stage: [x for x in found if x[0] == stage] for stage in dict.fromkeys(x[0] for x in found)}
            for stage, of in stages.items():
                print(f"  {stage:8} {sum(x[2] for x in of):6.1f} launches {sum(x[3] for x in of):9.1f} us")
                for _, kernel, count, time in of if args.all else ():
                    print(f"           {count:6.1f} {time:9.1f} us  {kernel}", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Arguments, args=sys.argv[1:], description=__doc__))
