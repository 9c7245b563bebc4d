"""moc-prepare: prepares without training, by several processes, and clears what nobody needs any more."""

import dataclasses
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moc_jax.commands import prepare as program
from moc_jax.config_json import config_to_json
from moc_jax.data import DataError, prepare, prune
from moc_jax.data.cache import at_work
from moc_jax.data.manifest import load_manifest, verify
from moc_jax.data.shards import ShardReader
from tests.data.small import make_videos, small_config, with_data

prune_module = sys.modules[prune.__module__]
ROOT = Path(__file__).parents[1]


@pytest.fixture
def cfg(tmp_path):
    make_videos(tmp_path, a=(13,), b=(13, 13), c=(21,))
    return small_config(tmp_path)


@pytest.fixture
def file(cfg, tmp_path):
    (tmp_path / "config.json").write_text(config_to_json(cfg))
    return str(tmp_path / "config.json")


def run(capsys, *arguments):
    """Exit code, output, messages."""
    code = 0
    try:
        program.main([str(argument) for argument in arguments])
    except SystemExit as end:
        code = end.code
    return code, *capsys.readouterr()


def test_prepares_and_says_what_a_run_would_be_made_of(cfg, file, capsys):
    code, out, _ = run(capsys, "--config", file)
    assert code == 0
    assert "3 training and 0 held-out scenes from 3 files: 5 shots" in out
    assert "scenes in the bucket of" in out
    folder = Path(re.search(r"latent frames \((.*)\)", out)[1])
    assert prepare(cfg) == load_manifest(folder)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--part", "2/2"], "--part is '2/2'; it must be i/n with i from 0 to n - 1"),
        (["--part", "x"], "--part is 'x'"),
        (["--processes", "0"], "--processes is 0; it must lie in 1..1024"),
        (["--processes", "two"], "--processes: invalid int value: 'two'"),
        (["--prune", "--data.cache", "gs://b/c"], "--prune: gs://b/c lies in a bucket"),
        (["--data.source", "/not/there"], "data.source: /not/there does not exist"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(file, capsys, arguments, message):
    code, _, err = run(capsys, "--config", file, *arguments)
    assert code == 2
    assert err.startswith(f"error: {message}")


@pytest.mark.long
def test_several_processes_end_with_what_one_would_have_made(cfg, file, tmp_path, capsys):
    code, out, _ = run(capsys, "--config", file, "--processes", 2, "--part", "0/2")
    assert code == 0
    assert "from 3 files" in out
    alone = prepare(with_data(cfg, cache=str(tmp_path / "alone")))
    together = prepare(cfg)
    assert (together.fingerprint, together.shards) == (alone.fingerprint, alone.shards)
    verify(together, range(3))


def test_an_error_of_all_processes_is_reported_and_its_code_kept(cfg, file, tmp_path, capfd):
    for video in (tmp_path / "videos").iterdir():
        video.write_bytes(b"x" * 99)
    code = run(capfd, "--config", file, "--processes", 2)
    assert code[0] == 1
    assert "error: no codec can be fitted on the training videos" in code[2]


@pytest.mark.long
def test_killed_again_and_again_it_comes_to_the_same_end(cfg, file, tmp_path):
    """SIGKILL at any moment: what was complete stays, and nothing half-written is taken for whole."""
    make_videos(tmp_path, **{f"v{k}": (13, 21) for k in range(12)})
    fresh = prepare(with_data(cfg, cache=str(tmp_path / "fresh")))
    command = [sys.executable, "prepare.py", "--config", file]
    for patience in (1.5, 1.9, 2.1, 2.3, 2.5, 2.7):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(patience)
        process.send_signal(signal.SIGKILL)
        process.wait()
    manifest = prepare(cfg)
    assert (manifest.fingerprint, manifest.shards) == (fresh.fingerprint, fresh.shards)
    verify(manifest, range(len(manifest.shards)))
    assert not list((tmp_path / "cache").rglob("*.tmp"))


class TestPrune:
    def test_earlier_states_and_what_only_they_needed_are_removed(self, cfg, tmp_path):
        first = prepare(cfg)
        (tmp_path / "videos" / "a.mp4").unlink()
        second = prepare(cfg)
        lines, shard = list(prune(second)), first.shard_path(0)
        assert not shard.exists()
        assert re.fullmatch(rf"removed {first.folder} \(.* MB\): an earlier state of this data", lines[0])
        assert re.fullmatch(
            rf"removed {first.shard_path(0)} \(.* MB\): of a video that no prepared folder .*", lines[1]
        )
        assert len(lines) == 2
        assert not first.folder.exists()
        assert not shard.with_suffix(".json").exists()
        verify(load_manifest(second.folder), range(2))
        assert prepare(cfg) == second
        assert list(prune(second)) == []

    def test_other_settings_and_other_data_stay(self, cfg, tmp_path):
        others = [
            prepare(with_data(cfg, keyframes=2)),
            prepare(with_data(cfg, source=(str(tmp_path / "videos" / "a.mp4"),))),
        ]
        make_videos(tmp_path, d=(9,))
        assert list(prune(prepare(cfg))) == []
        for manifest in others:
            verify(load_manifest(manifest.folder), range(len(manifest.shards)))

    def test_what_a_run_reads_stays(self, cfg, tmp_path):
        first = prepare(cfg)
        reader = ShardReader(first)
        make_videos(tmp_path, d=(9,))
        second = prepare(cfg)
        assert list(prune(second)) == [f"kept {first.folder}: a run is reading it"]
        reader.read(first.scenes[0])
        del reader
        assert len(list(prune(second))) == 1

    def test_not_while_another_process_prepares(self, cfg, tmp_path):
        manifest = prepare(cfg)
        with at_work(tmp_path / "cache"), pytest.raises(DataError, match=r"another process is preparing data in "):
            list(prune(manifest))

    @pytest.mark.parametrize("removable", [True, False])
    def test_what_cannot_be_read_or_removed_stays(self, cfg, tmp_path, monkeypatch, removable):
        """As after another user prepared there: nobody knows which shards its folder needs."""
        first = prepare(cfg)
        (tmp_path / "videos" / "a.mp4").unlink()
        second = prepare(cfg)
        read = prune_module.read_manifest

        def denied(folder, *_):
            raise PermissionError(13, "Permission denied", str(folder))

        def unreadable(folder):
            try:
                return denied(folder) if folder == first.folder else read(folder)
            except OSError as error:
                raise DataError("it cannot be read") from error

        with monkeypatch.context() as other_user:
            if removable:
                other_user.setattr(prune_module, "read_manifest", unreadable)
                expected = f"kept {first.folder} and all shards: it cannot be read (Permission denied)"
            else:
                other_user.setattr(prune_module.shutil, "rmtree", denied)
                expected = f"kept {first.folder}: it cannot be removed (Permission denied)"
            lines = list(prune(second))
        assert lines[0] == expected
        assert first.folder.exists()
        assert first.shard_path(0).exists() == removable
        verify(second, range(2))

    def test_leftovers_are_removed(self, cfg, file, tmp_path, capsys):
        manifest = prepare(cfg)
        old = shutil.copytree(manifest.folder, tmp_path / "cache" / "0123456789abcdef")
        (old / "manifest.json").write_text('{"version": 4}')
        waiting = tmp_path / "cache" / "waiting" / f"{'0' * 32}.frames"
        waiting.write_bytes(b"frames")
        code, out, _ = run(capsys, "--config", file, "--prune")
        assert code == 0
        assert f"removed {old} (" in out
        assert "cannot be read by this version" in out
        assert f"removed {waiting} (0.0 MB): waited for nobody" in out
        assert not old.exists()
        assert sorted(os.listdir(tmp_path / "cache" / "waiting")) == []


def test_another_codec_of_the_same_cache_is_no_earlier_state(cfg):
    other = prepare(dataclasses.replace(cfg, codec=dataclasses.replace(cfg.codec, whiten=0.2)))
    assert list(prune(prepare(cfg))) == []
    verify(load_manifest(other.folder), range(3))
