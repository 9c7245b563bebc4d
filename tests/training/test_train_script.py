"""moc-train itself: its previews, and Ctrl-C before there is anything to save."""

import dataclasses
import os
import re
import signal
import sys
import types

import jax
import numpy as np
import pytest
from etils import epath
from etils.epath.testing import mock_epath
from PIL import Image

import moc_jax.data
from moc_jax.commands import train
from moc_jax.config import ConfigError
from moc_jax.data import codec_of, prepare, read_video
from moc_jax.errors import PreviewError
from moc_jax.sampling import preview
from moc_jax.sampling.compare import prepared_scene
from moc_jax.sampling.generate import SamplingError
from moc_jax.sampling.scenes import canvas_of, make_request
from moc_jax.sampling.storyboard import StoryboardError
from moc_jax.text import build_text_encoder
from moc_jax.training.workdir import claimed
from tests.data.clips import make_clip
from tests.training.processes import finish, start_python
from tests.training.small import changed


@pytest.mark.long
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
    monkeypatch.setattr(preview, "Sampler", lambda *_: lambda params, boards: [sample for _ in boards])
    show = preview.make_preview(config, prepare(prepared_config))
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
        show({}, 7)
    assert done == [
        (action, f"gs://bucket/run/previews/{name}")
        for kind in ("mp4", "png")
        for action, name in (("copy", f".00000007.{kind}.part"), ("replace", f"00000007.{kind}"))
    ]


