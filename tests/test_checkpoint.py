"""Checkpoints: everything or nothing, on any mesh, and never a wrong number."""

import dataclasses
import errno
import functools
import gc
import pathlib
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from moc_jax import __version__, checkpoint, models
from moc_jax.checkpoint import CheckpointError, Checkpoints, load_for_sampling
from moc_jax.config import Config, ConfigError, HashConfig, MeshConfig, MMDiTConfig, PcaConfig, TrainConfig
from moc_jax.digest import tree_digests, weights_digest
from moc_jax.sharding import logical_axes, make_mesh, tree_shardings

CONFIG = Config(
    model=MMDiTConfig(dim=16, depth=2, heads=2, latent_channels=4, text_dim=8),
    codec=PcaConfig(channels=4),
    text=HashConfig(dim=8),
)
CODEC = {"basis": np.arange(12, dtype=np.float32).reshape(3, 4), "mean": np.ones(4)}
OPTIMIZER = optax.MultiSteps(optax.adamw(1e-3), 2)


SMALL = {("w",): ("layers", "embed", "mlp"), ("inner", "b"): ("mlp",)}
SMALL_SHAPES = {"w": (2, 8, 4), "inner": {"b": (4,)}}


@functools.cache
def numbers(seed, model):
    random = np.random.default_rng(seed)
    shapes = (
        SMALL_SHAPES if model is None else jax.tree.map(lambda x: x.shape, nnx.to_pure_dict(models.abstract(model)[1]))
    )
    params = jax.tree.map(
        lambda shape: random.normal(size=shape).astype(np.float32), shapes, is_leaf=lambda x: isinstance(x, tuple)
    )
    optimizer = jax.device_get(OPTIMIZER.init(params))
    return {"params": params, "ema": jax.tree.map(lambda x: x + 1, params), "optimizer": optimizer}


def state_on(mesh, seed=0, model=None):
    """A training state of its own numbers, laid out over `mesh`, and the target to restore it to."""
    tree = numbers(seed, model)
    shardings = tree_shardings(tree, SMALL if model is None else logical_axes(models.abstract(model)[1]), mesh)
    target = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)
    return jax.device_put(tree, shardings), target


def mesh_of(count, **sizes):
    return make_mesh(MeshConfig(**sizes), jax.devices()[:count])


def save(checkpoints, step, state, data=None):
    checkpoints.save(step, state, config=CONFIG, codec_state=CODEC, data_state=data or {"position": step})


def accept(config):
    assert config == CONFIG


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run" / "checkpoints"


@pytest.fixture(scope="session")
def saved_two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two") / "checkpoints"
    checkpoints = Checkpoints(str(folder), TrainConfig(), lambda step, digest: f"step {step} {digest}")
    for step in (3, 5):
        save(checkpoints, step, state_on(mesh_of(1), seed=step)[0])
    checkpoints.close()
    return folder


@pytest.fixture
def two(saved_two, folder):
    """Two checkpoints, at steps 3 and 5, of states 3 and 5."""
    return pathlib.Path(shutil.copytree(saved_two, folder))


# ------------------------------------------------------------------------------------------------ round trips


def test_a_run_comes_back_as_it_was(folder):
    mesh = mesh_of(1)
    state, target = state_on(mesh)
    checkpoints = Checkpoints(str(folder), TrainConfig())
    assert checkpoints.restore(target, accept) is None
    save(checkpoints, 7, state, {"position": 41, "rng": [1, 2]})
    checkpoints.wait()
    restored = checkpoints.restore(target, accept)
    checkpoints.close()
    assert (restored.step, restored.data_state, restored.config) == (7, {"position": 41, "rng": [1, 2]}, CONFIG)
    assert jax.tree.structure(restored.state) == jax.tree.structure(state)
    assert_same(restored.state, state)


@pytest.mark.parametrize(
    ("count", "sizes"), [(1, {}), (4, {"data": 2, "fsdp": 2}), (4, {"fsdp": -1, "data": 1}), (8, {"data": 8})]
)
def test_saved_on_eight_devices_restored_on_another_mesh(folder, count, sizes):
    state, _ = state_on(mesh_of(8, data=2, fsdp=4))
    checkpoints = Checkpoints(str(folder), TrainConfig())
    save(checkpoints, 1, state)
    checkpoints.wait()
    _, target = state_on(mesh_of(count, **sizes))
    restored = checkpoints.restore(target, accept).state
    checkpoints.close()
    assert_same(restored, state)
    assert jax.tree.all(jax.tree.map(lambda x, t: x.sharding == t.sharding, restored, target))


