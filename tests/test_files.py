"""Whole files or none, what dead writers leave, and places that are proven to be writable before any work."""

import contextlib
import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moc_jax import files
from moc_jax.config import ConfigError
from moc_jax.files import (
    TakenError,
    identity,
    prove_file,
    prove_folder,
    prove_new_folder,
    remove_leftovers,
    whole_file,
    whole_folder,
    write_text,
)


@pytest.fixture
def dead():
    """The id of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_identity_is_the_files_and_not_the_names(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "link").symlink_to("d")
    (tmp_path / "dangling").symlink_to("link/a")
    for same in ("link/a", "d/../d/a", "dangling"):
        assert identity(tmp_path / same) == identity(tmp_path / "d" / "a")
    for other in ("d/A", "d/b", "d", "a", "d/a/a"):
        assert identity(tmp_path / other) != identity(tmp_path / "d" / "a")


# ------------------------------------------------------------------------------------------------ whole files


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "a.txt"
    write_text(path, "old")
    with pytest.raises(ZeroDivisionError), whole_file(path) as partial:
        partial.write_text("half") / 0
    assert path.read_text() == "old"
    with whole_file(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert os.listdir(path.parent) == ["a.txt"]


@pytest.mark.parametrize("links", [True, False])
def test_a_new_file_replaces_none(tmp_path, monkeypatch, links):
    if not links:  # as on FAT
        monkeypatch.setattr(files.os, "link", lambda *_: (_ for _ in ()).throw(PermissionError(errno.EPERM, "link")))
    for name, text in (("a.mp4", "theirs"), ("a-2.mp4", "mine"), ("a-3.mp4", "mine, too")):
        expected = contextlib.nullcontext() if name == "a.mp4" else pytest.raises(TakenError, match=f"a.mp4 .*{name}$")
        with expected, whole_file(tmp_path / "a.mp4", replace=False) as partial:
            partial.write_text(text)
        assert (tmp_path / name).read_text() == text
    assert (tmp_path / "a.mp4").read_text() == "theirs"
    assert sorted(os.listdir(tmp_path)) == ["a-2.mp4", "a-3.mp4", "a.mp4"]


def test_a_writer_that_makes_no_file_leaves_none(tmp_path):
    with pytest.raises(OSError, match="encoder"), whole_file(tmp_path / "a.mp4"):
        raise OSError("encoder")
    assert os.listdir(tmp_path) == []


def test_leftovers_of_dead_writers_are_removed_and_nothing_else(tmp_path, dead):
    mine, others = f".a.mp4.{dead}.tmp", [f".b.mp4.{os.getppid()}.tmp", ".hidden.tmp", "a.mp4", f"a.{dead}.tmp"]
    for name in (mine, f".b.png.{dead}.tmp", *others):
        (tmp_path / name).write_text("half")
    (tmp_path / f".link.{dead}.tmp").symlink_to(tmp_path / "a.mp4")
    assert remove_leftovers(tmp_path, "a.mp4") == [mine]
    assert remove_leftovers(tmp_path) == [f".b.png.{dead}.tmp"]
    assert sorted(os.listdir(tmp_path)) == sorted([*others, f".link.{dead}.tmp"])
    assert remove_leftovers(tmp_path / "nowhere") == []


def test_a_file_that_is_being_written_is_no_leftover(tmp_path, dead):
    """Also where the writer is a process of another container, whose id says nothing here."""
    with whole_file(tmp_path / "a.mp4") as partial:
        partial.write_text("half")
        elsewhere = partial.rename(tmp_path / f".a.mp4.{dead}.tmp")
        assert remove_leftovers(tmp_path) == []
        elsewhere.rename(partial)
    assert (tmp_path / "a.mp4").read_text() == "half"


def test_a_process_with_the_id_of_the_dead_writer_removes_its_leftover(tmp_path):
    """In a container every start has the same id."""
    (tmp_path / f".a.mp4.{os.getpid()}.tmp").write_text("half")
    assert len(remove_leftovers(tmp_path)) == 1


def test_a_folder_takes_the_place_of_its_own_leftover_and_of_no_other(tmp_path, dead):
    (tmp_path / ".a.partial" / "old").mkdir(parents=True)
    (tmp_path / f".a.{dead}.tmp").write_text("")
    (tmp_path / ".b.partial" / "others").mkdir(parents=True)
    with whole_folder(tmp_path / "a") as partial:
        (partial / "x").write_text("new")
    assert sorted(os.listdir(tmp_path)) == [".b.partial", "a"]
    assert os.listdir(tmp_path / "a") == ["x"]
    assert (tmp_path / ".b.partial" / "others").is_dir()


def test_a_folder_that_another_process_makes_is_left_alone(tmp_path, dead):
    """Also where it is a process of another container, whose id says nothing here."""
    with whole_folder(tmp_path / "a") as partial:
        (partial / "x").write_text("half")
        (tmp_path / f".a.{os.getpid()}.tmp").rename(tmp_path / f".a.{dead}.tmp")
        message = rf"a is being written by process {dead}; wait for it, or give another name"
        with pytest.raises(ConfigError, match=message), whole_folder(tmp_path / "a"):
            pass
        with pytest.raises(ConfigError, match=message):
            prove_new_folder(tmp_path / "a", setting="the folder")
        assert (partial / "x").read_text() == "half"
    assert (tmp_path / "a" / "x").read_text() == "half"
    assert remove_leftovers(tmp_path) == [f".a.{dead}.tmp"]


# ------------------------------------------------------------------------------------------------ proofs


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", r"workdir is empty; give a path"),
        ("  ", r"workdir is empty"),
        ("a\0b", r"workdir a\\x00b holds a NUL character"),
        ("file", r"workdir \S*file cannot be written: \S+file is a file; give another name"),
        ("file/below", r"workdir \S*below cannot be written: \S+file is a file"),
        ("dangling", r"dangling is a file"),
        ("loop/run", r"its links lead nowhere"),
        ("x" * 300, r"workdir x+… \(300 characters\) cannot be written: a name in it is too long"),
        ("gs:/bucket/run", r"lacks a slash; an address begins with gs://"),
        ("nfs://host/run", r"nfs://host/run cannot be written: addresses that begin with nfs:// are not known"),
    ],
)
def test_folders_that_can_be_none(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("precious")
    Path("loop").symlink_to("loop")
    Path("dangling").symlink_to("nowhere")
    with pytest.raises(ConfigError, match=message):
        prove_folder(name, setting="workdir")
    assert sorted(os.listdir()) == ["dangling", "file", "loop"]
    assert Path("file").read_text() == "precious"


def test_an_address_without_its_package_names_the_package(monkeypatch):
    def missing(*_, **__):
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr("etils.epath.gpath.PosixGPath.mkdir", missing)
    with pytest.raises(
        ConfigError, match=r"workdir gs://b/run .* install gcsfs .*pip install 'moc_jax\[gcs\]', or give a path"
    ):
        prove_folder("gs://b/run", setting="workdir")


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.EROFS, "the file system is read-only"),
        (errno.EACCES, "this user may not write there"),
        (errno.ENOSPC, "the disk is full; free some space"),
        (errno.EDQUOT, "quota"),
        (errno.EIO, "Input/output error; give another path"),
    ],
)
@pytest.mark.parametrize("call", ["open", "write"])
def test_what_the_system_refuses_is_said_in_words(tmp_path, monkeypatch, number, message, call):
    """As root, no permission stops anything: the system's answer is made up."""

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.os, call, refuse)
    with pytest.raises(ConfigError, match=rf"data\.cache {tmp_path} cannot be written: .*{message}"):
        prove_folder(tmp_path, setting="data.cache")
    with pytest.raises(ConfigError, match=rf"--out {tmp_path}/a\.mp4 cannot be written: .*{message}"):
        prove_file(tmp_path / "a.mp4", setting="--out")
    monkeypatch.undo()
    assert os.listdir(tmp_path) == []


