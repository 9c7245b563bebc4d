"""Where tests run, before jax starts: on eight virtual CPU devices, with strict rank promotion.

`MOC_TEST_PLATFORM=gpu` (`make test-gpu`) runs the tests of attention on the GPU instead, with the Hopper kernels among
the backends; all other tests need the eight devices and are skipped.
"""

import os
import pathlib

os.environ["JAX_PLATFORMS"] = "cuda,cpu" if os.environ.get("MOC_TEST_PLATFORM") == "gpu" else "cpu"
os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # several test processes share one GPU
# Tiny programs: compiling them well takes longer than running them badly. The numbers do not depend on it.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 --xla_gpu_autotune_level=0"
)

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")

_MAPPINGS = pathlib.Path("/proc/self/maps")
_HERE = pathlib.Path(__file__).parent
# Tests whose kind stays with other parameters, or in a smaller form: all of them take longer than `make test` has, or
# CI. Such markers stand in the tests' own files where they are of a kind, and here where they are for single cases or
# whole files.
_LISTED = {name: frozenset((_HERE / f"{name}.txt").read_text().splitlines()) for name in ("long", "slow")}
_ON_GPU = _HERE / "attention"


def pytest_configure(config):
    config.addinivalue_line("markers", "long_for(*values): long where one of the test's parameters is among the values")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        for name, listed in _LISTED.items():
            if item.nodeid in listed or item.nodeid.partition("::")[0] in listed:
                item.add_marker(getattr(pytest.mark, name))
        given = [value for marker in item.iter_markers("long_for") for value in marker.args]
        if any(type(x) is type(y) and x == y for x in given for y in item.callspec.params.values()):
            item.add_marker(pytest.mark.long)
    if jax.default_backend() == "cpu":
        return
    elsewhere = pytest.mark.skip(reason="needs eight virtual CPU devices: run without MOC_TEST_PLATFORM=gpu")
    for item in items:
        if not item.path.is_relative_to(_ON_GPU):
            item.add_marker(elsewhere)


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory):
    """What one test compiled, the others, those of other workers and child processes take: it is most of the work."""
    here = tmp_path_factory.getbasetemp()
    folder = (here.parent if "PYTEST_XDIST_WORKER" in os.environ else here) / "compiled"
    folder.mkdir(exist_ok=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)  # for child processes, which would write to the user's
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    yield folder
    del os.environ["JAX_COMPILATION_CACHE_DIR"]
    jax.config.update("jax_compilation_cache_dir", None)


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Linux gives a process 65 530 mappings of memory; each program takes some, and LLVM crashes without."""
    yield
    if _MAPPINGS.exists() and _MAPPINGS.read_bytes().count(b"\n") > 35_000:
        jax.clear_caches()