def test_arrays_may_be_reused_as_soon_as_save_returns(folder):
    state, target = state_on(mesh_of(1))
    expected = jax.device_get(jax.tree.map(jnp.copy, state))
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 7, tree), donate_argnums=0)
    checkpoints = Checkpoints(str(folder), TrainConfig())
    save(checkpoints, 1, state)
    for _ in range(3):
        state = overwrite(state)
    checkpoints.wait()
    assert_same(checkpoints.restore(target, accept).state, expected)
    checkpoints.close()


def test_the_newest_and_every_nth_are_kept(folder):
    state, _ = state_on(mesh_of(1))
    checkpoints = Checkpoints(str(folder), TrainConfig(keep_last=2, keep_every=10))
    for step in (5, 10, 15, 20, 25, 30, 35):
        save(checkpoints, step, state)
    checkpoints.close()
    assert checkpoints.steps == [10, 20, 30, 35]


# ------------------------------------------------------------------------------------------------ damage


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def zero(path):
    path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # tensorstore's reads of the other arrays
@pytest.mark.parametrize(
    "damage",
    [pytest.param(cut, marks=pytest.mark.long), flip, pytest.param(pathlib.Path.unlink, marks=pytest.mark.long)],
)
def test_whatever_file_is_damaged_the_numbers_are_right(two, tmp_path, damage):
    """Each file of the newest checkpoint in turn: either it still reads exactly, or the one before is used."""
    (state_3, target), (state_5, _) = (state_on(mesh_of(1), seed=seed) for seed in (3, 5))
    fell_back = []
    for file in files_of(two / "5"):
        copy = tmp_path / "copy"
        shutil.copytree(two, copy)
        damage(copy / file.relative_to(two))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            checkpoints = Checkpoints(str(copy), TrainConfig())
            restored = checkpoints.restore(target, accept)
            checkpoints.close()
        assert_same(restored.state, state_5 if restored.step == 5 else state_3)
        assert restored.data_state == {"position": restored.step}
        named = [str(w.message) for w in caught if "is damaged" in str(w.message) and str(copy / "5") in str(w.message)]
        assert bool(named) == (restored.step == 3)
        assert (copy / "damaged-5").exists() == (restored.step == 3)
        fell_back += [str(file.relative_to(two / "5"))] if named else []
        shutil.rmtree(copy)
    gc.collect()  # what Orbax left of its failed reads must be reported in this test, where it is expected
    data = [f for f in fell_back if "/d/" in f]
    assert "meta/data.json" in fell_back
    assert len(fell_back) < len(files_of(two / "5"))  # some files nobody reads
    assert any(f.startswith("params") for f in data)
    assert any(f.startswith("codec") for f in data)


def test_a_card_lies_beside_each_checkpoint(two):
    """It says which weights these are, and is no part of what is restored."""
    digest = weights_digest(tree_digests(state_on(mesh_of(1), seed=5)[0]["ema"]))
    assert (two / "5" / "README.md").read_text() == f"step 5 {digest}"
    (two / "5" / "README.md").write_text("edited")
    assert Checkpoints(str(two), TrainConfig()).restore(state_on(mesh_of(1))[1], accept).step == 5


def test_training_goes_on_over_a_damaged_step(two):
    state, target = state_on(mesh_of(1), seed=9)
    flip(two / "5" / "meta" / "data.json")
    checkpoints = Checkpoints(str(two), TrainConfig())
    with pytest.warns(UserWarning, match=r"checkpoints/5 is damaged \(.*\) and was moved to damaged-5; that of step 3"):
        assert checkpoints.restore(target, accept).step == 3
    save(checkpoints, 5, state)
    checkpoints.wait()
    restored = checkpoints.restore(target, accept)
    checkpoints.close()
    assert restored.step == 5
    assert_same(restored.state, state)


@pytest.mark.parametrize("damage", [cut, flip, zero])
def test_an_older_checkpoint_that_is_damaged_does_not_stop_a_save(two, damage):
    state, target = state_on(mesh_of(1))
    damage(two / "3" / "_CHECKPOINT_METADATA")
    checkpoints = Checkpoints(str(two), TrainConfig(keep_last=3))
    assert checkpoints.restore(target, accept).step == 5
    save(checkpoints, 6, state)
    checkpoints.close()
    assert checkpoints.steps == [3, 5, 6]


