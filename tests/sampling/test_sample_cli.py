"""sample.py as a user calls it, in this process, on a checkpoint of a tiny model."""

import dataclasses
import json
import os
import re
import signal
import sys
import time

import av
import jax
import numpy as np
import pytest
from PIL import Image

from moc_jax.checkpoint import Checkpoints, saved_config
from moc_jax.checkpoint_names import CheckpointError
from moc_jax.cli import clean_exit
from moc_jax.codecs import CodecMismatch
from moc_jax.commands import sample, videos
from moc_jax.commands.sample_arguments import SAMPLE, Arguments
from moc_jax.config import AttentionConfig, ConfigError, PcaConfig, Umt5Config, WanVaeConfig
from moc_jax.data import codec_of, prepare
from moc_jax.digest import tree_digests, weights_digest
from moc_jax.files import TakenError
from moc_jax.provenance import read_provenance
from moc_jax.sampling.generate import Sampler
from moc_jax.sampling.storyboard import StoryboardError, load_storyboard, storyboard_digest
from tests.data.small import make_videos, small_config
from tests.sampling.worlds import CONFIG, make_codec, make_params
from tests.training.processes import environment, finish, start_python

BOARD = "caption: a street\nshots:\n  - {caption: a van, seconds: 0.4}\n  - {caption: night, seconds: 0.7}\n"


def save_checkpoint(folder, *, config=CONFIG, params=None, codec=None, step=3, data=""):
    checkpoints = Checkpoints(str(folder / "checkpoints"), config.train)
    checkpoints.save(
        step,
        {"params": jax.tree.map(jax.numpy.asarray, make_params() if params is None else params)},
        config=config,
        codec_state=(codec or make_codec()).state(),
        data_state={"data": data},
    )
    checkpoints.close()
    return folder


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("run"))


@pytest.fixture
def boards(tmp_path):
    (tmp_path / "one.yaml").write_text(BOARD)
    (tmp_path / "two.yaml").write_text(BOARD.replace("night", "day").replace("0.7", "0.1"))
    return tmp_path


@pytest.fixture
def no_sampling(monkeypatch):
    """For mistakes that must be found before anything is computed."""
    monkeypatch.setattr(Sampler, "__call__", lambda *args, **kwargs: pytest.fail("it began to sample"))


def call(run_folder, *words):
    sample.main(["--checkpoint", str(run_folder), *map(str, words)])


def read(path):
    with av.open(str(path)) as file:
        frames = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
        return np.stack(frames), float(file.streams.video[0].average_rate)


def test_from_checkpoint_and_storyboard_to_video_and_pictures(run_folder, boards, capsys, monkeypatch):
    """First beside files that appear meanwhile, then in place of one."""
    words = ["--storyboard", boards / "one.yaml", "--out", boards / "a.mp4", "--seed", 3]
    pictures = ["--contact-sheet", boards / "sheet.png", "--routing-picture", boards / "routes.png"]
    pictures += ["--routing-atlas", boards / "atlas.html"]
    routing, there = Sampler.routing, [boards / name for name in ("a.mp4", "sheet.png", "routes.png", "atlas.html")]

    def routing_while_others_write(*args):
        for path in there:
            path.write_text("theirs")
        return routing(*args)

    monkeypatch.setattr(Sampler, "routing", routing_while_others_write)
    with pytest.raises(TakenError) as caught:
        call(run_folder, *words, *pictures)
    assert [path.read_text() for path in there] == ["theirs"] * 4
    for path in there:
        ours = path.with_stem(f"{path.stem}-2")
        assert f"{path} was written by another process meanwhile, and stays; this one is {ours}" in str(caught.value)
    for name in ("sheet-2.png", "routes-2.png"):
        with Image.open(boards / name) as image:
            assert min(image.size) > 100
    assert '"levels": [0.9, 0.5, 0.1]' in (boards / "atlas-2.html").read_text()
    assert "frames at 12 fps" not in capsys.readouterr().out

    call(run_folder, *words, "--overwrite")
    assert f"{boards / 'a.mp4'}: 2 shots, 14 frames at 12 fps" in capsys.readouterr().out
    video, fps = read(boards / "a.mp4")
    assert video.shape == (14, 16, 32, 3)  # 5 and 9 frames
    assert fps == 12
    assert (boards / "a.mp4").read_bytes() == (boards / "a-2.mp4").read_bytes()  # same seed, same bytes

    made, digests = read_provenance(boards / "a.mp4"), tree_digests(make_params())
    assert (made.weights, made.step, made.seed) == (weights_digest(digests), 3, 3)
    assert made.storyboard == storyboard_digest(dataclasses.replace(load_storyboard(boards / "one.yaml"), seed=3))
    assert (made.settings["sample"]["steps"], made.settings["moc"]["top_k"]) == (3, 1)
    assert not made.partly_given


