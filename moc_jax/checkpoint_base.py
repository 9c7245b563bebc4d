"""The weights that adapters are beside: a checkpoint says which they are, and holds none of them.

Where they lie is a place on this machine, which may change; what they are, digests of their numbers say.
"""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import jax
import numpy as np
from etils import epath
from flax import nnx

from moc_jax import models
from moc_jax.checkpoint_layout import Base, Tree
from moc_jax.checkpoint_names import CheckpointError, find_steps
from moc_jax.config import Config, LoraConfig, ModelConfig
from moc_jax.digest import tree_digests, weights_digest
from moc_jax.public_weights import LICENCE, WeightsError, are_public, check_model, load, open_weights
from moc_jax.sharding import Params, replicated


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What sampling needs of a checkpoint."""

    config: Config
    params: Tree  # nested, float32, on one device; the moving average where the run kept one
    codec_state: dict[str, np.ndarray]
    step: int
    digest: str  # of `params`, by `weights_digest`; with adapters merged, of these and of what they were merged into
    data: str  # fingerprint of what it was trained on
    licence: str = ""  # of public weights that adapters are beside

    def model(self) -> models.VideoModel:
        """The transformer with these weights."""
        return nnx.merge(models.abstract(self.config.model)[0], self.params)


class LoadRun(Protocol):
    """Reads another run's weights."""

    def __call__(self, directory: str, step: int | None = None, *, shardings: Params | None = None) -> Checkpoint:
        """See `checkpoint.load_for_sampling`."""
        ...


def trained_like(model: ModelConfig, shardings: Params | None) -> Params:
    """Shapes of what a checkpoint of such a model holds: its weights, or its adapters alone.

    Args:
        shardings: of the weights; adapters lie whole on all of their devices. None: on one device.
    """
    weights = nnx.to_pure_dict(models.abstract(model)[1])
    if shardings is None or model.lora.rank:
        first = next(iter(jax.tree.leaves(shardings)), None)
        place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0]) if first is None else replicated(first.mesh)
        weights = models.trained(weights)
        shardings = jax.tree.map(lambda _: place, weights)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), weights, shardings)


def frozen_like(model: ModelConfig) -> Params:
    """Shapes and types of the weights that the adapters of such a model are beside."""
    frozen = models.frozen(nnx.to_pure_dict(models.abstract(model)[1]))
    assert frozen is not None
    return frozen


def load_base(place: str, model: ModelConfig, like: Params, load_run: LoadRun, *, setting: str) -> tuple[Params, str]:
    """The weights in `place`, and its full name, with the step of a run.

    Args:
        like: ShapeDtypeStructs with the shardings that they are to have.
        setting: what named the place, in messages.

    Raises:
        CheckpointError: nothing is there, or it can't be read.
        ConfigError: they are of another model.
    """
    check_there(place, setting)
    if are_public(place):
        try:
            weights = open_weights(place)
            check_model(weights, model, setting)
            return load(weights, like), os.path.abspath(place)
        except WeightsError as error:
            raise CheckpointError(str(error)) from error
    saved = load_run(place, shardings=jax.tree.map(lambda x: x.sharding, like))
    if saved.config.model.lora.rank:
        raise CheckpointError(f"{setting} {place} holds adapters, and no weights that others could be beside")
    root, _, _ = find_steps(place, saved.step)
    held = jax.tree.map(lambda x, wanted: x.astype(wanted.dtype), saved.params, like)
    return held, str(root / str(saved.step))


def check_there(place: str, setting: str) -> None:
    """Raises CheckpointError unless something lies in `place`."""
    if not (epath.Path(place).exists() if "://" in place else Path(place).exists()):
        what = "the weights that these adapters are beside"
        raise CheckpointError(f"{setting} {place}, {what}, is not there; name the place where they lie")


def checked(base: Base, params: Params, model: ModelConfig, place: str) -> None:
    """Raises CheckpointError unless `params`, which were read in `place`, are the weights that `base` says."""
    found = tree_digests(params, frozen_like(model))
    differ = sorted(name for name in {*found, *base.digests} if found.get(name) != base.digests.get(name))
    if differ:
        which = f"{len(differ)} of {len(base.digests)} arrays differ, such as {differ[0]}"
        raise CheckpointError(
            f"{place} holds other weights than those that these adapters were trained beside, which lay in "
            f"{base.place}: {which}"
        )


def base_of(params: Params, place: str) -> Base:
    """What a checkpoint says of weights as a run holds them, read in `place`."""
    return Base(place, tree_digests(params))


def with_base(
    saved: Checkpoint,
    digests: Mapping[str, int],
    base: Base | None,
    place: str,
    shardings: Params | None,
    load_run: LoadRun,
    *,
    merge: bool,
) -> Checkpoint:
    """A checkpoint of adapters with the weights that these are beside.

    Args:
        digests: of the adapters.
        base: what these weights are.
        place: where they lie now; empty: where they lay.
        shardings: where they go; None: to one device.
        merge: into weights of a model without adapters; else the model has both.

    Raises:
        CheckpointError, ConfigError: see `load_base` and `checked`.
        ValueError: the checkpoint doesn't say what they are.
    """
    if base is None:
        raise ValueError("meta: it says nothing of the weights that its adapters are beside")
    model = saved.config.model
    plain = dataclasses.replace(model, lora=LoraConfig())
    like = trained_like(plain, shardings)
    setting = "--base" if place else "the checkpoint's base"
    weights, where = load_base(place or base.place, model, like, load_run, setting=setting)
    checked(base, weights, model, where)
    licence = LICENCE if are_public(where) else ""
    saved = dataclasses.replace(saved, digest=weights_digest({**digests, **base.digests}), licence=licence)
    if not merge:
        weights = jax.tree.map(lambda x, held: x.astype(held.dtype), weights, frozen_like(model))
        return dataclasses.replace(saved, params=models.joined(weights, saved.params))
    params = models.merged(weights, saved.params, model.lora)
    params = jax.tree.map(lambda x, wanted: jax.device_put(x, wanted.sharding), params, like)
    return dataclasses.replace(saved, params=params, config=dataclasses.replace(saved.config, model=plain))
