"""One run on one topology: what its devices hold, do and send, how long a step takes, and what would make it fit."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping

from jax.sharding import AbstractMesh, AxisType

from moc_jax import models
from moc_jax.attention.accounting import Exchange as AttentionExchange
from moc_jax.attention.deal import Deal
from moc_jax.config import Config, LoraConfig, MeshConfig, Remat
from moc_jax.models import moving_count, parameter_count, step_flops, trained_count
from moc_jax.planning.links import Exchange
from moc_jax.planning.pace import phases
from moc_jax.planning.topology import Topology
from moc_jax.planning.traffic import BF16, exchanges
from moc_jax.planning.workload import Workload, deal_over, moved_over, workload
from moc_jax.sharding import AXES, mesh_sizes
from moc_jax.training.held import Held, sampling_bytes, training_bytes
from moc_jax.training.held import state_bytes as bytes_of
from moc_jax.training.remat import POLICIES, USABLE, policies
from moc_jax.training.state import make_blueprint

Sizes = Mapping[str, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What to expect of a step, in bytes, FLOPs and seconds of one device, or of all where it says so."""

    topology: Topology
    sizes: Sizes
    """Of the mesh's axes."""
    policy: Remat
    scenes: int
    """Of a step, over all devices."""
    work: Workload
    parameters: int
    trained: int
    """Parameters that training changes: those of adapters, if there are any."""
    held: Held
    phases: Mapping[str, float]
    exchanges: tuple[Exchange, ...]
    hidden: float
    """Seconds of the exchanges that pass while the devices compute."""
    useful: float
    """FLOPs of all devices."""
    problems: tuple[str, ...] = ()
    """Why it can't run as it is, memory apart."""
    turns: int = 1
    """Of sampling: how many evaluations of the whole scene a noise level takes."""

    @property
    def fits(self) -> bool:
        """Whether a device's memory suffices."""
        return self.held.total <= USABLE * self.topology.chip.memory

    @property
    def seconds(self) -> float:
        """Of a step."""
        return sum(self.phases.values()) + sum(each.seconds for each in self.exchanges) - self.hidden

    @property
    def utilisation(self) -> float:
        """MFU, as a run reports it."""
        return self.useful / (self.seconds * self.topology.devices * self.topology.chip.flops)


def plan_training(cfg: Config, where: Topology, sizes: Sizes | None = None) -> Plan:
    """A training step; `sizes` of the mesh, None: those of `cfg.mesh`.

    Raises:
        ConfigError: a mesh that these devices can't be, or a config that doesn't say how long a scene is.
    """
    work, given = workload(cfg), _sizes(cfg.mesh, where) if sizes is None else dict(sizes)
    if cfg.model.remat != "auto":
        return _training(cfg, where, given, cfg.model.remat, work)
    plans = [_training(cfg, where, given, policy, work) for policy in policies(cfg.model)]
    return next((plan for plan in plans if plan.fits), plans[-1])


def _training(cfg: Config, where: Topology, sizes: Sizes, policy: Remat, work: Workload) -> Plan:
    shards, share = sizes["data"] * sizes["fsdp"], sizes["context"] * sizes["tensor"]
    scenes = math.ceil(cfg.train.batch_size / shards)
    copies = scenes * cfg.diffusion.copies
    state = state_bytes(cfg, sizes)
    deal, moved = deal_over(cfg, work, sizes), moved_over(cfg, work, sizes, cfg.training_exchange, copies, BF16)
    held = training_bytes(cfg.model, policy, work.moc, work.shape, copies, state, sizes, where.chip, moved)
    whole = sum(state.values()) + state["weights"] - state["frozen"]
    parts = work.matrices * copies / share, work.attention * copies / share, work.tokens * copies / share
    computed = phases(cfg.model, policy, *parts, whole, where.chip)
    if cfg.diffusion.own_history:
        again = sum(phases(cfg.model, "none", *parts, 0, where.chip, training=False).values())
        computed["own history"] = cfg.diffusion.own_history_steps * again
    parameters, trained = parameter_count(cfg.model), trained_count(cfg.model)
    sent = exchanges(cfg.model, policy, moving_count(cfg.model), trained, deal, moved, copies, sizes, where)
    if cfg.diffusion.own_history:
        of, steps = (deal, moved, copies, sizes, where), cfg.diffusion.own_history_steps
        for each in exchanges(cfg.model, policy, moving_count(cfg.model), 0, *of, training=False):
            cost = {"bytes": steps * each.bytes, "seconds": steps * each.seconds}
            sent.append(dataclasses.replace(each, what=f"{each.what}, for own histories", **cost))
    useful = step_flops(cfg.model, work.matrices, work.attention)
    return Plan(
        topology=where,
        sizes=sizes,
        policy=policy,
        scenes=scenes * shards,
        work=work,
        parameters=parameters,
        trained=trained,
        held=held,
        phases=computed,
        exchanges=tuple(sent),
        hidden=_hidden(sent, sum(computed.values()), where),
        useful=useful * copies * shards,
        problems=tuple(_problems(cfg, sizes)),
    )


