"""What a run starts from: its own newest checkpoint, another run's weights (`train.init_from`), or nothing."""

import dataclasses
import math
from collections.abc import Sequence
from typing import cast

import numpy as np
from jax.sharding import Mesh

from moc_jax import models
from moc_jax.checkpoint import has_checkpoint, load_codec_state, load_for_sampling, newest_config
from moc_jax.codecs import Codec, CodecMismatch, load_codec
from moc_jax.config import BucketConfig, CodecConfig, Config, ConfigError, Remat
from moc_jax.config_json import differences
from moc_jax.processes import gather
from moc_jax.sharding import Params, batch_shards
from moc_jax.training.remat import choose, device_memory
from moc_jax.training.state import Blueprint

Changes = dict[str, tuple[object, object]]  # dotted name -> (then, now)


def initial_codec(cfg: Config) -> Codec | None:
    """The codec to prepare the data with; None: one is to be fitted. All processes call this together.

    A run that has begun has the codec in its own checkpoints, and needs the other run no more. Whether it can be
    resumed is seen here, as far as its newest checkpoint says so, before any video is opened.

    Raises:
        CheckpointError: nothing can be read there, or it is of another format.
        ConfigError: the weights there are of another model.
        CodecMismatch: the codec is of other settings.
    """
    begun = has_checkpoint(cfg.workdir)
    if begun and (newest := newest_config(cfg.workdir)):
        check_resumable(newest, cfg)
    if not cfg.train.init_from:
        return None
    saved, state = load_codec_state(cfg.workdir if begun else cfg.train.init_from)
    if not begun:
        check_initial(saved, cfg)
    return load_codec(cfg.codec, state)


def initial_params(cfg: Config, codec: Codec, shardings: Params) -> Params:
    """The weights of `train.init_from` (their moving average, where one was kept), laid out as `shardings`.

    Raises:
        CheckpointError, ConfigError: as `initial_codec`.
        CodecMismatch: `codec`, which the data was encoded with, is not the one that these weights know.
    """
    saved, state = load_codec_state(cfg.train.init_from)
    check_initial(saved, cfg)
    check_codec(cfg.codec, state, codec, trained=cfg.train.init_from, cache=cfg.data.cache)
    return load_for_sampling(cfg.train.init_from, shardings=shardings).params


def with_remat(
    cfg: Config, blueprint: Blueprint, shapes: Sequence[BucketConfig], mesh: Mesh
) -> tuple[Config, Blueprint, str]:
    """Both with a policy in place of `model.remat auto`; which that is, and why. All processes call this together.

    Policies differ in rounding, since the compiler fuses what it has at hand: a run keeps the one that it began with.

    Args:
        cfg: a run's settings.
        blueprint: the run's.
        shapes: the buckets of its batches.
        mesh: the devices.

    Raises:
        CheckpointError, ConfigError: see `newest_config`.
    """
    if cfg.model.remat != "auto":
        return cfg, blueprint, f"model.remat {cfg.model.remat}, as configured"
    begun = newest_config(cfg.workdir) if has_checkpoint(cfg.workdir) else None
    found = [text.split() for text in gather(f"{begun.model.remat if begun else 'auto'} {device_memory()}")]
    policy, why = cast(Remat, found[0][0]), "the run began with it"
    if policy == "auto":
        per_frame = math.prod(cfg.latent_size) / math.prod(cfg.model.patch)
        per_scene = max(shape.text_tokens + shape.frames * per_frame for shape in shapes)
        tokens = math.ceil(per_scene * cfg.train.batch_size / batch_shards(mesh))
        policy, why = choose(cfg.model, cfg.moc, blueprint.abstract, tokens, min(int(memory) for _, memory in found))
    model = dataclasses.replace(cfg.model, remat=policy)
    blueprint = dataclasses.replace(blueprint, graph=models.abstract(model)[0])
    return dataclasses.replace(cfg, model=model), blueprint, f"model.remat {policy}, by auto: {why}"


def check_codec(settings: CodecConfig, state: dict[str, np.ndarray], codec: Codec, *, trained: str, cache: str) -> None:
    """Raises CodecMismatch unless `state`, of the checkpoints in `trained`, is `codec`, of the data in `cache`."""
    saved = load_codec(settings, state).fingerprint
    if saved != codec.fingerprint:
        raise CodecMismatch(
            f"the weights in {trained} were trained on latents of codec {saved}, but the data in {cache} was "
            f"encoded with codec {codec.fingerprint}, fitted again: put back the data that was prepared for that run, "
            f"or start from its weights and codec with --train.init-from {trained} in another --workdir"
        )


def check_initial(saved: Config, cfg: Config) -> None:
    """Raises ConfigError, naming each field, unless the weights of a run with `saved` fit `cfg`."""
    listed = _listed(_of_the_model(differences(saved, cfg)))
    if listed:
        raise ConfigError(
            f"train.init_from {cfg.train.init_from} is of another model: {listed}. Give this run the same values"
        )


def check_resumable(saved: Config, cfg: Config) -> Changes:
    """The changes since a checkpoint with which a run may resume.

    Raises:
        ConfigError: model, codec or text encoder differ, or the state has other parts; names every such field.
    """
    changes = differences(saved, cfg)
    fixed = _of_the_model(changes) | {
        name: values
        for name, values in changes.items()
        if name == "optimizer.accumulate" or (name == "train.ema_decay" and 0 in values)
    }
    if fixed:
        raise ConfigError(
            f"the checkpoints in {cfg.workdir} can't be resumed with this config: {_listed(fixed)}. Change that back, "
            "or give another --workdir"
        )
    return changes


def _of_the_model(changes: Changes) -> Changes:
    """Those that make other functions of the same weights; remat only trades memory for time."""
    return {
        name: values
        for name, values in changes.items()
        if name.split(".")[0] in ("model", "codec", "text") and name != "model.remat"
    }


def _listed(changes: Changes) -> str:
    return "; ".join(f"{name} is {old!r} there and {new!r} here" for name, (old, new) in changes.items())
