"""The lock of a workdir: one holder, known by name, and given up when it is gone."""

import dataclasses
import json
import os
import subprocess
import sys
import threading

import pytest

from moc_jax import cloud
from moc_jax.config import ConfigError
from moc_jax.files import is_address
from moc_jax.training import lock as module
from moc_jax.training.lock import NAME, Lock, LockError, this_process
from moc_jax.training.workdir import claimed
from tests.clouds import storage

__all__ = ["storage"]


@pytest.fixture(params=["folder", "bucket"])
def workdir(request, tmp_path):
    """On a disk, and in a bucket."""
    if request.param == "folder":
        return tmp_path
    request.getfixturevalue("storage")
    return f"gs://bucket/{tmp_path.name}"


@pytest.fixture
def quick(monkeypatch):
    """A lease that is over in a moment."""
    monkeypatch.setattr(module, "LEASE", 0.4)
    monkeypatch.setattr(module, "REFRESH", 0.05)


def leave(workdir, sign=7, **changes):
    """The lock of another run."""
    holder = dataclasses.replace(this_process(), **changes)
    text = json.dumps({**dataclasses.asdict(holder), "sign": sign})
    cloud.write(f"{workdir}/{NAME}", text.encode()) if is_address(workdir) else (workdir / NAME).write_text(text)


def content(workdir):
    return cloud.read(f"{workdir}/{NAME}")[0] if is_address(workdir) else (workdir / NAME).read_bytes()


def holder(workdir):
    return json.loads(content(workdir))


def is_empty(workdir):
    return cloud.is_empty(workdir) if is_address(workdir) else not os.listdir(workdir)


def take(workdir):
    lock = Lock(workdir)
    lock.acquire()
    return lock


def ended():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_the_second_is_refused_and_told_whose_it_is(workdir):
    first = take(workdir)
    before = content(workdir)
    with pytest.raises(LockError) as refused:
        take(workdir)
    mine = holder(workdir)
    for part in (f"{workdir} is in use by process {os.getpid()} on host {mine['host']}", mine["since"], "--workdir"):
        assert part in str(refused.value)
    assert content(workdir) == before
    first.check(now=True)
    first.release()
    assert is_empty(workdir)
    take(workdir).release()


def test_a_killed_holder_of_this_host_is_followed_at_once(workdir, monkeypatch):
    monkeypatch.setattr(module, "LEASE", 1e9)  # nothing is waited for
    zombie = subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE)
    zombie.stdout.read()
    os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)
    for changes in ({"pid": ended()}, {"started": "1"}, {"pid": zombie.pid}):  # gone; its id used again; not yet reaped
        leave(workdir, **changes)
        take(workdir).release()
    zombie.communicate()


def test_a_holder_that_lives_is_never_followed(tmp_path):
    leave(tmp_path, pid=os.getppid(), started=module._started(os.getppid()))
    with pytest.raises(LockError, match=f"process {os.getppid()} "):
        take(tmp_path)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("changes", [{"host": "other"}, {"boot": "before"}, {"space": "pid:[1]"}])
def test_another_host_is_followed_once_it_gave_no_sign_for_the_lease(workdir, changes):
    leave(workdir, **changes)
    now, said = [0.0], []
    lock = Lock(workdir, clock=lambda: now[0])
    lock._over = Ticks(now, 0.1)
    lock.acquire(said.append)
    assert now[0] == pytest.approx(0.4)
    assert f"on host {changes.get('host', this_process().host)}" in said[0]
    assert holder(workdir)["pid"] == os.getpid()
    assert holder(workdir)["host"] == this_process().host
    lock.release()


class Ticks(threading.Event):
    """Waiting moves a clock instead."""

    def __init__(self, now, seconds):
        super().__init__()
        self._now, self._seconds = now, seconds

    def wait(self, timeout=None):
        if threading.current_thread() is threading.main_thread():
            self._now[0] += self._seconds
            return False
        return super().wait(timeout)


@pytest.mark.usefixtures("quick")
def test_another_host_that_gives_a_sign_keeps_its_folder(workdir):
    leave(workdir, host="other")
    threading.Timer(0.1, lambda: leave(workdir, host="other", sign=8)).start()
    with pytest.raises(LockError, match="on host other"):
        take(workdir)
    assert holder(workdir)["sign"] == 8


@pytest.mark.usefixtures("quick")
def test_the_holder_gives_signs(workdir):
    lock = take(workdir)
    first = holder(workdir)["sign"]
    deadline = threading.Event()
    for _ in range(100):
        if holder(workdir)["sign"] >= first + 2:
            break
        deadline.wait(0.05)
    assert holder(workdir)["sign"] >= first + 2
    lock.release()


