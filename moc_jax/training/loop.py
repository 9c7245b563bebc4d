"""The run: start or go on, step after step, until the last one, a signal, or a number that is no number."""

import collections
import contextlib
import dataclasses
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Self

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from moc_jax.checkpoint import Checkpoints
from moc_jax.config import Config, ConfigError, MoCConfig
from moc_jax.config_json import config_to_json
from moc_jax.data.buckets import Buckets
from moc_jax.data.manifest import Manifest, SceneEntry, codec_of
from moc_jax.data.pipeline import make_pipeline
from moc_jax.data.plan import TrainPlan
from moc_jax.errors import disk_full, explain_memory
from moc_jax.processes import gather, together
from moc_jax.scene import Scene
from moc_jax.sharding import check_batch, shard_batch
from moc_jax.training.memory import preview_remedies, remedies
from moc_jax.training.metrics import Clock, Metrics, draw_loss_curve, utilisation
from moc_jax.training.start import check_codec, check_resumable, initial_params
from moc_jax.training.state import Params, TrainState, create_state, make_blueprint
from moc_jax.training.step import StepMetrics, make_train_step, make_validation_step, validation_levels
from moc_jax.training.summary import si, stage_costs, summary

Preview = Callable[[Params, int], None]  # (weights, step): writes previews; all processes call it together

_LAG = 2  # steps whose results are not waited for, so that the devices always have the next one at hand


def lag(mesh: Mesh) -> int:
    """How many steps may be under way at once.

    Several CPU devices share one pool of threads, and two programs that wait for each other's share there never end.
    """
    return 0 if mesh.size > 1 and mesh.devices.flat[0].platform == "cpu" else _LAG


class TrainingError(RuntimeError):
    """A run that can't go on: says at which step, why, and what is intact."""


def train(cfg: Config, manifest: Manifest, mesh: Mesh, *, preview: Preview | None = None) -> None:
    """Trains to `train.steps`, from the newest checkpoint in the workdir if there is one.

    Ends early, with a checkpoint, on SIGTERM or SIGINT.

    Raises:
        ConfigError: settings that do not fit the mesh, the data, or the run that is to be gone on with.
        TrainingError: NaN or infinity in the loss, the gradients or the weights. Nothing of it is saved.
        CheckpointError: see `Checkpoints`.
        CodecMismatch: the weights to go on from were trained on latents of another codec than the data's.
    """
    check_batch(cfg.train.batch_size, mesh)
    if cfg.train.validate_every and not manifest.split("validation"):
        raise ConfigError(
            f"train.validate_every = {cfg.train.validate_every}, but no scene is held out: set "
            "data.validation_source or data.validation_fraction, or train.validate_every 0"
        )
    if cfg.train.preview_every and preview is None:
        raise ConfigError(f"train.preview_every = {cfg.train.preview_every}, but this run has no preview function")
    with jax.set_mesh(mesh), _Stop() as stop:
        try:
            with contextlib.closing(_Run(cfg, manifest, mesh, preview)) as run:
                run.to_the_end(stop)
        except OSError as error:
            if not disk_full(error):
                raise
            raise TrainingError(
                f"the disk is full: {error.filename or cfg.workdir} could not be written. Checkpoints are intact: make "
                "room and run the same command again"
            ) from error


@dataclasses.dataclass
class _Pending:
    """A step whose results nobody has looked at yet."""

    step: int
    metrics: StepMetrics
    scene: Scene  # this process's rows, on the host
    moc: MoCConfig


