"""What `model.remat auto` chooses, and the count of bytes that it goes by."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from moc_jax import models
from moc_jax.attention.accounting import Exchange
from moc_jax.attention.api import RoutedAttention
from moc_jax.chips import chip_of
from moc_jax.config import BucketConfig, LoraConfig, WanConfig
from moc_jax.models import kept_bytes
from moc_jax.planning import traffic
from moc_jax.planning.collectives import collectives
from moc_jax.planning.plan import plan_training
from moc_jax.planning.topology import topology
from moc_jax.scene import SceneShape
from moc_jax.training import remat, start
from moc_jax.training.held import state_bytes, training_bytes
from moc_jax.training.step import make_train_step
from tests.training.small import CONFIG, blueprint_of, changed, make_scene, mesh_of

AUTO = changed(CONFIG, model={"remat": "auto"}, data={"height": 32, "width": 32})
BLUEPRINT = blueprint_of(AUTO, mesh_of(1))
SHAPES = BucketConfig(shots=2, frames=4, text_tokens=8), BucketConfig(shots=3, frames=7, text_tokens=9)
WAN = WanConfig(dim=16, depth=2, heads=2, mlp_dim=64, latent_channels=4, text_dim=8, text_rows=4, dtype="float32")
ONE = {"data": 1, "fsdp": 1, "context": 1, "tensor": 1}
TOKENS = 9 + 7 * 4  # of a scene in the larger one, which those of small.py are in too


@pytest.mark.long
@pytest.mark.parametrize("sinks", [0, 1])
@pytest.mark.parametrize("lora", [LoraConfig(), LoraConfig(rank=3)], ids=["whole", "adapters"])
@pytest.mark.parametrize(("model", "tokens", "captions"), [(CONFIG.model, TOKENS, 0), (WAN, 7 * 4, 10)])
def test_what_is_kept_is_counted(model, tokens, captions, lora, sinks):
    """By the shapes of what the backward pass of the whole model takes from the forward pass, but for a percent."""
    model = dataclasses.replace(model, lora=lora)
    params, moc = nnx.to_pure_dict(models.abstract(model)[1]), changed(CONFIG, moc={"sink_chunks": sinks}).moc
    frozen, learned = (models.frozen(params), models.trained(params)) if lora.rank else (None, params)

    def kept(policy):
        """Of two scenes; weights, which are of all scenes, left out."""
        return kept_of(policy, 4) - kept_of(policy, 2)

    def kept_of(policy, scenes):
        scene = jax.tree.map(jnp.asarray, make_scene(batch=scenes))
        graph = models.abstract(dataclasses.replace(model, remat=policy))[0]

        def forward(learned, frozen):
            params = models.joined(frozen, learned) if lora.rank else learned
            network, t = nnx.merge(graph, params), jnp.ones((scenes, 3))
            inputs = scene.video, scene.text, t, scene.lengths, moc
            return network(*inputs, key=jax.random.key(0), attention=RoutedAttention(backend="xla"))

        backward = jax.eval_shape(lambda *of: jax.vjp(lambda x: forward(x, of[1]), of[0])[1], learned, frozen)
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(backward))

    least = kept("full")
    for policy in ("attention", "attention+mlp", "qkv+attention+mlp", "dots", "none"):
        counted = kept_bytes(model, policy, moc, 3) - kept_bytes(model, "full", moc, 3)
        counted //= model.depth
        # Where the pairs of four picks, and of two other shots' sinks, lie: plain XLA does not keep it.
        pairs = 4 * model.heads * (4 + 2 * sinks)
        keys_and_values = (
            2 * 4 * (model.dim + lora.rank) * captions * (policy == "dots")
        )  # of captions that are read apart
        expected = 2 * model.depth * (tokens * (counted - pairs) + keys_and_values)
        assert kept(policy) - least == pytest.approx(expected, rel=0.2 if policy == "none" else 0.02), policy


def test_the_fastest_that_fits_is_chosen():
    shape = SceneShape(shots=3, text_tokens=9, frames=7, rows=2, columns=2)
    wide, of = dataclasses.replace(AUTO.model, dim=2048), (AUTO.moc, shape, 1, state_bytes(BLUEPRINT.abstract))
    needs = {policy: training_bytes(wide, policy, *of, ONE, None).total for policy in remat.policies(wide)}
    assert tuple(needs) == remat.POLICIES
    assert list(needs.values()) == sorted(needs.values(), reverse=True)
    for policy, need in needs.items():
        chosen, why = remat.choose(needs, int(need / 0.95) + 1)
        assert chosen == policy
        assert "the fastest that fits" in why
    assert remat.policies(AUTO.model)[0] == "attention+mlp"  # narrow
    chosen, why = remat.choose(needs, int(need))
    assert chosen == "full"
    assert "none surely fits" in why


def asked_of(config, mesh, monkeypatch):
    """What a run counts its bytes from: for each bucket, scenes, state, mesh, chip, and what attention moves."""
    asked, count = [], start.training_bytes
    monkeypatch.setattr(start, "training_bytes", lambda *args: asked.append(args[3:]) or count(*args))
    start.with_remat(config, blueprint_of(config, mesh), SHAPES, mesh)
    monkeypatch.undo()
    return asked[: len(SHAPES)]


def test_what_is_needed_is_a_devices_share(monkeypatch):
    config = changed(AUTO, train={"batch_size": 8})
    for devices, sizes, scenes in ((1, {}, 8), (4, {"data": 2, "fsdp": 2}, 2)):
        with jax.set_mesh(mesh := mesh_of(devices, **sizes)):
            asked = asked_of(config, mesh, monkeypatch)
        assert [(of[0].shots, of[0].text_tokens, of[0].video_tokens) for of in asked] == [(2, 8, 16), (3, 9, 28)]
        assert {of[1] for of in asked} == {scenes}
        share = sum(asked[0][2].values()) / sum(state_bytes(blueprint_of(config, mesh_of(1)).abstract).values())
        assert share == 1 if devices == 1 else 0.5 < share < 0.7
        assert {of[3]["fsdp"] for of in asked} == {sizes.get("fsdp", 1)}
        assert {of[-1].at_once for of in asked} == {0}


def test_what_groups_of_tokens_gather_is_needed_too(monkeypatch):
    with jax.set_mesh(mesh := mesh_of(8, data=1, context=8)):
        _, (shape, scenes, state, sizes, _, moved) = asked_of(AUTO, mesh, monkeypatch)
    # Of three other groups, keys and values of one head of 8: 4 of 16 rows of text, and a token of each of 7 frames.
    assert moved.at_once == scenes * 3 * (16 // 4 + 7) * 2 * 8 * 4
    of = AUTO.model, "full", AUTO.moc, shape, scenes, state, sizes, None
    assert training_bytes(*of, moved).total - training_bytes(*of).total == 5 * moved.at_once


@pytest.mark.parametrize("kind", ["TPU v5p", "NVIDIA H200", "cpu"])
def test_a_run_reckons_with_what_moc_plan_says(kind, monkeypatch):
    config = changed(AUTO, data={"buckets": SHAPES[1:]}, train={"batch_size": 8})
    mesh, chip = mesh_of(4, data=1, fsdp=2, context=2), chip_of(kind)
    monkeypatch.setattr(start, "chip_of", lambda kind: chip)
    with jax.set_mesh(mesh):
        needed = start._needed(config, "attention", blueprint_of(config, mesh), SHAPES[1:], mesh)
    name = {"TPU v5p": "v5p:1x2x2"}.get(kind, "h200:4")
    plan = changed(config, model={"remat": "attention"}, mesh={"data": 1, "fsdp": 2, "context": 2})
    assert needed == pytest.approx(plan_training(plan, topology(name)).held.total, rel=1e-6)


def test_a_run_keeps_the_policy_that_it_began_with(monkeypatch):
    monkeypatch.setattr(start, "has_checkpoint", lambda workdir: True)
    monkeypatch.setattr(start, "newest_config", lambda workdir: changed(AUTO, model={"remat": "attention"}))
    config, blueprint, why = start.with_remat(AUTO, BLUEPRINT, SHAPES, mesh_of(1))
    assert nnx.merge(blueprint.graph, models.abstract(config.model)[1]).cfg.remat == "attention"
    assert (config.model.remat, why) == ("attention", "model.remat attention, by auto: the run began with it")
    full = changed(AUTO, model={"remat": "full"})
    assert start.with_remat(full, BLUEPRINT, SHAPES, mesh_of(1))[:2] == (full, BLUEPRINT)


def test_all_processes_go_by_the_least_memory_and_by_what_the_first_one_read(monkeypatch):
    monkeypatch.setattr(start, "gather", lambda text: [text, "attention 1"])
    config, _, why = start.with_remat(AUTO, BLUEPRINT, SHAPES, mesh_of(1))
    assert config.model.remat == "full"
    assert "none surely fits" in why


@pytest.mark.long
@pytest.mark.parametrize("policy", ["none", "qkv+attention+mlp", "full"])
def test_what_is_kept_is_not_exchanged_again(policy):
    """As the plan counts it, in the program of a step of two devices that share their scenes."""
    config = changed(CONFIG, model={"remat": policy}, train={"ema_decay": 0.0})
    with jax.set_mesh(mesh := mesh_of(2, data=1, context=2)):
        blueprint, attention = blueprint_of(config, mesh), RoutedAttention(backend="xla")
        step = make_train_step(config.train, config.optimizer, config.diffusion, blueprint, mesh, attention)
        text = step.lower(blueprint.abstract, make_scene(batch=2), config.moc).compile().as_text()
    found = [math.prod(each.shape) for each in collectives(text) if each.kind == "all-to-all"]
    moved = Exchange(kind="gather", heads=1, keys=0, keys_backward=0)
    ((_, _, passes),) = traffic._of_attention(moved, policy, training=True)
    assert sum(found) == passes * 4 * min(found) * config.model.depth
