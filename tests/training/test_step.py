"""The step: pure, the same on any mesh, one compilation per bucket and stage."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moc_jax.config import ChunkStage, OptimizerConfig
from moc_jax.diffusion.process import flow_loss
from moc_jax.scene import Scene, SceneLengths
from moc_jax.sharding import shard_batch, weight_sharding
from moc_jax.training import step as step_module
from moc_jax.training.optimizer import make_optimizer
from moc_jax.training.state import TrainState, create_state
from moc_jax.training.step import make_train_step, make_validation_step, validation_levels
from tests.training.small import CONFIG, blueprint_of, changed, make_scene, mesh_of, random_state

MESHES = {
    "1": (1, {}),
    "8x1": (8, {"data": 8}),
    "2x4": (8, {"data": 2, "fsdp": 4}),
    "1x8": (8, {"data": 1, "fsdp": 8}),
    "2x2x2x1": (8, {"data": 2, "fsdp": 2, "context": 2}),
    "1x2x2x2": (8, {"data": 1, "fsdp": 2, "context": 2, "tensor": 2}),
}


@functools.cache
def program(name="1", config=CONFIG):
    """Mesh, blueprint and compiled-once step; compiling is what these tests spend their time on."""
    count, sizes = MESHES[name]
    mesh = mesh_of(count, **sizes)
    blueprint = blueprint_of(config, mesh)
    return mesh, blueprint, make_train_step(config.train, config.optimizer, config.diffusion, blueprint, mesh)


def run(*scenes, name="1", config=CONFIG, start=0):
    """Random weights, then a step on each scene: the state and every step's metrics."""
    state = dataclasses.replace(random_state(config, program(name, config)[1]), step=np.int32(start))
    told = []
    for scene in scenes:
        state, metrics = advance(state, scene, name, config)
        told.append(jax.device_get(metrics))
    return state, told


def advance(state, scene, name="1", config=CONFIG):
    mesh, _, step = program(name, config)
    with jax.set_mesh(mesh):
        return step(state, shard_batch(scene, mesh), config.moc)


SHARDED = [pytest.param("2x4", marks=pytest.mark.long)]  # test_meshes.py has more of the model, of steps less
SHARDED += [pytest.param(name, marks=pytest.mark.slow) for name in ("8x1", "1x8", "2x2x2x1", "1x2x2x2")]


@functools.cache
def two_steps(name):
    return run(make_scene(1), make_scene(2), name=name)


@pytest.mark.long  # tests/test_meshes.py has five meshes of more kinds
@pytest.mark.parametrize("name", SHARDED)
def test_any_mesh_gives_the_losses_and_gradients_of_one_device(name):
    (one, told_one), (many, told_many) = two_steps("1"), two_steps(name)
    for a, b in zip(told_one, told_many):
        np.testing.assert_allclose(b.loss, a.loss, rtol=1e-5)
        np.testing.assert_allclose(b.grad_norm, a.grad_norm, rtol=1e-4)
        np.testing.assert_allclose(b.scene_loss, a.scene_loss, rtol=1e-5)
    # Adam's first moment is linear in the gradients, so this compares the gradients themselves.
    means = [jax.device_get(state.optimizer[1][0].mu) for state in (one, many)]
    scale = max(np.abs(x).max() for x in jax.tree.leaves(means[0]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, rtol=1e-3, atol=1e-5 * scale), *means)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(b, a, atol=2e-5), *(jax.device_get(s.ema) for s in (one, many))
    )


@pytest.mark.parametrize("name", SHARDED)
def test_the_state_stays_where_the_table_puts_it(name):
    (state, _), (mesh, blueprint, _) = two_steps(name), program(name)
    assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding == s, state, blueprint.shardings))
    kernel = ("blocks", "video", "mlp", "up", "kernel")
    spec = weight_sharding(blueprint.logical[kernel], (2, 16, 64), mesh).spec
    split = {axis for entry in spec for axis in ((entry,) if isinstance(entry, str) else entry or ())}
    assert split == {axis for axis in ("fsdp", "tensor") if mesh.shape[axis] > 1}
    for tree in (state.params, state.ema, state.optimizer[1][0].mu, state.optimizer[1][0].nu):
        for key in kernel:
            tree = tree[key]
        assert tree.sharding.spec == spec
        assert tree.addressable_shards[0].data.size == tree.size // (mesh.shape["fsdp"] * mesh.shape["tensor"])


def test_the_first_weights_do_not_depend_on_the_mesh():
    states = [jax.device_get(create_state(program(name)[1])) for name in ("1", "2x4")]
    jax.tree.map(np.testing.assert_array_equal, *states)


def test_a_step_is_a_pure_function_of_the_state():
    first, second = (jax.device_get(run(make_scene(3))) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)
    assert first[0].step == 1


def test_noise_and_drop_off_change_from_step_to_step():
    losses = [run(make_scene(3), start=start)[1][0].loss for start in (0, 1)]
    assert losses[0] != losses[1]


