"""What moc-plan expects of the 3.1 B model at 180 504 tokens on 1, 2 and 4 H200s, to stand beside what is measured.

    python -m benchmarks.plan_h200

The scene and the model are those of benchmarks/model.py, without a moving average. `context`: one scene, over all GPUs;
`fsdp`: a scene for each.
"""

import dataclasses
import pathlib
import shlex
import sys
from collections.abc import Sequence

import tyro

from benchmarks import results
from benchmarks.model import TWO_STREAMS
from moc_jax.config import BucketConfig, ChunkConfig, Config, DataConfig, HashConfig, MoCConfig, Remat, TrainConfig
from moc_jax.planning.plan import Plan, plan_sampling, plan_training
from moc_jax.planning.topology import topology
from moc_jax.sharding import AXES

COUNTS = 1, 2, 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Where to."""

    out: pathlib.Path = results.FOLDER


def config(policy: Remat, scenes: int) -> Config:
    """Of a run that trains this model."""
    model = dataclasses.replace(TWO_STREAMS, remat=policy)
    return Config(
        model=model,
        moc=MoCConfig(chunk=ChunkConfig(size=1280), top_k=5),
        text=HashConfig(dim=model.text_dim),
        data=DataConfig(height=480, width=480, buckets=(BucketConfig(shots=8, frames=200, text_tokens=504),)),
        train=TrainConfig(ema_decay=0.0, batch_size=scenes),
    )


def entry(plan: Plan) -> dict[str, object]:
    """What is stored of a plan."""
    return {
        "mesh": dict(plan.sizes),
        "remat": plan.policy,
        "step_ms": round(1e3 * plan.seconds, 1),
        "bytes": round(plan.held.total),
        "fits": plan.fits,
        "utilisation": round(plan.utilisation, 4),
        "exchanged_bytes": round(sum(each.bytes for each in plan.exchanges)),
        "phases_ms": {name: round(1e3 * seconds, 1) for name, seconds in plan.phases.items()},
        "exchanges_ms": {f"{x.kind} over {x.axis}": round(1e3 * x.seconds, 1) for x in plan.exchanges},
    }


def main(args: Arguments, command: str) -> None:
    """Plans, stores and prints."""
    for count in COUNTS:
        where = topology(f"h200:{count}")
        for axis in ("context", "fsdp") if count > 1 else ("context",):
            sizes = {name: count if name == axis else 1 for name in AXES}
            scenes = count if axis == "fsdp" else 1
            plans = {"training": plan_training(config("attention+mlp", scenes), where, sizes)}
            if axis == "context":
                plans["denoising"] = plan_sampling(config("attention+mlp", 1), where, sizes)
            for step, plan in plans.items():
                name = f"{step}, {axis} {count}"
                results.store(args.out, "plan", name, command, {"step": step, **entry(plan)}, chip="NVIDIA H200")
                print(f"{name}: {1e3 * plan.seconds:.0f} ms, {plan.held.total / 2**30:.1f} GiB", flush=True)


def run(argv: Sequence[str]) -> None:
    """The command line."""
    args = tyro.cli(Arguments, args=list(argv), description=__doc__)
    main(args, shlex.join(["python", "-m", "benchmarks.plan_h200", *argv]))


if __name__ == "__main__":
    run(sys.argv[1:])
