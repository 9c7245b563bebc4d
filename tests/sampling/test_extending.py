"""moc-sample --extend as a user calls it, on a checkpoint of a tiny model."""

import pytest
from PIL import Image

from moc_jax.checkpoint_names import CheckpointError
from moc_jax.commands import sample, shots
from moc_jax.commands.extending import ask
from moc_jax.commands.sample_arguments import Extending
from moc_jax.config import ConfigError
from moc_jax.data import read_video
from moc_jax.files import TakenError
from moc_jax.provenance import read_provenance
from moc_jax.sampling.generation import GenerationError, resume
from moc_jax.sampling.storyboard import StoryboardError, load_storyboard
from moc_jax.training.lock import Lock, LockError
from tests.sampling.test_sample_cli import save_checkpoint
from tests.sampling.test_shot_by_shot import config_with, new

BOARD = "caption: a street\nshots:\n  - {caption: a van, seconds: 0.4}\n  - {caption: night, seconds: 0.1}\n"
MORE = "caption: later\nshots:\n  - {cut: false, seconds: 0.1}\n  - {caption: a van, seconds: 0.4}\n"


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("run"), config=config_with())


@pytest.fixture(scope="module")
def film(tmp_path_factory, run_folder):
    """Begun and extended."""
    folder = tmp_path_factory.mktemp("film")
    (folder / "one.yaml").write_text(BOARD)
    (folder / "more.yaml").write_text(MORE)
    call("--checkpoint", run_folder, "--storyboard", folder / "one.yaml", "--extend", folder / "film", "--steps", 2)
    call("--extend", folder / "film", "--storyboard", folder / "more.yaml", "--contact-sheet", folder / "sheet.png")
    return folder


def call(*words):
    sample.main([str(word) for word in words])


@pytest.mark.long
def test_begun_extended_and_run_again(film, capsys, monkeypatch):
    folder = film / "film"
    assert sorted(path.name for path in folder.iterdir()) == ["generation.json", "shots", "video.mp4"]
    assert len(read_video(folder / "video.mp4", 16, 32, 12.0)) == 5 + 1 + 1 + 5
    assert read_provenance(folder / "video.mp4").step == 3
    with Image.open(film / "sheet.png") as sheet:
        assert sheet.size == (28 * 2 + 4 * 204 - 4, 28 * 2 + 124)
    before = {path.name: path.read_bytes() for path in (folder / "shots").iterdir()}
    joined = shots.join_videos
    words = "--storyboard", film / "more.yaml", "--contact-sheet", film / "new.png"
    with monkeypatch.context() as patched:
        patched.setattr(shots, "join_videos", lambda *args: joined(*args) or (film / "new.png").write_text("theirs"))
        with pytest.raises(TakenError, match=r"new.png .* this one is .*new-2.png"):
            call("--extend", folder, *words)  # as a scheduler does
    assert (film / "new.png").read_text() == "theirs"
    assert "ends with these shots already" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in (folder / "shots").iterdir()} == before

    call("--extend", folder, "--redo", 1)
    assert "shot 1: read by shots 2" in capsys.readouterr().out
    assert {path.name for path in (folder / "shots").iterdir()} == {*before, "0001-2.npz", "0001-2.mp4"}
    call("--extend", folder, "--redo", 2, "--redo-readers")
    assert "done again, too" in capsys.readouterr().out
    generation = resume(folder)
    assert [generation.take(shot) for shot in range(4)][:2] == [2, 2]
    assert generation.take(3) == 2

    for words, message in (
        (["--redo", 9], "--redo 9: there are shots 1 to 4"),
        (["--redo", 1, "--storyboard", film / "one.yaml"], "give --redo or --storyboard"),
        (["--out", film / "a.mp4"], "--out has no use with --extend"),
        (["--order", "shots"], "--order has no use with --extend"),
    ):
        with pytest.raises(ConfigError, match=message):
            call("--extend", folder, *words)
    for words, message in ((["--steps", 9], r"sample.steps 2, not 9"), (["--dense"], "moc.mode 'moc', not 'dense'")):
        with pytest.raises(GenerationError, match=message):
            call("--extend", folder, *words)
    seen = []
    made = shots.Sampler
    monkeypatch.setattr(shots, "Sampler", lambda config, *a, **named: seen.append(config) or made(config, *a, **named))
    call("--extend", folder, "--attention.backend", "reference")  # as this machine has it
    assert [config.attention.backend for config in seen] == ["reference"]
    assert seen[0].sample == generation.config.sample
    other = save_checkpoint(film / "other", config=config_with(), step=7)
    with pytest.raises(StoryboardError, match="there is no shot before it that it could continue"):
        call("--extend", film / "new", "--checkpoint", other, "--storyboard", film / "more.yaml")


