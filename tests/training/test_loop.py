"""The run: what it writes, what stops it, and what it refuses to go on with."""

import dataclasses
import json
import os
import re
import signal

import jax
import numpy as np
import pytest

from moc_jax.checkpoint import load_for_sampling, newest_config
from moc_jax.cli import config_from_json
from moc_jax.config import ChunkStage, ConfigError
from moc_jax.data import prepare
from moc_jax.training import loop
from moc_jax.training.loop import TrainingError, batch_entries, check_resumable, lag, train
from moc_jax.training.metrics import read_metrics
from tests.training.small import CONFIG, changed, mesh_of


@pytest.fixture
def start(prepared_config, tmp_path):
    """start(train={"steps": 3}, ...) trains in this test's workdir and returns the rows of its log."""

    def run(preview=None, mesh=None, **parts):
        config = dataclasses.replace(changed(prepared_config, **parts), workdir=str(tmp_path / "run"))
        train(config, prepare(config), mesh or mesh_of(1), preview=preview)
        return read_metrics(tmp_path / "run" / "metrics.jsonl")

    return run


def steps_saved(tmp_path):
    return sorted(int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir())


def test_a_run_writes_everything_and_a_second_one_has_nothing_to_do(
    start, prepared_config, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("moc_jax.progress.EVERY", 0.1)
    previews = []

    def preview(params, step):
        assert jax.tree.all(jax.tree.map(lambda x: bool(np.isfinite(x).all()), params))
        previews.append((step, float(np.abs(np.asarray(params["final"]["kernel"])).sum())))

    settings = {
        "validate_every": 2,
        "preview_every": 3,
        "chunk_schedule": (ChunkStage(step=0, size=2), ChunkStage(step=4, size=1)),
    }
    rows = start(preview, train=settings)
    out, err = capsys.readouterr()
    run = tmp_path / "run"
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows if "validation" in row] == [2, 4, 6]
    assert len(rows[2]["validation"]) == 1 + 8
    assert [step for step, _ in previews] == [3, 6]
    assert previews[0][1] != previews[1][1]
    assert steps_saved(tmp_path) == [3, 6]
    assert config_from_json((run / "config.json").read_text()).train.validate_every == 2
    assert (run / "loss.png").stat().st_size > 5000
    assert len(list((run / "tensorboard").iterdir())) == 1
    speed = read_metrics(run / "speed.jsonl")
    assert [row["step"] for row in speed] == [0, 2, 3, 4, 6, 6]  # logged, and before each checkpoint
    assert 0 < speed[-1]["goodput"] <= 1
    assert out.count("compiled the step") == 2  # one per stage; validation and previews bring no other
    kinds = "parameters", "2 training and 1 held-out scenes", "chunks of 2 frames", "chunks of 1 frames"
    for told in (*kinds, "FLOP", "MFU is left out"):
        assert told in out, told
    assert re.search(r"^training: 6 of 6 steps in [\d:]+, loss \d\.\d{4}$", err, re.MULTILINE)
    assert "\r" not in out + err

    assert start(preview, train=settings) == rows
    assert "resuming after step 6" in capsys.readouterr().out
    assert len(previews) == 2
    loaded = load_for_sampling(str(run))
    assert loaded.step == 6
    card = (run / "checkpoints" / "6" / "README.md").read_text()
    for told in (
        "pipeline_tag: text-to-video",
        f"SHA-256 `{loaded.digest}`",
        "6 of 6 steps",
        "scenes: 2",
        "Licence:",
    ):
        assert told in card, told
    assert previews[1][1] == float(np.abs(np.asarray(loaded.params["final"]["kernel"])).sum())