def test_storage_that_fails_costs_no_checkpoint(two, monkeypatch):
    """What can't be read today is there tomorrow, and the run goes on from it."""
    state, target = state_on(mesh_of(1), seed=5)
    before = files_of(two)

    def fail(path, *arguments):
        raise OSError(errno.ESTALE, "Stale file handle", str(path))

    checkpoints = Checkpoints(str(two), TrainConfig())
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_read_meta", fail)
        for _ in range(2):  # the same command again, still
            with pytest.raises(CheckpointError, match=r"step 5: OSError: .*Stale.*step 3: .*All were left as they are"):
                checkpoints.restore(target, accept)
    assert files_of(two) == before
    assert_same(checkpoints.restore(target, accept).state, state)


def test_with_damaged_checkpoints_only_nothing_starts_anew(two):
    shutil.rmtree(two / "3")
    (two / "5").rename(two / "damaged-5")
    with pytest.raises(CheckpointError, match=r"no checkpoint but damaged-5: rename .* or give another --workdir"):
        Checkpoints(str(two), TrainConfig()).restore(state_on(mesh_of(1))[1], accept)


def test_the_codec_comes_back_with_the_run(two):
    assert_same(Checkpoints(str(two), TrainConfig()).restore(state_on(mesh_of(1))[1], accept).codec_state, CODEC)


def test_a_half_written_checkpoint_is_named_and_removed(two):
    half = two / "7.orbax-checkpoint-tmp"
    shutil.copytree(two / "5", half)
    (half / "commit_success.txt").unlink()
    with pytest.warns(UserWarning, match=r"7\.orbax-checkpoint-tmp was never finished"):
        checkpoints = Checkpoints(str(two), TrainConfig())
    assert checkpoints.restore(state_on(mesh_of(1))[1], accept).step == 5
    checkpoints.close()
    assert not half.exists()


def test_a_copied_checkpoint_is_not_believed(two):
    """By its name it would be the newest."""
    _, target = state_on(mesh_of(1))
    shutil.copytree(two / "3", two / "9")
    checkpoints = Checkpoints(str(two), TrainConfig())
    with pytest.warns(UserWarning, match=r"9 is damaged \(ValueError: it holds step 3, .* moved to damaged-9"):
        assert checkpoints.restore(target, accept).step == 5
    checkpoints.close()


def test_a_renamed_checkpoint_is_refused_and_named_back_it_is_whole(two):
    _, target = state_on(mesh_of(1))
    shutil.rmtree(two / "3")
    (two / "5").rename(two / "50")
    checkpoints = Checkpoints(str(two), TrainConfig())
    with pytest.raises(CheckpointError, match=r"step 50: ValueError: it holds step 5, .* only the name 5 is right"):
        checkpoints.restore(target, accept)
    (two / "50").rename(two / "5")
    assert checkpoints.restore(target, accept).step == 5
    checkpoints.close()


ODD_NAMES = ["0010", "²", "١٢", "-1", "1e3", "5_6", "ckpt_7", "a b", "7.orbax-checkpoint-tmp.txt"]


def test_odd_names_stop_nothing_and_stay(two):
    """Neither for reading nor for what Orbax does when it saves and removes."""
    state, target = state_on(mesh_of(1))
    for number, name in enumerate(ODD_NAMES):
        shutil.copytree(two / "3", two / name) if number % 2 else (two / name).mkdir()
    (two / "notes.txt").write_text("mine")
    with pytest.warns(UserWarning, match="holds entries that are not checkpoints: .* and 5 more; left alone"):
        checkpoints = Checkpoints(str(two), TrainConfig(keep_last=1))
    assert checkpoints.restore(target, accept).step == 5
    for step in (6, 10, 12):
        save(checkpoints, step, state)
    checkpoints.close()
    assert sorted(path.name for path in two.iterdir()) == sorted([*ODD_NAMES, "notes.txt", "12"])


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (pathlib.Path.mkdir, "it has no meta"),
        (pathlib.Path.touch, "it is not a folder"),
        (lambda path: path.symlink_to("nowhere"), "it is not a folder"),
        (lambda path: path.symlink_to(path.name), "it is not a folder"),
    ],
    ids=["empty", "file", "dangling", "loop"],
)
@pytest.mark.parametrize("name", ["6", "9" * 30])
def test_what_bears_a_steps_name_but_is_none_moves_aside(two, name, make, problem):
    state, target = state_on(mesh_of(1))
    make(two / name)
    checkpoints = Checkpoints(str(two), TrainConfig(keep_last=1))
    with pytest.warns(UserWarning, match=rf"{name} is damaged \(FileNotFoundError: {problem}\) and was moved"):
        assert checkpoints.restore(target, accept).step == 5
    save(checkpoints, 6, state)
    checkpoints.close()
    assert sorted(path.name for path in two.iterdir()) == ["6", f"damaged-{name}"]


