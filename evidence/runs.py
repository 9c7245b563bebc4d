"""One run: an arm is trained and tested, and what it learned tested and trained on as other arms."""

import concurrent.futures
import dataclasses
import datetime
import json
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from evidence.arms import arm_of, stages_of
from evidence.cache import load_weights, save_weights
from evidence.cost import Cost, cost_of
from evidence.dataset import Dataset
from evidence.exam import Exam, grade
from evidence.experiment import Programs, Task, Trainer
from evidence.findings import best_head, probed, save_sheet, share, summary
from evidence.progress import Progress, resumed, save_state, state_of
from evidence.recolor import Recolorings
from evidence.results import Result, finite, name_of
from evidence.settings import Setting
from moc_jax.files import write_text
from moc_jax.models.patches import scene_shape
from moc_jax.phases import Phases
from moc_jax.reading import parse_json
from moc_jax.scene import Scene, chunk_table

LEVELS = (0.2, 0.4, 0.6, 0.8, 0.95)
"""Noise levels of the validation loss and of the picks."""
STATE_EVERY = 60
"""Seconds of training after which its state is saved, at a test."""
TUNED = 0.05
"""Updates of an arm that goes on as another, as a share of those before."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One arm, learning rate and seed."""

    arm: str
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        """Of its files."""
        return name_of(self.arm, self.learning_rate, self.seed)


def training_of(setting: Setting, run: Run, init_from: str, start: pathlib.Path | None, updates: int) -> str:
    """Tells a training from others: by its setting, arm, rate and seed, by which weights it starts from, and where it
    has stages by how many updates."""
    plan = updates if len(stages_of(run.arm)) > 1 else None
    return repr((setting, run, init_from, start and start.name, plan))


def task_of(setting: Setting) -> Task:
    """What a setting's arms have in common while they are trained and sampled."""
    return Task(
        model=setting.model,
        diffusion=setting.diffusion,
        sample=setting.sample,
        batch=setting.batch,
        warmup=setting.warmup,
        box_weight=setting.box_weight,
        in_turn=setting.in_turn,
    )


def missing(result: Result, also: Sequence[str], then: Sequence[str]) -> list[str]:
    """The arms as which its weights are still to be tested, or tested and trained."""
    done = result.get("switched", {})
    return [
        name
        for name in dict.fromkeys((*also, *then))
        if "tuned" not in done.get(name, {}) and (name in then or name not in done)
    ]


