"""Trains and tests arms one after another on this process's device; results are files, and what has one is skipped.

    python -m evidence.run --arms dense "moc 8x6" --seeds 0 1 2 --learning-rates 5e-4 1e-3 2e-3 --minutes 4

With --gpus 4 as many processes do it, each on a GPU of its own; no run is done by two of them. The first one renders
and encodes the stories on all cores, into --cache; the others wait for it.
"""

import contextlib
import dataclasses
import fcntl
import math
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np
import tyro

from benchmarks.results import versions
from evidence import dataset, recolor
from evidence.arms import ARMS, arm_of, stages_of
from evidence.exam import Exam, make_exam
from evidence.findings import save_sheet, truth_dynamic_degree
from evidence.progress import progress_in, state_of
from evidence.results import RESULTS, Result, best_rates, finished, kept_in, name_of
from evidence.runs import Laboratory, Library, Run, missing, training_of
from evidence.settings import CHOICES, FINAL, SETTINGS, Setting, final_seeds, final_training_seeds
from evidence.spread import Spread
from moc_jax.cli import clean_exit
from moc_jax.compilation import kept_programs
from moc_jax.config import ConfigError
from moc_jax.phases import Phases
from moc_jax.reading import parse_json

_ALONE = "--gpus=1", "--per-gpu=1"  # what each of several processes is given
_BEGIN = time.perf_counter()
SHEET = 10
"""Stories on a contact sheet, unless the final file names them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """What is trained, and for how long."""

    setting: str = "full-mixed"
    """World, model and task; see evidence/settings.py."""
    arms: tuple[str, ...] = ARMS
    seeds: tuple[int, ...] = ()
    """Of initial weights, data order and noise; none given: 0, or with --final those of evidence/final.json."""
    learning_rates: tuple[float, ...] = ()
    """None given: 1e-3, or with --final each arm's best on the stories for choices."""
    minutes: float = 4.0
    """Of this command, an arm's training at most, compilation and the tests in between included; its last test comes
    after it."""
    within: float | None = None
    """Minutes from the start in which all is to end: a run that would take longer, by the longest so far, is left."""
    updates: int | None = None
    """An arm's updates at most; none given: the setting's."""
    resume: bool = False
    """Finished runs that had fewer updates resume from their states in --cache; without it, those that were cut off."""
    gpus: int = 1
    """More than one: as many processes, each with one of them."""
    per_gpu: int = 1
    """Processes that share one GPU: while one compiles or grades, another trains."""
    part: str = "0/1"
    """i/n: begin with the i-th of n parts of the list, counted from 0."""
    final: bool = False
    """Test on the stories of evidence/final.json, which are for the final table alone."""
    also: tuple[str, ...] = ()
    """Arms that the trained weights are tested as, too, without any training."""
    then: tuple[str, ...] = ()
    """The same, and then trained as for 5 % of the updates: what a change of attention costs a trained model."""
    init_from: str = ""
    """A folder of results, such as `still`, whose runs' weights are started from: those of the same arm and seed, at
    the arm's best rate; or of another arm: `still/dense`."""
    backend: str = "auto"
    """What computes attention."""
    out: pathlib.Path = RESULTS
    cache: pathlib.Path = pathlib.Path("cache/evidence")
    """Where encoded stories, trained weights and compiled programs are kept."""
    processes: int = os.cpu_count() or 1
    """That render and encode stories."""

    @property
    def kept(self) -> pathlib.Path:
        """The folder of these results' states, weights and locks."""
        return kept_in(self.cache, self.out)

    def __post_init__(self):
        if self.setting not in SETTINGS:
            raise ValueError(f"--setting {self.setting}: known are {', '.join(SETTINGS)}")
        part = re.fullmatch(r"(\d+)/(\d+)", self.part)
        if part is None or not int(part[1]) < int(part[2]):
            raise ValueError(f"--part {self.part}: must be i/n with i from 0 to n - 1, such as 0/4")
        least = {
            "gpus": self.gpus,
            "per-gpu": self.per_gpu,
            "processes": self.processes,
            "updates": 1 if self.updates is None else self.updates,
        }
        for name, given in least.items():
            if given < 1:
                raise ValueError(f"--{name} {given}: must be at least 1")
        if not 0 <= self.minutes < math.inf:
            raise ValueError(f"--minutes {self.minutes}: must be 0 or more")
        if self.within is not None and not 0 < self.within < math.inf:
            raise ValueError(f"--within {self.within}: must be more than 0 minutes")
        if bad := [rate for rate in self.learning_rates if not 0 < rate < math.inf]:
            raise ValueError(f"--learning-rates {bad[0]}: must be more than 0")
        if bad := [seed for seed in self.seeds if not 0 <= seed < 2**31]:
            raise ValueError(f"--seeds {bad[0]}: must lie in 0..{2**31 - 1}")


