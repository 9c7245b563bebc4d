"""Trains and tests arms one after another on this process's device; results are files, and what has one is skipped.

    python -m evidence.run --arms dense "moc 8x6" --seeds 0 1 2 --learning-rates 5e-4 1e-3 2e-3 --minutes 4

With --gpus 4 as many processes do it, each a part of the list on a GPU of its own. The first one renders and encodes
the stories on all cores, into --cache; the others wait for it.
"""

import dataclasses
import datetime
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from PIL import Image

from benchmarks.results import versions
from evidence import dataset
from evidence.arms import ARMS, Arm, arm_of
from evidence.exam import Exam, Recall, frames_of, grade, make_exam
from evidence.experiment import Task, Trainer, interval
from evidence.recolor import recolorings
from evidence.results import RESULTS, name_of
from evidence.settings import CHOICES, FINAL, SETTINGS, Setting, final_seeds
from moc_jax.attention.accounting import account
from moc_jax.config import OptimizerConfig
from moc_jax.files import whole_file, write_text
from moc_jax.models.patches import scene_shape
from moc_jax.reading import parse_json
from moc_jax.scene import chunk_table

LEVELS = (0.2, 0.4, 0.6, 0.8, 0.95)
"""Noise levels of the validation loss and of the picks."""
SHEET = 10
"""Stories on a contact sheet, unless the final file names them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """What is trained, and for how long."""

    setting: str = "full"
    """World, model and task; see evidence/settings.py."""
    arms: tuple[str, ...] = ARMS
    seeds: tuple[int, ...] = (0,)
    """Of initial weights, data order and noise."""
    learning_rates: tuple[float, ...] = (1e-3,)
    minutes: float = 4.0
    """An arm's training at most, compilation and the tests in between included; its last test comes after it."""
    updates: int | None = None
    """An arm's updates at most; none given: the setting's."""
    gpus: int = 1
    """More than one: as many processes, each with one of them and its part of the runs."""
    part: str = "1/1"
    """i/n: every n-th run of the list, from the i-th on."""
    final: bool = False
    """Test on the stories of evidence/final.json, which are for the final table alone."""
    also: tuple[str, ...] = ()
    """Arms that the trained weights are tested as, too, without any training."""
    backend: str = "auto"
    """What computes attention."""
    out: pathlib.Path = RESULTS
    cache: pathlib.Path = pathlib.Path("cache/evidence")
    """Where encoded stories are kept."""
    processes: int = os.cpu_count() or 1
    """That render and encode stories."""

    def __post_init__(self):
        if self.setting not in SETTINGS:
            raise ValueError(f"--setting {self.setting}: known are {', '.join(SETTINGS)}")
        part = re.fullmatch(r"(\d+)/(\d+)", self.part)
        if part is None or not 1 <= int(part[1]) <= int(part[2]):
            raise ValueError(f"--part {self.part}: must be i/n with i from 1 to n, such as 2/4")
        least = {"gpus": self.gpus, "processes": self.processes, "updates": 1 if self.updates is None else self.updates}
        for name, given in least.items():
            if given < 1:
                raise ValueError(f"--{name} {given}: must be at least 1")


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


def main(args: Arguments, command: str) -> None:
    """Trains this part of the runs that have no result yet."""
    i, n = map(int, args.part.split("/"))
    runs = [Run(arm, rate, seed) for seed in args.seeds for rate in args.learning_rates for arm in args.arms][
        i - 1 :: n
    ]
    arms = {run.arm: arm_of(run.arm, args.backend) for run in runs}  # a wrong name fails before any work
    folder = args.out / (args.setting + ("-final" if args.final else ""))
    also = {name: arm_of(name, args.backend) for name in args.also}
    left = [run for run in runs if not _finished(folder / f"{run.name}.json")]
    print(f"{len(runs) - len(left)} of {len(runs)} runs have results in {folder}", flush=True)
    if not left:
        return
    setting = SETTINGS[args.setting]
    data, exam, rows = stories(setting, args.final, args.processes, args.cache)
    save_sheet(folder / "truth.jpg", exam, np.asarray(exam.data.latents), rows)
    about = {"setting": args.setting, "final": args.final, "command": command, "versions": versions()}
    about["truth_dynamic_degree"] = truth_dynamic_degree(exam)
    about |= {"device": jax.devices()[0].device_kind, "stories": setting.stories, "held_out": len(exam.data.seeds)}
    for run in left:
        updates = setting.updates if args.updates is None else args.updates
        _run(setting, run, arms[run.arm], also, data, exam, rows, updates, args.minutes * 60, folder, about)


