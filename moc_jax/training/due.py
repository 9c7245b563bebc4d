"""What a run does between steps now and then: what is due after a step, and what of it was left undone."""

import json

import jax
from etils import epath

from moc_jax.config import TrainConfig
from moc_jax.processes import gather
from moc_jax.training.history import read_metrics


def due(cfg: TrainConfig, step: int) -> list[str]:
    """`validation` and `preview`, as far as they are due after `step`."""
    every = {"validation": cfg.validate_every, "preview": cfg.preview_every}
    return [name for name, steps in every.items() if steps and step and step % steps == 0]


def missing(cfg: TrainConfig, workdir: str, preview: object, step: int) -> list[str]:
    """What was due after the step that a run starts from, and was not done; process 0 knows for all.

    `preview` may have a method `missing(step)`; one without is taken as done.
    """
    found = []
    if jax.process_index() == 0:
        rows = read_metrics(epath.Path(workdir) / "metrics.jsonl")
        done = {"validation": any(row["step"] == step and "validation" in row for row in rows)}
        look = getattr(preview, "missing", None)
        done["preview"] = look is None or not look(step)
        found = [name for name in due(cfg, step) if not done[name]]
    return json.loads(gather(json.dumps(found))[0])
