"""How much faster are several GPUs on one scene, and on a scene for each?

    python -m benchmarks.scaling                                 # all that the devices of this machine can do
    python -m benchmarks.scaling --which context --counts 1 4    # one scene, its tokens split over 4
    python -m benchmarks.scaling --which context --counts 4 --head-groups 2    # as two groups of heads by two of tokens
    python -m benchmarks.scaling --which context --scene.attention.exchange dispatch    # one of the two exchanges alone

The model and scene are those of benchmarks/model.py: 3.1 B parameters, 180 504 tokens. Measured are

    context     a training step of one scene over n devices, as every split into groups of heads x groups of tokens, and
                between groups of tokens with each exchange
    fsdp        a training step of n scenes, one on each device, whose weights are split; on one device it is context's
    sampling    one call of the model for one scene over n devices
    long        a training step of a scene of four times the shots, over all devices

with milliseconds, tokens/s, how much that is of one device's times n, what a device needs, what it receives of others
for attention, counted, and from a profile, for how long its collectives ran, for how long nothing ran beside them, and
where the time goes.
"""

import concurrent.futures
import dataclasses
import gc
import itertools
import json
import pathlib
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import tyro
from flax import nnx
from jax.profiler import ProfileData

from benchmarks import model as whole
from benchmarks import results
from benchmarks.measure import Effort, Program, begun, time_launches
from benchmarks.several import times_one
from benchmarks.trace import apart, kernels, profiled, split_of
from moc_jax import models
from moc_jax.attention.accounting import chosen_exchange
from moc_jax.attention.api import RoutedAttention, routed_attention
from moc_jax.attention.sharded import deal_of
from moc_jax.config import Config, ExchangeKind, HashConfig, MeshConfig, TrainConfig
from moc_jax.scene import Scene, chunk_table
from moc_jax.sharding import batch_sharding, make_mesh, shard_batch
from moc_jax.training.state import Blueprint, make_blueprint
from moc_jax.training.step import make_train_step

