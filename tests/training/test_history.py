"""What lies in a workdir never stops a run and is never lost: damaged lines and odd files move aside by name."""

import errno
import json
import os
import warnings

import numpy as np
import pytest
from etils import epath

from moc_jax.training import history
from moc_jax.training.metrics import Metrics, draw_loss_curve, read_metrics
from moc_jax.training.speed import Speed

ROWS = [json.dumps({"step": step, "loss": 1 / step}).encode() for step in range(1, 7)]
WHOLE = b"".join(row + b"\n" for row in ROWS)

UNREADABLE = {
    "cut": b'{"step": 3, "lo',
    "null": b"null",
    "list": b'[{"step": 3}]',
    "number": b"3",
    "text": b'"step"',
    "no step": b'{"loss": 0.5}',
    "step null": b'{"step": null, "loss": 0.5}',
    "step true": b'{"step": true, "loss": 0.5}',
    "step half": b'{"step": 2.5, "loss": 0.5}',
    "step text": b'{"step": "3", "loss": 0.5}',
    "step NaN": b'{"step": NaN, "loss": 0.5}',
    "step negative": b'{"step": -3, "loss": 0.5}',
    "step huge": b'{"step": %d, "loss": 0.5}' % 10**30,
    "digits": b'{"step": %s}' % (b"9" * 5000),
    "NaN": b'{"step": 3, "loss": NaN}',
    "infinite": b'{"step": 3, "loss": 1e999}',
    "beyond floats": b'{"step": 3, "loss": %d}' % 10**310,
    "loss text": b'{"step": 3, "loss": "low"}',
    "loss list": b'{"step": 3, "loss": [1]}',
    "validation text": b'{"step": 3, "validation": {"mean": "low"}}',
    "two on a line": ROWS[2] + ROWS[3],
    "foreign bytes": b"\xff\xfe\x00\xc3(",
    "UTF-16": '{"step": 3, "loss": 0.5}'.encode("utf-16"),
    "NULs": bytes(4096),
    "NULs before": bytes(16) + ROWS[2],
    "deep": b'{"step": ' + b"[" * 100_000,
    "very long": b'{"step": 3, "loss": 0.5' + b" " * (2 << 20) + b"}",
}