def main(args: Arguments, command: str) -> None:
    """Trains what has no result yet and no other process is at work on."""
    for name in (*args.arms, *args.also, *args.then):
        arm_of(name)  # a wrong name fails before any work
    if wrong := [name for name in (*args.also, *args.then) if len(stages_of(name)) > 1]:
        raise ConfigError(f"--also and --then: {', '.join(wrong)} has stages of a whole training; name it in --arms")
    runs = _runs(args)
    i, n = map(int, args.part.split("/"))
    first = len(runs) * i // n
    runs = runs[first:] + runs[:first]
    folder = args.out / (args.setting + ("-final" if args.final else ""))
    left = [run for run in runs if _undone(args, folder, run)]
    print(f"{len(runs) - len(left)} of {len(runs)} runs have results in {folder}", flush=True)
    if not left:
        return
    start = {run: _start(args, run) for run in left} if args.init_from else {}
    for run in left:
        _check_resumable(args, folder, run, start.get(run))
    with kept_programs(str(args.cache / "programs")):
        found = {run: _stored(folder, run) for run in left}
        lab = _laboratory(args, folder, command, [run.arm for run in left if not _result(args, folder, run)])
        longest = 0.0
        for run in left:
            begin = time.perf_counter()
            if args.within is not None and begin + longest > _BEGIN + 60 * args.within:
                print(f"{run.name} and what follows is left: it would not end in {args.within:g} minutes", flush=True)
                break
            with _claimed(args.kept / "locks" / folder.name / run.name) as mine:
                if not mine:
                    print(f"{run.name} is left to another process, which is at work on it", flush=True)
                if mine and not _result(args, folder, run) and found[run] == _stored(folder, run):
                    lab.train(run, args.updates or lab.setting.updates, args.minutes * 60, start.get(run))
                if mine and _stored(folder, run) and _undone(args, folder, run):
                    lab.switch(run, args.also, args.then)
            longest = max(longest, time.perf_counter() - begin)


def _runs(args: Arguments) -> list[Run]:
    seeds = args.seeds or (final_training_seeds() if args.final else (0,))
    rates = dict.fromkeys(args.arms, args.learning_rates or (1e-3,))
    if args.final and not args.learning_rates:
        choices = args.out / args.setting
        best = best_rates(finished(choices))
        if unknown := [arm for arm in args.arms if arm not in best]:
            raise ConfigError(f"--final: {choices} has no finished run of {', '.join(unknown)}; give --learning-rates")
        rates = {arm: (best[arm],) for arm in args.arms}
    return [Run(arm, rate, seed) for arm in args.arms for rate in rates[arm] for seed in seeds]