@pytest.mark.parametrize("make", [pathlib.Path.touch, lambda path: path.symlink_to("nowhere")])
def test_a_checkpoints_folder_that_is_none_is_named(folder, make):
    folder.parent.mkdir()
    make(folder)
    with pytest.raises(CheckpointError, match=r"checkpoints is not a folder: move it, or give another --workdir"):
        Checkpoints(str(folder), TrainConfig())


@pytest.mark.parametrize("background", [False, True])
def test_a_full_disk_is_named_and_the_checkpoint_before_is_intact(two, monkeypatch, background):
    state, target = state_on(mesh_of(1))
    checkpoints = Checkpoints(str(two), TrainConfig())
    full = OSError(errno.ENOSPC, "No space left on device")

    class Response:
        def result(self):
            raise RuntimeError("background save failed") from full

    def no_room(step, items, force):
        (two / f"{step}.orbax-checkpoint-tmp").mkdir()
        if background:
            return Response()
        raise full

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints._checkpointer, "save_checkpointables_async", no_room)
        with pytest.raises(CheckpointError, match=r"disk is full: .*checkpoints/8 .*steps \[3, 5\] are intact"):  # noqa: PT012
            save(checkpoints, 8, state)
            checkpoints.check()
    assert not (two / "8.orbax-checkpoint-tmp").exists()
    assert checkpoints.restore(target, accept).step == 5
    save(checkpoints, 8, state)  # there is room again
    checkpoints.close()
    assert checkpoints.steps == [5, 8]


def test_other_errors_of_a_save_keep_their_traceback(two, monkeypatch):
    def broken(step, items, force):
        raise KeyError("a bug")

    checkpoints = Checkpoints(str(two), TrainConfig())
    monkeypatch.setattr(checkpoints._checkpointer, "save_checkpointables_async", broken)
    with pytest.raises(KeyError, match="a bug"):
        save(checkpoints, 8, state_on(mesh_of(1))[0])
    checkpoints.close()


# ------------------------------------------------------------------------------------------------ another model


def test_the_saved_config_is_checked_before_arrays_are_read(two):
    def refuse(config):
        raise ConfigError("model.dim differs")

    checkpoints = Checkpoints(str(two), TrainConfig())
    with pytest.raises(ConfigError, match=r"model\.dim differs"):
        checkpoints.restore(state_on(mesh_of(1))[1], refuse)
    checkpoints.close()
    assert checkpoints.steps == [3, 5]


def test_weights_of_another_shape_are_named(two):
    target = state_on(mesh_of(1))[1]
    target["optimizer"].acc_grads["w"] = jax.ShapeDtypeStruct((2, 4), np.float32)
    checkpoints = Checkpoints(str(two), TrainConfig())
    with pytest.raises(CheckpointError, match=r"optimizer/acc_grads/w is \[2, 8, 4\] there and \[2, 4\] in this one"):
        checkpoints.restore(target, accept)
    checkpoints.close()
    assert checkpoints.steps == [3, 5]


@pytest.mark.parametrize(("written", "fix"), [(1, "with the version that wrote it"), (4, "Update moc_jax")])
def test_another_format_is_refused_wherever_it_is_read(folder, monkeypatch, written, fix):
    """And is no damage: it stays where it is, and no older one is taken in its place."""
    state, target = state_on(mesh_of(1))
    checkpoints = Checkpoints(str(folder), TrainConfig())
    save(checkpoints, 3, state)
    checkpoints.wait()
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "FORMAT", written)
        save(checkpoints, 5, state)
        checkpoints.wait()
    message = (
        rf"checkpoints/5 is of format {written}, written by moc_jax {__version__}, but .* reads format 3\. .*{fix}"
    )
    monkeypatch.setattr(checkpoint, "_read_arrays", lambda *arguments: pytest.fail("it read the arrays"))
    run = str(folder.parent)
    for read in (
        lambda: checkpoints.restore(target, accept),
        lambda: load_for_sampling(run),
        lambda: checkpoint.load_codec_state(run),
        lambda: checkpoint.newest_config(run),
        lambda: checkpoint.saved_config(run),
    ):
        with pytest.raises(CheckpointError, match=message):
            read()
    assert checkpoints.steps == [3, 5]
    assert checkpoint.saved_config(run, 3) == (CONFIG, 3)
    checkpoints.close()


# ------------------------------------------------------------------------------------------------ sampling


@pytest.fixture(scope="session")
def saved_model(tmp_path_factory):
    """A whole model's checkpoints at steps 3 and 5, written on two devices."""
    folder = tmp_path_factory.mktemp("model") / "run" / "checkpoints"
    checkpoints = Checkpoints(str(folder), TrainConfig())
    for step in (3, 5):
        save(checkpoints, step, state_on(mesh_of(2, data=1, fsdp=2), step, CONFIG.model)[0])
    checkpoints.close()
    return folder