Which = Literal["context", "fsdp", "sampling", "long"]
_COLLECTIVE = re.compile(r"nccl|all_to_all|allgather|reducescatter", re.IGNORECASE)
_LONGER = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """What is measured, and of which model and scene."""

    scene: whole.Arguments = whole.Arguments()
    """As in benchmarks/model.py."""
    which: tuple[Which, ...] = ("context", "fsdp", "sampling", "long")
    counts: tuple[int, ...] = ()
    """Numbers of devices; none: 1, 2, 4, ... as there are."""
    head_groups: tuple[int, ...] = ()
    """Of context's splits those into so many groups of heads; none: all that can be."""
    profile: bool = True
    """Also trace a launch of each, where there are GPUs."""
    out: pathlib.Path = results.FOLDER


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One measurement."""

    which: Which
    devices: int
    head_groups: int = 0
    scenes: int = 1
    longer: int = 1
    exchange: ExchangeKind = "auto"
    remat: str = ""
    """Of a training step."""

    @property
    def mesh(self) -> MeshConfig:
        """Its axes."""
        if self.which == "fsdp":
            return MeshConfig(data=1, fsdp=self.devices)
        return MeshConfig(data=1, context=self.devices)

    @property
    def name(self) -> str:
        """In results."""
        split = f", {self.head_groups}x{self.devices // self.head_groups}" if self.head_groups else ""
        ways = (f", {way}" for way in (self.exchange, self.remat) if way not in ("auto", ""))
        return f"{self.which}, {self.devices} devices{split}{''.join(ways)}"


def cases(args: Arguments, counts: Sequence[int]) -> Iterator[Case]:
    """All that are asked for: those of fewer devices first, which the others are compared with."""
    heads, asked, remat = args.scene.model.heads, args.scene.attention.exchange, _asked(args).model.remat
    for which, count in itertools.product(args.which, counts):
        if which == "context":
            for groups in (u for u in range(count, 0, -1) if count % u == 0 and heads % u == 0):
                if args.head_groups and groups not in args.head_groups:
                    continue
                kinds: tuple[ExchangeKind, ...] = ("gather", "dispatch") if asked == "auto" else (asked,)
                for kind in kinds if groups < count else ("auto",):
                    yield Case(which=which, devices=count, head_groups=groups, exchange=kind, remat=remat)
        elif which == "fsdp":
            if count > 1 or "context" not in args.which:
                yield Case(which=which, devices=count, scenes=count, remat=remat)
        elif which == "sampling":
            yield Case(which=which, devices=count)
        elif count == max(counts):
            yield Case(which=which, devices=count, longer=_LONGER, remat=remat)


def main(args: Arguments, command: str) -> None:
    """Measures, stores and prints."""
    there = len(jax.devices())
    counts = args.counts or tuple(2**i for i in range(there.bit_length()) if 2**i <= there)
    entries = _stored(args)
    print(
        f"{'':<46} {'ms':>9} {'tokens/s':>10} {'of n':>6} {'GiB':>6} {'MB/layer':>9} {'collectives':>12} {'alone':>7}"
    )
    for ready in made_ready(list(cases(args, counts)), args):
        case = ready.case
        if isinstance(ready, Failed):
            print(f"{case.name:<46} {ready.why}")
            continue
        found = measure(ready, args)
        results.store(args.out, "scaling", case.name, command, found)
        entries[case.name] = json.loads(json.dumps(found))
        print(row(case, entries), flush=True)
        gc.collect()


def _stored(args: Arguments) -> dict[str, Any]:
    """What was measured before on this kind of card."""
    kind = jax.devices()[0].device_kind
    return next((file["entries"] for file in results.load(args.out, "scaling") if file["card"] == kind), {})


def _asked(args: Arguments) -> whole.Arguments:
    """The scene and its model, which recomputes alike in all cases, or they could not be compared."""
    asked = args.scene
    if asked.model.remat != "auto":
        return asked
    return dataclasses.replace(asked, model=dataclasses.replace(asked.model, remat="full"))


def row(case: Case, entries: dict[str, Any]) -> str:
    """One line of the table; of what one device does in the same time, if it was measured."""
    found = entries[case.name]
    times = times_one(case.which, found, entries)
    scaling = "" if times is None else f"{times / case.devices:.1%}"
    moved = [f"{found[key]:.1f}" if key in found else "" for key in ("collectives_ms", "alone_ms")]
    return (
        f"{case.name:<46} {found['ms']:>9.1f} {found['tokens_per_second']:>10.0f} {scaling:>6} {found['gib']:>6.1f} "
        f"{found['received_mb']:>9.1f} {moved[0]:>12} {moved[1]:>7}"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Failed:
    """A case that can't be."""

    case: Case
    why: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ready:
    """A case's program, and what it is given."""

    case: Case
    config: Config
    mesh: jax.sharding.Mesh
    blueprint: Blueprint
    scene: Scene
    program: Program
    about: dict[str, Any]


def made_ready(some: Sequence[Case], args: Arguments) -> list[Ready | Failed]:
    """Compiles them all, beside each other, before any is timed: compiling takes longer than measuring."""

    def ready(case: Case) -> Ready | Failed:
        try:
            return make_ready(case, args)
        except (whole.DoesNotFit, jax.errors.JaxRuntimeError) as error:  # the others are still to be measured
            return Failed(case=case, why=str(error))

    with concurrent.futures.ThreadPoolExecutor(len(some) or 1) as pool:
        return list(pool.map(ready, some))