def test_what_is_proven_is_left_as_it_was(tmp_path, dead):
    prove_folder(tmp_path / "run", setting="workdir")
    assert os.listdir(tmp_path / "run") == []
    (tmp_path / "a.mp4").write_text("old")
    (tmp_path / f".a.mp4.{dead}.tmp").write_text("half")
    prove_file(tmp_path / "a.mp4", setting="--out")
    prove_file(tmp_path / "new" / "deep" / "b.mp4", setting="--out")
    assert sorted(os.listdir(tmp_path)) == ["a.mp4", "run"]
    assert (tmp_path / "a.mp4").read_text() == "old"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("folder.mp4", r"--out folder\.mp4 cannot be written: it is a folder; give another name"),
        ("x" * 252 + ".mp4", r"characters\) cannot be written: a name in it is too long"),
        ("file/a.mp4", r"file is a file; give another name"),
        ("a\0.mp4", r"holds a NUL character"),
        ("gs://bucket/a.mp4", r"--out gs:/bucket/a\.mp4 is an address; give a path of a file system"),
    ],
)
def test_files_that_can_be_none(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    Path("folder.mp4").mkdir()
    Path("file").write_text("precious")
    with pytest.raises(ConfigError, match=message):
        prove_file(Path(name), setting="--out")
    assert sorted(os.listdir()) == ["file", "folder.mp4"]


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("there", 0, "the folder there exists; give the name of a new folder"),
        ("dangling", 0, "the folder dangling exists"),
        ("file/new", 0, r"the folder file/new cannot be written: \S+file is a file; give another name"),
        ("a\0b", 0, "holds a NUL character"),
        (
            "deep/new",
            10**20,
            r"deep/new will hold 100,000,000,000,000,000,000 bytes, but [\d,]+ are free there",
        ),
    ],
)
def test_new_folders_that_can_be_none(tmp_path, monkeypatch, name, size, message):
    monkeypatch.chdir(tmp_path)
    Path("there").mkdir()
    Path("file").write_text("precious")
    Path("dangling").symlink_to("nowhere")
    with pytest.raises(ConfigError, match=message):
        prove_new_folder(Path(name), setting="the folder", size=size)
    assert sorted(os.listdir()) == ["dangling", "file", "there"]