class _Run:
    def __init__(self, cfg: Config, manifest: Manifest, mesh: Mesh, preview: Preview | None):
        self._cfg, self._mesh, self._preview = cfg, mesh, preview
        part = {"process_index": jax.process_index(), "process_count": jax.process_count()}
        self._data = make_pipeline(cfg, manifest, split="train", **part)
        self._held_out = make_pipeline(cfg, manifest, split="validation", **part) if cfg.train.validate_every else None
        self._codec = codec_of(manifest)
        self._blueprint = make_blueprint(cfg, mesh)
        self._step = make_train_step(cfg, self._blueprint, mesh)
        self._validation_step = make_validation_step(cfg, self._blueprint, mesh)
        self._programs: dict[Any, Any] = {}
        self._costs = stage_costs(cfg, self._data.buckets)
        self._pending: collections.deque[_Pending] = collections.deque()
        self._lag = lag(mesh)
        self._saved: int | None = None

        buckets = [self._data.buckets, *([self._held_out.buckets] if self._held_out else [])]
        if jax.process_index() == 0:
            print(summary(cfg, manifest, buckets, self._costs, mesh, self._blueprint), flush=True)
        self._checkpoints = Checkpoints(str(epath.Path(cfg.workdir) / "checkpoints"), cfg.train)
        self._state, told = self._start()
        self._start_step = int(self._state.step)
        if jax.process_index() == 0:
            print(told, flush=True)
            _write(epath.Path(cfg.workdir) / "config.json", config_to_json(cfg))
        self._metrics = Metrics(
            cfg.workdir, start=self._start_step, steps=cfg.train.steps, enabled=jax.process_index() == 0
        )
        self._clock = Clock()

    @explain_memory("the weights, the optimizer's state and the moving average", TrainingError, remedies)
    def _start(self) -> tuple[TrainState, str]:
        changes: dict[str, tuple[Any, Any]] = {}
        restored = self._checkpoints.restore(
            self._blueprint.abstract.items(), lambda saved: changes.update(check_resumable(saved, self._cfg))
        )
        if restored is None:
            return self._begin()
        self._data.set_state(restored.data_state)
        check_codec(restored.codec_state, self._cfg, self._codec, trained=self._cfg.workdir)
        self._saved = restored.step
        told = f"going on from step {restored.step} in {self._cfg.workdir}"
        told += "".join(f"\n  {name} was {old!r} and is {new!r}" for name, (old, new) in changes.items())
        return TrainState.from_items(restored.state), told

    def _begin(self) -> tuple[TrainState, str]:
        source, params, told = self._cfg.train.init_from, None, f"starting in {self._cfg.workdir}"
        if source:
            params = initial_params(self._cfg, self._codec, self._blueprint.shardings.params)
            told += f" from the weights in {source}"
        return create_state(self._cfg, self._blueprint, params), told

    def to_the_end(self, stop: "_Stop") -> None:
        """Steps until the last one, or until `stop`; returns once all is saved."""
        cfg = self._cfg.train
        stopping = False
        for batch in range(self._start_step, cfg.steps):
            self._one(batch)
            step = batch + 1
            if cfg.validate_every and step % cfg.validate_every == 0:
                self._between(self._validate, step)
            if cfg.preview_every and step % cfg.preview_every == 0:
                self._between(self._show_preview, step)
            stopping = stop.asked(step)
            if stopping or step == cfg.steps or step % cfg.checkpoint_every == 0:
                self._between(self._save, step)
            self._checkpoints.check()
            if stopping:
                break
        self._checkpoints.wait()
        self._finish(stopping)

    @explain_memory("a training step", TrainingError, remedies)
    def _one(self, batch: int) -> None:
        moc = self._cfg.moc_at(batch)
        mine = next(self._data)
        scene = shard_batch(mine, self._mesh)
        program = self._program(scene, moc)
        self._state, metrics = program(self._state, scene)
        self._pending.append(_Pending(batch + 1, metrics, mine, moc))
        if len(self._pending) > self._lag:
            self._report()

    def _program(self, scene: Scene, moc: MoCConfig) -> Callable[[TrainState, Scene], tuple[TrainState, StepMetrics]]:
        """The step, compiled for this bucket and stage."""
        key = (moc, scene.video.shape, scene.text.shape, scene.lengths.shot_frames.shape)
        if key not in self._programs:
            with self._paused():
                self._programs[key] = self._compiled(scene, moc)
        return self._programs[key]

    @explain_memory("a training step", TrainingError, remedies)
    def _compiled(self, scene: Scene, moc: MoCConfig) -> jax.stages.Compiled:
        begin = time.perf_counter()
        program = f"the step for {scene.video.shape[1]} frames and chunks of {moc.chunk.size} {moc.chunk.unit}"
        compiled = together(f"compile {program}", self._step.lower(self._blueprint.abstract, scene, moc).compile)
        memory: Any = compiled.memory_analysis()  # None where the backend can't tell
        held = memory.argument_size_in_bytes + memory.temp_size_in_bytes if memory else 0
        self._metrics.say(
            f"compiled {program} in {time.perf_counter() - begin:.0f} s"
            + (f"; each device needs {si(held)}B" if memory else "")
        )
        return compiled

    @property
    def config(self) -> Config:
        """What the run was started with."""
        return self._cfg

    # -------------------------------------------------------------------------------------------- telling

    @explain_memory("a training step", TrainingError, remedies)
    def _report(self) -> None:
        """Looks at the oldest step's results."""
        told = self._pending.popleft()
        values = jax.device_get(told.metrics)
        if not all(np.isfinite(x) for x in (values.loss, values.grad_norm, values.param_norm)):
            raise TrainingError(self._diagnosis(told, values))
        row = {name: float(getattr(values, name)) for name in ("loss", "grad_norm", "param_norm", "learning_rate")}
        log = told.step % self._cfg.train.log_every == 0
        self._metrics.write(told.step, row, board=log)
        cost, scenes = self._cost(told), self._cfg.train.batch_size
        self._clock.add(steps=1, tokens=scenes * cost.tokens, flops=scenes * cost.flops)
        self._metrics.progress(told.step, loss=f"{row['loss']:.4f}")
        if log:
            rates = self._clock.rates()
            speed = {f"speed/{name}_per_second": rate for name, rate in rates.items()}
            used = utilisation(rates["flops"], self._mesh.devices.flat[0].device_kind, self._mesh.size)
            self._metrics.board(told.step, speed | ({} if used is None else {"speed/model_flops_utilisation": used}))

    def _cost(self, told: _Pending) -> Any:
        scene = told.scene
        shape = scene.lengths.shot_frames.shape[1], scene.video.shape[1], scene.text.shape[1]
        shapes = [(s.shots, s.frames, s.text_tokens) for s in self._data.buckets.shapes]
        return self._costs[told.moc][shapes.index(shape)]

    def _diagnosis(self, told: _Pending, values: StepMetrics) -> str:
        entries = batch_entries(self._cfg, self._data.buckets, told.step - 1)
        rows = len(told.scene.video)
        mine = slice(jax.process_index() * rows, (jax.process_index() + 1) * rows)
        found = [
            f"{entry.name} from {entry.source}"
            for entry, video, text in zip(entries[mine], told.scene.video, told.scene.text)
            if not (np.isfinite(video).all() and np.isfinite(text).all())
        ]
        broken = [name for names in gather(json.dumps(found)) for name in json.loads(names)]
        losses = ", ".join(f"{e.name} from {e.source}: {loss:.4g}" for e, loss in zip(entries, values.scene_loss))
        cause = (
            f"the data itself holds NaN or infinity: {'; '.join(broken)}; remove that file and prepare the data anew"
            if broken
            else "the data is finite; try a lower optimizer.learning_rate, a longer warm-up or model.dtype float32"
        )
        intact = "nothing was saved yet" if self._saved is None else f"the checkpoint of step {self._saved} is intact"
        return (
            f"step {told.step}: loss {values.loss:.4g}, gradient norm {values.grad_norm:.4g}, weights' norm "
            f"{values.param_norm:.4g}. Loss by scene: {losses}. Cause: {cause}. {intact[0].upper()}{intact[1:]}"
        )

    # -------------------------------------------------------------------------------------------- between steps

    def _between(self, action: Callable[[int], None], step: int) -> None:
        """Does what is not a step once all steps before it are known to be good; its time counts for no speed."""
        while self._pending:
            self._report()
        with self._paused():
            action(step)

    @contextlib.contextmanager
    def _paused(self) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        seconds = time.perf_counter() - begin
        self._clock.leave_out(seconds)
        self._metrics.leave_out(seconds)

    @explain_memory("validation", TrainingError, remedies)
    def _validate(self, step: int) -> None:
        assert self._held_out is not None
        self._held_out.set_state({**self._held_out.get_state(), "step": 0})
        moc, params = self._cfg.moc_at(step - 1), self._state.sampling_params
        results = [
            jax.device_get(self._validation_step(params, shard_batch(scene, self._mesh), np.int32(number), moc))
            for number, scene in enumerate(self._held_out)
        ]
        sums, shots = (np.sum(x, axis=0) for x in zip(*results))
        losses = sums.astype(np.float64) / max(shots, 1)
        values = {f"t_{t:.3f}": float(loss) for t, loss in zip(np.asarray(validation_levels(self._cfg)), losses)}
        self._metrics.write(step, {"validation": {"mean": float(losses.mean()), **values}})
        self._metrics.say(f"step {step}: validation loss {losses.mean():.4f}")

    @explain_memory("a preview", TrainingError, preview_remedies)
    def _show_preview(self, step: int) -> None:
        assert self._preview is not None
        self._preview(self._state.sampling_params, step)

    @explain_memory("a checkpoint's digests", TrainingError, remedies)
    def _save(self, step: int) -> None:
        self._checkpoints.save(
            step,
            self._state.items(),
            config=self._cfg,
            codec_state=self._codec.state(),
            data_state=self._data.get_state(),
        )
        self._saved = step

    def _finish(self, stopped: bool) -> None:
        if jax.process_index() != 0:
            return
        workdir, step = epath.Path(self._cfg.workdir), int(self._state.step)
        drawn = draw_loss_curve(workdir / "metrics.jsonl", workdir / "loss.png")
        self._metrics.say(
            f"{'stopped' if stopped else 'done'} after step {step}: {workdir / 'checkpoints' / str(step)}"
            + (f", loss curve {workdir / 'loss.png'}" if drawn else "")
            + ("; the same command goes on from here" if stopped else "")
        )

    def close(self) -> None:
        self._metrics.close()
        self._data.close()
        if self._held_out is not None:
            self._held_out.close()
        self._checkpoints.close()


def batch_entries(cfg: Config, buckets: Buckets, batch: int) -> list[SceneEntry]:
    """The scenes that batch number `batch` (from 0) is made of, over all processes."""
    planned = TrainPlan(tuple(map(len, buckets.scenes)), cfg.train.batch_size, cfg.train.seed)[batch]
    return [buckets.scenes[planned.bucket][number] for number in planned.scenes if number is not None]


class _Stop:
    """Hears SIGTERM and SIGINT; with several processes, all hear of it at the same step, whoever got the signal."""

    def __init__(self):
        self._heard: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            # With several processes SIGTERM belongs to jax, which tells the others; SIGINT is made one.
            for number in [signal.SIGINT] + [signal.SIGTERM] * (jax.process_count() == 1):
                self._before[number] = signal.signal(number, self._hear)
        return self

    def _hear(self, number: int, frame: Any) -> None:
        self._heard = number
        signal.signal(number, self._before[number])  # a second one ends the run at once
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def asked(self, step: int) -> bool:
        """Whether to stop after `step`."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._heard is not None

    def __exit__(self, *exception: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def _write(path: epath.Path, text: str) -> None:
    """All of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.parent / f"{path.name}.part"
    part.write_text(text)
    part.replace(path)