def test_padding_does_not_reach_the_loss():
    told = []
    for fill in (0.0, 1e3):
        scene = make_scene(4)
        used = np.arange(scene.video.shape[1])[None] < scene.lengths.shot_frames.sum(axis=1)[:, None]
        scene.video[~used] = fill
        told.append(run(scene)[1][0])
    assert np.isfinite(told[0].grad_norm)
    jax.tree.map(np.testing.assert_array_equal, *told)


def test_scene_losses_average_to_the_loss_over_shots():
    told = two_steps("1")[1][0]
    shots = (make_scene(1).lengths.shot_frames > 0).sum(axis=1)
    np.testing.assert_allclose((told.scene_loss * shots).sum() / shots.sum(), told.loss, rtol=1e-5)
    assert told.scene_loss[-1] == 0  # the blank scene


# ------------------------------------------------------------------------------------------------ compilations


@pytest.fixture
def traces(monkeypatch):
    """Counts how often the loss is traced."""
    count = []

    def counted(*args, flow_loss=step_module.flow_loss, **kwargs):
        count.append(1)
        return flow_loss(*args, **kwargs)

    monkeypatch.setattr(step_module, "flow_loss", counted)
    return count


def test_this_xla_knows_the_options_of_gpus():
    """Any of its compilers reads them all; one that it doesn't know would end every run on a GPU."""
    lowered = jax.jit(jnp.sin).lower(1.0)
    lowered.compile(compiler_options=step_module._OPTIONS["gpu"])
    with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option"):
        lowered.compile(compiler_options={"xla_gpu_enable_nothing": True})


def test_options_that_xla_flags_names_are_left_to_it(monkeypatch):
    class Device:
        platform = "gpu"

    mesh = types.SimpleNamespace(devices=np.array([Device()]))
    assert step_module.compiler_options(mesh) == step_module._OPTIONS["gpu"]
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_triton_gemm=true --xla_dump_to=somewhere")
    assert set(step_module._OPTIONS["gpu"]) - set(step_module.compiler_options(mesh)) == {"xla_gpu_enable_triton_gemm"}
    Device.platform = "cpu"
    assert step_module.compiler_options(mesh) is None


def test_no_step_calls_back_into_python():
    """Such a program is never kept, and would be compiled at every start."""
    mesh, blueprint, step = program()
    validate = make_validation_step(CONFIG.train, CONFIG.diffusion, blueprint, mesh)
    number = jax.ShapeDtypeStruct((), jnp.int32)
    with jax.set_mesh(mesh):
        lowered = [
            step.lower(blueprint.abstract, make_scene(), CONFIG.moc),
            validate.lower(blueprint.abstract.params, make_scene(), number, CONFIG.moc),
        ]
    seen = jax.jit(lambda x: jax.debug.print("{}", x)).lower(1.0)
    assert ["callback" in program.as_text() for program in (seen, *lowered)] == [True, False, False]


def test_one_compilation_per_bucket_and_chunk_size(traces):
    config = changed(CONFIG, train={"chunk_schedule": (ChunkStage(step=2, size=2), ChunkStage(step=4, size=1))})
    assert [config.moc_at(step).chunk.size for step in range(6)] == [1, 1, 2, 2, 1, 1]
    mesh = mesh_of(1)
    blueprint = blueprint_of(config, mesh)
    loss_fn = step_module.flow_loss  # the one that counts
    step = make_train_step(config.train, config.optimizer, config.diffusion, blueprint, mesh, loss_fn=loss_fn)
    validate = make_validation_step(config.train, config.diffusion, blueprint, mesh)
    state, number = blueprint.abstract, jax.ShapeDtypeStruct((), jnp.int32)
    for batch, traced in enumerate([1, 1, 2, 2, 2, 2]):  # going back to a size of before traces nothing
        step.eval_shape(state, make_scene(batch), config.moc_at(batch))
        assert len(traces) == traced
    step.eval_shape(state, make_scene(9, frames=9), config.moc_at(5))
    assert len(traces) == 3  # another bucket
    for batch in range(3):
        validate.eval_shape(state.sampling_params, make_scene(batch), number, config.moc)
        step.eval_shape(state, make_scene(batch), config.moc)
    assert len(traces) == 4  # validation once; training not again


# ------------------------------------------------------------------------------------------------ optimizer and average


@pytest.mark.long
def test_accumulation_weighs_gradients_by_shots_and_moves_nothing_in_between():
    config = changed(CONFIG, optimizer={"accumulate": 2})
    state = random_state(config, program("1", config)[1])
    before = jax.device_get(state)
    for seed in (1, 2):
        state, _ = advance(state, make_scene(seed), config=config)
        if seed == 1:
            jax.tree.map(
                np.testing.assert_array_equal, (before.params, before.ema), jax.device_get((state.params, state.ema))
            )
            first = jax.device_get(state.optimizer.acc_grads)
    mean = jax.device_get(state.optimizer.inner_opt_state[1][0].mu)
    # The second batch's gradients alone, from the same weights and the same step's noise.
    single = run(make_scene(2), start=1)[0].optimizer[1][0].mu
    second = jax.tree.map(lambda m: m / 0.1, jax.device_get(single))
    m, n = ((make_scene(seed).lengths.shot_frames > 0).sum() for seed in (1, 2))
    assert m != n
    jax.tree.map(
        lambda x, a, b: np.testing.assert_allclose(x, 0.1 * (m * a + n * b) / (m + n), rtol=1e-4, atol=1e-6),
        mean,
        first,
        second,
    )
    assert not np.array_equal(before.params["final"]["kernel"], state.params["final"]["kernel"])