def test_a_filter_may_refuse_a_caption(run_folder, boards, no_sampling):
    answer = 'import sys\nfor line in sys.stdin: print(\'{"allowed": false, "reason": "dark"}\', flush=True)'
    (boards / "filter.py").write_text(answer)
    words = ["--out", boards / "a.mp4", "--caption-filter", f"{sys.executable} '{boards / 'filter.py'}'"]
    with pytest.raises(StoryboardError, match=r"one.yaml: caption is refused: dark"):
        call(boards / "no run", "--storyboard", boards / "one.yaml", *words)  # before anything is read
    assert not (boards / "a.mp4").exists()


def test_what_shots_of_generations_say_is_not_dropped(boards, no_sampling):
    (boards / "pins.yaml").write_text(
        "caption: x\nshots: [{caption: a, seconds: 1}, {caption: b, seconds: 1, remember: [1]}]"
    )
    with pytest.raises(StoryboardError, match=r"pins.yaml: shots\[1\].remember is for a generation.*give --extend"):
        call(boards / "no run", "--storyboard", boards / "pins.yaml", "--out", boards / "a.mp4")


def test_a_long_storyboard_is_named_before_anything_is_loaded(boards, capsys):
    """Whatever bytes its name has."""
    name = boards / os.fsdecode(b"caf\xe9.yaml")
    name.write_text("caption: a\nshots:\n" + "- {caption: b, seconds: 1}\n" * 1200)
    with pytest.raises(CheckpointError):
        call(boards / "no run", "--storyboard", name, "--out", boards / "a.mp4")
    assert r"caf\udce9.yaml: 1,200 shots" in capsys.readouterr().out


@pytest.mark.long
def test_several_storyboards_make_a_folder(run_folder, boards):
    """Each over four devices."""
    out = boards / "videos"
    call(
        run_folder,
        "--storyboard",
        boards / "one.yaml",
        boards / "two.yaml",
        "--out",
        out,
        "--contact-sheet",
        out,
        "--dense",
        "--mesh.data",
        2,
        "--mesh.context",
        4,
    )
    assert sorted(p.name for p in out.iterdir()) == ["one.mp4", "one.png", "two.mp4", "two.png"]
    assert len(read(out / "two.mp4")[0]) == 6


def test_every_setting_takes_its_place():
    args = Arguments(
        checkpoint="run",
        storyboard=(),
        out="x.mp4",
        dense=True,
        top_k=2,
        chunk=3,
        solver="dpm++",
        steps=7,
        guidance=3.0,
        shift=2.0,
        order="shots",
        history_noise=0.1,
        attention=AttentionConfig(backend="xla"),
    )
    config = sample.configure(CONFIG, 1, args)
    assert config.attention.backend == "xla"
    assert (config.moc.mode, config.moc.top_k, config.moc.chunk.size, config.moc.chunk.unit) == (
        "dense",
        2,
        3,
        "frames",
    )
    assert config.sample == dataclasses.replace(
        CONFIG.sample, solver="dpm++", steps=7, guidance=3.0, shift=2.0, order="shots", history_noise=0.1
    )
    plain = Arguments(checkpoint="run", storyboard=(), out="x.mp4")
    assert CONFIG.attention.backend == "reference"  # where it was trained; here, what suits this machine
    assert sample.configure(CONFIG, 1, plain) == dataclasses.replace(CONFIG, attention=AttentionConfig())