@pytest.fixture
def run(saved_model, tmp_path):
    return pathlib.Path(shutil.copytree(saved_model.parent, tmp_path / "run"))


@pytest.mark.parametrize("where", ["", "checkpoints", "checkpoints/5"])
def test_sampling_reads_average_codec_and_config(saved_model, where):
    loaded = load_for_sampling(str(saved_model.parent / where))
    assert (loaded.step, loaded.config) == (5, CONFIG)
    assert_same(loaded.params, numbers(5, CONFIG.model)["ema"])
    assert all(len(x.devices()) == 1 for x in jax.tree.leaves(loaded.params))
    assert loaded.codec_state.keys() == CODEC.keys()
    for name, array in loaded.codec_state.items():
        assert array.dtype == CODEC[name].dtype
        np.testing.assert_array_equal(array, CODEC[name])
    assert_same(nnx.to_pure_dict(nnx.state(loaded.model(), nnx.Param)), loaded.params)


def test_sampling_without_an_average_reads_the_weights(folder):
    state, _ = state_on(mesh_of(1), 1, CONFIG.model)
    checkpoints = Checkpoints(str(folder), TrainConfig())
    save(checkpoints, 2, {"params": state["params"]})
    checkpoints.close()
    assert_same(load_for_sampling(str(folder.parent)).params, state["params"])


def test_sampling_weights_that_do_not_fit_their_config_are_named(folder):
    state, _ = state_on(mesh_of(1), 1, dataclasses.replace(CONFIG.model, mlp_ratio=2.0))
    checkpoints = Checkpoints(str(folder), TrainConfig())
    save(checkpoints, 2, {"params": state["params"]})
    checkpoints.close()
    with pytest.raises(
        CheckpointError, match=r"params/blocks/text/mlp/down/kernel is \[2, 32, 16\] there and \[2, 64, 16\]"
    ):
        load_for_sampling(str(folder))


def test_sampling_by_step(run):
    assert load_for_sampling(str(run), step=3).step == 3
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 4 .* there are steps \[3, 5\]"):
        load_for_sampling(str(run), step=4)
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        load_for_sampling(str(run / "nowhere"))


def test_sampling_passes_over_a_damaged_checkpoint(run):
    flip(run / "checkpoints" / "5" / "meta" / "data.json")
    with pytest.warns(UserWarning, match=r"checkpoints/5 is damaged .* trying the one before"):
        assert load_for_sampling(str(run)).step == 3
    with pytest.raises(CheckpointError, match=r"checkpoints/5 is damaged .*; there are steps \[3, 5\]"):
        load_for_sampling(str(run), step=5)


def test_sampling_believes_no_name(run):
    folder = run / "checkpoints"
    (folder / "5").rename(folder / "9")
    (folder / "²").mkdir()
    with pytest.warns(UserWarning, match=r"/9 is damaged \(ValueError: it holds step 5.* trying the one before"):
        assert load_for_sampling(str(run)).step == 3
    with pytest.raises(
        CheckpointError, match=r"9 is damaged \(ValueError: it holds step 5, .* there are steps \[3, 9\]"
    ):
        load_for_sampling(str(folder / "9"))
    (folder / "9").rename(run / "best")
    with pytest.raises(CheckpointError, match="best is a checkpoint, but its name is not a step"):
        load_for_sampling(str(run / "best"))


# ------------------------------------------------------------------------------------------------ digests


def test_digests_see_every_bit_and_every_place_but_not_the_mesh():
    x = np.arange(64, dtype=np.float32).reshape(8, 8)
    split = jax.device_put(x, jax.NamedSharding(mesh_of(8), jax.P("data")))
    base = tree_digests({"x": jnp.asarray(x)})
    assert tree_digests({"x": split}) == base
    seen = {base["x"]}
    for index in np.ndindex(x.shape):
        other = x.view(np.uint32).copy()
        other[index] ^= 1
        seen.add(tree_digests({"x": jnp.asarray(other.view(np.float32))})["x"])
    for swapped in (x.T, x[::-1], x[:, ::-1]):
        seen.add(tree_digests({"x": jnp.asarray(swapped)})["x"])
    assert len(seen) == 1 + 64 + 3


def test_a_relative_folder_is_as_good_as_an_absolute_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoints = Checkpoints("run/checkpoints", CONFIG.train)
    assert checkpoints.directory == tmp_path / "run" / "checkpoints"
    with pytest.raises(CheckpointError, match="no checkpoint in run"):
        load_for_sampling("run")
