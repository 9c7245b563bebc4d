"""The run: start or resume, step after step, until the last one, a signal, or a NaN."""

import collections
import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator

import jax
from etils import epath
from jax.sharding import Mesh

from moc_jax.attention.api import routed_attention
from moc_jax.checkpoint import Checkpoints
from moc_jax.checkpoint_names import CheckpointError
from moc_jax.compilation import built
from moc_jax.config import BucketConfig, Config, ConfigError, MoCConfig
from moc_jax.config_json import config_to_json
from moc_jax.data.manifest import Manifest, codec_of
from moc_jax.data.pack import blank_scene
from moc_jax.data.pipeline import make_pipeline
from moc_jax.errors import Failure, disk_full, explain_memory
from moc_jax.files import write_text
from moc_jax.phases import Phases
from moc_jax.processes import gather
from moc_jax.scene import Scene
from moc_jax.sharding import batch_sharding, check_batch, own_rows, shard_batch
from moc_jax.signals import Interrupted, Signals
from moc_jax.training.closing import closing_all
from moc_jax.training.diagnosis import batch_entries, diagnosis, is_finite
from moc_jax.training.due import Preview, due, missing, without_preview
from moc_jax.training.input_wait import InputWait
from moc_jax.training.lock import Lock, LockError
from moc_jax.training.memory import preview_remedies, remedies
from moc_jax.training.metrics import Metrics, draw_loss_curve
from moc_jax.training.profile import Profile
from moc_jax.training.programs import Programs, StagePrograms, Wanted, lag
from moc_jax.training.speed import Speed
from moc_jax.training.start import Changes, begin, check_codec, check_resumable, frozen_base, licence_of, with_remat
from moc_jax.training.state import TrainState, make_blueprint
from moc_jax.training.step import StepMetrics, make_train_step, make_validation_step
from moc_jax.training.stop import RunStop
from moc_jax.training.summary import SceneCost, model_card, stage_costs, summary
from moc_jax.training.validation import Validation

__all__ = ["Preview", "TrainingError", "batch_entries", "check_resumable", "lag", "train"]

_LONG = 2.0  # seconds; longer steps are waited for: what that costs is little, and a signal waits for one step only
_TIMED = 3  # which step is timed to find out; the first ones warm up


class TrainingError(Failure):
    """A run that can't continue: says at which step, why, and what is intact."""


def train(
    cfg: Config,
    manifest: Manifest,
    mesh: Mesh,
    *,
    preview: Preview | None = None,
    stop: RunStop | None = None,
    lock: Lock | None = None,
    phases: Phases | None = None,
) -> None:
    """Trains to `train.steps`, from the newest checkpoint in the workdir if there is one.

    Ends early, with a checkpoint, on SIGTERM or SIGINT.

    Args:
        stop: listens for signals; None: this function listens while it runs.
        lock: the workdir's, where this process holds it: asked now and then whether it still does.
        phases: what was done before; None: the first step's time is counted from here.

    Raises:
        ConfigError: settings that do not fit the mesh, the data, or the run that is to be resumed.
        TrainingError: NaN or infinity in the loss, the gradients or the weights. Nothing of it is saved.
        LockError: another run has taken the workdir over.
        CheckpointError: see `Checkpoints`.
        CodecMismatch: the weights to start from were trained on latents of another codec than the data's.
    """
    check_batch(cfg.train.batch_size, mesh)
    if cfg.train.validate_every and not manifest.split("validation"):
        raise ConfigError(
            f"train.validate_every = {cfg.train.validate_every}, but no scene is held out: set "
            "data.validation_source or data.validation_fraction, or train.validate_every 0"
        )
    if cfg.train.preview_every and preview is None:
        raise ConfigError(f"train.preview_every = {cfg.train.preview_every}, but this run has no preview function")
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.set_mesh(mesh))
        stop = RunStop(stack.enter_context(Signals())) if stop is None else stop
        try:
            with closing_all() as closes:
                run = _Run(cfg, manifest, mesh, preview, stop, lock, phases or Phases(), closes)
                with stop.deferred():
                    run.to_the_end()
        except OSError as error:
            if not disk_full(error):
                raise
            raise TrainingError(
                f"the disk is full: {error.filename or cfg.workdir} could not be written. Checkpoints are intact: free "
                "space and run the same command again"
            ) from error