def test_public_weights_may_lie_elsewhere():
    model = dataclasses.replace(CONFIG.model, latent_channels=16, text_dim=4096)
    codec, text = WanVaeConfig(version="2.1", weights="there"), Umt5Config(weights="there", tokenizer="own")
    config = dataclasses.replace(CONFIG, model=model, codec=codec, text=text)
    args = Arguments(checkpoint="run", out="a.mp4", weights="here")
    found = sample.configure(config, 1, args)
    assert (found.codec.weights, found.text.weights, found.text.tokenizer) == ("here", "here", "own")
    assert sample.configure(CONFIG, 1, args).codec == CONFIG.codec


def test_help_shows_the_values_of_the_checkpoint_beside_it(run_folder, capsys):
    with pytest.raises(SystemExit) as caught:
        sample.main(["--help", "--checkpoint", str(run_folder)])
    assert caught.value.code == 0
    text = " ".join(re.sub(r"[│─╭╮╰╯]", " ", capsys.readouterr().out).split())
    config, step = saved_config(str(run_folder))
    moc = config.moc_at(step - 1)
    values = {name.replace("_", "-"): getattr(config.sample, name) for name in SAMPLE}
    for name, value in {**values, "top-k": moc.top_k, "chunk": moc.chunk.size, "step": step}.items():
        assert re.search(rf"--{name} (?:(?!--).)*default: {re.escape(str(value))}\)", text), (name, value)
    assert re.search(r"--out (?:(?!--).)*\(required\)", text)


@pytest.mark.parametrize("words", [["--checkpoint"], ["--step", "x"], ["--checkpoint", "a", "--step"]])
def test_help_comes_whatever_stands_beside_it(words, capsys):
    with pytest.raises(SystemExit) as caught:
        sample.main(["--help", *words])
    assert caught.value.code == 0
    assert "--checkpoint" in capsys.readouterr().out


def test_help_explains_each_setting(capsys):
    with pytest.raises(SystemExit) as caught:
        sample.main(["--help"])
    assert caught.value.code == 0
    text = " ".join(re.sub(r"[│─╭╮╰╯]", " ", capsys.readouterr().out).split())
    for field in dataclasses.fields(Arguments):
        assert f"--{field.name.replace('_', '-')}" in text
    for phrase in ("Chunks that each query picks", "Replace files that exist", "Which checkpoint"):
        assert phrase in text