@contextlib.contextmanager
def _claimed(path: pathlib.Path) -> Iterator[bool]:
    """Whether this process has it while the block runs, and no other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def _undone(args: Arguments, folder: pathlib.Path, run: Run) -> bool:
    found = _result(args, folder, run)
    return found is None or bool(missing(found, args.also, args.then))


def _stored(folder: pathlib.Path, run: Run) -> Result | None:
    """A finished result."""
    path = folder / f"{run.name}.json"
    found = parse_json(path.read_bytes()) if path.exists() else {"finished": False}
    return found if found["finished"] else None


def _result(args: Arguments, folder: pathlib.Path, run: Run) -> Result | None:
    """A finished result, unless it is to be resumed."""
    found, updates = _stored(folder, run), args.updates or SETTINGS[args.setting].updates
    more = found and args.resume and found["updates"] < updates and not found.get("diverged")
    return None if more else found


def _check_resumable(args: Arguments, folder: pathlib.Path, run: Run, start: pathlib.Path | None) -> None:
    """A finished result is not to be lost to a training from the beginning, nor more updates to fewer.

    Raises:
        ConfigError: they would be.
    """
    path = state_of(args.kept / "weights" / folder.name, run.name)
    if _result(args, folder, run):
        return
    kept, setting = progress_in(path), SETTINGS[args.setting]
    updates = args.updates or setting.updates
    wanted = training_of(setting, run, args.init_from, start, updates)
    if kept is not None and kept.training == wanted and kept.updates > updates:
        raise ConfigError(
            f"--updates {updates}: {path} has {kept.updates} of this training; ask for as many, or remove that file"
        )
    if _stored(folder, run) is not None and (kept is None or kept.training != wanted):
        why = "there is no state of it" if kept is None else "the state is of another training, such as --init-from"
        raise ConfigError(f"--resume: {run.name} is finished in {folder}, and {why}: {path}; leave --resume out")


def _start(args: Arguments, run: Run) -> pathlib.Path:
    """The weights that a run starts from."""
    folder, _, arm = args.init_from.partition("/")
    arm = arm or run.arm
    best = best_rates(finished(args.out / folder))
    if arm not in best:
        raise ConfigError(f"--init-from {args.init_from}: {args.out / folder} has no finished run of {arm!r}")
    path = args.kept / "weights" / folder / f"{name_of(arm, best[arm], run.seed)}.npz"
    if not path.exists():
        raise ConfigError(f"--init-from {args.init_from}: {path} does not exist; train {arm!r} with seed {run.seed}")
    return path


def _laboratory(args: Arguments, folder: pathlib.Path, command: str, arms: Sequence[str]) -> Laboratory:
    """What all runs share; while stories are made, the first of the arms to train is compiled."""
    setting, phases = SETTINGS[args.setting], Phases()
    shapes = dataset.shapes(setting.world, setting.codec, setting.text, setting.seeds)
    colored = setting.world.recolorable
    library = Library(
        setting, shapes, recolor.shapes(setting.codec.channels) if colored else None, backend=args.backend
    )
    for first in arms[:1]:
        library.of(first, fresh=not args.init_from)
    phases.done("programs")
    with Spread(args.processes) as spread:
        data, exam, rows = stories(setting, args.final, spread, args.cache)
    phases.done("stories")
    save_sheet(folder / "truth.jpg", exam, np.asarray(exam.data.latents), rows)
    about = {"setting": args.setting, "final": args.final, "command": command, "versions": versions()}
    about |= {"truth_dynamic_degree": truth_dynamic_degree(exam), "init_from": args.init_from}
    about |= {"device": jax.devices()[0].device_kind, "stories": setting.stories, "held_out": len(exam.data.seeds)}
    lab = Laboratory(
        setting=setting,
        library=library,
        data=data,
        exam=exam,
        colors=recolor.recolorings(exam.codec) if colored else None,
        rows=rows,
        folder=folder,
        weights=args.kept / "weights" / folder.name,
        about=about,
    )
    print(f"{len(data.seeds)} + {len(exam.data.seeds)} stories after {phases.total('truth')}", flush=True)
    return lab


def stories(
    setting: Setting, final: bool, spread: Spread, cache: pathlib.Path | None
) -> tuple[dataset.Dataset, Exam, list[int]]:
    """What is trained on, what is asked, and the rows of the contact sheet."""
    codec = dataset.fit(setting.codec_world or setting.world, setting.codec, setting.codec_stories, spread, cache)
    data = dataset.make(setting.world, codec, setting.text, setting.seeds, spread, cache)
    seeds, rows = final_seeds(setting.final) if final else (range(setting.held_out), list(range(SHEET)))
    world = dataclasses.replace(setting.tested_world or setting.world, split=FINAL if final else CHOICES)
    return data, make_exam(world, codec, setting.text, seeds, spread, cache), rows


def side_by_side(argv: Sequence[str], environments: Sequence[Mapping[str, str]]) -> str | None:
    """The runs of a command line, a part in each of the environments; what went wrong, or None."""
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # the parts end, too
    parts: list[subprocess.Popen[bytes]] = []
    try:
        for i, environment in enumerate(environments):
            command = [sys.executable, "-m", "evidence.run", *argv, f"--part={i}/{len(environments)}"]
            parts.append(subprocess.Popen(command, env=os.environ | environment))
        failed = [i for i, process in enumerate(parts) if process.wait()]
    finally:
        for process in parts:
            process.terminate()
        signal.signal(signal.SIGTERM, before)
    return f"parts {failed} of {len(parts)} failed" if failed else None


def run(argv: Sequence[str]) -> None:
    """The command line."""
    args = tyro.cli(Arguments, args=list(argv), description=__doc__)
    if args.gpus * args.per_gpu > 1:
        memory = {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{0.9 / args.per_gpu:.2f}"}
        given = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(args.gpus)))).split(",")
        if len(given) < args.gpus:
            raise ConfigError(f"--gpus {args.gpus}: CUDA_VISIBLE_DEVICES leaves {len(given)}: {','.join(given)}")
        gpus = [gpu for _ in range(args.per_gpu) for gpu in given[: args.gpus]]
        environments = [memory | {"CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus]
        sys.exit(side_by_side([*argv, *_ALONE], environments))
    main(args, "python -m evidence.run " + shlex.join(word for word in argv if word not in _ALONE))


if __name__ == "__main__":
    # Else calls of numpy wait for a thread that traces, 5 ms each: stories took 4 times as long.
    sys.setswitchinterval(2e-4)
    with clean_exit():
        run(sys.argv[1:])
