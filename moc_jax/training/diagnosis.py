"""Why a step's results are not finite: which scenes they came from, and whether the data itself is broken."""

import json
from collections.abc import Sequence

import numpy as np

from moc_jax.config import TrainConfig
from moc_jax.data.buckets import Buckets
from moc_jax.data.manifest import SceneEntry
from moc_jax.data.pipeline import SceneIterator
from moc_jax.data.plan import TrainPlan
from moc_jax.processes import gather
from moc_jax.scene import Scene
from moc_jax.training.step import StepMetrics


def is_finite(values: StepMetrics) -> bool:
    """Whether loss, gradients and weights all are."""
    return all(np.isfinite(x) for x in (values.loss, values.grad_norm, values.param_norm))


def diagnosis(
    train: TrainConfig,
    data: SceneIterator,
    step: int,
    scene: Scene,
    rows: Sequence[int],
    values: StepMetrics,
    saved: int | None,
) -> str:
    """What to report of `step`, whose results are not finite; all processes call this together.

    Args:
        data: the training data.
        scene: this process's rows of the batch, on the host.
        rows: which of the batch these are.
        saved: the step of the newest checkpoint.
    """
    entries = batch_entries(train, data.buckets, step - 1 - data.begun)
    mine = [entries[row] for row in rows]
    found = [
        f"{entry.name} from {entry.source}"
        for entry, video, text in zip(mine, scene.video, scene.text)
        if not (np.isfinite(video).all() and np.isfinite(text).all())
    ]
    broken = [name for names in gather(json.dumps(found)) for name in json.loads(names)]
    losses = ", ".join(f"{e.name} from {e.source}: {loss:.4g}" for e, loss in zip(entries, values.scene_loss))
    cause = (
        f"the data itself holds NaN or infinity: {'; '.join(broken)}; remove that file and prepare the data again"
        if broken
        else "the data is finite; try a lower optimizer.learning_rate, a longer warm-up or model.dtype float32"
    )
    intact = "nothing was saved yet" if saved is None else f"the checkpoint of step {saved} is intact"
    return (
        f"step {step}: loss {values.loss:.4g}, gradient norm {values.grad_norm:.4g}, weights' norm "
        f"{values.param_norm:.4g}. Loss by scene: {losses}. Cause: {cause}. {intact[0].upper()}{intact[1:]}"
    )


def batch_entries(train: TrainConfig, buckets: Buckets, batch: int) -> list[SceneEntry]:
    """The scenes that batch number `batch` of the data (from 0) is made of, over all processes."""
    planned = TrainPlan(tuple(map(len, buckets.scenes)), train.batch_size, train.seed)[batch]
    return [buckets.scenes[planned.bucket][number] for number in planned.scenes if number is not None]