def side_by_side(argv: Sequence[str], environments: Sequence[Mapping[str, str]]) -> str | None:
    """The runs of a command line, a part in each of the environments; what went wrong, or None."""
    parts = [
        subprocess.Popen(
            [sys.executable, "-m", "evidence.run", *argv, f"--part={i}/{len(environments)}"],
            env=os.environ | environment,
        )
        for i, environment in enumerate(environments, start=1)
    ]
    failed = [i for i, process in enumerate(parts, start=1) if process.wait()]
    return f"parts {failed} of {len(parts)} failed" if failed else None


def _finished(path: pathlib.Path) -> bool:
    return path.exists() and parse_json(path.read_bytes())["finished"]


def stories(
    setting: Setting, final: bool, processes: int, cache: pathlib.Path | None
) -> tuple[dataset.Dataset, Exam, list[int]]:
    """What is trained on, what is asked, and the rows of the contact sheet."""
    start = time.perf_counter()
    codec = dataset.fit(setting.world, setting.codec, setting.codec_stories, cache)
    seeds = range(setting.codec_stories, setting.codec_stories + setting.stories)
    data = dataset.make(setting.world, codec, setting.text, seeds, processes, cache)
    seeds, rows = final_seeds() if final else (range(setting.held_out), list(range(SHEET)))
    world = dataclasses.replace(setting.world, split=FINAL if final else CHOICES)
    exam = make_exam(world, codec, setting.text, seeds, processes, cache)
    print(f"{len(data.seeds)} + {len(seeds)} stories after {time.perf_counter() - start:.0f} s", flush=True)
    return data, exam, rows


def _run(
    setting: Setting,
    run: Run,
    arm: Arm,
    also: dict[str, Arm],
    data: dataset.Dataset,
    exam: Exam,
    rows: list[int],
    updates: int,
    seconds: float,
    folder: pathlib.Path,
    about: dict[str, Any],
) -> None:
    """Trains and tests; the result's file is there from the first test on, and says whether it is finished."""
    start = time.perf_counter()
    task = Task(
        model=setting.model,
        optimizer=OptimizerConfig(learning_rate=run.learning_rate, warmup_steps=setting.warmup),
        diffusion=setting.diffusion,
        sample=setting.sample,
        updates=updates,
        batch=setting.batch,
        box_weight=setting.box_weight,
    )
    trainer = Trainer(task, arm, run.seed, data, recolorings(exam.codec) if setting.world.still else None)
    weights = jax.tree.map(jnp.copy, trainer.state.sampling_params)
    warm = threading.Thread(target=trainer.warm_up, args=(weights,))  # compiles the tests while training does
    warm.start()
    quick, curve, spent, done = exam.first(setting.quick), [], 0.0, 0
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    result = dataclasses.asdict(run) | about | {"date": date, "finished": False, "curve": curve}
    result |= {"skipped": _skipped(setting, run.arm, arm, data)}
    while done < updates and time.perf_counter() - start < seconds:
        before = time.perf_counter()
        losses = trainer.run(min(setting.every, updates - done))
        done, took = done + len(losses), time.perf_counter() - before
        spent += took if curve else 0.0  # the first ones are compiled
        warm.join()
        recalls = grade(quick, trainer.sample(quick.data, jax.random.key(1)))
        probe = probed(trainer, quick, LEVELS[-1])
        picks = {name: probe[name] for name in ("box_error", "into_reveal") if name in probe}
        curve.append({"updates": done, "loss": float(losses.mean()), "seconds": took} | share(recalls) | picks)
        write_text(folder / f"{run.name}.json", json.dumps(result, indent=1) + "\n")
        low, high = (100 * curve[-1][name] for name in ("low", "high"))
        print(f"{run.name}: {done} updates, loss {losses.mean():.4f}, {low:.0f}..{high:.0f} % correct", flush=True)
    latents = trainer.sample(exam.data, jax.random.key(0))
    recalls = grade(exam, latents)
    milliseconds = 1e3 * spent / max(done - curve[0]["updates"], 1)
    result |= {"updates": done, "milliseconds": milliseconds, "test": summary(recalls), "finished": True}
    result["levels"] = [probed(trainer, exam, level) for level in LEVELS]
    result["also"] = {
        name: share(grade(exam, trainer.sample(exam.data, jax.random.key(0), other))) for name, other in also.items()
    }
    save_sheet(folder / f"{run.name}.jpg", exam, latents, rows)
    write_text(folder / f"{run.name}.json", json.dumps(result, indent=1) + "\n")
    print(f"{run.name}: {result['test']['all']}, {time.perf_counter() - start:.0f} s", flush=True)