@pytest.mark.long
def test_going_on_is_the_same_as_not_stopping(start, tmp_path):
    def stop(params, step):
        if not stopped:
            stopped.append(step)
            os.kill(os.getpid(), signal.SIGTERM)

    stopped = []
    first = start(stop, train={"steps": 8, "preview_every": 4, "validate_every": 3})
    assert stopped == [4]
    assert first[-1]["step"] == 4
    assert steps_saved(tmp_path) == [3, 4]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    second = start(stop, train={"steps": 8, "preview_every": 4, "validate_every": 3})
    os.rename(tmp_path / "run", tmp_path / "interrupted")
    assert start(stop, train={"steps": 8, "preview_every": 4, "validate_every": 3}) == second
    assert second[: len(first)] == first


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"data": 2, "fsdp": 4}, {"data": 2, "context": 2, "tensor": 2}], ids=str)
def test_eight_devices_train_like_one(start, tmp_path, sizes):
    one = start(train={"batch_size": 8, "steps": 3}, mesh=mesh_of(1))
    os.rename(tmp_path / "run", tmp_path / "one")
    many = start(train={"batch_size": 8, "steps": 3}, mesh=mesh_of(8, **sizes))
    np.testing.assert_allclose([row["loss"] for row in many], [row["loss"] for row in one], rtol=2e-5)


# ------------------------------------------------------------------------------------------------ what stops a run


def poison(monkeypatch, step, where):
    """From batch `step` (from 1) on, one scene's data or all losses are NaN."""
    count = []

    def shard_batch(scene, mesh, shard_batch=loop.shard_batch):
        count.append(1)
        if len(count) >= step:
            scene.video[1 if where == "data" else slice(None), 0] = np.nan if where == "data" else 3e38
        return shard_batch(scene, mesh)

    monkeypatch.setattr(loop, "shard_batch", shard_batch)