def test_of_many_starts_at_once_one_gets_it(workdir):
    for leftover in (False, True) * 10:
        if leftover:
            leave(workdir, started="1")
        ready, results = threading.Barrier(8), []

        def start(ready=ready, results=results):
            lock = Lock(workdir)
            ready.wait()
            try:
                lock.acquire()
                results.append(lock)
            except LockError as error:
                results.append(error)

        threads = [threading.Thread(target=start) for _ in range(8)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        (winner,) = [result for result in results if isinstance(result, Lock)]
        assert len(results) == 8
        winner.release()


def test_a_run_that_slept_too_long_notices_and_leaves_the_others_lock(workdir):
    now = [0.0]
    lock = Lock(workdir, clock=lambda: now[0])
    lock.acquire()
    lock.check()
    leave(workdir, host="other")
    lock.check()  # it was looked at a moment ago
    now[0] = 100.0
    with pytest.raises(LockError, match=r"was taken over by process \d+ on host other.*this run stops"):
        lock.check()
    with pytest.raises(LockError):
        lock.check()
    lock.release()
    assert holder(workdir)["host"] == "other"


def test_a_lock_that_was_removed_is_lost(tmp_path):
    lock = take(tmp_path)
    (tmp_path / NAME).unlink()
    with pytest.raises(LockError, match="was removed"):
        lock.check(now=True)
    lock.release()


def test_storage_that_is_out_of_reach_for_a_while_proves_nothing(tmp_path, monkeypatch):
    lock = take(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(module.os, "open", lambda *_: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        lock.check(now=True)
    lock.check(now=True)
    lock.release()
    assert os.listdir(tmp_path) == []


def test_an_answer_that_was_lost_is_no_loss(storage, monkeypatch):
    """The client repeats a request whose answer it didn't get, and hears that the object is there: it is ours."""
    write, lost, workdir = cloud.write, [], "gs://bucket/lost-answer"

    def twice(address, content, **condition):
        if not lost:
            lost.append(write(address, content, **condition))
        return write(address, content, **condition)

    monkeypatch.setattr(cloud, "write", twice)
    lock = take(workdir)
    lock.check(now=True)
    lock.release()
    assert is_empty(workdir)


@pytest.mark.parametrize(
    "content",
    ["my notes", "null", "[1]", "{}", '{"pid": 1}', '"a"', "9" * 5000, "[" * 20000, '{"sign": 1', "\ud800"],
)
def test_what_is_no_lock_is_left_alone(tmp_path, content):
    (tmp_path / NAME).write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(ConfigError, match=r"run\.lock is not a run's lock, or a damaged one; if no run is using"):
        take(tmp_path)
    assert (tmp_path / NAME).read_bytes() == content.encode("utf-8", "surrogatepass")


@pytest.mark.parametrize("field", ["pid", "sign", "host", "started"])
def test_fields_of_other_types_are_no_lock(tmp_path, field):
    for value in (None, [1], 1e300, 10**400, -1, True):
        fields = {**dataclasses.asdict(this_process()), "sign": 1, field: value}
        (tmp_path / NAME).write_text(json.dumps(fields))
        with pytest.raises(ConfigError, match="is not a run's lock"):
            take(tmp_path)


def test_what_else_can_lie_in_its_place(tmp_path):
    (tmp_path / "precious").write_text("precious")
    path = tmp_path / NAME
    for make, kind in (
        (lambda: path.symlink_to(tmp_path / "precious"), "a link"),
        (path.mkdir, "a folder"),
        (lambda: os.mkfifo(path), "not a file"),
    ):
        make()
        with pytest.raises(ConfigError, match=kind):
            take(tmp_path)
        path.rmdir() if path.is_dir() else path.unlink()
    assert (tmp_path / "precious").read_text() == "precious"


@pytest.mark.parametrize("content", [b"", b"\0" * 300, b"\n"])
def test_what_a_power_failure_leaves_is_free(tmp_path, content):
    (tmp_path / NAME).write_bytes(content)
    take(tmp_path).release()


# ------------------------------------------------------------------------------------------------ the workdir


def use(folder, error=None):
    with claimed(str(folder)):
        assert holder(folder)["pid"] == os.getpid()
        if error is not None:
            raise error


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_the_lock_goes_whatever_happens(tmp_path, error):
    with pytest.raises(error):
        use(tmp_path, error)
    assert os.listdir(tmp_path) == []
    with pytest.raises(error):
        use(tmp_path / "made", error)
    assert os.listdir(tmp_path) == []  # a folder made for a run that never began goes too


def test_a_start_clears_what_dead_runs_left_and_nothing_else(tmp_path):
    (tmp_path / "previews").mkdir()
    for name in (
        f".config.json.{ended()}.tmp",
        "config.json.part",
        "metrics.jsonl.part",
        "previews/.00000004.mp4.part",
        f"previews/.00000004.png.{ended()}.tmp",
    ):
        (tmp_path / name).write_text("half")
    kept = ["config.json", "notes.part", f".mine.{os.getppid()}.tmp", "previews/00000002.png"]
    for name in kept:
        (tmp_path / name).write_text("whole")
    use(tmp_path)
    left = [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()]
    assert sorted(left) == sorted(kept)
