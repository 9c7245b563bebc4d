"""Plans: counted parts are exact, estimates are as near to what was compiled and measured as they say."""

import dataclasses
import json
import shlex
from typing import get_args

import jax
import pytest

from benchmarks import plan_h200, results
from benchmarks.plan_memory import CASES, planned
from moc_jax.attention.accounting import exchange
from moc_jax.attention.deal import Deal
from moc_jax.cli import load_config
from moc_jax.config import BucketConfig, ConfigError, LoraConfig, MeshConfig
from moc_jax.config.network import Remat
from moc_jax.models import parameter_count, trained_count
from moc_jax.planning.plan import plan_sampling, plan_training, remedies, state_bytes
from moc_jax.planning.report import as_json, lines
from moc_jax.planning.topology import topology
from moc_jax.planning.traffic import BF16, exchanges
from moc_jax.planning.workload import moved_over, workload
from moc_jax.sharding import AXES
from moc_jax.training.remat import POLICIES, policies
from moc_jax.training.state import create_state, device_bytes
from tests.training.small import CONFIG, blueprint_of, changed, mesh_of

SMALL = changed(CONFIG, data={"buckets": (BucketConfig(shots=3, frames=12, text_tokens=16),)})


def _multi_shot(*options: str):
    given = shlex.split(" ".join(options))
    return load_config(["--config", "multi_shot", *([] if "--preset" in given else ["--preset", "3b"]), *given])


def _sizes(**axes: int):
    return {axis: axes.get(axis, 1) for axis in AXES}


def test_the_state_is_what_a_run_holds():
    mesh = mesh_of(8, data=2, fsdp=4)
    with jax.set_mesh(mesh):
        state = create_state(blueprint_of(SMALL, mesh))
    found = state_bytes(SMALL, _sizes(data=2, fsdp=4))
    assert sum(found.values()) == device_bytes(state) - state.step.nbytes


@pytest.mark.long
def test_adapters_are_planned_as_they_are_trained():
    """Frozen weights in the type of their products, without gradients, moments, or a place in checkpoints."""
    where, config = topology("h200:1"), load_config(["--config", "wan21_1_3b_lora"])
    whole = dataclasses.replace(config, model=dataclasses.replace(config.model, lora=LoraConfig()))
    plan, full = (plan_training(each, where, _sizes()) for each in (config, whole))
    assert (plan.parameters, plan.trained) == (parameter_count(config.model), trained_count(config.model))
    assert plan.parameters == full.trained == 1_418_996_800
    frozen = plan.held.parts["frozen"]
    assert 2 * plan.parameters < frozen < 2.1 * plan.parameters
    assert plan.held.parts["weights"] == plan.held.parts["gradients"] == 4 * plan.trained
    assert full.useful - plan.useful == pytest.approx(plan.scenes * plan.work.matrices)
    words = "\n".join(lines(config, plan, [], sample=False, price=0))
    assert f"{plan.parameters:,} parameters, frozen, and {plan.trained:,} of adapters" in words
    assert as_json(config, plan, [], sample=False, price=0)["checkpoint"]["bytes"] < 17 * plan.trained
    merged, plain = (plan_sampling(each, where, _sizes()) for each in (config, whole))
    assert merged.held == plain.held


def test_teacher_forcing_computes_every_scene_twice_and_gathers_keys():
    where, sizes = topology("v5e:2x4"), _sizes(context=8)
    plain = changed(SMALL, moc={"visibility": "past"}, model={"remat": "full"})
    plan, taught = (
        plan_training(changed(plain, diffusion={"teacher_forcing": on}), where, sizes) for on in (False, True)
    )
    assert taught.scenes == plan.scenes
    assert taught.useful == 2 * plan.useful
    assert taught.held.parts["kept by layers"] == 2 * plan.held.parts["kept by layers"]
    work = workload(plain)
    gathered = moved_over(plain, work, sizes, "gather", taught.scenes, BF16).keys
    keys = next(each.bytes for each in taught.exchanges if each.what == "keys and values")
    assert keys == 2 * 2 * plain.model.depth * gathered, "forward, and again as all is recomputed"


def test_a_history_of_its_own_costs_a_forward_pass_a_step():
    where, moc = topology("h200:1"), {"visibility": "past"}
    taught = changed(SMALL, moc=moc, model={"remat": "full"}, diffusion={"teacher_forcing": True})
    one, three = (changed(taught, diffusion={"own_history": 0.5, "own_history_steps": steps}) for steps in (1, 3))
    plain, one, three = (plan_training(each, where, _sizes()) for each in (taught, one, three))
    assert "own history" not in plain.phases
    assert three.phases["own history"] == pytest.approx(3 * one.phases["own history"])
    assert one.phases["own history"] == pytest.approx(sum(plain.phases.values()) / 4, rel=0.3)

    of = topology("v5e:2x4"), _sizes(context=8)
    sent, more = (
        {x.what: x.bytes for x in plan_training(changed(taught, diffusion={"own_history": share}), *of).exchanges}
        for share in (0.0, 0.5)
    )
    heads = "heads of q, k, v and outputs"
    assert more[f"{heads}, for own histories"] == pytest.approx(sent[heads] / 3)  # of three passes, one
    assert more[heads] == sent[heads]