@pytest.mark.long_for("size")
@pytest.mark.parametrize(
    ("where", "cause"), [("data", "the data itself holds NaN or infinity: {name}"), ("size", "the data is finite")]
)
def test_nan_stops_the_run_and_is_not_saved(start, prepared_config, tmp_path, monkeypatch, where, cause):
    poison(monkeypatch, 5, where)
    with pytest.raises(TrainingError) as error:
        start(train={"checkpoint_every": 2})
    manifest = prepare(prepared_config)
    buckets = loop.make_pipeline(prepared_config, manifest, split="train").buckets
    entries = batch_entries(prepared_config.train, buckets, 4)
    message = str(error.value)
    assert message.startswith("step 5: loss nan") or message.startswith("step 5: loss inf")
    for entry in entries:
        assert f"{entry.name} from {entry.source}" in message
    assert cause.format(name=f"{entries[1].name} from {entries[1].source}") in message
    assert "The checkpoint of step 4 is intact" in message
    assert steps_saved(tmp_path) == [2, 4]
    assert [row["step"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3, 4]
    params = load_for_sampling(str(tmp_path / "run")).params
    assert jax.tree.all(jax.tree.map(lambda x: bool(np.isfinite(x).all()), params))


@pytest.mark.long
def test_nan_just_before_a_checkpoint_is_seen_before_it_is_saved(start, tmp_path, monkeypatch):
    poison(monkeypatch, 4, "data")
    with pytest.raises(TrainingError, match=r"step 4: .* The checkpoint of step 2 is intact"):
        start(train={"checkpoint_every": 2})
    assert steps_saved(tmp_path) == [2]


def test_settings_that_cannot_be_are_told_before_anything_is_computed(start, prepared_config, tmp_path):
    with pytest.raises(ConfigError, match=r"batch_size = 2 does not divide over mesh data 8"):
        start(mesh=mesh_of(8, data=8))
    with pytest.raises(ConfigError, match=r"validate_every = 5, but no scene is held out: set data\.validation_source"):
        start(train={"validate_every": 5}, data={"validation_source": ()})
    with pytest.raises(ConfigError, match="no preview function"):
        start(train={"preview_every": 5})
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------ going on


@pytest.mark.long
def test_another_model_is_refused_by_name_and_other_changes_are_told(start, tmp_path, capsys):
    start(train={"steps": 1})
    with pytest.raises(ConfigError, match=r"model\.mlp_ratio is 4\.0 there and 2\.0 here.*another --workdir"):
        start(train={"steps": 2}, model={"mlp_ratio": 2.0})
    assert steps_saved(tmp_path) == [1]
    capsys.readouterr()
    start(train={"steps": 2, "log_every": 1})
    out = capsys.readouterr().out
    assert "resuming after step 1" in out
    assert "train.log_every was 2 and is 1" in out
    assert "train.steps was 1 and is 2" in out


@pytest.mark.parametrize(
    ("parts", "field"),
    [
        ({"model": {"heads": 1}}, "model.heads"),
        ({"codec": {"whiten": 0.1}}, "codec.whiten"),
        ({"text": {"max_tokens": 9}}, "text.max_tokens"),
        ({"optimizer": {"accumulate": 2}}, "optimizer.accumulate"),
        ({"train": {"ema_decay": 0.0}}, "train.ema_decay"),
    ],
)
def test_what_must_stay(parts, field):
    with pytest.raises(ConfigError, match=field):
        check_resumable(CONFIG, changed(CONFIG, **parts))


@pytest.mark.long
def test_what_auto_chose_is_told_saved_and_kept(start, tmp_path, capsys, monkeypatch):
    start(model={"remat": "auto"}, train={"steps": 1})
    assert "model.remat attention+mlp, by auto: the fastest that fits" in capsys.readouterr().out
    assert newest_config(str(tmp_path / "run")).model.remat == "attention+mlp"
    monkeypatch.setattr("moc_jax.training.start.device_memory", lambda: 1)
    start(model={"remat": "auto"}, train={"steps": 2})
    out = capsys.readouterr().out
    assert "model.remat attention+mlp, by auto: the run began with it" in out
    assert "model.remat was" not in out


@pytest.mark.parametrize(
    "parts", [{"model": {"remat": "full"}}, {"moc": {"top_k": 1}}, {"train": {"ema_decay": 0.5, "steps": 7}}]
)
def test_what_may_change(parts):
    changes = check_resumable(CONFIG, changed(CONFIG, **parts))
    assert len(changes) == sum(map(len, parts.values()))


@pytest.mark.long
def test_the_log_is_plain_json(start, tmp_path):
    start(train={"steps": 1})
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert set(row) == {"step", "loss", "grad_norm", "param_norm", "learning_rate"}


def test_steps_overlap_except_on_several_cpu_devices():
    assert lag(mesh_of(1)) == 2
    assert lag(mesh_of(8, data=2, fsdp=4)) == 0


# ------------------------------------------------------------------------------------------------ memory

TOO_LITTLE = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 68719476736 bytes."


class Hungry:
    """A training step that finds no memory, when it is compiled or when it runs."""

    def __init__(self, at):
        self.at = at

    def fail(self, *arguments):
        raise jax.errors.JaxRuntimeError(TOO_LITTLE)

    def lower(self, *arguments):
        return self

    def compile(self, **options):
        return self.fail() if self.at == "compile" else self

    def memory_analysis(self):
        return None

    __call__ = fail


@pytest.mark.parametrize("at", ["compile", "run"])
def test_too_little_memory_names_the_settings_that_need_less(start, monkeypatch, at):
    monkeypatch.setattr(loop, "make_train_step", lambda *arguments: Hungry(at))
    with pytest.raises(TrainingError, match="the devices' memory is too small for a training step: 64 GiB") as caught:
        start(model={"remat": "dots"})
    for named in (
        "train.batch_size (now 2)",
        "model.remat full (now dots;",
        "model.dtype bfloat16 (now float32)",
        "mesh.fsdp (now 1;",
        "data.buckets (now as long as the longest scene)",
    ):
        assert named in str(caught.value)


def test_too_little_memory_for_the_weights_is_named(start, monkeypatch):
    monkeypatch.setattr("moc_jax.training.start.create_state", Hungry("run"))
    with pytest.raises(TrainingError, match="too small for the weights, the optimizer's state and the moving ave"):
        start()