def make_ready(case: Case, args: Arguments) -> Ready:
    """Compiles a case.

    Raises:
        DoesNotFit: its program needs more than a device has.
    """
    asked = _asked(args)
    asked = dataclasses.replace(asked, scenes=case.scenes, shots=asked.shots * case.longer)
    config = Config(
        model=asked.model, moc=asked.moc, text=HashConfig(dim=asked.model.text_dim), train=TrainConfig(ema_decay=0.0)
    )
    attention = routed_attention(
        dataclasses.replace(asked.attention, head_groups=case.head_groups, exchange=case.exchange)
    )
    mesh = make_mesh(case.mesh, jax.devices()[: case.devices])
    with jax.set_mesh(mesh):
        scene = shard_batch(whole.make_scene(asked), mesh)
        shape, lengths = models.scene_shape(config.model, scene.video.shape, scene.text.shape, scene.lengths)
        deal = deal_of(shape, config.model.heads, attention)
        table = jax.eval_shape(lambda: chunk_table(lengths, shape, config.moc.chunk))
        sizes = {"heads": config.model.heads, "head_dim": config.model.head_dim, "element_bytes": 2}
        received = chosen_exchange(deal, table, config.moc, attention.exchange, **sizes)
        blueprint = make_blueprint(config.model, config.optimizer, config.train, mesh)
        lowered = _lowered(case, config, attention, mesh, blueprint, scene)
        program = whole.fitting(lowered, config.model)
    about = {
        "model": dataclasses.asdict(config.model),
        "devices": case.devices,
        "groups": [deal.head_groups, deal.groups],
        "tokens": case.scenes * shape.tokens,
        "gib": program.memory.peak / 2**30,
        "exchange": received.kind,
        "received_mb": received.forward / 1e6,
    }
    return Ready(case=case, config=config, mesh=mesh, blueprint=blueprint, scene=scene, program=program, about=about)


def _lowered(
    case: Case,
    config: Config,
    attention: RoutedAttention,
    mesh: jax.sharding.Mesh,
    blueprint: Blueprint,
    scene: Scene,
) -> jax.stages.Lowered:
    """What is timed."""
    if case.which != "sampling":
        step = make_train_step(config.train, config.optimizer, config.diffusion, blueprint, mesh, attention)
        return step.lower(blueprint.abstract, scene, config.moc)

    def velocity(params, scene):
        t = jnp.full(scene.lengths.shot_frames.shape, 0.9)
        network = nnx.merge(blueprint.graph, params)
        return network(scene.video, scene.text, t, scene.lengths, config.moc, attention=attention)

    places = blueprint.shardings.sampling_params, batch_sharding(mesh)
    return jax.jit(velocity, in_shardings=places).lower(blueprint.abstract.sampling_params, scene)


def measure(ready: Ready, args: Arguments) -> dict[str, Any]:
    """One entry."""
    with jax.set_mesh(ready.mesh):
        state = begun(ready.blueprint)

        def launch():
            nonlocal state
            if ready.case.which == "sampling":
                return ready.program(state.sampling_params, ready.scene)
            state, metrics = ready.program(state, ready.scene)
            return metrics

        timing = time_launches(launch, Effort(samples=args.scene.repeats))
        found = ready.about | {
            "ms": timing.median_ms,
            "tokens_per_second": 1e3 * ready.about["tokens"] / timing.median_ms,
        }
        if args.profile and jax.default_backend() == "gpu":
            profile = profiled(launch)
            found |= dict(zip(("collectives_ms", "alone_ms"), collectives(profile), strict=True))
            found["split"] = dataclasses.asdict(split_of(profile))
    return found


def collectives(profile: ProfileData) -> tuple[float, float]:
    """Milliseconds of a launch in which a collective ran on the first GPU, and in which nothing else did."""
    found = list(kernels(profile))
    ran, _ = apart(found, 2, lambda name: 0 if _COLLECTIVE.search(name) else 1)
    _, alone = apart(found, 2, lambda name: 1 if _COLLECTIVE.search(name) else 0)
    return ran, alone


def run(argv: Sequence[str]) -> None:
    """The command line."""
    one_kind = (tyro.conf.AvoidSubcommands,)  # of model
    args = tyro.cli(Arguments, args=list(argv), description=__doc__, config=one_kind)
    main(args, shlex.join(["python", "-m", "benchmarks.scaling", *argv]))


if __name__ == "__main__":
    run(sys.argv[1:])
