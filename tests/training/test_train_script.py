"""train.py itself: its previews, and Ctrl-C before there is anything to save."""

import dataclasses
import signal
import types

import numpy as np
from etils import epath
from etils.epath.testing import mock_epath
from PIL import Image

import train
from moc_jax.data import prepare, read_video
from moc_jax.sampling import generate
from tests.training.processes import finish, start_python


def test_a_run_with_previews(command, tmp_path):
    settings = {"train.steps": 2, "train.preview-every": 2, "train.validate-every": 0, "sample.steps": 2}
    code, out = finish(
        command(tmp_path, *(word for name, value in settings.items() for word in (f"--{name}", str(value))))
    )
    assert code == 0, out
    assert sorted(path.name for path in (tmp_path / "previews").iterdir()) == ["00000002.mp4", "00000002.png"]
    frames = read_video(tmp_path / "previews" / "00000002.mp4", 32, 48, 12)
    assert len(frames) >= 18  # two shots or three, of nine frames
    with Image.open(tmp_path / "previews" / "00000002.png") as picture:
        assert min(picture.size) > 48


def test_previews_of_a_run_in_a_bucket_go_there(prepared_config, monkeypatch):
    """They are made on the own disk and copied whole."""
    config = dataclasses.replace(prepared_config, workdir="gs://bucket/run")
    frames = np.zeros((9, 32, 48, 3), np.uint8)
    sample = types.SimpleNamespace(video=frames, shots=[frames] * 3)
    monkeypatch.setattr(generate, "Sampler", lambda *_: lambda params, boards: [sample for _ in boards])
    preview = train.make_preview(config, prepare(prepared_config))
    done = []

    def copy(original, path, to, *, overwrite):
        assert epath.Path(path).stat().length > 100
        done.append(("copy", str(to)))

    with mock_epath(
        mkdir=lambda original, path, **_: None,
        makedirs=lambda original, path, **_: None,
        copy=copy,
        replace=lambda original, path, to: done.append(("replace", str(to))),
    ):
        preview({}, 7)
    assert done == [
        (action, f"gs://bucket/run/previews/{name}")
        for kind in ("mp4", "png")
        for action, name in (("copy", f".00000007.{kind}.part"), ("replace", f"00000007.{kind}"))
    ]


def test_ctrl_c_while_preparing_is_told_in_a_line(config_file, command, tmp_path):
    script = """
import signal, sys, time, train, moc_jax.data as data
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start with it ignored
def prepare(*arguments):
    print("preparing", flush=True)
    for _ in range(600):  # another thread may take the signal, which ends no sleep of this one
        time.sleep(0.1)
data.prepare = prepare
train.main(sys.argv[1:])
"""
    process = start_python(["-c", script, "--config", config_file, "--workdir", tmp_path], command.environment)
    while "preparing" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    code, out = finish(process)
    assert (code, out) == (130, "interrupted; what was complete before is kept\n")
