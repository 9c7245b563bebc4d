"""A plan in words and as JSON."""

from moc_jax.config import Config
from moc_jax.planning.plan import Plan, Remedy
from moc_jax.planning.saving import save_of
from moc_jax.sharding import AXES
from moc_jax.training.summary import si

_ODDS_AND_ENDS = 0.005  # of the whole: what is less is not listed


def as_json(cfg: Config, plan: Plan, remedies: list[Remedy], *, sample: bool, price: float) -> dict[str, object]:
    """All figures; bytes and seconds of one device, FLOPs of all."""
    chip = plan.topology.chip
    found: dict[str, object] = {
        "topology": plan.topology.name,
        "devices": plan.topology.devices,
        "hosts": plan.topology.hosts,
        "mesh": dict(plan.sizes),
        "problems": list(plan.problems),
        "parameters": plan.parameters,
        "trained": plan.trained,
        "scene": {"tokens": plan.work.tokens, "sparsity": plan.work.cost.sparsity},
        "scenes": plan.scenes,
        "remat": plan.policy,
        "memory": {
            "held": {name: round(size) for name, size in plan.held.parts.items()},
            "total": round(plan.held.total),
            "device": chip.memory,
            "fits": plan.fits,
        },
        "would_fit": [{"change": each.change, **_short(each.plan)} for each in remedies],
        "flops": plan.useful,
        "exchanges": [
            {"what": x.what, "kind": x.kind, "axis": x.axis, "bytes": round(x.bytes), "seconds": x.seconds}
            for x in plan.exchanges
        ],
        "seconds": {**plan.phases, "hidden exchanges": -plan.hidden, "step": plan.seconds},
        "utilisation": plan.utilisation,
    }
    if sample:
        found["sample_seconds"] = sample_seconds(cfg, plan)
    else:
        save = save_of(cfg, plan.topology.hosts, plan.sizes["data"])
        found["checkpoint"] = {"bytes": save.bytes, "hosts_that_write": save.writers}
    if price:
        found["price_of_1000_steps"] = price_of(plan, price)
    return found


def sample_seconds(cfg: Config, plan: Plan) -> float:
    """Of all evaluations of the model for a scene, or for one each on every `data` and `fsdp`."""
    evaluations = cfg.sample.steps * (2 if cfg.sample.solver == "heun" else 1)
    return evaluations * (2 if cfg.sample.guidance != 1 else 1) * plan.turns * plan.seconds


def price_of(plan: Plan, price: float) -> float:
    """Of 1,000 steps, where a chip costs `price` an hour."""
    return price * plan.topology.devices / plan.topology.chip.per_chip * plan.seconds * 1000 / 3600


def _short(plan: Plan) -> dict[str, object]:
    return {"total": round(plan.held.total), "step": plan.seconds, "utilisation": plan.utilisation}


def lines(cfg: Config, plan: Plan, remedies: list[Remedy], *, sample: bool, price: float) -> list[str]:
    """The same for people."""
    of, work, chip = plan.topology, plan.work, plan.topology.chip
    mesh = " x ".join(f"{axis} {plan.sizes[axis]}" for axis in AXES)
    beside = f", frozen, and {plan.trained:,} of adapters" if cfg.model.lora.rank and not sample else ""
    found = [
        f"{of.name}: {of.devices} devices in {of.hosts} host(s); mesh {mesh}",
        f"{plan.parameters:,} parameters{beside}; {plan.scenes} scene(s) of {work.shape.shots} shots and "
        f"{work.tokens:,} tokens, of whose pairs {work.cost.sparsity:.1%} are skipped; model.remat {plan.policy}",
        *(f"PROBLEM: {problem}" for problem in plan.problems),
        "",
        f"memory of one device, {chip.memory / 2**30:.4g} GiB:",
    ]
    for name, size in sorted(plan.held.parts.items(), key=lambda item: -item[1]):
        if size > _ODDS_AND_ENDS * plan.held.total:
            found.append(f"  {size / 2**30:8.2f} GiB  {name}")
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    found.append(f"  {plan.held.total / 2**30:8.2f} GiB  in all: {verdict}")
    if not plan.fits and not sample:
        found.append(
            "would fit:" if remedies else "nothing alone of context, tensor, fsdp, recomputation and batch would fit"
        )
        for each in remedies:
            found.append(f"  {each.change}: {each.plan.held.total / 2**30:.2f} GiB, {_time(each.plan.seconds)} a step")
    found += ["", f"{'an evaluation' if sample else 'a step'} takes about {_time(plan.seconds)}:"]
    found += [f"  {_time(seconds):>10}  {name}" for name, seconds in plan.phases.items()]
    for x in plan.exchanges:
        found.append(f"  {_time(x.seconds):>10}  {x.kind} over {x.axis}, {si(x.bytes)}B received: {x.what}")
    if plan.hidden:
        found.append(f"  {_time(-plan.hidden):>10}  of these, behind the computation")
    found.append(f"{si(plan.useful)}FLOP; MFU {plan.utilisation:.1%} of {si(chip.flops)}FLOP/s a device")
    if sample:
        seconds = _time(sample_seconds(cfg, plan))
        by = f", for each of {plan.turns} shots" if plan.turns > 1 else ""
        found.append(f"a scene: {cfg.sample.steps} steps with {cfg.sample.solver}{by}, {seconds}")
    else:
        save = save_of(cfg, of.hosts, plan.sizes["data"])
        found.append(f"a checkpoint: {si(save.bytes)}B, {si(save.per_host)}B by each of {save.writers} host(s)")
    if price and not sample:
        found.append(f"1,000 steps: {price_of(plan, price):,.2f}, at {price:g} for a chip and hour")
    return found


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if abs(seconds) >= 10 else f"{1e3 * seconds:.4g} ms"
