"""Where compiled programs are kept, and that no failure there stops a run."""

import os
import pathlib
import re
import warnings
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from moc_jax import compilation
from moc_jax.compilation import built, find_program, kept_program, kept_programs, mesh_options, prune, user_folder

NO_MESH = jax.sharding.get_mesh()

# ------------------------------------------------------------------------------------------------ which folder


@pytest.fixture
def as_usual():
    """jax was given no folder and no limits, as in a user's process."""
    usual = {
        "jax_compilation_cache_dir": None,
        "jax_persistent_cache_min_compile_time_secs": 1.0,
        "jax_persistent_cache_min_entry_size_bytes": 0,
    }
    before = {name: getattr(jax.config, name) for name in usual}
    for name, value in usual.items():
        jax.config.update(name, value)
    yield
    assert {name: getattr(jax.config, name) for name in usual} == usual  # `kept_programs` leaves all as it was
    for name, value in before.items():
        jax.config.update(name, value)


def compiled(number):
    """A program of which there is no other."""
    return float(jax.jit(lambda x: x * number)(jnp.float32(1)))


def test_the_users_cache_folder_by_the_rules_of_xdg(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    for base, folder in (
        ("/var/my cache", "/var/my cache/moc_jax/programs"),
        ("", "/home/someone/.cache/moc_jax/programs"),
        ("not/absolute", "/home/someone/.cache/moc_jax/programs"),  # which is to be ignored
    ):
        monkeypatch.setenv("XDG_CACHE_HOME", base)
        assert user_folder() == pathlib.Path(folder)
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert user_folder() == pathlib.Path("/home/someone/.cache/moc_jax/programs")


def test_every_program_is_kept_however_fast_it_was_compiled(tmp_path, as_usual):
    with kept_programs(str(tmp_path / "a" / "b")):
        assert compiled(1.25) == 1.25
    assert list((tmp_path / "a" / "b").glob("jit__lambda*-cache"))


def test_what_the_user_set_for_jax_stays(compilation_cache, monkeypatch):
    monkeypatch.setattr("moc_jax.compilation.prune", lambda *_: 1 // 0)  # nothing of it is removed either
    with kept_programs("auto"):
        assert jax.config.jax_compilation_cache_dir == str(compilation_cache)
        assert jax.config.jax_persistent_cache_min_compile_time_secs == 0.3
    with kept_programs(""):
        assert jax.config.jax_compilation_cache_dir is None
    assert jax.config.jax_compilation_cache_dir == str(compilation_cache)


def test_the_folder_stays_bounded(tmp_path):
    for age, name in enumerate(("new", "old", "oldest")):
        (tmp_path / f"{name}-cache").write_bytes(bytes(100))
        os.utime(tmp_path / f"{name}-cache", (1000 - age, 1000 - age))
    (tmp_path / "else").write_bytes(bytes(1000))
    prune(tmp_path, 250)
    assert sorted(os.listdir(tmp_path)) == ["else", "new-cache", "old-cache"]
    os.utime(tmp_path / "old-cache", (2000, 999))  # used since
    prune(tmp_path, 150)
    assert sorted(os.listdir(tmp_path)) == ["else", "old-cache"]


# ------------------------------------------------------------------------------------------------ without tracing


@pytest.fixture
def traced(tmp_path, as_usual, monkeypatch):
    """traced(made_of): a program from the folder, or traced, and how often it was traced in all."""
    times = []
    monkeypatch.setattr("moc_jax.compilation._UNFIT", set())
    jax.config.update("jax_enable_compilation_cache", False)

    def run(made_of="a program"):
        def f(x):
            times.append(1)
            return x + 1

        found = kept_program(made_of, jax.devices()[:1], lambda: built(NO_MESH, jax.jit(f), jnp.float32(1)))
        assert found(jnp.float32(2)) == 3
        return len(times)

    with kept_programs(str(tmp_path)):
        yield run
    jax.config.update("jax_enable_compilation_cache", True)


def test_a_program_that_was_kept_is_not_traced_again(traced, monkeypatch):
    assert [traced(), traced(), traced("another"), traced()] == [1, 1, 2, 2]
    monkeypatch.setattr("moc_jax.compilation._source_digest", lambda: "of another version")
    assert [traced(), traced()] == [3, 3]
    monkeypatch.setenv("XLA_FLAGS", "others")
    assert [traced(), traced()] == [4, 4]
    with jax.numpy_rank_promotion("allow"):  # any of jax's settings
        assert [traced(), traced()] == [5, 5]


def test_programs_for_a_processor_are_left_to_jax(traced, monkeypatch):
    monkeypatch.undo()
    assert [traced(), traced()] == [1, 2]


def test_with_several_processes_each_one_traces(traced, monkeypatch):
    traced()
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert [traced(), traced()] == [2, 3]


def test_what_jax_found_in_its_own_cache_is_not_kept_again(tmp_path, as_usual, monkeypatch):
    """Serialized once more it might not run."""
    monkeypatch.setattr("moc_jax.compilation._UNFIT", set())
    x = jnp.float32(1)

    def kept(name):
        devices = jax.devices()[:1]
        kept_program(name, devices, lambda: built(NO_MESH, jax.jit(lambda x: x * 7.75), x))
        return find_program(name, devices) is not None

    with kept_programs(str(tmp_path)):
        assert kept("compiled here")
        jax.clear_caches()
        assert not kept("found by jax")
        (file,) = tmp_path.glob("moc_jax-*-cache")
        file.write_bytes(b"damaged")
        jax.clear_caches()
        with pytest.warns(UserWarning, match="can't be used, and is removed") as told:
            assert not kept("compiled here")
        assert len(told) == 1  # later starts don't meet it again


def test_a_program_that_was_cut_off_is_replaced(traced, tmp_path):
    traced()
    (file,) = tmp_path.glob("moc_jax-*-cache")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.warns(UserWarning, match=r"moc_jax-\w+-cache can't be used, and is removed"):
        assert traced() == 2
    assert traced() == 2


def test_nothing_is_kept_elsewhere(monkeypatch):
    monkeypatch.setattr("moc_jax.compilation._UNFIT", set())
    kept_program("a", jax.devices()[:1], jax.jit(lambda x: x).lower(jnp.float32(1)).compile)
    assert find_program("a", jax.devices()[:1]) is None
    monkeypatch.setattr("moc_jax.compilation._folder", epath.Path("gs://no-such-bucket"))  # which is not asked
    assert find_program("a", jax.devices()[:1]) is None


# ------------------------------------------------------------------------------------------------ what goes wrong


def test_a_folder_that_can_be_none_is_reported_and_stops_nothing(tmp_path, monkeypatch, as_usual):
    (tmp_path / "file").write_text("precious")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    warning = r"compiled programs are not kept.*file.*--compilation-cache"
    for setting in ("auto", str(tmp_path / "file" / "cache")):
        with pytest.warns(UserWarning, match=warning), kept_programs(setting):
            assert (jax.config.jax_compilation_cache_dir, compiled(1.5)) == (None, 1.5)


def test_a_full_disk_is_reported_once_and_what_was_cut_off_there_is_replaced(tmp_path, monkeypatch, as_usual):
    shown, file = [], type(epath.Path(tmp_path))
    write = file.write_bytes

    def full(path, data):
        write(path, data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "showwarning", lambda message, *_, **__: shown.append(str(message)))
        with kept_programs(str(tmp_path)):
            monkeypatch.setattr(file, "write_bytes", full)
            assert [compiled(2.25), compiled(2.5)] == [2.25, 2.5]
            assert not list(tmp_path.glob("*-cache"))
            monkeypatch.setattr(file, "write_bytes", write)
            assert compiled(2.75) == 2.75
        assert len(shown) == 1
        assert re.match(rf"the compilation cache {tmp_path} could not be written \(OSError: .*No space left", shown[0])

        (entry,) = tmp_path.glob("*-cache")
        whole = entry.read_bytes()
        entry.write_bytes(whole[: len(whole) // 2])  # as a killed process leaves it
        jax.clear_caches()
        with kept_programs(str(tmp_path)):
            assert compiled(2.75) == 2.75
        assert len(shown) == 2
        assert re.match(rf"the compilation cache {tmp_path} could not be read \(", shown[1])
        assert len(entry.read_bytes()) > len(whole) // 2


def mesh_of(platform, slices):
    devices = [SimpleNamespace(platform=platform, slice_index=slice_index, process_index=0) for slice_index in slices]
    return SimpleNamespace(empty=False, devices=np.array(devices))


def test_gpus_that_nvlink_joins_compute_nothing_while_they_exchange(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    options = mesh_options(mesh_of("gpu", [0, 0]))
    assert options == {"xla_gpu_disable_async_collectives": "ALLCOLLECTIVES"}
    jax.jit(jnp.sin).lower(1.0).compile(compiler_options=options)  # else XLA would end every run there
    for other in (mesh_of("gpu", [0]), mesh_of("gpu", [0, 1]), mesh_of("tpu", [0, 0]), mesh_of("cpu", [0, 0])):
        assert mesh_options(other) is None
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_disable_async_collectives=ALLGATHER")
    assert mesh_options(mesh_of("gpu", [0, 0])) is None


def test_programs_are_built_with_what_their_mesh_asks_for(monkeypatch):
    asked = []
    monkeypatch.setattr(compilation, "mesh_options", lambda mesh: asked.append(mesh) or {"xla_no_such_option": True})
    mesh = jax.make_mesh((1,), ("data",))
    with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option"):
        built(mesh, jax.jit(jnp.sin), 1.0)
    assert asked == [mesh]
