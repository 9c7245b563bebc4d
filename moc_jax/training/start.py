"""What a run starts from: its own newest checkpoint, another run's weights (`train.init_from`), or nothing."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from moc_jax import models
from moc_jax.attention.accounting import Exchange, chosen_exchange
from moc_jax.attention.api import routed_attention
from moc_jax.attention.sharded import deal_of
from moc_jax.checkpoint import has_checkpoint, load_codec_state, load_for_sampling, newest_config, newest_meta
from moc_jax.checkpoint_base import base_of, check_there, checked, load_base
from moc_jax.checkpoint_layout import Base
from moc_jax.chips import chip_of
from moc_jax.codecs import Codec, CodecMismatch, load_codec
from moc_jax.config import PLACES, TRADES, BucketConfig, CodecConfig, Config, ConfigError, MoCConfig, Remat
from moc_jax.config_json import differences
from moc_jax.processes import gather
from moc_jax.scene import SceneLengths, SceneShape, chunk_table
from moc_jax.sharding import Params, batch_shards
from moc_jax.training.held import state_bytes, training_bytes
from moc_jax.training.remat import choose, device_memory, policies
from moc_jax.training.state import Blueprint, TrainState, create_state
from moc_jax.weights import LICENCE, are_public, check_model, load, open_weights
from moc_jax.weights.adapters import check_adapters, load_adapters, open_adapters

Changes = dict[str, tuple[object, object]]  # dotted name -> (then, now)


def initial_codec(cfg: Config) -> Codec | None:
    """The codec to prepare the data with; None: one is to be fitted. All processes call this together.

    A run that has begun has the codec in its own checkpoints, whatever is fitted meanwhile, and needs the other run no
    more. Whether it can be resumed is seen here, as far as its newest checkpoint says so, before any video is opened.

    Raises:
        CheckpointError: nothing can be read there, or it is of another format.
        ConfigError: the weights there are of another model; or `model.lora.targets` names nothing.
        CodecMismatch: the codec is of other settings.
    """
    begun = has_checkpoint(cfg.workdir)
    if cfg.model.lora.rank:
        models.abstract(cfg.model)  # its targets
        check_there(base_place(cfg), "train.init_from")
    if not begun and cfg.train.init_from and are_public(cfg.train.init_from):
        return None
    if begun and (newest := newest_config(cfg.workdir)):
        check_resumable(newest, cfg)
    if not (begun or cfg.train.init_from):
        return None
    saved, state = load_codec_state(cfg.workdir if begun else cfg.train.init_from)
    if not begun:
        check_initial(saved, cfg)
    return load_codec(cfg.codec, state)


def check_public(cfg: Config) -> None:
    """Where a new run starts from public weights, they are looked at, all but their numbers.

    Raises:
        WeightsError: they are not whole.
        ConfigError: they are of another model, or there are none, and adapters need some; or `train.init_adapters`
            are others than this run's.
    """
    if cfg.train.init_adapters and not cfg.model.lora.rank:
        raise ConfigError("train.init_adapters names adapters, but model.lora.rank is 0: give the rank that they have")
    if cfg.model.lora.rank and not cfg.train.init_from and not has_checkpoint(cfg.workdir):
        raise ConfigError(
            f"model.lora.rank = {cfg.model.lora.rank} trains adapters of weights, and train.init_from names none: give "
            "public weights, or a run's workdir"
        )
    if cfg.train.init_from and are_public(cfg.train.init_from) and not has_checkpoint(cfg.workdir):
        check_model(open_weights(cfg.train.init_from), cfg.model, "train.init_from")
    if cfg.train.init_adapters and not has_checkpoint(cfg.workdir):
        check_adapters(open_adapters(cfg.train.init_adapters), cfg.model, "train.init_adapters")


def check_first_frames(cfg: Config) -> None:
    """Raises ConfigError: a model that reads first frames would never be given any."""
    if cfg.condition_channels and not cfg.data.first_frames:
        raise ConfigError(
            f"model.condition_channels = {cfg.condition_channels} reads first frames, but data.first_frames = 0 gives "
            "none; set it to 1, or to less where shots shall begin without, too"
        )


def trained_on(cfg: Config) -> str | None:
    """The fingerprint of the data that this run must be resumed with; None: of none.

    Raises:
        CheckpointError, ConfigError: see `newest_config`.
    """
    if cfg.train.allow_new_data or not has_checkpoint(cfg.workdir):
        return None
    return newest.trained_on if (newest := newest_meta(cfg.workdir)) else None


def base_place(cfg: Config) -> str:
    """Where the weights lie that this run's adapters are beside: where they lay, unless `train.init_from` has changed.

    Raises:
        CheckpointError, ConfigError: see `newest_config`.
    """
    newest = newest_meta(cfg.workdir) if has_checkpoint(cfg.workdir) else None
    if newest and newest.base and cfg.train.init_from in ("", newest.config.train.init_from):
        return newest.base.place
    return cfg.train.init_from


def frozen_base(
    cfg: Config, codec: Codec, blueprint: Blueprint, saved: Base | None
) -> tuple[Params | None, Base | None]:
    """The weights that this run's adapters are beside, and what its checkpoints say of them; None where it has none.

    Args:
        saved: What they must be; None: the run begins.

    Raises:
        CheckpointError, ConfigError, CodecMismatch: see `load_base`, `checked` and `initial_params`.
    """
    if blueprint.abstract.frozen is None:
        return None, None
    place = base_place(cfg)
    if saved is None and not are_public(place):
        _check_run(cfg, codec)
    of_run = functools.partial(load_for_sampling, adapters="alone")
    params, where = load_base(place, cfg.model, blueprint.abstract.frozen, of_run, setting="train.init_from")
    if saved is None:
        return params, base_of(params, where)
    checked(saved, params, cfg.model, where)
    return params, dataclasses.replace(saved, place=where)


def initial_params(cfg: Config, codec: Codec, shardings: Params) -> Params:
    """The weights of `train.init_from` (their moving average, where one was kept), laid out as `shardings`.

    Raises:
        CheckpointError, ConfigError: as `initial_codec`.
        CodecMismatch: `codec`, which the data was encoded with, is not the one that these weights know.
        WeightsError: see `check_public`.
    """
    if are_public(cfg.train.init_from):
        check_public(cfg)
        return load(open_weights(cfg.train.init_from), shardings)
    _check_run(cfg, codec)
    return load_for_sampling(cfg.train.init_from, shardings=shardings).params


def _check_run(cfg: Config, codec: Codec) -> None:
    """The run that this one starts from."""
    saved, state = load_codec_state(cfg.train.init_from)
    check_initial(saved, cfg)
    check_codec(cfg.codec, state, codec, trained=cfg.train.init_from, cache=cfg.data.cache)


def begin(cfg: Config, codec: Codec, blueprint: Blueprint, frozen: Params | None) -> tuple[TrainState, str]:
    """The state before the first batch, and what to report of it.

    Args:
        frozen: the weights that adapters are beside.

    Raises:
        CheckpointError, ConfigError, CodecMismatch, WeightsError: see `initial_params` and `load_adapters`.
    """
    source, adapters, params = cfg.train.init_from, cfg.train.init_adapters, None
    report = f"starting in {cfg.workdir}" + (f" from the weights in {source}" if source else "")
    if frozen is None and source:
        params = initial_params(cfg, codec, blueprint.shardings.params)
    elif frozen is not None and adapters:
        params = load_adapters(open_adapters(adapters), cfg.model, blueprint.abstract.params, "train.init_adapters")
        report += f" and the adapters in {adapters}"
    return create_state(blueprint, params, frozen), report + licence_of(source)


def licence_of(source: str) -> str:
    """A line of a report, where public weights lie in `source`; else nothing."""
    return f"\n  licence of the weights in {source}: {LICENCE}" if source and are_public(source) else ""


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
        needs = {policy: _needed(cfg, policy, blueprint, shapes, mesh) for policy in policies(cfg.model)}
        policy, why = choose(needs, min(int(memory) for _, memory in found))
    model = dataclasses.replace(cfg.model, remat=policy)
    blueprint = dataclasses.replace(blueprint, graph=models.abstract(model)[0])
    return dataclasses.replace(cfg, model=model), blueprint, f"model.remat {policy}, by auto: {why}"


def _needed(cfg: Config, policy: Remat, blueprint: Blueprint, shapes: Sequence[BucketConfig], mesh: Mesh) -> float:
    """Bytes of a device in the bucket that needs most, and in the stage of the schedule that has the most picks."""
    patch, (rows, columns) = cfg.model.patch, cfg.latent_size
    size, scenes = {"rows": rows // patch[1], "columns": columns // patch[2]}, cfg.train.batch_size / batch_shards(mesh)
    moc = max((cfg.moc_at(stage.begin) for stage in cfg.stages(0)), key=lambda moc: moc.top_k)
    copies = math.ceil(scenes) * cfg.diffusion.copies
    of = state_bytes(blueprint.abstract), dict(mesh.shape), chip_of(mesh.devices.flat[0].device_kind)
    needs = []
    for each in shapes:
        shape = SceneShape(shots=each.shots, text_tokens=each.text_tokens, frames=each.frames // patch[0], **size)
        moved = _moved(cfg, moc, shape, copies)
        needs.append(training_bytes(cfg.model, policy, moc, shape, copies, *of, moved).total)
    return max(needs)


def _moved(cfg: Config, moc: MoCConfig, shape: SceneShape, scenes: int) -> Exchange:
    """What a device of a scene receives of others' keys for a layer, where these lie in groups of tokens."""
    frames, captions = (jax.ShapeDtypeStruct((1, count), jnp.int32) for count in (shape.shots, shape.shots + 1))
    table = jax.eval_shape(
        lambda frames, captions: chunk_table(SceneLengths(frames, captions), shape, moc.chunk), frames, captions
    )
    deal = deal_of(shape, cfg.model.heads, routed_attention(cfg.attention))
    sizes = {"heads": cfg.model.heads // deal.sharing, "head_dim": cfg.model.head_dim, "scenes": scenes}
    sizes["element_bytes"] = jnp.dtype(cfg.model.dtype).itemsize
    return chosen_exchange(deal, table, moc, cfg.training_exchange, **sizes)


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
    listed = _listed(
        {name: of for name, of in _of_the_model(differences(saved, cfg)).items() if not name.startswith("model.lora.")}
    )
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
    """Those that make other functions of the same weights."""
    return {
        name: values
        for name, values in changes.items()
        if name.split(".")[0] in ("model", "codec", "text") and name not in PLACES | TRADES
    }


def _listed(changes: Changes) -> str:
    return "; ".join(f"{name} is {old!r} there and {new!r} here" for name, (old, new) in changes.items())