@pytest.mark.usefixtures("no_sampling")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--top-k", "-1"], "moc.top_k is -1"),
        (["--chunk", "0"], "moc.chunk.size is 0"),
        (["--steps", "0"], "sample.steps is 0"),
        (["--history-noise", "1.5"], "sample.history_noise is 1.5"),
        (["--shift", "nan"], "sample.shift is nan"),
        (["--seed", "5000000000"], "seed is 5000000000; it must lie in 0..4294967295"),
        (["--out", "video.avi"], "video.avi must end in .mp4"),
        (["--contact-sheet", "sheet.jpg"], "sheet.jpg must end in .png"),
    ],
)
def test_impossible_settings_are_named_before_the_checkpoint_is_opened(boards, words, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        call("no-run", "--storyboard", boards / "one.yaml", "--out", boards / "a.mp4", *words)


@pytest.mark.usefixtures("no_sampling")
def test_dense_attention_has_no_routing_to_picture(run_folder, boards):
    with pytest.raises(ConfigError, match="dense attention routes nothing"):
        call(
            *(run_folder, "--storyboard", boards / "one.yaml", "--out", boards / "a.mp4"),
            *("--dense", "--routing-picture", "r.png"),
        )


@pytest.mark.usefixtures("no_sampling")
@pytest.mark.parametrize("words", [("--lora", "x"), ("--lora-scale", "0.5")])
def test_a_run_takes_no_adapters_from_elsewhere(tmp_path, boards, words):
    with pytest.raises(ConfigError, match=f"{words[0]} {words[1]}: .* holds a run; this is for public weights"):
        call(tmp_path, "--storyboard", boards / "one.yaml", "--out", boards / "a.mp4", *words)


@pytest.mark.usefixtures("no_sampling")
def test_nothing_is_overwritten_unasked(run_folder, boards):
    (boards / "a.mp4").write_bytes(b"precious")
    with pytest.raises(ConfigError, match=r"a\.mp4 exists; give another name, or --overwrite"):
        call(run_folder, "--storyboard", boards / "one.yaml", "--out", boards / "a.mp4")
    assert (boards / "a.mp4").read_bytes() == b"precious"
    (boards / "sub").mkdir()
    (boards / "sub" / "one.yaml").write_text(BOARD)
    with pytest.raises(ConfigError, match=r"two storyboards would both be written to .*one\.mp4"):
        call(run_folder, "--storyboard", boards / "one.yaml", boards / "sub" / "one.yaml", "--out", boards / "videos")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "x.mp4"], "x.mp4 is one file, but there are 2 storyboards; give a folder"),
        (["--out", "videos", "--contact-sheet", "x.png"], "x.png is one file, but there are 2 storyboards"),
        (["--out", "one.yaml"], "one.yaml is a file; give another name"),
        (["--out", "one.yaml/below/videos"], "one.yaml is a file; give another name"),
    ],
)
def test_places_that_cannot_be_written_are_named_before_the_checkpoint_is_opened(boards, monkeypatch, words, message):
    monkeypatch.chdir(boards)
    with pytest.raises(ConfigError, match=re.escape(message)):
        call("no-run", "--storyboard", "one.yaml", "two.yaml", *words)
    assert sorted(p.name for p in boards.iterdir()) == ["one.yaml", "two.yaml"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "x" * 252 + ".mp4"], "--out x"),
        (
            ["--out", "videos/a.mp4", "--contact-sheet", "one.yaml/sheet.png"],
            "--contact-sheet one.yaml/sheet.png cannot",
        ),
        (["--out", "gs://bucket/a.mp4"], "--out gs:/bucket/a.mp4 is an address; give a path of a file system"),
        (["--out", "a.mp4", "--routing-picture", "folder/r.png", "--overwrite"], "it is a folder; give another name"),
    ],
)
def test_single_files_that_cannot_be_written_are_named_first_too(boards, monkeypatch, words, message):
    monkeypatch.chdir(boards)
    (boards / "folder" / "r.png").mkdir(parents=True)
    (boards / "folder" / "r.png" / "one.png").mkdir()
    with pytest.raises(ConfigError, match=re.escape(message)):
        call("no-run", "--storyboard", "one.yaml", *words)
    assert sorted(p.name for p in boards.iterdir()) == ["folder", "one.yaml", "two.yaml"]


@pytest.mark.long
def test_sigterm_ends_sampling_with_a_line_and_without_a_file(run_folder, boards):
    words = ["--storyboard", boards / "one.yaml", "--out", boards / "a.mp4", "--steps", 10**5, "--solver", "euler"]
    script = "import moc_jax.progress; moc_jax.progress.EVERY = 0.2; from moc_jax.cli import sample; sample()"
    process = start_python(["-c", script, "--checkpoint", run_folder, *words], environment(boards / "compiled"))
    while not re.match(r"sampling: [1-9][\d,]* of 100,000 steps", process.stdout.readline()):
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    begin = time.monotonic()
    code, out = finish(process)
    assert code == 143, out
    assert out.endswith("terminated; what was completed before is kept\n")
    assert time.monotonic() - begin < 10
    assert not list(boards.glob("*.mp4")) + list(boards.glob(".*"))


def test_a_training_scene_is_shown_with_its_scores(tmp_path, capsys, monkeypatch):
    make_videos(tmp_path, film=(9, 14))
    data = small_config(tmp_path).data
    config = dataclasses.replace(CONFIG, data=dataclasses.replace(data, height=16, width=32))
    manifest = prepare(config)
    folder = save_checkpoint(tmp_path / "run", config=config, codec=codec_of(manifest), data=manifest.fingerprint)
    shown = {}
    drawn = videos.contact_sheet
    monkeypatch.setattr(
        videos, "contact_sheet", lambda *args, **kwargs: shown.update(kwargs, rows=args[0]) or drawn(*args, **kwargs)
    )
    words = ["--training-scene", 0, "--out", tmp_path, "--contact-sheet", tmp_path / "sheet.png"]
    call(folder, *words)
    out = capsys.readouterr().out
    scores = re.search(r"own reconstruction: .*by shot: (\S+), (\S+)\)", out).groups()
    assert re.search(r"PSNR of the reconstruction against the original: [\d.]+ dB", out)
    assert [name for name, _ in shown["rows"]] == ["original", "codec", "sample"]
    assert [[len(shot) for shot in shots] for _, shots in shown["rows"]] == [[9, 13]] * 3
    assert shown["notes"] == [f"PSNR {score} dB" for score in scores]
    assert len(read(tmp_path / "scene-0.mp4")[0]) == 22  # 9 and 13 frames
    with pytest.raises(ConfigError, match=r"scene-0\.mp4 exists"):
        call(folder, *words)