def resume(workdir, start=5):
    """The warnings of going on after step `start`."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Metrics(str(workdir), start=start, steps=9, speed=Speed("cpu", 1), enabled=True).close()
    return [str(w.message) for w in caught if w.category is UserWarning]


@pytest.mark.parametrize("line", UNREADABLE.values(), ids=UNREADABLE)
def test_a_line_that_cannot_be_read_is_set_aside_and_all_others_kept(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\n".join([*ROWS[:2], line, *ROWS[2:], b""]))
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3, 4, 5, 6]
    (told,) = resume(tmp_path)
    assert told == f"1 line(s) of {path} can't be read and were moved to metrics.jsonl.damaged-1; all others are kept"
    assert path.read_bytes() == b"".join(row + b"\n" for row in ROWS[:5])
    assert (tmp_path / "metrics.jsonl.damaged-1").read_bytes() == line + b"\n"
    assert resume(tmp_path) == []


def test_every_damage_gets_a_name_of_its_own(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for number in (1, 2):
        path.write_bytes(b"null\n" * number + WHOLE)
        (told,) = resume(tmp_path)
        assert f"{number} line(s)" in told
        assert (tmp_path / f"metrics.jsonl.damaged-{number}").read_bytes() == b"null\n" * number


def test_a_file_of_another_encoding_is_set_aside_as_it_was(tmp_path):
    path, data = tmp_path / "metrics.jsonl", WHOLE.decode().encode("utf-16")
    path.write_bytes(data)
    assert len(resume(tmp_path)) == 1
    assert path.read_bytes() == b""
    assert (tmp_path / "metrics.jsonl.damaged-1").read_bytes() == data + b"\n"


@pytest.mark.parametrize("edit", [lambda x: x.replace(b"\n", b"\r\n"), lambda x: b"\xef\xbb\xbf" + x, lambda x: x[:-1]])
def test_what_an_editor_does_to_a_file_can_be_read(tmp_path, edit):
    (tmp_path / "metrics.jsonl").write_bytes(edit(WHOLE))
    assert resume(tmp_path, start=6) == []
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_a_last_line_that_was_cut_off_is_what_a_kill_leaves(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(WHOLE + ROWS[0][:9])
    assert resume(tmp_path) == []
    assert WHOLE.startswith(path.read_bytes())
    path.write_bytes(WHOLE + b"\0\0\0")  # what a power failure leaves is not
    assert len(resume(tmp_path)) == 1


def test_numbers_that_are_not_finite_become_null_and_the_curve_leaves_them_out(tmp_path):
    metrics = Metrics(str(tmp_path), start=0, steps=3, speed=Speed("cpu", 1), enabled=True)
    metrics.write(1, {"loss": 0.5, "validation": {"mean": float("nan"), "t_0.5": np.float32("inf")}}, board=False)
    metrics.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        {"step": 1, "loss": 0.5, "validation": {"mean": None, "t_0.5": None}}
    ]
    assert draw_loss_curve(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    assert resume(tmp_path) == []


def test_what_a_new_start_would_replace_stays_under_another_name(tmp_path):
    """As where the checkpoints were moved to another disk."""
    speed = b'{"step": 0, "unix": 5.0, "counted": 0.0}\n{"step": 6, "unix": 9.0}\n'
    old = {"metrics.jsonl": WHOLE, "speed.jsonl": speed, "loss.png": b"a curve", "previews/00000004.png": b"a picture"}
    (tmp_path / "previews").mkdir()
    for name, content in old.items():
        (tmp_path / name).write_bytes(content)
    (told,) = resume(tmp_path, start=0)
    names = [f"{name}.before-1" for name in ("metrics.jsonl", "speed.jsonl", "loss.png", "previews")]
    assert f"{tmp_path} has the log of a run up to step 6, but no checkpoint" in told
    assert ", ".join(names) in told
    for name, content in old.items():
        folder, *file = name.split("/")
        assert (tmp_path / f"{folder}.before-1").joinpath(*file).read_bytes() == content
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""
    assert [row["unix"] for row in read_metrics(tmp_path / "speed.jsonl")] == [5.0]
    assert resume(tmp_path, start=0) == []
    (tmp_path / "metrics.jsonl").write_bytes(WHOLE[:30])
    assert "metrics.jsonl.before-2, speed.jsonl.before-2" in resume(tmp_path, start=0)[0]


# ------------------------------------------------------------------------------------------------ in the way


def folder(path):
    path.mkdir()
    (path / "inside").write_text("kept")


IN_THE_WAY = {
    "folder": (folder, "is a folder"),
    "dangling": (lambda path: path.symlink_to("nowhere"), "is a link to nowhere"),
    "loop": (lambda path: path.symlink_to(path.name), "is a link to"),
    "pipe": (os.mkfifo, "is not a file"),
}


@pytest.mark.parametrize("name", ["metrics.jsonl", "loss.png"])
@pytest.mark.parametrize(("make", "problem"), IN_THE_WAY.values(), ids=IN_THE_WAY)
def test_what_is_no_file_moves_aside(tmp_path, name, make, problem):
    make(tmp_path / name)
    (told,) = resume(tmp_path)
    assert problem in told
    assert f"{tmp_path / name} " in told
    assert f"it was moved to {name}.damaged-1" in told
    assert os.path.lexists(tmp_path / f"{name}.damaged-1")
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""
    assert resume(tmp_path) == []


@pytest.mark.parametrize("name", ["tensorboard", "previews"])
@pytest.mark.parametrize("make", [lambda path: path.write_text("kept"), lambda path: path.symlink_to("nowhere")])
def test_what_is_no_folder_moves_aside(tmp_path, name, make):
    make(tmp_path / name)
    (told,) = resume(tmp_path)
    assert told == f"{tmp_path / name} is not a folder; it was moved to {name}.damaged-1"
    assert (tmp_path / "tensorboard").is_dir()


def test_a_link_is_read_but_never_written_through(tmp_path):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere.jsonl"
    run.mkdir()
    elsewhere.write_bytes(WHOLE)
    (run / "metrics.jsonl").symlink_to(elsewhere)
    (told,) = resume(run)
    assert "is a link to" in told
    assert "its lines are kept" in told
    assert (run / "metrics.jsonl").read_bytes() == b"".join(row + b"\n" for row in ROWS[:5])
    assert elsewhere.read_bytes() == WHOLE


def test_a_file_that_cannot_be_opened_moves_aside(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(WHOLE)
    opened = type(path).open

    def deny(self, mode="r", *arguments, **options):
        if self.name == path.name and mode == "rb":
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return opened(self, mode, *arguments, **options)

    monkeypatch.setattr(type(path), "open", deny)
    (told,) = resume(tmp_path)
    monkeypatch.undo()
    assert told == f"{path} can't be read (Permission denied); it was moved to metrics.jsonl.damaged-1"
    assert (tmp_path / "metrics.jsonl.damaged-1").read_bytes() == WHOLE


def test_without_a_place_for_tensorboard_the_run_goes_on(tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("moc_jax.training.metrics.EventFile", refuse)
    (told,) = resume(tmp_path)
    assert told == "nothing is written to TensorBoard: [Errno 30] Read-only file system"


def test_a_folder_of_tensorboard_that_goes_away_stops_nothing(tmp_path, monkeypatch):
    metrics = Metrics(str(tmp_path), start=0, steps=3, speed=Speed("cpu", 1), enabled=True)

    def refuse():
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(metrics._board, "flush", refuse)
    with pytest.warns(UserWarning, match="nothing more is written to TensorBoard: .*Stale file handle"):
        metrics.write(1, {"loss": 1.0})
    metrics.write(2, {"loss": 0.5})
    metrics.close()
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


@pytest.mark.parametrize("broken", ["metrics.jsonl", "loss.png"])
def test_a_curve_that_cannot_be_drawn_at_the_end_is_a_warning(tmp_path, broken):
    (tmp_path / "metrics.jsonl").write_bytes(WHOLE)
    if broken == "metrics.jsonl":
        (tmp_path / broken).unlink()
    (tmp_path / broken).mkdir()
    with pytest.warns(UserWarning, match=r"loss\.png could not be drawn"):
        assert not draw_loss_curve(tmp_path / "metrics.jsonl", epath.Path(tmp_path) / "loss.png")


def test_in_a_bucket_where_nothing_can_be_added_to_a_file_no_line_is_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(history, "is_address", lambda path: True)
    kind = type(path := epath.Path(tmp_path / "metrics.jsonl"))
    opened = kind.open
    # A bucket's file that is opened to add to it is emptied.
    monkeypatch.setattr(kind, "open", lambda path, mode="r", **more: opened(path, mode.replace("a", "w"), **more))
    (tmp_path / "metrics.jsonl").write_bytes(WHOLE)
    log = history.Log(path)
    log.write('{"step": 7}\n')
    assert path.read_bytes() == WHOLE
    log.keep()
    assert path.read_bytes() == WHOLE + b'{"step": 7}\n'
    log.write('{"step": 8}\n')
    log.close()
    assert path.read_bytes() == WHOLE + b'{"step": 7}\n{"step": 8}\n'


def test_lines_that_a_disk_does_not_take_are_held_until_it_does(tmp_path, monkeypatch):
    metrics = Metrics(str(tmp_path), start=0, steps=3, speed=Speed("cpu", 1), enabled=True)
    file, room = metrics._file._file, [9]

    class Full:
        def write(self, data):
            if not room:
                raise OSError(errno.ENOSPC, "No space left on device")
            return file.write(data[: room.pop()])

    monkeypatch.setattr(metrics._file, "_file", Full())
    metrics.write(1, {"loss": 1.0}, board=False)
    metrics.write(2, {"loss": 0.5}, board=False)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b'{"step": '
    with pytest.warns(UserWarning, match="a log can't be written, and its lines are held until that works: .*No space"):
        metrics.keep()
    monkeypatch.undo()
    metrics.keep()
    assert (tmp_path / "metrics.jsonl").read_bytes() == b'{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 0.5}\n'
    metrics.close()
