"""Where a training was left: its state and its tests until then, in one file."""

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np

from evidence.cache import load_weights, save_weights
from evidence.experiment import Trainer
from evidence.results import finite
from moc_jax.reading import parse_json

_TOLD = "progress"  # beside the state's arrays


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a training came."""

    training: str
    """What it is of: a state of another is not resumed."""
    commands: tuple[str, ...]
    """That it was trained by, one after another."""
    curve: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """Its tests."""

    @property
    def updates(self) -> int:
        """Until the last of them."""
        return self.curve[-1]["updates"] if self.curve else 0


def state_of(weights: pathlib.Path, name: str) -> pathlib.Path:
    """The file of a run's state beside its weights."""
    return weights / f"{name}.state.npz"


def save_state(path: pathlib.Path, trainer: Trainer, progress: Progress) -> None:
    """The trainer's state, each array by its name, and how far it came."""
    told = json.dumps(finite(dataclasses.asdict(progress)))
    save_weights(path, trainer.state, **{_TOLD: np.array(told)})


def progress_in(path: pathlib.Path) -> Progress | None:
    """How far the training came whose state is in a file; None: there is no such file."""
    if not path.exists():
        return None
    with np.load(path, allow_pickle=False) as file:
        told = parse_json(str(file[_TOLD]).encode())
    return Progress(training=told["training"], commands=tuple(told["commands"]), curve=told["curve"])


def resumed(path: pathlib.Path, new: Progress, trainer: Trainer) -> Progress:
    """`new`, or what is in a file if it is of the same training; the trainer then takes its state."""
    found = progress_in(path)
    if found is None or not found.curve:
        return new
    if found.training != new.training:
        print(f"{path} is of another training: not resumed", flush=True)
        return new
    trainer.state = load_weights(path, trainer.state)
    print(f"{path.name} resumes after {found.updates} updates", flush=True)
    return dataclasses.replace(new, commands=(*found.commands, *new.commands), curve=found.curve)
