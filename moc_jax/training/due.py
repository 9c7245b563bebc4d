"""What a run does between steps now and then: what is due after a step, and what of it was left undone."""

import contextlib
import json
import warnings
from collections.abc import Callable, Iterator

import jax
from etils import epath

from moc_jax.config import TrainConfig
from moc_jax.errors import PreviewError
from moc_jax.processes import gather
from moc_jax.sharding import Params
from moc_jax.training.history import read_metrics

Preview = Callable[[Params, int], None]
"""(weights, step): writes previews; all processes call it together. Where it has a method `missing(step)`, a run that
was stopped before the preview of its last step makes it up when it resumes. A preview that fails is left out with a
warning; with several processes, only if it raises PreviewError."""


def due(cfg: TrainConfig, step: int) -> list[str]:
    """`validation` and `preview`, as far as they are due after `step`."""
    every = {"validation": cfg.validate_every, "preview": cfg.preview_every}
    return [name for name, steps in every.items() if steps and step and step % steps == 0]


def missing(cfg: TrainConfig, workdir: str, preview: Preview | None, step: int) -> list[str]:
    """What was due after the step that a run starts from, and was not done; process 0 knows for all."""
    found = []
    if jax.process_index() == 0:
        rows = read_metrics(epath.Path(workdir) / "metrics.jsonl")
        done = {"validation": any(row["step"] == step and "validation" in row for row in rows)}
        look = getattr(preview, "missing", None)
        done["preview"] = look is None or not look(step)
        found = [name for name in due(cfg, step) if not done[name]]
    return json.loads(gather(json.dumps(found))[0])


@contextlib.contextmanager
def without_preview(step: int) -> Iterator[None]:
    """A preview that fails costs no step, unless it may have failed on one process while others wait for it."""
    try:
        yield
    except Exception as error:
        if jax.process_count() > 1 and not isinstance(error, PreviewError):
            raise
        if jax.process_index() == 0:
            warnings.warn(f"training continues without the preview of step {step}: {error}", stacklevel=2)
