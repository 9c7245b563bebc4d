"""A run whose workdir lies in a bucket, on a local server that speaks as Google Cloud Storage does."""

import json
import os
import threading
import time

import pytest

from moc_jax import cloud
from tests.clouds import storage
from tests.training.processes import finish, finish_both, start_python, two

__all__ = ["storage"]
pytestmark = pytest.mark.usefixtures("storage")
BOARD = "caption: a\nshots:\n  - caption: b\n    seconds: 1\n"


def lines():
    return [json.loads(line)["step"] for line in cloud.read("gs://bucket/run/metrics.jsonl")[0].splitlines()]


def saved(step):
    return cloud.look(f"gs://bucket/run/checkpoints/{step}/_CHECKPOINT_METADATA") is not None


@pytest.fixture
def in_bucket(command, clips, monkeypatch):
    """Arguments with which the videos and the cache are those of a bucket."""
    names = "STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL", "XDG_CACHE_HOME"
    monkeypatch.setattr(command, "environment", command.environment | {name: os.environ[name] for name in names})
    for file in clips.rglob("*.mp4"):
        cloud.upload(file, f"gs://bucket/clips/{file.relative_to(clips)}")
    data = {"source": "gs://bucket/clips/train", "validation-source": "gs://bucket/clips/held_out"}
    given = [word for name, value in data.items() for word in (f"--data.{name}", value)]
    return [*given, "--train.validate-every", 0]


@pytest.mark.long
def test_all_of_it_in_a_bucket(command, in_bucket, tmp_path):
    """Prepared, trained, killed, resumed and sampled; then another host, without any copy, finds it done."""
    (tmp_path / "board.yaml").write_text(BOARD)
    given = [*in_bucket, "--data.cache", "gs://bucket/cache"]
    process = command("gs://bucket/run", "--train.steps", 4000, *given)
    said = []
    reader = threading.Thread(target=lambda: said.extend(process.stdout), daemon=True)
    reader.start()  # what the run says must not fill the pipe
    deadline = time.monotonic() + 200
    while not saved(8):
        assert process.poll() is None, "".join(said)
        assert time.monotonic() < deadline
        time.sleep(0.2)
    second = command("gs://bucket/run", *given)
    code, out = finish(second)
    assert (code, f"in use by process {process.pid} on host" in out) == (1, True), out
    process.kill()
    process.wait()
    reader.join()
    process.stdout.close()
    assert set(range(1, 9)) <= set(lines())
    code, out = finish(command("gs://bucket/run", "--train.steps", 40, *given))
    assert code == 0, out
    assert lines() == list(range(1, 41))
    assert cloud.look("gs://bucket/run/run.lock") is None
    board = ["--storyboard", tmp_path / "board.yaml", "--out", tmp_path / "out.mp4", "--steps", 2]
    code, out = finish(start_python(["sample.py", "--checkpoint", "gs://bucket/run", *board], command.environment))
    assert code == 0, out
    assert (tmp_path / "out.mp4").stat().st_size > 100
    before = {found.address: found.generation for found in cloud.below("gs://bucket/cache")}
    command.environment["XDG_CACHE_HOME"] = str(tmp_path / "another_host")
    code, out = finish(command("gs://bucket/run", "--train.steps", 42, "--data.workers", 1, *given))
    assert code == 0, out
    assert {found.address: found.generation for found in cloud.below("gs://bucket/cache")} == before
    fetched = {path.suffix for path in (tmp_path / "another_host").rglob("*.*") if path.is_file()}
    assert ".array_record" in fetched
    assert ".mp4" not in fetched


@pytest.mark.long
def test_two_hosts_that_share_a_bucket_alone(command, in_bucket, tmp_path, monkeypatch):
    """Each has copies of its own; they prepare and train together."""
    started, shared = [], command.environment

    def on_its_own_host(workdir, *arguments):
        copies = str(tmp_path / f"host{len(started)}")
        command.environment = shared | {"XDG_CACHE_HOME": copies}
        started.append(copies)
        return command(workdir, *arguments)

    given = [*in_bucket, "--data.cache", "gs://bucket/shared", "--train.steps", 6]
    finish_both(two(on_its_own_host, "gs://bucket/together", *given))
    rows = cloud.read("gs://bucket/together/metrics.jsonl")[0].splitlines()
    assert [json.loads(row)["step"] for row in rows] == list(range(1, 7))
    names = [found.address.removeprefix("gs://bucket/shared/") for found in cloud.below("gs://bucket/shared")]
    assert sum(name.startswith("codecs/") for name in names) == 1
    assert sum(name.endswith("manifest.json") for name in names) == 1
    assert sum(name.endswith(".array_record") for name in names) == 3