def test_where_nothing_is_computed_again_all_is_kept():
    held = {
        remat: plan_training(changed(SMALL, model={"remat": remat}), topology("h200:1"), _sizes()).held.total
        for remat in get_args(Remat)
        if remat != "auto"
    }
    assert max(held, key=held.__getitem__) == "none"


def test_the_scene_of_a_config_is_its_largest():
    work = workload(_multi_shot())
    assert (work.shape.shots, work.tokens) == (8, 180_504)
    assert work.moc.chunk.size == 1280  # of the last stage
    assert work.cost.sparsity == pytest.approx(0.842, abs=0.002)
    with pytest.raises(ConfigError, match="max-shot-frames"):
        workload(load_config(["--config", "demo", "--data.max-shot-frames", "0"]))


def test_what_does_not_fit_is_told_with_what_would():
    config, where = _multi_shot("--preset base --train.batch-size 16 --model.remat full"), topology("v5e:4x4")
    plan = plan_training(config, where)
    assert not plan.fits
    found = remedies(config, plan)
    assert any("mesh.context" in each.change for each in found)
    assert all(each.plan.fits for each in found)
    (context,) = (each for each in found if "mesh.context" in each.change)
    devices = context.plan.sizes["context"]
    assert devices > 1
    assert context.plan.sizes == _sizes(fsdp=16 // devices, context=devices)
    shown = "\n".join(lines(config, plan, found, sample=False, price=2.7))
    for word in (
        "DOES NOT FIT",
        "would fit",
        "--mesh.context",
        "all-gather over fsdp",
        "MFU",
        "1,000 steps",
        "checkpoint",
    ):
        assert word in shown, word
    figures = json.loads(json.dumps(as_json(config, plan, found, sample=False, price=2.7)))
    assert figures["memory"]["total"] == pytest.approx(sum(figures["memory"]["held"].values()), rel=1e-6)
    assert figures["seconds"]["step"] == pytest.approx(
        sum(x for n, x in figures["seconds"].items() if n != "step") + sum(x["seconds"] for x in figures["exchanges"])
    )
    assert figures["price_of_1000_steps"] == pytest.approx(2.7 * 16 * plan.seconds * 1000 / 3600)


def test_auto_takes_the_fastest_policy_that_fits():
    config = _multi_shot("--train.batch-size 64")
    large, small = (plan_training(config, topology(name)) for name in ("v5p:4x4x4", "v5e:8x8"))
    assert large.fits
    assert large.policy != "full"
    for policy in POLICIES[: POLICIES.index(large.policy)]:
        faster = dataclasses.replace(config, model=dataclasses.replace(config.model, remat=policy))
        assert not plan_training(faster, large.topology).fits, policy
    assert small.policy == "full"


def test_auto_leaves_out_what_a_run_leaves_out():
    config = _multi_shot("--preset small --train.batch-size 4")
    assert config.model.dim <= 1024
    assert plan_training(config, topology("h200:4")).policy == policies(config.model)[0] != POLICIES[0]


def test_a_batch_that_does_not_divide_is_a_problem():
    plan = plan_training(_multi_shot(), topology("v5p:4x4x4"))
    assert "does not divide" in plan.problems[0]
    assert plan.scenes == 64
    assert not plan_training(_multi_shot("--train.batch-size 64"), topology("v5p:4x4x4")).problems


def test_a_mesh_that_cannot_be_is_refused():
    config = dataclasses.replace(SMALL, mesh=MeshConfig(data=3, fsdp=-1))
    with pytest.raises(ConfigError, match="product"):
        plan_training(config, topology("h200:4"))


def test_exchanges_are_those_of_the_formulas():
    """180 000 tokens, 24 heads of 128, over 64 devices: 8 groups of heads x 8 of tokens, in MB per layer and pass."""
    model = dataclasses.replace(_multi_shot().model, dim=24 * 128, heads=24, depth=1)
    deal = Deal(text=0, frames=200, frame=900, groups=8, head_groups=8)
    moved = exchange(deal, 24, 128)
    found = exchanges(model, "none", 0, 0, deal, moved, 1, _sizes(context=64), topology("v5p:4x4x4"), training=False)
    heads, keys = (each.bytes / 1e6 for each in found)
    assert heads == pytest.approx(60, rel=0.05)
    assert keys == pytest.approx(2 * 121, rel=0.05)  # without causality, which halves it


def test_sampling_counts_evaluations():
    config = _multi_shot("--sample.solver heun", "--sample.guidance 2", "--sample.steps 10")
    plan = plan_sampling(config, topology("h200:1"))
    found = as_json(config, plan, [], sample=True, price=0)
    assert found["sample_seconds"] == pytest.approx(40 * plan.seconds)
    assert plan.held.parts["weights"] == 4 * parameter_count(config.model)


def test_shot_by_shot_what_is_kept_is_held():
    (measured,) = results.load(results.FOLDER, "cache")
    kept = measured["entries"]["8 shots, 30 layers of 1536, pallas_gpu"]["kept_bytes"]
    shots = "--sample.order shots", "--moc.visibility past"
    plans = {
        way: (config, plan_sampling(config, topology("h200:1")))
        for way, options in {
            "joint": (),
            "kept": shots,
            "8 bits": (*shots, "--sample.cache float8"),
            "both captions": (*shots, "--sample.guidance 2", "--sample.cache on"),
            "off": (*shots, "--sample.cache off"),
            "later shots seen": shots[:1],
            "too much": (*shots, "--data.buckets 64:1600:1000"),
        }.items()
        for config in [_multi_shot(*options)]
    }
    held = {way: plan.held.parts.get("finished shots", 0) / kept for way, (_, plan) in plans.items()}
    wanted = {"joint": 0, "kept": 1, "8 bits": 0.52, "both captions": 2, "off": 0, "later shots seen": 0, "too much": 0}
    assert held == pytest.approx(wanted, rel=0.02)
    turns = {way: plan.turns for way, (_, plan) in plans.items()}
    assert turns == {**dict.fromkeys(wanted, 1), "off": 8, "later shots seen": 8, "too much": 64}
    words = "\n".join(lines(*plans["off"], [], sample=True, price=0))
    assert "30 steps with unipc, for each of 8 shots" in words


# ------------------------------------------------------------------------------------------------ beside what was found


_STORED = {
    case: entry for file in results.load(results.FOLDER, "plan_memory") for case, entry in file["entries"].items()
}


@pytest.mark.parametrize("case", sorted(_STORED))
def test_memory_is_near_what_xla_assigned(case):
    assert planned(case)[1].held.total == pytest.approx(_STORED[case]["bytes"], rel=0.05)


def test_slices_of_all_chips_are_among_them():
    """And one chip alone of each."""
    kinds = {case.split()[0] for case in _STORED}
    assert {"v5p:8x8x4", "v6e:4x4", "v5e:4x4", "tpu7x:2x2x1", "v4:1x1x1"} <= kinds
    assert set(_STORED) <= set(CASES)


def test_one_h200_takes_as_long_as_was_measured():
    (measured,) = results.load(results.FOLDER, "model")
    for step, plan in {
        "training": plan_training(plan_h200.config("attention+mlp", 1), topology("h200:1")),
        "denoising": plan_sampling(plan_h200.config("attention+mlp", 1), topology("h200:1")),
    }.items():
        name = next(name for name in measured["entries"] if name.startswith(f"{step}, 30 layers"))
        entry = measured["entries"][name]["steps"][step]["moc"]
        assert 1e3 * plan.seconds == pytest.approx(entry["median_ms"], rel=0.05)
        assert plan.held.total == pytest.approx(entry["memory"]["peak"], rel=0.08)


def _of_h200s(step, axis, count):
    plan = plan_sampling if step == "denoising" else plan_training
    config = plan_h200.config("attention+mlp", count if axis == "fsdp" else 1)
    return plan(config, topology(f"h200:{count}"), _sizes(**{axis: count}))


def test_several_h200s_take_as_long_as_was_measured():
    (measured,) = results.load(results.FOLDER, "scaling")
    of_plan = {"context": ("training", "context"), "fsdp": ("training", "fsdp"), "sampling": ("denoising", "context")}
    compared = set()
    for name, entry in measured["entries"].items():
        kind, count = name.partition(",")[0], entry["devices"]
        if kind in of_plan and entry["groups"][1] == 1 and not entry.get("first_step"):
            seconds = _of_h200s(*of_plan[kind], count).seconds
            assert 1e3 * seconds == pytest.approx(entry["ms"], rel=0.05), name
            compared.add((kind, count))
    assert compared >= {("context", 2), ("context", 4), ("fsdp", 4), ("sampling", 4)}


def test_what_is_stored_of_h200s_is_what_the_plan_says():
    (found,) = results.load(results.FOLDER, "plan")
    for name in ("training, context 1", "training, context 4", "training, fsdp 4", "denoising, context 2"):
        step, axis, count = name.replace(",", "").split()
        assert found["entries"][name]["step_ms"] == pytest.approx(
            1e3 * _of_h200s(step, axis, int(count)).seconds, abs=1
        )


def test_shots_are_cropped_as_training_crops_them():
    data = {"max_shot_frames": 8, "buckets": ()}
    cropped, exact = (workload(changed(CONFIG, data=data | {"max_shot_frames": frames})) for frames in (8, 5))
    assert cropped.bucket == exact.bucket
    two = changed(CONFIG, data=data | {"max_shot_frames": 4}, model={"patch": (2, 2, 2)})
    with pytest.raises(ConfigError, match=r"data\.max_shot_frames 4 is too short .* take at least 5 frames"):
        workload(two)
