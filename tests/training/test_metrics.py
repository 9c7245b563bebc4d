"""The log: exact numbers, nothing twice, and a curve that can be looked at."""

import io
import json
import time

import numpy as np
from PIL import Image
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c

from moc_jax.training.metrics import Metrics, draw_loss_curve, read_metrics
from moc_jax.training.speed import Speed


def test_numbers_come_back_exactly(tmp_path):
    metrics = Metrics(str(tmp_path), start=0, steps=3, speed=Speed("cpu", 1), enabled=True)
    losses = [float(np.float32(x)) for x in (0.1, 1 / 3, 2e-20)]
    for step, loss in enumerate(losses, 1):
        metrics.write(step, {"loss": loss})
        metrics.progress(step, loss="x")
    metrics.close()
    assert [row["loss"] for row in read_metrics(tmp_path / "metrics.jsonl")] == losses
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1


def test_going_on_drops_what_lies_beyond_the_checkpoint_and_what_was_cut_off(tmp_path):
    path = tmp_path / "metrics.jsonl"
    whole = "".join(json.dumps({"step": step, "loss": step / 3}) + "\n" for step in range(1, 8))
    path.write_text(whole + '{"step": 8, "lo')
    Metrics(str(tmp_path), start=5, steps=9, speed=Speed("cpu", 1), enabled=True).close()
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3, 4, 5]
    assert whole.startswith(path.read_text())


def test_only_the_main_process_writes(tmp_path):
    metrics = Metrics(str(tmp_path), start=0, steps=3, speed=Speed("cpu", 1), enabled=False)
    metrics.write(1, {"loss": 1.0})
    metrics.board(1, {"x": 1.0})
    metrics.progress(1)
    metrics.leave_out(1.0)
    metrics.say("nothing")
    metrics.close()
    assert list(tmp_path.iterdir()) == []


def _events(folder):
    """What a TensorBoard file holds: records of length, checksum, event, checksum."""
    (file,) = folder.iterdir()
    data = file.read_bytes()
    while data:
        size = int.from_bytes(data[:8], "little")
        for part, checksum in ((data[:8], data[8:12]), (data[12 : 12 + size], data[12 + size : 16 + size])):
            assert masked_crc32c(part) == int.from_bytes(checksum, "little")
        event = Event.FromString(data[12 : 12 + size])
        yield event
        data = data[16 + size :]


def _points(folder):
    """name -> [(step, value)]."""
    found = {}
    for event in _events(folder):
        for value in event.summary.value:
            found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


def test_tensorboard_gets_every_number_by_name(tmp_path):
    metrics = Metrics(str(tmp_path), start=0, steps=3, speed=Speed("cpu", 1), enabled=True)
    metrics.write(1, {"loss": 1.0}, board=False)
    metrics.write(2, {"loss": 2.0, "validation": {"mean": 0.5, "t_0.500": 0.25}})
    metrics.board(2, {"speed/steps_per_second": 4.0})
    metrics.close()
    assert _points(tmp_path / "tensorboard") == {
        "loss": [(2, 2.0)],
        "validation/mean": [(2, 0.5)],
        "validation/t_0.500": [(2, 0.25)],
        "speed/steps_per_second": [(2, 4.0)],
    }


def test_tensorboard_forgets_what_a_resumed_run_does_again(tmp_path):
    """A file says its version first; points of earlier files count up to the step that it starts with."""
    Metrics(str(tmp_path), start=300, steps=999, speed=Speed("cpu", 1), enabled=True).close()
    version, session = _events(tmp_path / "tensorboard")
    assert (version.file_version, version.step) == ("brain.Event:2", 0)
    assert (session.session_log.status, session.step) == (SessionLog.START, 301)
    assert abs(session.wall_time - time.time()) < 100


def test_progress_leaves_pauses_out_and_shows_the_loss(tmp_path, monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr("sys.stderr", out)
    monkeypatch.setattr("moc_jax.progress.EVERY", 0.02)
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    metrics = Metrics(str(tmp_path), start=10, steps=40, speed=Speed("cpu", 1), enabled=True)
    now[0] += 102.0
    metrics.leave_out(100.0)
    metrics.progress(20, loss="0.1234")
    while "loss" not in out.getvalue():
        time.sleep(0.005)
    metrics.close()
    assert "training: 20 of 40 steps (50%), 5 steps/s, 00:04 left, loss 0.1234\n" in out.getvalue()
    assert "\r" not in out.getvalue()


def test_the_loss_curve_is_a_picture(tmp_path):
    path, out = tmp_path / "metrics.jsonl", tmp_path / "loss.png"
    assert not draw_loss_curve(path, out)
    rows = [{"step": step, "loss": 1 / step} for step in range(1, 60)] + [{"step": 30, "validation": {"mean": 0.5}}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert draw_loss_curve(path, out)
    with Image.open(out) as picture:
        assert picture.size == (800, 450)
        colours = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    for line in ((31, 78, 156), (209, 73, 91)):  # running mean, validation
        assert (np.abs(colours.astype(int) - line).sum(axis=1) < 12).sum() > 20