@dataclasses.dataclass
class _Pending:
    """A step whose results nobody has looked at yet."""

    step: int
    metrics: StepMetrics
    scene: Scene  # this process's rows, on the host
    moc: MoCConfig


class _Run:
    _saved: int | None = None  # the newest step
    _finite = True  # as far as steps were looked at

    def __init__(
        self,
        cfg: Config,
        manifest: Manifest,
        mesh: Mesh,
        preview: Preview | None,
        stop: RunStop,
        lock: Lock | None,
        phases: Phases,
        closes: Callable[[Callable[[], None]], None],  # takes the close of each part as soon as there is one
    ):
        self._cfg, self._mesh, self._preview, self._stop, self._lock = cfg, mesh, preview, stop, lock
        self._phases, self._main = phases, jax.process_index() == 0
        self._rows = own_rows(cfg.train.batch_size, mesh)
        part = {"rows": self._rows, "process_index": jax.process_index(), "process_count": jax.process_count()}
        self._data = make_pipeline(cfg, manifest, split="train", verified=False, **part)
        closes(self._data.close)
        card = functools.partial(model_card, cfg, manifest)
        self._checkpoints = Checkpoints(str(epath.Path(cfg.workdir) / "checkpoints"), cfg.train, card)
        closes(self._checkpoints.close)
        blueprint = make_blueprint(cfg.model, cfg.optimizer, cfg.train, mesh)
        self._cfg, self._blueprint, remat = with_remat(cfg, blueprint, self._data.buckets.shapes, mesh)
        cfg = self._cfg
        self._attention = routed_attention(cfg.attention)
        where = self._blueprint, mesh, self._attention
        self._step = make_train_step(cfg.train, cfg.optimizer, cfg.diffusion, *where)
        self._codec, self._latent_shape = codec_of(manifest, cfg.codec), manifest.latent_shape
        self._programs = StagePrograms(Programs(stop), cfg.stages, self._data.buckets_between, self._program)
        closes(self._programs.close)
        if (newest := max(self._checkpoints.steps, default=0)) < cfg.train.steps:
            self._programs.begin(newest)  # compiled while all that follows is done
        phases.done("model")
        self._data.verify()
        self._validation, buckets = None, [self._data.buckets]
        if cfg.train.validate_every:
            held_out = make_pipeline(cfg, manifest, split="validation", **part)
            closes(held_out.close)
            step, levels = make_validation_step(cfg.train, cfg.diffusion, *where), cfg.train.validation_buckets
            self._validation = Validation(held_out, step, mesh, levels, stop)
            buckets.append(held_out.buckets)
        self._costs = stage_costs(cfg, self._data.buckets)
        self._pending: collections.deque[_Pending] = collections.deque()
        self._lag, self._idle = lag(mesh), 0.0  # seconds that were not spent in steps
        if self._main:
            print(summary(cfg, manifest, buckets, self._costs, mesh, self._blueprint), remat, sep="\n", flush=True)
        phases.done("checks and summary")
        self._state, report = self._start()
        phases.done("weights")
        begin = self._start_step = self._done = int(self._state.step)
        self._place = self._data.get_state()  # where the data stands after step `_done`
        if self._main:
            print(report, flush=True)
            write_text(epath.Path(cfg.workdir) / "config.json", config_to_json(cfg))
        speed = Speed(mesh.devices.flat[0].device_kind, mesh.size, begun=phases.seconds)
        self._metrics = Metrics(cfg.workdir, start=begin, steps=cfg.train.steps, speed=speed, enabled=self._main)
        closes(self._metrics.close)
        self._profile = Profile(cfg.train.profile_steps, cfg.workdir, begin, self._between)
        self._input = InputWait(cfg.data, self._metrics.say)
        for part in (self._profile, self._input):
            closes(part.close)

    @explain_memory("the weights, the optimizer's state and the moving average", TrainingError, remedies)
    def _start(self) -> tuple[TrainState, str]:
        changes: Changes = {}
        restored = self._checkpoints.restore(
            self._blueprint.abstract.items(), lambda saved: changes.update(check_resumable(saved, self._cfg))
        )
        saved = restored.base if restored else None
        frozen, self._base = frozen_base(self._cfg, self._codec, self._blueprint, saved)
        if restored is None:
            return begin(self._cfg, self._codec, self._blueprint, frozen)
        self._data.set_state(restored.data_state)
        cfg = self._cfg
        check_codec(cfg.codec, restored.codec_state, self._codec, trained=cfg.workdir, cache=cfg.data.cache)
        self._saved = restored.step
        report = f"resuming after step {restored.step} in {self._cfg.workdir}"
        report += "".join(f"\n  {name} was {old!r} and is {new!r}" for name, (old, new) in changes.items())
        if self._data.begun == restored.step:
            report += f"\n  other data than before step {restored.step}: its first epoch begins"
        report += licence_of(self._base.place) if self._base else ""
        return TrainState.from_items(restored.state, frozen), report

    def to_the_end(self) -> None:
        """Runs steps until the last one, or a requested stop; returns once all is saved.

        After a step a signal is served first, then the checkpoint, then what the next start would make up.
        """
        cfg, stopped = self._cfg.train, False
        try:
            self._extras(self._start_step, missing(cfg, self._cfg.workdir, self._preview, self._start_step))
            for step in range(self._start_step + 1, cfg.steps + 1):
                self._one(step)
                self._profile.after(step)
                self._stop.check()
                if step == cfg.steps or step % cfg.checkpoint_every == 0:
                    self._between(self._save, step)
                self._checkpoints.check()
                self._check_lock()
                self._extras(step, due(cfg, step))
        except Interrupted:
            stopped = True
        except Exception as error:
            self._rescue(error)
            raise
        if self._done > self._start_step and self._saved != self._done:
            self._between(self._save, self._done)
        self._checkpoints.wait()
        self._finish(stopped)

    def _rescue(self, error: Exception) -> None:
        """Saves the steps that an error which ends the run would cost, where that is possible.

        Of several processes others may wait in a step, and NaN or what another run has taken over is not saved.
        """
        lost = self._done not in (self._start_step, self._saved)
        if jax.process_count() > 1 or not (lost and self._finite) or isinstance(error, CheckpointError | LockError):
            return
        with contextlib.suppress(Exception):  # the devices or the disk may be what failed
            self._between(self._save, self._done)
            self._checkpoints.wait()
            self._metrics.say(f"what was trained until step {self._done} is saved, before this error:")

    def _one(self, step: int) -> None:
        if step == self._start_step + _TIMED:
            self._choose_lag(step)
        else:
            self._dispatch(step)
        if len(self._pending) > self._lag:
            self._report()
        for line in self._programs.news():
            self._metrics.say(line)
        if step == self._start_step + 1:
            self._report_all()
            self._metrics.say(f"the first step was done after {self._phases.total('step')}")

    def _choose_lag(self, step: int) -> None:
        """Times a step alone; all processes find the same, since one that ran ahead would be waited for in vain."""
        self._report_all()
        begin = time.perf_counter() - self._idle
        self._dispatch(step)
        self._report_all()
        seconds = gather(str(time.perf_counter() - self._idle - begin))
        if max(map(float, seconds)) > _LONG:
            self._lag = 0

    @explain_memory("a training step", TrainingError, remedies)
    def _dispatch(self, step: int) -> None:
        mine = self._input.batch(lambda: next(self._data))
        scene = shard_batch(mine, self._mesh)
        self._phases.done("first batch")
        bucket, moc = self._bucket(mine), self._cfg.moc_at(step - 1)
        with contextlib.nullcontext() if self._programs.ready(step - 1, bucket) else self._paused():
            program = self._programs.get(step - 1, bucket)
        self._phases.done("compiling")
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            self._state, metrics = program(self._state, scene)
        self._input.given(metrics.loss)
        self._done, self._place = step, self._data.get_state()
        self._pending.append(_Pending(step, metrics, mine, moc))

    def _program(self, moc: MoCConfig, bucket: BucketConfig) -> Wanted:
        """The step for this attention and scenes of this shape."""
        cfg, mesh, sharding = self._cfg, self._mesh, batch_sharding(self._mesh)

        def of_batch(x):
            return jax.ShapeDtypeStruct((cfg.train.batch_size, *x.shape), x.dtype, sharding=sharding)

        given = {"clean": cfg.clean_first_frames, "condition": cfg.condition_channels}
        scene = jax.tree.map(of_batch, blank_scene(bucket, self._latent_shape, cfg.text.dim, **given))
        return Wanted(
            what=f"the step for {bucket.frames} frames and chunks of {moc.chunk.size} {moc.chunk.unit}",
            made_of=("train_step", cfg.model, cfg.train, cfg.optimizer, cfg.diffusion, self._attention, moc, scene),
            devices=list(mesh.devices.flat),
            build=functools.partial(built, mesh, self._step, self._blueprint.abstract, scene, moc),
        )

    @property
    def config(self) -> Config:
        """The run's settings, `model.remat` resolved."""
        return self._cfg

    # -------------------------------------------------------------------------------------------- reporting

    @explain_memory("a training step", TrainingError, remedies)
    def _report(self) -> None:
        """Looks at the oldest step's results."""
        oldest = self._pending.popleft()
        values = jax.device_get(oldest.metrics)
        if not is_finite(values):
            self._finite = False
            found = oldest.step, oldest.scene, self._rows, values
            raise TrainingError(diagnosis(self._cfg.train, self._data, *found, self._saved))
        row = {name: float(getattr(values, name)) for name in ("loss", "grad_norm", "param_norm", "learning_rate")}
        log = oldest.step % self._cfg.train.log_every == 0
        self._metrics.write(oldest.step, row, board=log)
        cost, n = self._cost(oldest), self._cfg.train.batch_size
        self._metrics.count(steps=1, tokens=n * cost.tokens, flops=n * cost.flops, waited=self._input.waited())
        self._metrics.progress(oldest.step, loss=f"{row['loss']:.4f}")
        if log:
            self._input.judge(self._metrics.times(oldest.step), self._cfg.train.log_every)

    def _report_all(self) -> None:
        while self._pending:
            self._report()

    def _cost(self, step: _Pending) -> SceneCost:
        cost = self._costs[step.moc][self._data.buckets.shapes.index(self._bucket(step.scene))]
        assert cost is not None  # the bucket has scenes
        return cost

    def _bucket(self, scene: Scene) -> BucketConfig:
        shots, frames, text_tokens = scene.lengths.shot_frames.shape[1], scene.video.shape[1], scene.text.shape[1]
        return BucketConfig(shots=shots, frames=frames, text_tokens=text_tokens)

    # -------------------------------------------------------------------------------------------- between steps

    def _between(self, action: Callable[[int], None], step: int) -> None:
        """Does what is not a step once all steps before it are known to be good; its time counts for no speed."""
        self._report_all()
        with self._paused():
            action(step)

    @contextlib.contextmanager
    def _paused(self) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        seconds = time.perf_counter() - begin
        self._idle += seconds
        self._metrics.leave_out(seconds)

    def _extras(self, step: int, names: list[str]) -> None:
        actions = {"validation": self._validate, "preview": self._show_preview}
        for name in names:
            self._between(actions[name], step)
            self._stop.check()

    @explain_memory("validation", TrainingError, remedies)
    def _validate(self, step: int) -> None:
        assert self._validation is not None
        losses = self._validation(self._state.sampling_params, self._cfg.moc_at(step - 1))
        self._metrics.write(step, {"validation": losses})
        self._metrics.say(f"step {step}: validation loss {losses['mean']:.4f}")

    def _show_preview(self, step: int) -> None:
        with without_preview(step):
            self._sample_preview(step)

    @explain_memory("a preview", TrainingError, preview_remedies)
    def _sample_preview(self, step: int) -> None:
        assert self._preview is not None
        self._preview(self._state.sampling_params, step)

    def _check_lock(self, *, now: bool = False) -> None:
        if self._lock is not None:
            self._lock.check(now=now)

    @explain_memory("a checkpoint's digests", TrainingError, remedies)
    def _save(self, step: int) -> None:
        self._check_lock(now=True)
        self._metrics.times(step)
        self._metrics.keep()
        beside = {"codec_state": self._codec.state(), "data_state": self._place, "base": self._base}
        self._checkpoints.save(step, self._state.items(), config=self._cfg, **beside)
        self._saved = step

    def _finish(self, stopped: bool) -> None:
        if not self._main:
            return
        self._metrics.keep()
        workdir = epath.Path(self._cfg.workdir)
        drawn = draw_loss_curve(workdir / "metrics.jsonl", workdir / "loss.png")
        where = "before its first step" if self._saved is None else f"after step {self._saved}: "
        self._metrics.say(
            f"{'stopped' if stopped else 'done'} {where}"
            + ("" if self._saved is None else f"{workdir / 'checkpoints' / str(self._saved)}")
            + (f", loss curve {workdir / 'loss.png'}" if drawn else "")
            + ("; the same command resumes from here" if stopped else "")
        )
