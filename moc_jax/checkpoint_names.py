"""What lies in a run's checkpoints folder: a name is a step only as this program writes it.

Without jax, so that a wrong path is reported at once.
"""

import os
import re
from collections.abc import Sequence

from etils import epath

from moc_jax.errors import Failure

_STEP = re.compile(r"0|[1-9][0-9]*", re.ASCII)
_UNFINISHED = re.compile(r"[0-9]+\.orbax-checkpoint-tmp(-[0-9]+)?", re.ASCII)
_DAMAGED = "damaged-"


class CheckpointError(Failure):
    """A checkpoint that cannot be written or read: the message names it, the cause and what is intact."""


def absolute(directory: str) -> epath.Path:
    """Orbax takes no relative paths; a bucket's address is none."""
    return epath.Path(directory if "://" in directory else os.path.abspath(directory))


def step_of(name: str) -> int | None:
    """The step of a checkpoint's folder; None for a name that no checkpoint is given: 007, ², -1, 1e3."""
    return int(name) if _STEP.fullmatch(name) else None


def steps_in(root: epath.Path) -> list[int]:
    """Steps by name, oldest first, whatever lies behind the names: reading shows which are whole."""
    return sorted(step for path in _entries(root) if (step := step_of(path.name)) is not None)


def unfinished_in(root: epath.Path) -> list[epath.Path]:
    """What an interrupted save left."""
    return [path for path in _entries(root) if _UNFINISHED.fullmatch(path.name) and path.is_dir()]


def damaged_in(root: epath.Path) -> list[str]:
    """Names of what was set aside."""
    return [path.name for path in _entries(root) if path.name.startswith(_DAMAGED)]


def foreign_in(root: epath.Path) -> list[str]:
    """Names of what is neither a checkpoint nor was one."""
    known = {*map(str, steps_in(root)), *damaged_in(root), *(path.name for path in unfinished_in(root))}
    return [path.name for path in _entries(root) if path.name not in known and not path.name.startswith(".")]


def free_aside(root: epath.Path, step: int) -> epath.Path:
    """Where to move a damaged step: `damaged-<step>`, with a number behind it where that is taken."""
    taken, name, number = {path.name for path in _entries(root)}, f"{_DAMAGED}{step}", 1
    while name in taken:
        number += 1
        name = f"{_DAMAGED}{step}-{number}"
    return root / name


def few(names: Sequence[str]) -> str:
    """Some of them, and how many more there are."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(map(repr, names[:5])) + more


def _entries(root: epath.Path) -> list[epath.Path]:
    return sorted(root.iterdir(), key=lambda path: path.name) if root.is_dir() else []


def find_steps(directory: str, step: int | None, *, name: str = "") -> tuple[epath.Path, list[int], int | None]:
    """The checkpoints folder that `directory` means, the steps there, oldest first, and which of them is meant, if one.

    Args:
        directory: a run's workdir, its `checkpoints` folder, or the folder of one step.
        step: which one; None: the newest that is whole, unless `directory` is the folder of one.
        name: of `directory` in messages; empty: itself.

    Raises:
        CheckpointError: there is none.
    """
    given = absolute(directory)
    root = given / "checkpoints" if (given / "checkpoints").is_dir() else given
    if (root / "meta").exists():
        root, step = root.parent, step_of(root.name)
        if step is None:
            raise CheckpointError(f"{given} is a checkpoint, but its name is not a step: rename it to what it was")
    steps = steps_in(root)
    if not steps:
        raise CheckpointError(
            f"no checkpoint in {name or directory}; give a run's workdir, its checkpoints folder, one step's folder, "
            "or a folder of public weights"
        )
    if step is not None and step not in steps:
        raise CheckpointError(f"no checkpoint of step {step} in {root}; there are steps {steps}")
    return root, steps, step
