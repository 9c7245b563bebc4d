"""The loss of held-out scenes."""

import functools
from collections.abc import Hashable

import jax
import numpy as np
from jax.sharding import Mesh

from moc_jax.compilation import built
from moc_jax.config import MoCConfig
from moc_jax.data.pipeline import SceneIterator
from moc_jax.processes import together
from moc_jax.sharding import Params, shard_batch
from moc_jax.training.step import validation_levels
from moc_jax.training.stop import RunStop


class Validation:
    """Measures it at the noise levels of `make_validation_step`; all processes call it together."""

    def __init__(
        self,
        scenes: SceneIterator,
        step: jax.stages.Wrapped,
        mesh: Mesh,
        levels: int,
        stop: RunStop,
    ) -> None:
        """`levels` are `train.validation_buckets`."""
        self._scenes, self._step, self._mesh = scenes, step, mesh
        self._levels, self._stop = levels, stop
        self._programs: dict[Hashable, jax.stages.Compiled] = {}

    def __call__(self, params: Params, moc: MoCConfig) -> dict[str, float]:
        """The mean over shots of the loss at each level, and the mean of these.

        Raises:
            Interrupted: a signal came first.
        """
        self._scenes.set_state({**self._scenes.get_state(), "step": 0})
        results = []
        for number, scene in enumerate(self._scenes):
            self._stop.check()
            batch = params, shard_batch(scene, self._mesh), np.int32(number)
            key = moc, batch[1].video.shape, batch[1].text.shape, batch[1].lengths.shot_frames.shape
            if key not in self._programs:
                build = functools.partial(built, self._mesh, self._step, *batch, moc)
                what = f"compile validation (program {len(self._programs) + 1})"
                self._programs[key] = self._stop.unless_asked(functools.partial(together, what, build))
            results.append(jax.device_get(self._programs[key](*batch)))
        sums, shots = (np.sum(x, axis=0) for x in zip(*results))
        losses = sums.astype(np.float64) / max(shots, 1)
        levels = np.asarray(validation_levels(self._levels))
        return {"mean": float(losses.mean()), **{f"t_{t:.3f}": float(loss) for t, loss in zip(levels, losses)}}