def scene_of(shots, seed):
    """One scene of one-frame shots in a bucket of six."""
    random = np.random.default_rng(seed)
    lengths = SceneLengths(
        (np.arange(6) < shots).astype(np.int32)[None], (np.arange(7) < shots + 1).astype(np.int32)[None]
    )
    used = (np.arange(6) < shots)[None, :, None, None, None]
    video = (random.normal(size=(1, 6, 4, 4, 4)) * used).astype(np.float32)
    return Scene(video, random.normal(size=(1, 7, 8)).astype(np.float32), lengths)


@pytest.mark.parametrize("shots", [(1, 6), (6, 1, 3), (2, 0)])
def test_accumulated_batches_give_the_update_of_one_batch_of_their_scenes(monkeypatch, shots):
    """With one noise for all, for a step's own differs from batch to batch; the model is a weight per channel."""
    monkeypatch.setattr(jax.random, "normal", lambda key, shape, dtype=jnp.float32: jnp.full(shape, 0.3, dtype))
    scenes = [jax.tree.map(jnp.asarray, scene_of(n, seed)) for seed, n in enumerate(shots)]
    whole, logical = jax.tree.map(lambda *x: jnp.concatenate(x), *scenes), {("w",): ("embed", "mlp")}

    def loss(w, scene):
        levels = jnp.full(scene.lengths.shot_frames.shape, 0.4)
        return flow_loss(lambda z, t: z * w["w"].reshape(1, 1, 1, 1, 4), scene, key, CONFIG.diffusion, t=levels)[0]

    key, start, after = jax.random.key(0), {"w": jnp.ones((1, 4))}, []
    for batches in (scenes, [whole]):
        cfg = OptimizerConfig(accumulate=len(batches), clip_norm=0.5, warmup_steps=0)
        optimizer = make_optimizer(cfg, 2 * len(batches), logical)
        w, state = start, optimizer.init(start)
        for scene in batches * 2:
            n = (scene.lengths.shot_frames > 0).sum()
            updates, state = optimizer.update(jax.grad(loss)(w, scene), state, w, shots=n)
            w = optax.apply_updates(w, updates)
        after.append((w["w"], (state.inner_opt_state if len(batches) > 1 else state)[1][0].mu["w"]))
    for accumulated, at_once in zip(*after):
        np.testing.assert_allclose(accumulated, at_once, rtol=1e-5)
        assert not np.array_equal(at_once, start["w"])


def test_the_average_follows_its_formula():
    state = random_state(CONFIG, program()[1])
    average = np.asarray(state.ema["final"]["kernel"])
    for n in range(3):
        state, _ = advance(state, make_scene(n))
        decay = min(CONFIG.train.ema_decay, (1 + n) / (10 + n))
        average = decay * average + (1 - decay) * np.asarray(state.params["final"]["kernel"])
        np.testing.assert_allclose(state.ema["final"]["kernel"], average, rtol=1e-5, atol=1e-7)


def test_without_an_average_the_weights_are_sampled():
    state = blueprint_of(changed(CONFIG, train={"ema_decay": 0.0}), mesh_of(1)).abstract
    assert state.ema is None
    assert state.sampling_params is state.params
    assert set(state.items()) == {"params", "optimizer"}


def test_items_take_a_state_apart_and_put_it_together():
    state = program()[1].abstract
    assert set(state.items()) == {"params", "ema", "optimizer"}
    assert TrainState.from_items(state.items()) == state


# ------------------------------------------------------------------------------------------------ validation


@pytest.mark.long
def test_validation_is_fixed_and_counts_shots():
    results = []
    for name in ("1", "2x4"):
        mesh, blueprint, _ = program(name)
        params = random_state(CONFIG, blueprint).params
        validate = make_validation_step(CONFIG.train, CONFIG.diffusion, blueprint, mesh)
        with jax.set_mesh(mesh):
            scene = shard_batch(make_scene(5), mesh)
            (sums, shots), (again, _), (other, _) = (
                jax.block_until_ready(validate(params, scene, jnp.int32(number), CONFIG.moc)) for number in (0, 0, 1)
            )
        assert sums.sharding.is_fully_replicated
        np.testing.assert_array_equal(sums, again)
        assert not np.allclose(sums, other)
        assert shots == (make_scene(5).lengths.shot_frames > 0).sum()
        results.append(np.asarray(sums))
    assert results[0].shape == (CONFIG.train.validation_buckets,)
    assert (results[0] > 0).all()
    np.testing.assert_allclose(results[1], results[0], rtol=1e-5)


def test_validation_stands_at_the_centres():
    np.testing.assert_array_equal(validation_levels(4), [0.125, 0.375, 0.625, 0.875])