def _dispatched(moved: AttentionExchange) -> int | None:
    return moved.at_once if moved.kind == "dispatch" else None


def plan_sampling(cfg: Config, where: Topology, sizes: Sizes | None = None) -> Plan:
    """One evaluation of the model, adapters merged, while a scene is sampled; errors of `plan_training`.

    Shot by shot, what is kept of finished shots is held, and an evaluation is one of each shot. Where nothing is kept,
    or it doesn't fit and need not be, each shot's noise levels take evaluations of the whole scene.
    """
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, lora=LoraConfig()))
    work, sizes = workload(cfg), _sizes(cfg.mesh, where) if sizes is None else dict(sizes)
    share = sizes["context"] * sizes["tensor"]
    weights = state_bytes(cfg, sizes)["weights"]
    parameters = parameter_count(cfg.model)
    deal, moved = deal_over(cfg, work, sizes), moved_over(cfg, work, sizes, cfg.attention.exchange, 1, BF16)
    moving = moving_count(cfg.model)
    sent = exchanges(cfg.model, "none", moving, 0, deal, moved, 1, sizes, where, training=False)
    parts = work.matrices / share, work.attention / share, work.tokens / share
    computed = phases(cfg.model, "none", *parts, weights, where.chip, training=False)
    plan = Plan(
        topology=where,
        sizes=sizes,
        policy="none",
        scenes=sizes["data"] * sizes["fsdp"],
        work=work,
        parameters=parameters,
        trained=trained_count(cfg.model),
        held=sampling_bytes(cfg.model, work.tokens, weights, sizes, where.chip, _dispatched(moved)),
        phases=computed,
        exchanges=tuple(sent),
        hidden=_hidden(sent, sum(computed.values()), where),
        useful=(work.matrices + work.attention) * sizes["data"] * sizes["fsdp"],
    )
    if cfg.sample.order != "shots":
        return plan
    kept = _kept_bytes(cfg, work, deal, sizes)
    turn_by_turn = dataclasses.replace(plan, held=Held(parts={**plan.held.parts, "finished shots": kept}))
    if kept and (turn_by_turn.fits or cfg.sample.cache != "auto"):
        return turn_by_turn
    return dataclasses.replace(plan, turns=work.shape.shots)


def _kept_bytes(cfg: Config, work: Workload, deal: Deal, sizes: Sizes) -> int:
    """Of finished shots, on one device, with guidance for both captions; 0: they can't be kept."""
    model, moc, sample = cfg.model, work.moc, cfg.sample
    changes = moc.dense_first_steps or moc.dense_last_steps or moc.top_k_schedule
    if sample.cache == "off" or changes or models.why_not(moc, model):
        return 0
    scenes, small = 2 if sample.guidance != 1 else 1, sample.cache == "float8"
    size = models.kept_size(model, moc, work.shape, deal, batch=scenes, small=small)
    return size.device_bytes // (sizes["context"] * sizes["tensor"])


def state_bytes(cfg: Config, sizes: Sizes) -> dict[str, int]:
    """Bytes that one device holds of the state, by its parts."""
    mesh = AbstractMesh(tuple(sizes[axis] for axis in AXES), AXES, axis_types=(AxisType.Auto,) * len(AXES))
    return bytes_of(make_blueprint(cfg.model, cfg.optimizer, cfg.train, mesh).abstract)


def _sizes(cfg: MeshConfig, where: Topology) -> dict[str, int]:
    asked = [getattr(cfg, axis) for axis in AXES]
    return dict(zip(AXES, mesh_sizes(asked, where.devices), strict=True))


