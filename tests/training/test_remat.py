"""What `model.remat auto` chooses, and the count of bytes that it goes by."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from moc_jax import models
from moc_jax.attention.api import RoutedAttention
from moc_jax.config import BucketConfig
from moc_jax.models import kept_bytes
from moc_jax.training import remat, start
from moc_jax.training.state import device_bytes
from tests.training.small import CONFIG, blueprint_of, changed, make_scene, mesh_of

AUTO = changed(CONFIG, model={"remat": "auto"}, data={"height": 32, "width": 32})
BLUEPRINT = blueprint_of(AUTO, mesh_of(1))
SHAPES = BucketConfig(shots=2, frames=4, text_tokens=8), BucketConfig(shots=3, frames=7, text_tokens=9)
TOKENS = 9 + 7 * 4  # of a scene in the larger one, which those of small.py are in too


@pytest.mark.long
def test_what_is_kept_is_counted():
    """By the shapes of what the backward pass of the whole model takes from the forward pass, but for a percent."""
    scene = jax.tree.map(jnp.asarray, make_scene(batch=2))
    params = blueprint_of(CONFIG, mesh_of(1)).abstract.params

    def kept(policy):
        graph = models.abstract(dataclasses.replace(CONFIG.model, remat=policy))[0]

        def forward(params):
            network, t = nnx.merge(graph, params), jnp.ones((2, 3))
            inputs = scene.video, scene.text, t, scene.lengths, CONFIG.moc
            return network(*inputs, key=jax.random.key(0), attention=RoutedAttention(backend="xla"))

        backward = jax.eval_shape(lambda params: jax.vjp(forward, params)[1], params)
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(backward))

    least = kept("full")
    for policy in ("attention", "attention+mlp", "dots"):
        counted = kept_bytes(CONFIG.model, policy, CONFIG.moc) - kept_bytes(CONFIG.model, "full", CONFIG.moc)
        counted //= CONFIG.model.depth
        pairs = 4 * CONFIG.model.heads * 4  # where the pairs of four picks lie, which plain XLA does not keep
        expected = 2 * CONFIG.model.depth * TOKENS * (counted - pairs)
        assert kept(policy) - least == pytest.approx(expected, rel=0.02)


def test_the_fastest_that_fits_is_chosen():
    state, wide = BLUEPRINT.abstract, dataclasses.replace(AUTO.model, dim=2048)
    needs = [remat.needed_bytes(wide, policy, AUTO.moc, state, TOKENS) for policy in remat.POLICIES]
    assert needs == sorted(needs, reverse=True)
    for policy, need in zip(remat.POLICIES, needs):
        chosen, why = remat.choose(wide, AUTO.moc, state, TOKENS, int(need / 0.95) + 1)
        assert chosen == policy
        assert "the fastest that fits" in why
    assert remat.choose(AUTO.model, AUTO.moc, state, TOKENS, 2**40)[0] == "attention+mlp"  # narrow
    chosen, why = remat.choose(wide, AUTO.moc, state, TOKENS, need)
    assert chosen == "full"
    assert "none surely fits" in why


def test_what_is_needed_is_a_devices_share(monkeypatch):
    asked = []
    monkeypatch.setattr(start, "choose", lambda *args: asked.append(args[2:]) or ("full", ""))
    config = changed(AUTO, train={"batch_size": 8})
    for mesh in (mesh_of(1), mesh_of(4, data=2, fsdp=2)):
        start.with_remat(config, blueprint_of(config, mesh), SHAPES, mesh)
    (whole, tokens, memory), (share, fewer, same) = asked
    assert (tokens, fewer) == (8 * TOKENS, 2 * TOKENS)  # of the largest bucket
    assert 0.5 < device_bytes(share) / device_bytes(whole) < 0.7
    assert memory == same > 2**20


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
