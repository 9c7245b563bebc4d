"""How far is moc-plan's memory from XLA's? Training steps are compiled for TPUs that aren't there, and compared.

    python -m benchmarks.plan_memory                       # all cases, some forty seconds each
    python -m benchmarks.plan_memory --cases "v5p:4x4x4 3b"
    python -m benchmarks.plan_memory --show                # what is stored, in a table
    python -m benchmarks.plan_memory --fit                 # the plan's numbers again, when the step has changed

Needs libtpu: pip install -e '.[tpu]'. Scenes have shots of 22 500 tokens with captions of 56, one for each device or
`context` of them; no moving average is kept. Single chips have models of two or six layers, which more would
not change but for what it keeps; slices have the whole model, with weights split over all devices.
"""

import dataclasses
import functools
import math
import pathlib
import shlex
import sys
from collections.abc import Sequence

import numpy as np
import tyro

from benchmarks import results
from moc_jax.cli import load_config
from moc_jax.config import Config
from moc_jax.planning.compiled import compile_step
from moc_jax.planning.plan import Plan, plan_training, remedies, state_bytes
from moc_jax.planning.topology import topology
from moc_jax.training import held as memory
from moc_jax.training import remat

_TWO = "--model.dim 1536 --model.heads 12 --model.mlp-ratio 5.8333333333333333"  # as benchmarks/model.py has it
_LONG = "--data.buckets 64:1600:3640"
CASES = {
    "v5p:1x1x1 3b, 2 layers": "--preset 3b --model.depth 2",
    "v5p:1x1x1 3b, 2 layers, 4 shots": "--preset 3b --model.depth 2 --data.buckets 4:100:280",
    "v5p:1x1x1 1536 wide, 2 layers": f"{_TWO} --model.depth 2",
    "v5p:1x1x1 1536 wide, 6 layers": f"{_TWO} --model.depth 6",
    "v5p:1x1x1 base, 2 layers": "--preset base --model.depth 2",
    "v5p:1x1x1 base, 2 layers, 2 shots": "--preset base --model.depth 2 --data.buckets 2:50:168",
    "v5p:1x1x1 base, 6 layers": "--preset base --model.depth 6",
    "v5p:1x1x1 base, 6 layers, attention": "--preset base --model.depth 6 --model.remat attention",
    "v5p:1x1x1 base, 6 layers, dots": "--preset base --model.depth 6 --model.remat dots",
    "v5p:1x1x1 large, 2 layers": "--preset large --model.depth 2",
    "v5p:4x4x4 3b": "--preset 3b",
    "v5p:4x4x4 base": "--preset base",
    "v5p:8x8x4 3b": "--preset 3b",
    "v5p:8x8x4 3b, context 4": "--preset 3b --mesh.fsdp 64 --mesh.context 4",
    "v5p:8x8x4 3b, 64 shots, context 16": f"--preset 3b --mesh.fsdp 16 --mesh.context 16 {_LONG}",
    "v5p:8x8x8 wan21-14b, context 8": "--preset wan21-14b --mesh.fsdp 64 --mesh.context 8",
    "v5p:8x8x16 3b, context 8": "--preset 3b --mesh.fsdp 128 --mesh.context 8",
    "v4:1x1x1 base, 2 layers": "--preset base --model.depth 2",
    "v6e:1x1 3b, 2 layers": "--preset 3b --model.depth 2",
    "v6e:1x1 base, 2 layers": "--preset base --model.depth 2",
    "v6e:4x4 3b": "--preset 3b",
    "v6e:4x4 3b, context 4": "--preset 3b --mesh.fsdp 4 --mesh.context 4",
    "v6e:4x4 base": "--preset base",
    "v5e:1x1 base, 2 layers": "--preset base --model.depth 2",
    "v5e:4x4 base": "--preset base",
    "v5e:4x4 base, context 4": "--preset base --mesh.fsdp 4 --mesh.context 4",
    "tpu7x:1x1x1 base, 2 layers": "--preset base --model.depth 2",
    "tpu7x:2x2x1 3b": "--preset 3b",
    "tpu7x:4x4x4 3b": "--preset 3b",
}
"""Topology and what differs from configs/multi_shot.py."""


