"""Folders of public weights in a checkpoint's place: what they say, what is missing in them, and videos from them."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from moc_jax import processes
from moc_jax.commands import sample, videos
from moc_jax.config import ConfigError
from moc_jax.sampling.storyboard import StoryboardError
from moc_jax.tensor_files.places import EXPERTS
from moc_jax.weights import WeightsError, convert, open_weights
from moc_jax.weights.pipelines import NEGATIVE_PROMPT, open_pipeline
from tests.sampling.test_sample_cli import BOARD, read
from tests.weights.pipelines import EULER, UNIPC, write_pipeline

pytest.importorskip("sentencepiece")
pytest.importorskip("ftfy")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_pipeline(tmp_path_factory.mktemp("theirs"))


@pytest.fixture
def board(tmp_path):
    (tmp_path / "one.yaml").write_text(BOARD)
    return tmp_path / "one.yaml"


@pytest.fixture
def no_devices(monkeypatch):
    """For mistakes that must be found before any is touched."""
    monkeypatch.setattr(processes, "wake_devices", lambda *args: pytest.fail("devices were woken"))


def call(folder, board, *words):
    small = ["--height", 64, "--width", 96, "--steps", 2]
    given = ["--checkpoint", folder, "--storyboard", board, "--out", board.parent / "out.mp4", *small, *words]
    sample.main(list(map(str, given)))
    return read(board.parent / "out.mp4")


@pytest.mark.parametrize(
    ("kind", "names", "expected"),
    [
        ("t2v", "diffusers", ("unipc", "auto", 50, 5.0, 0.0, 3.0, 480, 832, 16.0)),
        ("t2v", "original", ("unipc", "wan-unipc", 50, 5.0, 0.0, 5.0, 480, 832, 16.0)),
        ("ti2v-5b", "diffusers", ("unipc", "auto", 50, 5.0, 0.0, 3.0, 704, 1280, 24.0)),
        ("t2v-a14b", "original", ("unipc", "wan-unipc", 40, 4.0, 3.0, 12.0, 480, 832, 16.0)),
        ("i2v-a14b", "original", ("unipc", "wan-unipc", 40, 3.5, 3.5, 5.0, 480, 832, 16.0)),
    ],
)
def test_settings_are_the_folders_or_as_published(tmp_path, kind, names, expected):
    config = open_pipeline(str(write_pipeline(tmp_path / "theirs", kind, names))).config
    s, data = config.sample, config.data
    steering = s.guidance, s.guidance_low
    assert (s.solver, s.schedule, s.steps, *steering, s.shift, data.height, data.width, data.fps) == expected
    assert (s.whole_timesteps, s.negative_prompt, config.moc.mode) == (True, NEGATIVE_PROMPT, "dense")
    assert config.codec.version == ("2.2" if kind == "ti2v-5b" else "2.1")
    assert config.moc.chunk.size == (2 if kind == "ti2v-5b" else 1)


def test_one_expert_of_i2v_is_refused(tmp_path):
    for names, (high, low) in EXPERTS.items():
        place = write_pipeline(tmp_path / names, "i2v-a14b", names)
        with pytest.raises(ConfigError, match=f"the other's folder is missing; name one with both: .*{high} and {low}"):
            open_pipeline(str(place / low))
    shutil.rmtree(tmp_path / "diffusers" / "transformer_2")
    (tmp_path / "diffusers" / "model_index.json").unlink()
    with pytest.raises(WeightsError, match=r"has transformer alone, an expert of .* I2V A14B; transformer_2 is"):
        open_weights(tmp_path / "diffusers")


def test_a_boundary_beside_the_teams_folders_changes_no_schedule(tmp_path):
    place = write_pipeline(tmp_path / "theirs", "t2v-a14b", "original")
    convert(open_weights(place), tmp_path / "ours", names="original")
    assert open_pipeline(str(tmp_path / "ours")).config.sample == open_pipeline(str(place)).config.sample


def test_the_scheduler_decides(tmp_path):
    s = open_pipeline(str(write_pipeline(tmp_path / "euler", scheduler=EULER))).config.sample
    assert (s.solver, s.schedule, s.shift) == ("euler", "auto", 7.0)
    for changed, message in (
        ({"_class_name": "DDIMScheduler"}, "scheduler_config.json is of a 'DDIMScheduler'; supported are UniPC"),
        ({"solver_order": 3}, "says solver_order 3; supported is 2"),
        ({"flow_shift": "3"}, "says flow_shift '3'; it must be a number"),
    ):
        (tmp_path / "euler" / "scheduler" / "scheduler_config.json").write_text(json.dumps(UNIPC | changed))
        with pytest.raises(ConfigError, match=message):
            open_pipeline(str(tmp_path / "euler"))


@pytest.mark.usefixtures("no_devices")
@pytest.mark.parametrize(
    ("gone", "message", "note"),
    [
        ("vae", "weights of Wan's autoencoder|file of Wan's autoencoder", "--codec"),
        ("text_encoder", "file of umT5's encoder", "--text-encoder"),
        ("tokenizer", r"no spiece\.model of umT5's tokenizer", "--tokenizer"),
        ("transformer/diffusion_pytorch_model.safetensors", r"no \.safetensors and no \.pth file", ""),
    ],
)
def test_what_is_missing_is_named_before_any_device_is_touched(folder, board, tmp_path, gone, message, note):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (shutil.rmtree if (copy / gone).is_dir() else type(copy).unlink)(copy / gone)
    with pytest.raises((ConfigError, WeightsError), match=message) as caught:
        call(copy, board)
    assert note in "".join(getattr(caught.value, "__notes__", []))


@pytest.mark.usefixtures("no_devices")
def test_what_is_wrong_is_named_before_any_device_is_touched(folder, board, capsys):
    board.write_text(BOARD.replace("night", "many words " * 300))
    with pytest.raises(StoryboardError, match=r"shots\[1\]\.caption: the caption .* tokens .*: Wan reads 512 at most"):
        call(folder, board)
    board.write_text(BOARD.replace("0.4", "0.01"))
    with pytest.raises(StoryboardError, match=r"shots\[0\]: seconds = 0\.01 is less than a frame at 16 frames"):
        call(folder, board)
    for words, message in (
        (["--step", 3], "--step 3: .* holds public weights, which have none"),
        (["--base", folder], "--base .*: .* holds public weights, which have none"),
        (["--adapters", "apart"], "--adapters apart: .* holds public weights, which have none"),
        (["--lora-scale", 0.5], r"--lora-scale 0\.5 scales the adapters of --lora, which is not given"),
        (["--dense", "--routed"], "give --dense or --routed"),
        (["--routing-picture", board.parent / "a.png"], "--routing-picture: dense attention routes nothing; drop it$"),
        (["--dense-layers", 0, 5], r"moc\.dense_layers = \[0, 5\]"),
        (["--height", 50], r"data\.height = 50 does not divide by 16"),
        (["--codec", folder / "transformer"], "isn't an? .*autoencoder"),
    ):
        with pytest.raises(ConfigError, match=message):
            call(folder, board, *words)
    with pytest.raises(SystemExit, match="2"):
        call(folder, board, "--lora", folder, "--lora-scale", "nan")
    assert "lora_scale is nan; it must lie in -1000000..1000000" in capsys.readouterr().err
    for words in (["--step", 3], ["--base", folder]):
        given = ["--extend", board.parent / "film", "--checkpoint", folder, "--storyboard", board, *words]
        with pytest.raises(ConfigError, match=f"{words[0]} .* holds public weights, which have none"):
            sample.main(list(map(str, given)))


def test_the_licence_is_shown_once_where_weights_are_opened(folder, board, monkeypatch, capsys):
    monkeypatch.setattr(processes, "wake_devices", lambda *args: None)
    monkeypatch.setattr(videos, "make_videos", lambda *args: board.with_name("out.mp4").touch())
    monkeypatch.setattr("tests.sampling.test_public.read", lambda path: None)
    call(folder, board)
    assert capsys.readouterr().out.count("licence: Apache-2.0 for what the Wan team published") == 1


def test_no_device_is_touched_before_all_is_looked_at(folder, board):
    """On a platform that is not there, whatever touched a device would fail."""
    board.write_text(BOARD.replace("night", "many words " * 300))
    words = ["--checkpoint", folder, "--storyboard", board, "--out", board.parent / "out.mp4"]
    environment = os.environ | {"JAX_PLATFORMS": "tpu"}
    done = subprocess.run(
        [sys.executable, "sample.py", *map(str, words)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "shots[1].caption: the caption" in done.stderr


@pytest.mark.long
def test_a_video_from_a_folder_of_diffusers_and_of_the_team(folder, board, tmp_path):
    """The same numbers in other files, and what isn't there named by options; all settings of moc work."""
    words = ["--schedule", "auto", "--shift", 3, "--seed", 3, "--dense-layers", 1]
    words += ["--routed", "--dense-first-steps", 1, "--top-k-schedule", "0:1"]
    video, fps = call(folder, board, *words)
    assert (video.shape, fps) == ((18, 64, 96, 3), 16)
    team = write_pipeline(tmp_path / "team", names="original")
    shutil.rmtree(team / "google")
    again, _ = call(team, board, *words, "--overwrite", "--tokenizer", folder / "tokenizer")
    np.testing.assert_array_equal(again, video)
    dense, _ = call(folder, board, *words, "--overwrite", "--dense-last-steps", 1)
    assert (dense != video).any()
    # Split over devices by the rules of training.
    split, _ = call(folder, board, *words, "--overwrite", "--mesh.data", 1, "--mesh.fsdp", 4, "--mesh.tensor", 2)
    assert np.abs(split.astype(int) - video.astype(int)).mean() < np.abs(dense.astype(int) - video.astype(int)).mean()


def test_help_shows_the_values_of_the_folder_beside_it(folder, capsys):
    with pytest.raises(SystemExit):
        sample.main(["--help", "--checkpoint", str(folder)])
    text = " ".join(capsys.readouterr().out.split())
    assert "(default: 832)" in text
