"""Any mesh gives the losses, gradients and samples of one device: scenes, weights, tokens and heads are split."""

import dataclasses
import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moc_jax import models
from moc_jax.attention.api import RoutedAttention
from moc_jax.config import (
    ChunkConfig,
    ConfigError,
    DiffusionConfig,
    MeshConfig,
    MMDiTConfig,
    MoCConfig,
    OptimizerConfig,
    TrainConfig,
)
from moc_jax.diffusion.process import flow_loss
from moc_jax.scene import Scene, SceneLengths
from moc_jax.sharding import AXES, logical_axes, make_mesh, scene_mesh, shard_batch, tree_shardings
from moc_jax.training.state import make_blueprint

MODEL = MMDiTConfig(
    dim=24, depth=2, heads=4, mlp_ratio=1.0, latent_channels=2, text_dim=4, dtype="float32", remat="none"
)
MOC = MoCConfig(chunk=ChunkConfig(size=4), top_k=1, drop_off_max=1.0, drop_in_rate=1.0)
ATTENTION = RoutedAttention(backend="reference")
QUICK = [(1, 2, 2, 2)]
COVERING = [*QUICK, (1, 1, 8, 1), (1, 1, 2, 4), (2, 1, 4, 1), (4, 1, 1, 2)]
ALL = [s for s in itertools.product((1, 2, 4, 8), repeat=4) if math.prod(s) == 8 and MODEL.heads % s[3] == 0]


def scene_of(batch=8):
    """Long and short shots, and none; neither frames nor tokens of frames divide over the devices."""
    random = np.random.default_rng(0)
    shots = np.array([[5, 0], [1, 1], [2, 3], [0, 0]] * (batch // 4), np.int32)
    words = np.array([[1, 2, 0], [1, 1, 1], [0, 2, 3], [0, 0, 0]] * (batch // 4), np.int32)
    video = random.normal(size=(batch, 5, 6, 4, 2)).astype(np.float32)
    text = random.normal(size=(batch, 5, 4)).astype(np.float32)
    return Scene(video, text, SceneLengths(shots, words))


@functools.cache
def weights():
    random = np.random.default_rng(1)
    graph, shapes = models.abstract(MODEL)
    logical = logical_axes(shapes)
    return (
        graph,
        logical,
        jax.tree.map(lambda x: (0.2 * random.normal(size=x.shape)).astype("f"), nnx.to_pure_dict(shapes)),
    )


def losses(params, scene, moc=MOC, attention=ATTENTION, graph=None):
    """The loss, each shot's, and the velocity; with all that is random in a step."""
    found = []

    def velocity_fn(z, t):
        model, key = nnx.merge(graph or weights()[0], params), jax.random.key(2)
        found.append(model(z, scene.text, t, scene.lengths, moc, key=key, attention=attention))
        return found[0]

    loss, of_shots = flow_loss(velocity_fn, scene, jax.random.key(3), DiffusionConfig())
    return loss, (of_shots, found[0])


@functools.cache
def results(sizes, remat="none", attention=ATTENTION):
    """((loss, (of shots, velocity)), gradients) on such a mesh; None: on one device."""
    how = dict(attention=attention, graph=models.abstract(dataclasses.replace(MODEL, remat=remat))[0])
    function = jax.jit(jax.value_and_grad(functools.partial(losses, **how), has_aux=True))
    _, logical, params = weights()
    if sizes is None:
        return jax.device_get(function(params, jax.tree.map(jnp.asarray, scene_of())))
    with jax.set_mesh(mesh := make_mesh(MeshConfig(**dict(zip(AXES, sizes))))):
        placed = jax.device_put(params, tree_shardings(params, logical, mesh))
        return jax.device_get(function(placed, shard_batch(scene_of(), mesh)))


def marked(sizes):
    if sizes in QUICK:
        return sizes
    return pytest.param(sizes, marks=pytest.mark.long if sizes in COVERING else pytest.mark.slow)


@pytest.mark.parametrize("sizes", [marked(sizes) for sizes in ALL], ids=str)
def test_losses_gradients_and_velocities_are_those_of_one_device(sizes):
    check(results(sizes))


@pytest.mark.long
@pytest.mark.parametrize("remat", ["full", "attention"])
def test_queries_that_are_dispatched_find_the_same(remat):
    """In a scan over layers, with what they exchanged kept or exchanged again."""
    attention = dataclasses.replace(ATTENTION, head_groups=1, exchange="dispatch")
    check(results((2, 1, 4, 1), remat, attention))


def check(found):
    ((loss, (of_shots, velocity)), gradients), ((one, (each, of_one)), known) = found, results(None)
    np.testing.assert_allclose(loss, one, rtol=1e-5)
    np.testing.assert_allclose(of_shots, each, rtol=1e-4, atol=1e-5)
    used = np.arange(5)[None] < scene_of().lengths.shot_frames.sum(axis=1)[:, None]
    np.testing.assert_allclose(velocity[used], of_one[used], rtol=1e-4, atol=1e-4)
    scale = max(np.abs(x).max() for x in jax.tree.leaves(known))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * scale), gradients, known)


@pytest.mark.long
def test_no_device_holds_all_tokens_at_full_width():
    """By the shapes of all that the compiled loss and gradients compute, of one scene over four devices."""
    graph, shapes = models.abstract(model := dataclasses.replace(MODEL, dim=96, depth=1, remat="full"))
    logical, params = logical_axes(shapes), nnx.to_pure_dict(shapes)
    frames, rows, columns = 64, 12, 8
    tokens = 5 + frames * rows * columns // 4
    how = dict(
        moc=MoCConfig(chunk=ChunkConfig(size=256), top_k=1), attention=RoutedAttention(backend="xla"), graph=graph
    )
    function = jax.jit(jax.value_and_grad(functools.partial(losses, **how), has_aux=True))
    with jax.set_mesh(mesh := make_mesh(MeshConfig(data=1, context=4), jax.devices()[:4])):
        one = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype), scene_of())
        video = jax.ShapeDtypeStruct((1, frames, rows, columns, 2), jnp.float32)
        placed = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            params,
            tree_shardings(params, logical, mesh),
        )
        text = function.lower(placed, dataclasses.replace(one, video=video)).compile().as_text()
    sizes = {shape: math.prod(map(int, shape.split(","))) for shape in re.findall(r"\[([\d,]+)\]\{", text)}
    large = {shape for shape, size in sizes.items() if size >= tokens * model.dim}
    assert not large
    assert max(sizes.values()) > tokens * model.dim // 8  # this did look at them