def _hidden(sent: list[Exchange], computed: float, where: Topology) -> float:
    """Weights and gradients of other layers pass while a layer computes; what a layer itself waits for does not.

    Between GPUs of one host nothing does (compilation.py).
    """
    if not where.chip.torus and where.hosts == 1:
        return 0.0
    return min(computed, sum(each.seconds for each in sent if each.axis in ("data", "fsdp")))


def _problems(cfg: Config, sizes: Sizes) -> Iterator[str]:
    shards, batch = sizes["data"] * sizes["fsdp"], cfg.train.batch_size
    if batch % shards:
        yield (
            f"train.batch_size {batch} does not divide over data {sizes['data']} x fsdp {sizes['fsdp']}: counted are "
            f"{math.ceil(batch / shards) * shards} scenes"
        )


# ------------------------------------------------------------------------------------------------ what would fit


@dataclasses.dataclass(frozen=True, kw_only=True)
class Remedy:
    """The least change of one kind with which the plan would fit."""

    change: str
    """As options: --mesh.context 4."""
    plan: Plan


def remedies(cfg: Config, plan: Plan) -> list[Remedy]:
    """For a training plan that doesn't fit: those of context, tensor, fsdp, recomputation and batch that would."""
    where, sizes = plan.topology, plan.sizes
    found = []
    for kind in (_by_axis("context"), _by_axis("tensor"), _by_fsdp, _by_policy, _by_batch):
        for change, config, others in kind(cfg, sizes, where.devices):
            changed = plan_training(config, where, others)
            if changed.fits:
                found.append(Remedy(change=change, plan=changed))
                break
    return found


_Change = tuple[str, Config, Sizes]


def _by_axis(axis: str) -> Callable[[Config, Sizes, int], Iterator[_Change]]:
    """More devices for one scene, taken from fsdp, then from data; so fewer scenes at once."""

    def changes(cfg: Config, sizes: Sizes, devices: int) -> Iterator[_Change]:
        for factor in (2**i for i in itertools.count(1)):
            fsdp = math.gcd(sizes["fsdp"], factor)
            batch, rest = divmod(cfg.train.batch_size, factor)
            if sizes["data"] % (factor // fsdp) or factor > devices:
                return
            new = {**sizes, axis: sizes[axis] * factor}
            if cfg.model.heads % new["tensor"] or cfg.model.mlp_dim % new["tensor"]:
                return
            new |= {"fsdp": sizes["fsdp"] // fsdp, "data": sizes["data"] // (factor // fsdp)}
            change = f"--mesh.{axis} {new[axis]} --mesh.fsdp {new['fsdp']} --mesh.data {new['data']}"
            if rest or not batch:
                yield change, cfg, new
                continue
            train = dataclasses.replace(cfg.train, batch_size=batch)
            yield f"{change} --train.batch-size {batch}", dataclasses.replace(cfg, train=train), new

    return changes


def _by_fsdp(cfg: Config, sizes: Sizes, devices: int) -> Iterator[_Change]:
    for factor in (2**i for i in range(1, 15)):
        if sizes["data"] % factor == 0:
            new = {**sizes, "fsdp": sizes["fsdp"] * factor, "data": sizes["data"] // factor}
            yield f"--mesh.fsdp {new['fsdp']} --mesh.data {new['data']}", cfg, new


def _by_policy(cfg: Config, sizes: Sizes, devices: int) -> Iterator[_Change]:
    if cfg.model.remat not in ("auto", "full"):
        for policy in POLICIES[POLICIES.index(cfg.model.remat) + 1 if cfg.model.remat in POLICIES else 0 :]:
            model = dataclasses.replace(cfg.model, remat=policy)
            yield f"--model.remat {policy}", dataclasses.replace(cfg, model=model), sizes


def _by_batch(cfg: Config, sizes: Sizes, devices: int) -> Iterator[_Change]:
    shards = sizes["data"] * sizes["fsdp"]
    for scenes in range(math.ceil(cfg.train.batch_size / shards) - 1, 0, -1):
        train = dataclasses.replace(cfg.train, batch_size=scenes * shards)
        yield f"--train.batch-size {scenes * shards}", dataclasses.replace(cfg, train=train), sizes
