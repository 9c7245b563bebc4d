"""Compiling is most of what these tests do: what one of them compiled, the others (and their child processes) take."""

import jax
import pytest

from tests.data.clips import make_clip
from tests.training.small import DATA, changed


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compiled")
    jax.config.update("jax_compilation_cache_dir", str(folder))
    yield folder
    jax.config.update("jax_compilation_cache_dir", None)


@pytest.fixture(scope="session")
def clips(tmp_path_factory):
    """Two training videos and a held-out one."""
    folder = tmp_path_factory.mktemp("clips")
    for name, shots, seed in (("train/a", 3, 1), ("train/b", 2, 2), ("held_out/c", 2, 3)):
        (folder / name).parent.mkdir(exist_ok=True)
        make_clip(folder / f"{name}.mp4", shots=shots, seed=seed, frames_per_shot=9)
    return folder


@pytest.fixture(scope="session")
def prepared_config(clips, tmp_path_factory):
    """The small config, for these videos."""
    data = {
        "source": (str(clips / "train"),),
        "validation_source": (str(clips / "held_out"),),
        "cache": str(tmp_path_factory.mktemp("cache")),
    }
    return changed(DATA, data=data)
