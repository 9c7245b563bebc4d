"""Videos, a config and a command that the tests of training share."""

import pytest

from moc_jax.config_json import config_to_json
from tests.data.clips import make_clip
from tests.training.processes import STEPS, environment, start_python
from tests.training.small import DATA, changed


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


@pytest.fixture(scope="session")
def config_file(prepared_config, tmp_path_factory):
    """The small config for a real process."""
    config = changed(prepared_config, train={"steps": STEPS, "checkpoint_every": 4, "validate_every": 6})
    file = tmp_path_factory.mktemp("config") / "config.json"
    file.write_text(config_to_json(config))
    return file


@pytest.fixture(scope="session")
def command(config_file, compilation_cache):
    """command(workdir, *arguments) -> what starts train.py; programs are compiled once for all of them."""

    def start(workdir, *arguments):
        return start_python(["train.py", "--config", config_file, "--workdir", workdir, *arguments], start.environment)

    start.environment = environment(compilation_cache)
    return start