_ATTENTION, _MLP = ("attention", "padding", "pairs"), ("mlp", "hidden", "mlp_padding")  # of which the larger counts
_ROUNDS, _TIE = 200, 0.02


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Which steps are compiled."""

    cases: tuple[str, ...] = tuple(CASES)
    timeout: float = 900.0
    """Seconds for one compilation."""
    show: bool = False
    """Compile nothing: what is stored, beside the plan of now."""
    fit: bool = False
    """Compile nothing: the numbers of moc_jax/training/held.py that are nearest to what is stored."""
    out: pathlib.Path = results.FOLDER

    def __post_init__(self):
        unknown = [case for case in self.cases if case not in CASES]
        if unknown:
            raise ValueError(f"--cases {unknown}: known are {', '.join(CASES)}")


def planned(case: str) -> tuple[Config, Plan]:
    """The config of a case, and what is planned for it."""
    where = topology(case.split()[0])
    usual = "--model.remat full --data.buckets 8:200:504 --train.ema-decay 0 --mesh.data 1 --mesh.fsdp -1"
    own = shlex.split(CASES[case])
    context = int(own[own.index("--mesh.context") + 1]) if "--mesh.context" in own else 1
    own += ["--train.batch-size", str(where.devices // context)]
    given = [word for word in own if word.startswith("--")]
    pairs = list(zip(*[iter(shlex.split(usual))] * 2, strict=True))
    config = load_config(["--config", "multi_shot", *(w for pair in pairs if pair[0] not in given for w in pair), *own])
    return config, plan_training(config, where)


@functools.cache
def _parts(case: str) -> tuple[Config, Plan, dict[str, int]]:
    config, plan = planned(case)
    return config, plan, state_bytes(config, plan.sizes)


def _held(case: str) -> float:
    """As `planned`, by the numbers of now."""
    config, plan, state = _parts(case)
    scenes = plan.scenes // (plan.sizes["data"] * plan.sizes["fsdp"])
    of = config.model, plan.policy, plan.work.moc, plan.work.shape, scenes, state, plan.sizes, plan.topology.chip
    return memory.training_bytes(*of).total


def main(args: Arguments, command: str) -> None:
    """Compiles, compares, stores."""
    if args.show or args.fit:
        print("\n".join([*table(args.out), "", *pods_table(args.out)] if args.show else fitted(args.out)))
        return
    for case in args.cases:
        config, plan = planned(case)
        made = compile_step(config, plan.topology, dict(plan.sizes), args.timeout)
        exchanged = {kind: {"arrays": n, "bytes": size} for kind, (n, size) in made.collectives.items()}
        entry = {"parameters": plan.parameters, "bytes": made.total, "collectives": exchanged}
        kind = plan.topology.chip.name
        results.store(args.out, "plan_memory", case, command, entry, chip=f"TPU {kind}")
        off = plan.held.total / made.total - 1
        print(f"{case}: {made.total / 2**30:.2f} GiB, planned {plan.held.total / 2**30:.2f}: {off:+.1%}", flush=True)


def stored(folder: pathlib.Path) -> dict[str, int]:
    """Bytes by case."""
    files = results.load(folder, "plan_memory")
    return {case: entry["bytes"] for file in files for case, entry in file["entries"].items()}


def _fit_of(case: str) -> str:
    chip = case.partition(":")[0]
    return chip if chip in memory.FITS else "v5p"


def fitted(folder: pathlib.Path) -> list[str]:
    """A line for each kind of chip: the numbers whose plans are off by the least at most, and drawn to the numbers of
    now where nothing else decides.

    A plan is linear in them, but for the larger of attention and MLP: that of the last round is kept for the next.
    """
    lines, names = [], [field.name for field in dataclasses.fields(memory.Fit)]
    made = stored(folder)
    for chip, present in list(memory.FITS.items()):
        cases = [case for case in made if _fit_of(case) == chip]

        def totals(fit: memory.Fit, cases: list[str] = cases, chip: str = chip) -> np.ndarray:
            memory.FITS[chip] = fit
            return np.array([_held(case) for case in cases])

        nothing = dict.fromkeys(names, 0.0)
        base = totals(memory.Fit(**nothing))
        parts = np.stack([totals(memory.Fit(**{**nothing, name: 1.0})) - base for name in names], axis=1)
        memory.FITS[chip] = present
        size = np.array([made[case] for case in cases])
        weight = np.array([3.0 if topology(case.split()[0]).devices > 1 else 1.0 for case in cases])
        now = np.array([getattr(present, name) for name in names])
        of_attention, of_mlp = ([name in each for name in names] for each in (_ATTENTION, _MLP))
        found, left = now, parts
        for _ in range(_ROUNDS):
            smaller = (parts * found)[:, of_attention].sum(axis=1) < (parts * found)[:, of_mlp].sum(axis=1)
            left = parts.copy()
            left[np.ix_(smaller, of_attention)] = 0
            left[np.ix_(~smaller, of_mlp)] = 0
            rows = np.concatenate([weight[:, None] * left / size[:, None], np.diag(_TIE / (now + 1))])
            wanted = np.concatenate([weight * (1 - base / size), _TIE * now / (now + 1)])
            found = np.maximum(np.linalg.lstsq(rows, wanted, rcond=None)[0], 0)
            off = np.abs((base + left @ found) / size - 1)
            weight *= (1 + off / off.max()) / 2  # what is far off counts more and more
            weight *= len(size) / weight.sum()
        shown = ", ".join(f"{name}={value:.2f}" for name, value in zip(names, found, strict=True))
        off = (base + left @ found) / size - 1
        lines.append(f'"{chip}": Fit({shown}),  # at most {np.abs(off).max():.1%} off in {len(cases)} cases')
    return lines


def table(folder: pathlib.Path) -> list[str]:
    """Markdown."""
    lines = ["| topology and model | XLA, GiB | planned, GiB | off |", "|---|--:|--:|--:|"]
    found = stored(folder)
    for case in [case for case in CASES if case in found]:
        made, held = found[case], planned(case)[1].held.total
        lines.append(f"| {case} | {made / 2**30:.2f} | {held / 2**30:.2f} | {held / made - 1:+.1%} |")
    return lines


_KINDS = "all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute"


def pods_table(folder: pathlib.Path) -> list[str]:
    """Markdown: what a device of each slice needs, by XLA, and exchanges in a step, in GB of whole arrays."""
    lines = [f"| slice, model | GiB of | fits | {' | '.join(_KINDS)} |", f"|---|--:|---|{'--:|' * len(_KINDS)}"]
    for file in results.load(folder, "plan_memory"):
        for case, entry in file["entries"].items():
            where = topology(case.split()[0])
            if math.prod(where.sides) == 1 or "collectives" not in entry:
                continue
            config, plan = planned(case)
            fits = entry["bytes"] <= remat.USABLE * where.chip.memory
            found = "yes" if fits else " or ".join(["no; with", *(f"`{x.change}`" for x in remedies(config, plan))])
            moved = [entry["collectives"].get(kind, {"bytes": 0})["bytes"] for kind in _KINDS]
            sizes = " | ".join(f"{size / 1e9:.3g}" if size >= 5e7 else "-" for size in moved)
            memory = f"{entry['bytes'] / 2**30:.1f} of {where.chip.memory / 2**30:.1f}"
            lines.append(f"| {case} | {memory} | {found.replace('with or', 'with')} | {sizes} |")
    return lines


def run(argv: Sequence[str]) -> None:
    """The command line."""
    args = tyro.cli(Arguments, args=list(argv), description=__doc__)
    main(args, shlex.join(["python", "-m", "benchmarks.plan_memory", *argv]))


if __name__ == "__main__":
    run(sys.argv[1:])