def test_what_is_not_there_is_named_before_anything_is_read(tmp_path, run_folder):
    with pytest.raises(ConfigError, match="holds no generation yet; give --checkpoint and --storyboard"):
        call("--extend", tmp_path / "film", "--redo", 1)
    (tmp_path / "a.yaml").write_text(BOARD)
    with pytest.raises(ConfigError, match="there is no such storyboard"):
        call("--extend", tmp_path / "film", "--checkpoint", tmp_path, "--storyboard", tmp_path / "none.yaml")
    assert not (tmp_path / "film").exists()


def test_a_checkpoint_that_lies_elsewhere_now_is_asked_for(tmp_path, monkeypatch):
    (tmp_path / "a.yaml").write_text(BOARD)
    new(tmp_path / "begun", load_storyboard(tmp_path / "a.yaml"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"in out/run, which begun/generation.json names and --checkpoint overrides; give"
    ):
        call("--extend", "begun")
    with pytest.raises(CheckpointError, match=r"no checkpoint in other; give"):
        call("--extend", "begun", "--checkpoint", "other")


def test_a_wish_that_is_not_counted_again_is_said(tmp_path, capsys):
    (tmp_path / "a.yaml").write_text(BOARD)
    begun = new(tmp_path / "begun", load_storyboard(tmp_path / "a.yaml"))
    args = Extending(extend=str(begun.folder), redo=(2,))
    for said in (False, True):
        ask(begun, args, [])
        assert ("begun was asked for this last" in capsys.readouterr().out) == said
        assert begun.take(1) == 2


def test_a_contact_sheet_replaces_nothing_unasked_and_never_what_is_read(tmp_path):
    Image.new("RGB", (32, 16)).save(tmp_path / "red.png")
    (tmp_path / "a.yaml").write_text(BOARD.replace("night", "night, image: red.png"))
    begun = new(tmp_path / "begun", load_storyboard(tmp_path / "a.yaml"))
    (given,) = (begun.folder / "given").iterdir()
    begin = ["--extend", tmp_path / "film", "--checkpoint", tmp_path / "none", "--storyboard", tmp_path / "a.yaml"]
    for words, sheet in ((begin, tmp_path / "red.png"), (["--extend", begun.folder], given)):
        with pytest.raises(ConfigError, match=r"png exists; give another name, or --overwrite"):
            call(*words, "--contact-sheet", sheet)
        with pytest.raises(ConfigError, match=r"png, which is read, and --contact-sheet .*png are one file"):
            call(*words, "--contact-sheet", sheet, "--overwrite")


def test_what_cannot_be_sampled_is_not_kept(tmp_path, run_folder):
    """Else the folder could never be continued."""
    (tmp_path / "a.yaml").write_text(BOARD)
    (tmp_path / "b.yaml").write_text("caption: x\nshots:\n  - {caption: y, seconds: 0.001}\n")
    words = ["--extend", tmp_path / "film", "--checkpoint", run_folder]
    with pytest.raises(StoryboardError, match=r"b.yaml: shots\[0\]: seconds = 0.001 is less than a frame"):
        call(*words, "--storyboard", tmp_path / "a.yaml", tmp_path / "b.yaml")
    assert not (tmp_path / "film").exists()
    (tmp_path / "film").mkdir()
    lock = Lock(tmp_path / "film")
    lock.acquire()
    with pytest.raises(LockError, match=r"is in use by process .* give another --extend"):
        call(*words, "--storyboard", tmp_path / "a.yaml")
    lock.release()
    for path in (tmp_path, tmp_path / "a.yaml"):
        with pytest.raises(GenerationError, match="exists and is not a generation"):
            call("--extend", path, "--checkpoint", tmp_path / "none", "--storyboard", tmp_path / "a.yaml")
    for more, message in (
        (["--redo-readers"], "--redo-readers: of which shots"),
        (["--redo", 1, "--seed", 3], "--seed is for the shots of a --storyboard"),
        (["--storyboard", tmp_path / "a.yaml", "--lora", "x"], "--lora x: .* holds a run; this is for public weights"),
    ):
        with pytest.raises(ConfigError, match=message):
            call(*words, *more)