class Library:
    """The programs of one setting's arms; what is compiled for an arm serves all of its runs."""

    def __init__(self, setting: Setting, data: Dataset, colors: Recolorings | None, backend: str):
        """For data and colors of these shapes."""
        self._setting, self._shapes, self._backend = setting, (data, colors), backend
        self._programs: dict[str, Programs] = {}

    def of(self, arm: str, *, ahead: bool = True, **what: bool) -> Programs:
        """An arm's programs; if they are new, they begin to be compiled `ahead`, as `Programs.compile` has it."""
        if arm not in self._programs:
            setting = self._setting
            self._programs[arm] = Programs(task_of(setting), arm_of(arm, self._backend), setting.world)
            if ahead:
                self._programs[arm].compile(*self._shapes, **what)
        return self._programs[arm]

    def cost(self, arm: str, scene: Scene) -> Cost:
        """Of an arm's attention to such a scene."""
        model, value = self._setting.model, arm_of(arm, self._backend)
        shape, lengths = scene_shape(model, scene.video.shape, scene.text.shape, scene.lengths)
        table = jax.jit(chunk_table, static_argnums=(1, 2))(lengths, shape, value.moc.chunk)
        return cost_of(table, value, model.head_dim)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Laboratory:
    """All that runs of one setting have in common."""

    setting: Setting
    library: Library
    data: Dataset
    exam: Exam
    colors: Recolorings | None
    """That stories are trained on in."""
    rows: list[int]
    """Of the contact sheets."""
    folder: pathlib.Path
    """Of results."""
    weights: pathlib.Path
    """Folder of trained weights."""
    about: dict[str, Any]
    """What every result says of its making."""

    def train(self, run: Run, updates: int, seconds: float, start: pathlib.Path | None = None) -> None:
        """Trains from fresh weights or those in a file, or from where this training was left, and tests; what is known
        before it has ended is in NAME.partial.json."""
        begin, phases = time.perf_counter(), Phases()
        programs = self.library.of(run.arm, fresh=start is None)
        stages = [(int(share * updates), self.library.of(arm, updates_alone=True)) for share, arm in stages_of(run.arm)]
        weights = None if start is None else load_weights(start, programs.abstract_weights)
        trainer = Trainer(programs, self.data, run.seed, run.learning_rate, weights, self.colors)
        new = Progress(
            training=training_of(self.setting, run, self.about["init_from"], start, updates),
            commands=(self.about["command"],),
        )
        progress = resumed(self.state_of(run), new, trainer)
        curve = progress.curve
        result: dict[str, Any] = dataclasses.asdict(run) | self.about
        result |= {"date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"), "finished": False, "curve": curve}
        result |= {"earlier_commands": progress.commands[:-1]} if len(progress.commands) > 1 else {}
        result |= dataclasses.asdict(self.library.cost(run.arm, self.data.scenes(jnp.arange(1))))
        done, loss = progress.updates, None
        untested, first, took, saved = start is not None and not curve, True, 0.0, begin  # fresh weights tell nothing
        phases.done("weights")
        with concurrent.futures.ThreadPoolExecutor(1) as beside:  # grading takes the processor alone
            grading = []
            while True:
                if untested:
                    test = {"updates": done, "loss": loss, "seconds": took} | ({"first": True} if first else {})
                    grading.append(beside.submit(self._graded, run, result, *self._test(programs, trainer, test)))
                    first = first and done == 0
                    phases.done("tests")
                diverged = loss is not None and not np.isfinite(loss)
                over = done >= updates or (not first and time.perf_counter() - begin >= seconds)
                if not diverged and (over or time.perf_counter() - saved >= STATE_EVERY):
                    for test in grading:
                        test.result()  # the curve is whole until here
                    save_state(self.state_of(run), trainer, progress)
                    saved = time.perf_counter()
                    phases.done("states")
                if over or diverged:
                    break
                end = min((at for at, _ in stages if at > done), default=updates)
                clock, count = time.perf_counter(), min(self.setting.every, end - done)
                loss = trainer.run(count, [programs for at, programs in stages if at <= done][-1])
                phases.done("the first updates" if first else "updates")
                took, done, untested = time.perf_counter() - clock, done + count, True
            for test in grading:
                test.result()
        phases.done("grades")
        if done < stages[-1][0] and not diverged:
            print(f"{run.name} is left after {done} of {updates} updates: it was not trained as itself yet", flush=True)
            return
        latents = programs.sample(trainer.weights, self.exam.data, jax.random.key(0))
        result |= {"updates": done, "milliseconds": _pace(curve), "test": summary(grade(self.exam, latents))}
        result["levels"] = [probed(programs, trainer.weights, self.exam, level) for level in LEVELS]
        phases.done("last test")
        save_sheet(self.folder / f"{run.name}.jpg", self.exam, latents, self.rows)
        save_weights(self.file_of(run), trainer.weights)
        self._write(run, result | {"finished": True, "diverged": diverged})
        test = result["test"]["all"]
        print(f"{run.name}: {test['correct']} of {test['trials']} correct, {phases.total('files')}", flush=True)

    def _test(self, programs: Programs, trainer: Trainer, test: dict[str, Any]) -> tuple[dict[str, Any], np.ndarray]:
        """A test with what the weights make of its stories, and the latents that are still to be graded."""
        quick = self.exam.first(self.setting.quick)
        latents = programs.sample(trainer.weights, quick.data, jax.random.key(1))
        probe = probed(programs, trainer.weights, quick, LEVELS[-1])
        test |= {name: probe[name] for name in ("box_error", "into_reveal", "gradient") if name in probe}
        return test | ({"read": best_head(probe["read"])} if "read" in probe else {}), latents

    def _graded(self, run: Run, result: dict[str, Any], test: dict[str, Any], latents: np.ndarray) -> None:
        result["curve"].append(test | share(grade(self.exam.first(self.setting.quick), latents)))
        self._write(run, result)
        low, high = (100 * result["curve"][-1][name] for name in ("low", "high"))
        print(f"{run.name}: {test['updates']} updates, {low:.0f}..{high:.0f} % correct", flush=True)

    def switch(self, run: Run, also: Sequence[str], then: Sequence[str]) -> None:
        """Tests a finished run's weights as each of the arms `also`; as each of `then` too, which they are then trained
        as for `TUNED` of their updates.

        Raises:
            FileNotFoundError: the weights were not kept.
        """
        result = parse_json(self.result_of(run).read_bytes())
        weights = load_weights(self.file_of(run), self.library.of(run.arm, ahead=False).abstract_weights)
        for name in missing(result, also, then):
            programs, phases = self.library.of(name, ahead=name in then, fresh=False), Phases()
            seed = run.seed + 2**16  # other noise and stories
            tuned = Trainer(programs, self.data, seed, run.learning_rate, weights, self.colors)
            found: dict[str, Any] = dataclasses.asdict(self.library.cost(name, self.data.scenes(jnp.arange(1))))
            phases.done("weights")
            found |= {"zero_shot": self._tested(programs, tuned)}
            phases.done("test")
            if name in then:
                count = max(1, round(TUNED * result["updates"]))
                tuned.run(count)
                phases.done("updates")
                found |= {"updates": count, "tuned": self._tested(programs, tuned)}
            result.setdefault("switched", {})[name] = found
            self._write(run, result)
            shares = " -> ".join(f"{100 * found[of]['share']:.0f} %" for of in ("zero_shot", "tuned") if of in found)
            print(f"{run.name} as {name}: {shares}, {phases.total('last test')}", flush=True)

    def file_of(self, run: Run) -> pathlib.Path:
        """Its weights."""
        return self.weights / f"{run.name}.npz"

    def state_of(self, run: Run) -> pathlib.Path:
        """What it is resumed from."""
        return state_of(self.weights, run.name)

    def result_of(self, run: Run) -> pathlib.Path:
        """Its result."""
        return self.folder / f"{run.name}.json"

    def _tested(self, programs: Programs, trainer: Trainer) -> dict[str, Any]:
        return share(grade(self.exam, programs.sample(trainer.weights, self.exam.data, jax.random.key(0))))

    def _write(self, run: Run, result: dict[str, Any]) -> None:
        lines = ",\n".join(f" {json.dumps(name)}: {json.dumps(value)}" for name, value in finite(result).items())
        whole = self.result_of(run)
        partial = whole.with_suffix(".partial.json")
        write_text(whole if result["finished"] else partial, f"{{\n{lines}\n}}\n")
        if result["finished"]:
            partial.unlink(missing_ok=True)


def _pace(curve: Sequence[dict[str, Any]]) -> float:
    """Milliseconds of an update: the median over tests, but for each command's first, before which all is compiled, if
    there are more."""
    steps = [
        (b.get("first", False), 1e3 * b["seconds"] / (b["updates"] - a["updates"]))
        for a, b in zip([{"updates": 0}, *curve], curve)
        if b["seconds"]
    ]
    return float(np.median([ms for first, ms in steps if not first] or [ms for _, ms in steps]))