def _skipped(setting: Setting, name: str, arm: Arm, data: dataset.Dataset) -> float:
    """The share of pairs that the arm leaves out, captions counted, if picks are random."""
    if name == "dense":
        return 0.0
    scene = data.scenes(jnp.arange(1))
    shape, lengths = scene_shape(setting.model, scene.video.shape, scene.text.shape, scene.lengths)
    table = jax.jit(chunk_table, static_argnums=(1, 2))(lengths, shape, arm.moc.chunk)
    return account(table, arm.moc, setting.model.head_dim).expected_sparsity


def share(recalls: Sequence[Recall]) -> dict[str, Any]:
    """How many were correct, with Wilson's interval."""
    correct = sum(recall.correct for recall in recalls)
    low, high = interval(correct, len(recalls))
    of_story = sum(recall.of_story for recall in recalls)
    return {
        "correct": correct,
        "trials": len(recalls),
        "share": correct / len(recalls),
        "low": low,
        "high": high,
        "of_story": of_story / len(recalls),
    }


def summary(recalls: Sequence[Recall]) -> dict[str, Any]:
    """All recalls, and those of each gap."""

    def of(some: Sequence[Recall]) -> dict[str, Any]:
        means = {
            name: float(np.mean([getattr(recall, name) for recall in some]))
            for name in ("box_psnr", "background_psnr", "dynamic_degree")
        }
        return share(some) | means

    gaps = sorted({recall.gap for recall in recalls})
    return {"all": of(recalls), "by_gap": {gap: of([r for r in recalls if r.gap == gap]) for gap in gaps}}


def truth_dynamic_degree(exam: Exam) -> float:
    """Of the same shots, after the codec's reconstruction."""
    return float(np.mean([recall.dynamic_degree for recall in grade(exam, np.asarray(exam.data.latents))]))


def probed(trainer: Trainer, exam: Exam, level: float) -> dict[str, Any]:
    """Errors of the velocity and shares of picks at one noise level, of the shots that recall something."""
    probe = trainer.probe(exam.data, level, jax.random.key(2))
    rows, shots, reveals = (
        np.array([getattr(question, name) for question in exam.questions]) for name in ("row", "shot", "reveal")
    )
    gaps, picked = shots - reveals, probe.into_reveal[rows, :, :, shots]  # [questions, depth, H]
    box = probe.box_error[rows, shots]
    found = {
        "level": level,
        "error": float(probe.error[rows, shots].mean()),
        "box_error": float(box.mean()),
        "box_error_by_gap": {int(gap): float(box[gaps == gap].mean()) for gap in np.unique(gaps)},
    }
    if np.isnan(picked).all():
        return found
    # What chance gives where only earlier shots are candidates: all are of one length.
    return found | {
        "into_reveal": np.nanmean(picked, axis=0).round(4).tolist(),
        "into_reveal_by_gap": {int(gap): float(np.nanmean(picked[gaps == gap])) for gap in np.unique(gaps)},
        "into_reveal_by_chance": float((1 / shots).mean()),
    }


def save_sheet(path: pathlib.Path, exam: Exam, latents: np.ndarray, rows: Sequence[int]) -> None:
    """A row per story: the middle frame of each recall, by gap."""
    lines = []
    for row in rows:
        asked = sorted((q for q in exam.questions if q.row == row), key=lambda q: q.shot - q.reveal)
        frames = [frames_of(exam, latents[row], question.shot) for question in asked]
        lines.append(np.concatenate([of[len(of) // 2] for of in frames], axis=1))
    with whole_file(path) as partial:
        Image.fromarray(np.concatenate(lines)).save(os.fspath(partial), "jpeg", quality=92)


def run(argv: Sequence[str]) -> None:
    """The command line."""
    args = tyro.cli(Arguments, args=list(argv), description=__doc__)
    if args.gpus > 1:
        environments = [{"CUDA_VISIBLE_DEVICES": str(gpu)} for gpu in range(args.gpus)]
        sys.exit(side_by_side([*argv, "--gpus=1"], environments))
    main(args, "python -m evidence.run " + " ".join(map(shlex.quote, argv)))


if __name__ == "__main__":
    run(sys.argv[1:])