def test_previews_show_the_original_and_what_the_codec_makes_of_it(prepared_config, monkeypatch, tmp_path):
    """Held in memory as the few frames that are shown; without the videos, the codec's row is there all the same."""
    config, manifest = dataclasses.replace(prepared_config, workdir=str(tmp_path)), prepare(prepared_config)
    shots = [np.zeros((9, 32, 48, 3), np.uint8)] * len(manifest.split("train")[0].shots)
    sample = types.SimpleNamespace(video=shots[0], shots=shots)
    monkeypatch.setattr(preview, "Sampler", lambda *_: lambda params, boards: [sample for _ in boards])
    sheets, drawn = [], preview.contact_sheet
    monkeypatch.setattr(preview, "contact_sheet", lambda rows, *a, **k: sheets.append(rows) or drawn(rows, *a, **k))
    read = []
    monkeypatch.setattr(preview, "prepared_scene", lambda *args: read.append(1) or prepared_scene(*args))
    show = preview.make_preview(config, manifest)
    assert read == []  # a start needs none of it
    show({}, 6)
    show({}, 7)
    assert read == [1]
    sheets.pop(0)
    scene = prepared_scene(config.data, manifest, codec_of(manifest), manifest.split("train")[0])
    assert [name for name, _ in sheets[0]] == ["original", "codec", "step 7"]
    for (_, frames), whole in zip(sheets[0], (scene.original, scene.codec)):
        for few, shot in zip(frames, whole, strict=True):
            np.testing.assert_array_equal(few, shot[[0, len(shot) // 2, -1]])
    gone = dataclasses.replace(config, data=dataclasses.replace(config.data, source=("elsewhere",)))
    preview.make_preview(gone, manifest)({}, 8)
    assert [name for name, _ in sheets[1]] == ["codec", "step 8"]


def test_a_preview_needs_its_storyboards_files_no_more_and_fails_alike_on_all_processes(
    prepared_config, monkeypatch, tmp_path
):
    make_clip(tmp_path / "given.mp4", shots=1, frames_per_shot=9)
    Image.new("RGB", (48, 32), "red").save(tmp_path / "rider.png")
    files = "{caption: b, seconds: 0.75, image: rider.png}, {caption: c, video: given.mp4}"
    (tmp_path / "sb.yaml").write_text(f"caption: a\nshots: [{files}, {{caption: d, image: rider.png}}]")
    config = changed(prepared_config, train={"preview_storyboard": str(tmp_path / "sb.yaml")})
    config, manifest = dataclasses.replace(config, workdir=str(tmp_path / "run")), prepare(prepared_config)
    asked = []

    def sampler(config, codec, encoder, stop):
        def sample(params, boards):
            canvas = canvas_of(config.data, codec, config.model, config.moc)
            asked.append(make_request(boards, canvas, config.sample, build_text_encoder(config.text)))
            if len(asked) == 3:
                raise SamplingError("it holds NaN")
            shots = [np.zeros((9, 32, 48, 3), np.uint8)] * 3
            return [types.SimpleNamespace(video=shots[0], shots=shots)]

        return sample

    monkeypatch.setattr(preview, "Sampler", sampler)
    show = preview.make_preview(config, manifest)
    show({}, 1)
    for name in ("rider.png", "given.mp4", "sb.yaml"):
        (tmp_path / name).unlink()
    show({}, 2)
    jax.tree.map(np.testing.assert_array_equal, *asked)
    assert np.abs(asked[0].known.video[0, 0]).max() > 0
    with pytest.raises(PreviewError, match="it holds NaN"):
        show({}, 3)
    monkeypatch.setattr(preview, "write_video", lambda *_: 1 / 0)
    with pytest.raises(PreviewError, match="division by zero"):
        show({}, 4)
    monkeypatch.setattr("jax.process_index", lambda: 1)
    show({}, 5)
    with pytest.raises(StoryboardError, match="no such storyboard"):
        preview.make_preview(config, manifest)


def test_ctrl_c_while_preparing_is_told_in_a_line(config_file, command, tmp_path):
    script = """
import signal, sys, time, moc_jax.data as data
from moc_jax.commands import train
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start with it ignored
def prepare(*arguments, **options):
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
    assert (code, out) == (130, "interrupted; what was completed before is kept\n")


# ------------------------------------------------------------------------------------------------ the workdir


@pytest.fixture
def start_here(config_file, monkeypatch, capsys):
    """start_here(*arguments) -> (exit code, messages) of train.py in this process; no video may be opened."""

    def run(*arguments):
        monkeypatch.setattr(moc_jax.data, "prepare", lambda *_, **__: pytest.fail("it began to prepare the data"))
        with pytest.raises(SystemExit) as ended:
            train.main(["--config", str(config_file), *map(str, arguments)])
        return ended.value.code, capsys.readouterr().err

    return run


@pytest.mark.parametrize(
    ("workdir", "message"),
    [
        ("file", "file is a file; give another name"),
        ("file/run", "file is a file; give another name"),
        ("x" * 300, "a name in it is too long"),
        ("gs://bucket/run", "pip install 'moc_jax[gcs]'"),
        ("gs:/bucket/run", "lacks a slash"),
        ("link/run.lock", "run.lock"),
    ],
)
def test_a_workdir_that_can_be_none_is_refused_before_any_video_is_opened(
    start_here, tmp_path, monkeypatch, workdir, message
):
    monkeypatch.setitem(sys.modules, "gcsfs", None)  # as where it is not installed
    (tmp_path / "file").write_text("precious")
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / "run.lock").symlink_to(tmp_path / "file")
    given = workdir if ":/" in workdir else "link" if workdir.startswith("link") else workdir
    code, err = start_here("--workdir", given if ":/" in given else f"{tmp_path}/{given}")
    assert code == 2, err
    assert message in err
    assert err.startswith("error: ")
    assert (tmp_path / "file").read_text() == "precious"


def test_the_same_command_twice_is_refused_by_the_first_ones_name(start_here, tmp_path):
    with claimed(str(tmp_path)):
        code, err = start_here("--workdir", tmp_path)
        assert (tmp_path / "run.lock").exists()
    assert code == 1
    assert re.match(rf"error: {tmp_path} is in use by process {os.getpid()} on host \S+, since \d{{4}}-", err)


def test_a_data_cache_that_can_be_none_is_refused_before_any_video_is_opened(prepared_config, monkeypatch, tmp_path):
    module = sys.modules[prepare.__module__]
    monkeypatch.setattr(module, "find_sources", lambda *_: pytest.fail("it looked for videos"))
    (tmp_path / "file").write_text("precious")
    for cache, message in (
        (tmp_path / "file", "is a file; give another name"),
        (tmp_path / ("x" * 300), "a name in it is too long"),
        ("s3://bucket/cache", "is .*; addresses of s3:// can't be used here: give a path or a gs:// address"),
        (f"{tmp_path}/a\0b", ""),
    ):
        with pytest.raises(ConfigError, match=rf"data\.cache .*{message}"):
            prepare(changed(prepared_config, data={"cache": str(cache)}))


def test_prepared_data_is_used_from_a_disk_that_is_read_only(prepared_config, monkeypatch):
    prepare(prepared_config)
    module = sys.modules[prepare.__module__]
    monkeypatch.setattr(module, "prove_folder", lambda *_, **__: pytest.fail("it asked to write"))
    prepare(prepared_config)


def test_what_killed_runs_left_in_the_data_cache_is_removed(prepared_config, tmp_path):
    """Also of settings or videos that are others now."""
    (tmp_path / ".0123456789abcdef.partial" / "deep").mkdir(parents=True)
    (tmp_path / ".theirs.partial").mkdir()
    manifest = prepare(changed(prepared_config, data={"cache": str(tmp_path)}))
    there = {name.partition("-")[0] for name in os.listdir(tmp_path)}
    assert there == {
        ".lock",
        ".theirs.partial",
        ".work",
        "captions",
        "codecs",
        "encoded",
        "waiting",
        manifest.folder.name,
    }