@pytest.mark.parametrize("sizes", [(1, 1, 1, 8), (2, 1, 1, 4)])
def test_the_tensor_axis_must_divide_heads_and_mlp(sizes):
    mesh = make_mesh(MeshConfig(**dict(zip(AXES, sizes))))
    model = MODEL if sizes[3] == 8 else MMDiTConfig(dim=48, heads=4, mlp_ratio=0.125)
    what = r"model.heads = 4; .*: 1, 2, 4$" if sizes[3] == 8 else r"model.dim x model.mlp_ratio = 6; .*: 1, 2, 3$"
    with pytest.raises(ConfigError, match=rf"mesh.tensor = {sizes[3]} must divide {what}"):
        make_blueprint(model, OptimizerConfig(), TrainConfig(), mesh)


@pytest.mark.parametrize(
    ("sizes", "scenes", "expected"),
    [
        ((4, 2, 1, 1), 1, (1, 1, 8, 1)),
        ((4, 2, 1, 1), 4, (4, 1, 2, 1)),
        ((2, 1, 2, 2), 3, (1, 1, 4, 2)),
        ((4, 2, 1, 1), 16, (4, 2, 1, 1)),
    ],
)
def test_what_would_be_copies_of_a_scene_share_it(sizes, scenes, expected):
    mesh = make_mesh(MeshConfig(**dict(zip(AXES, sizes))))
    found = scene_mesh(mesh, scenes)
    assert found.devices.shape == expected
    assert list(found.devices.flat) == list(mesh.devices.flat)