@pytest.mark.long
def test_an_episode_has_a_video_for_each_shot(run_folder, tmp_path, monkeypatch, capsys):
    """As StoryMem and EntityBench name them; a scene of HoloCine's is one video."""
    monkeypatch.setattr("moc_jax.stories.PROMPT_SECONDS", 0.5)
    scenes = [{"scene_num": 1, "video_prompts": ["a", "b"], "cut": [True, False]}, {"video_prompts": ["c"]}]
    (tmp_path / "episode.json").write_text(json.dumps({"story_overview": "all", "scenes": scenes}))
    holocine = {"global_caption": "x", "shot_captions": ["one", "two"], "num_frames": 16}
    (tmp_path / "scene.json").write_text(json.dumps(holocine))
    out = tmp_path / "out"
    call(run_folder, "--storyboard", tmp_path / "episode.json", "--out", out)
    names = ["01_01.mp4", "01_02.mp4", "02_01.mp4"]
    assert sorted(path.name for path in (out / "episode").iterdir()) == names
    assert [len(read(out / "episode" / name)[0]) for name in names] == [5, 5, 5]  # half a second is six
    assert f"{out / 'episode'}: 3 shots, 15 frames at 12 fps" in capsys.readouterr().out
    call(run_folder, "--storyboard", tmp_path / "scene.json", "--out", tmp_path / "scene.mp4", "--steps", 1)
    assert len(read(tmp_path / "scene.mp4")[0]) == 10  # twice half a second
    with pytest.raises(ConfigError, match=r"episode/01_01.mp4 exists"):
        call(run_folder, "--storyboard", tmp_path / "episode.json", "--out", out)
    with pytest.raises(ConfigError, match=r"x.mp4 is one file, but there are 3 videos of single shots; give a folder"):
        call(run_folder, "--storyboard", tmp_path / "episode.json", "--out", tmp_path / "x.mp4")


@pytest.mark.usefixtures("no_sampling")
def test_a_bad_storyboard_is_named_before_the_checkpoint_is_opened(boards):
    (boards / "one.yaml").write_text(BOARD.replace("seconds", "secs"))
    with pytest.raises(StoryboardError, match=r"one\.yaml: unknown field shots\[0\]\.secs"):
        call(boards / "no-run", "--storyboard", boards / "one.yaml", "--out", boards / "a.mp4")


@pytest.mark.usefixtures("no_sampling")
@pytest.mark.parametrize("kind", ["codec", "model"])
def test_checkpoint_of_another_codec_or_model(tmp_path, boards, kind):
    other = {
        "codec": {"codec": make_codec(PcaConfig(channels=4, whiten=0.25))},
        "model": {"config": dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, dim=48))},
    }[kind]
    folder = save_checkpoint(tmp_path / "run", **other)
    parts = {"codec": ["0.25", "0.5"], "model": ["of another model", "[2, 16] there and [2, 24] in this one"]}[kind]
    with pytest.raises((CheckpointError, CodecMismatch)) as caught:
        call(folder, "--storyboard", boards / "one.yaml", "--out", boards / "a.mp4")
    for part in parts:
        assert part in str(caught.value)
    assert not (boards / "a.mp4").exists()


def test_a_broken_checkpoint_writes_no_video(tmp_path, boards, capsys):
    params = jax.tree.map(lambda w: np.full_like(w, np.nan), make_params())
    folder = save_checkpoint(tmp_path / "run", params=params)
    with pytest.raises(SystemExit) as caught, clean_exit():
        call(folder, "--storyboard", boards / "one.yaml", "--out", boards / "a.mp4")
    assert caught.value.code == 1
    assert re.search(r"error: .*one\.yaml: the sample holds NaN", capsys.readouterr().err)
    assert not (boards / "a.mp4").exists()
