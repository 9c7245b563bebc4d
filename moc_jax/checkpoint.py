"""Checkpoints: weights, optimizer, moving average, place in the data, codec and config under one step, or none of it.

    workdir/checkpoints/<step>/{params, ema, optimizer, codec, meta, README.md}

Orbax (imported nowhere else) writes in the background and commits a step by one rename. Beside the arrays lie digests
of their bits, computed on the devices and independent of the mesh, so that any damage is seen on restore: the
newest checkpoint that is whole is used, and every other is named in a warning. Restore targets are built from the
current mesh, never from the saved one. checkpoint_names.py says which folders are checkpoints at all.
"""

import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import logging
import os
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import numpy as np
from etils import epath

import moc_jax
from moc_jax.checkpoint_base import Checkpoint, trained_like, with_base
from moc_jax.checkpoint_layout import (
    FATAL,
    FORMAT,
    Base,
    Meta,
    Tree,
    check_shapes,
    newest_readable,
    own_data_state,
    parse_meta,
    shapes_of,
)
from moc_jax.checkpoint_names import (
    CheckpointError,
    absolute,
    damaged_in,
    few,
    foreign_in,
    free_aside,
    steps_in,
    unfinished_in,
)
from moc_jax.config import Config, TrainConfig
from moc_jax.config_json import config_to_json
from moc_jax.digest import array_digest, text_digest, tree_digests, weights_digest
from moc_jax.errors import disk_full, out_of_memory
from moc_jax.files import write_text
from moc_jax.processes import attempt, gather, sync
from moc_jax.sharding import Params

try:  # public since orbax-checkpoint 0.13; the same API under its older name before
    from orbax.checkpoint import v1 as ocp
except ImportError:
    from orbax.checkpoint.experimental import v1 as ocp


def _not_reported_twice(record: logging.LogRecord) -> bool:
    """Orbax logs every error of its threads with a traceback, and raises it as well: it is reported once, in words."""
    return record.levelno < logging.ERROR or not ("orbax" in record.pathname or "orbax" in record.getMessage())


@dataclasses.dataclass(frozen=True)
class Restored:
    """A run after `step` batches."""

    step: int
    state: Tree  # as the target given to `restore`, on its shardings
    data_state: Tree  # this process's data iterator
    config: Config
    codec_state: dict[str, np.ndarray]
    base: Base | None


# ------------------------------------------------------------------------------------------------ a run's checkpoints


class Checkpoints:
    """The checkpoints of one run. All processes call every method together."""

    def __init__(self, directory: str, cfg: TrainConfig, card: Callable[[int, str], str] = lambda step, digest: ""):
        """`directory` is created if necessary; what an interrupted save left there is named in a warning and removed.

        `card`: the text for people that will lie beside the arrays, of a step and its weights' digest.

        Raises:
            CheckpointError: `directory` is something else.
        """
        self.directory = absolute(directory)
        self._cfg, self._card = cfg, card
        self._pending: tuple[int, str, Any] | None = None
        if not self.directory.is_dir() and (self.directory.exists() or os.path.lexists(self.directory)):
            raise CheckpointError(f"{self.directory} is not a folder: move it, or give another --workdir")
        for name in self._remove_unfinished():
            warnings.warn(f"checkpoint {self.directory / name} was never finished and was removed", stacklevel=2)
        foreign = foreign_in(self.directory)
        if foreign:
            warnings.warn(
                f"{self.directory} holds entries that are not checkpoints: {few(foreign)}; left alone", stacklevel=2
            )

    @functools.cached_property
    def _checkpointer(self) -> ocp.training.Checkpointer:
        """Built after `restore`, since it reads every step's metadata, and damaged ones must be out of its way."""
        policies = ocp.training.preservation_policies
        keep: list[policies.LatestN | policies.EveryNSteps] = [policies.LatestN(self._cfg.keep_last)]
        keep += [policies.EveryNSteps(self._cfg.keep_every)] if self._cfg.keep_every else []
        policy: Any = policies.AnyPreservationPolicy(keep)
        return ocp.training.Checkpointer(self.directory, context=_context(), preservation_policy=policy)

    @property
    def steps(self) -> list[int]:
        """Committed steps, oldest first."""
        return steps_in(self.directory)

    def save(
        self,
        step: int,
        state: Tree,
        *,
        config: Config,
        codec_state: Mapping[str, np.ndarray],
        data_state: Tree,
        base: Base | None = None,
    ) -> None:
        """Starts to write a checkpoint; returns as soon as the arrays may be reused.

        Args:
            state: trees of arrays by name: `params`, `optimizer`, and `ema` where one is kept.
            data_state: this process's data iterator, as JSON.
            base: what the weights that `state` does not hold are.

        Raises:
            CheckpointError: this save, or the one before it, found the disk full.
        """
        self.wait()
        codec_state = {name: np.asarray(array) for name, array in codec_state.items()}
        body = {
            "format": FORMAT,
            "step": step,
            "config": config_to_json(config),
            "data": gather(json.dumps(data_state)),
            "shapes": {name: shapes_of(tree) for name, tree in state.items()},
            "digests": {name: tree_digests(tree) for name, tree in state.items()},
            "codec": {name: array_digest(array) for name, array in codec_state.items()},
            "base": dataclasses.asdict(base) if base else {},
            "versions": {"moc_jax": moc_jax.__version__}
            | {name: importlib.metadata.version(name) for name in ("jax", "flax", "orbax-checkpoint")},
        }
        text = json.dumps(body)
        fitted = {"codec": codec_state} if codec_state else {}  # nothing is what Orbax does not write
        items = {**state, **fitted, "meta": {"body": text, "sha256": text_digest(text)}}
        weights = body["digests"]["ema" if "ema" in state else "params"] | (base.digests if base else {})
        card = self._card(step, weights_digest(weights))
        try:
            self._pending = step, card, self._checkpointer.save_checkpointables_async(step, items, force=True)
        except Exception as error:
            self._failed(step, error)

    def check(self) -> None:
        """Raises what a finished background save met, without waiting for one that still runs."""
        if self._pending is not None and not self._checkpointer.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Blocks until everything is on disk.

        Raises:
            CheckpointError: the disk was full; checkpoints that were committed before are intact.
        """
        if self._pending is None:
            return
        (step, card, response), self._pending = self._pending, None
        try:
            response.result()
            if card and jax.process_index() == 0:
                write_text(self.directory / str(step) / "README.md", card)
        except Exception as error:
            self._failed(step, error)

    def close(self) -> None:
        """Waits, then releases Orbax's threads."""
        try:
            self.wait()
        finally:
            if "_checkpointer" in vars(self):
                vars(self).pop("_checkpointer").close()

    def restore(self, target: Tree, check: Callable[[Config], None]) -> Restored | None:
        """The newest checkpoint that is whole; None where there has never been one.

        Newer ones are then named in a warning and moved aside as `damaged-<step>`. When none can be read, which may be
        the storage's fault, all stay as they are. To be called before the first `save`.

        Args:
            target: trees of ShapeDtypeStruct with the shardings of the current mesh, by name.
            check: raises when the saved config is not one that this run may resume from.

        Raises:
            CheckpointError: there are checkpoints but none can be read, or the weights are of another model.
        """
        problems: dict[int, str] = {}
        for step in reversed(self.steps):
            restored, problems[step] = self._restore_step(step, target, check)
            if restored is not None:
                del problems[step]
                for damaged, problem in problems.items():
                    self._set_aside(damaged, problem, step)
                return restored
        if problems:
            each = "; ".join(f"step {step}: {problem}" for step, problem in problems.items())
            raise CheckpointError(
                f"none of the checkpoints in {self.directory} can be read ({each}). All were left as they are: if the "
                "storage is at fault, run the same command again once it works; to start over, give another --workdir"
            )
        aside = damaged_in(self.directory)
        if aside:
            raise CheckpointError(
                f"{self.directory} holds no checkpoint but {', '.join(aside)}: rename one to its step's number to try "
                "it again, or give another --workdir to start over"
            )
        return None

    def _restore_step(self, step: int, target: Tree, check: Callable[[Config], None]) -> tuple[Restored | None, str]:
        path = self.directory / str(step)
        meta, problem = attempt(lambda: _read_meta(path), FATAL)
        if meta is None:
            return None, problem
        check(meta.config)
        data_state = own_data_state(meta, path)
        saved, problem = attempt(lambda: _read_arrays(path, meta, target), FATAL)
        if saved is None:
            return None, problem
        state = {name: saved[name] for name in target}
        return Restored(step, state, data_state, meta.config, saved["codec"], meta.base), ""

    def _set_aside(self, step: int, problem: str, whole: int) -> None:
        path, aside = self.directory / str(step), free_aside(self.directory, step)
        warnings.warn(
            f"checkpoint {path} is damaged ({problem}) and was moved to {aside.name}; that of step {whole} is whole",
            stacklevel=3,
        )
        sync("see_aside")  # every process names the same place, before it is taken
        if jax.process_index() == 0:
            path.rename(aside)
        sync("set_aside")

    def _remove_unfinished(self) -> list[str]:
        paths = unfinished_in(self.directory)
        if jax.process_index() == 0:
            for path in paths:
                path.rmtree(missing_ok=True)
        return [path.name for path in paths]

    def _failed(self, step: int, error: Exception) -> None:
        if not disk_full(error):
            raise error
        with contextlib.suppress(Exception):  # it raises the same again
            vars(self).pop("_checkpointer").close()
        for _ in range(10):  # half a checkpoint is worth nothing, but Orbax's other threads may still be making it
            self._remove_unfinished()
            time.sleep(0.1)
        intact = f"the checkpoints of steps {self.steps} are intact" if self.steps else "there is no earlier checkpoint"
        raise CheckpointError(
            f"the disk is full: checkpoint {self.directory / str(step)} could not be written; {intact}. Free some "
            "space (train.keep_last and train.keep_every say what is kept) and run the same command again"
        ) from error


# ------------------------------------------------------------------------------------------------ weights and codec


def has_checkpoint(directory: str) -> bool:
    """Whether `directory`, a run's workdir, holds one."""
    return bool(steps_in(absolute(directory) / "checkpoints"))


def newest_config(directory: str) -> Config | None:
    """The config of the newest checkpoint of a run's workdir; else as `newest_meta`."""
    return meta.config if (meta := newest_meta(directory)) else None


def newest_meta(directory: str) -> Meta | None:
    """What the newest checkpoint of a run's workdir says; None where it is damaged, which `restore` will say.

    Raises:
        CheckpointError: it is of a format that this version does not read.
        ConfigError: its config is none that this version reads.
    """
    root = absolute(directory) / "checkpoints"
    return attempt(lambda: _read_meta(root / str(steps_in(root)[-1])), FATAL)[0]


def saved_config(directory: str, step: int | None = None) -> tuple[Config, int]:
    """Config and step of a checkpoint, of which no array is read; arguments and errors of `load_for_sampling`."""
    return newest_readable(directory, step, lambda path: ((meta := _read_meta(path)).config, meta.step))


def load_for_sampling(
    directory: str,
    step: int | None = None,
    *,
    shardings: Params | None = None,
    adapters: Literal["merged", "apart", "alone"] = "merged",
    base: str = "",
) -> Checkpoint:
    """Config, weights and codec of one checkpoint.

    Args:
        directory: a run's workdir, its `checkpoints` folder, or the folder of one step.
        step: which one; None takes the newest that is whole.
        shardings: where the weights go, a tree like theirs; None: on one device. All processes load together.
        adapters: become part of the weights that they are beside, or stay apart, or come `alone`.
        base: where these weights lie now; empty: where they lay.

    Raises:
        CheckpointError: no such checkpoint, a damaged one, one whose weights do not fit its model's config, or one
            of adapters whose base is gone or another.
    """

    def load(path: epath.Path) -> Checkpoint:
        meta = _read_meta(path)
        name = "ema" if "ema" in meta.digests else "params"
        saved = _read_arrays(path, meta, {name: trained_like(meta.config.model, shardings)})
        digests = meta.digests[name]
        digest = weights_digest(digests)
        found = Checkpoint(meta.config, saved[name], saved["codec"], meta.step, digest, meta.trained_on)
        if adapters == "alone" or not found.config.model.lora.rank:
            return found
        of_run = functools.partial(load_for_sampling, adapters="alone")
        return with_base(found, digests, meta.base, base, shardings, of_run, merge=adapters == "merged")

    return newest_readable(directory, step, load)


def load_codec_state(directory: str) -> tuple[Config, dict[str, np.ndarray]]:
    """Config and codec of the newest checkpoint that is whole in both; arguments and errors of `load_for_sampling`."""

    def load(path: epath.Path) -> tuple[Config, dict[str, np.ndarray]]:
        meta = _read_meta(path)
        return meta.config, _read_arrays(path, meta, {})["codec"]

    return newest_readable(directory, None, load)


# ------------------------------------------------------------------------------------------------ reading


def _context() -> ocp.Context:
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_not_reported_twice)  # once, however often it is asked for
    registry = ocp.handlers.local_registry()
    registry.add(ocp.handlers.JsonHandler, checkpointable_name="meta")
    context = ocp.Context()
    context.checkpointables.registry = registry
    return context


def _read_meta(path: epath.Path) -> Meta:
    if not (path / "meta").is_dir():  # Orbax would log it, with a list of what else it looked for
        raise FileNotFoundError("it has no meta" if path.is_dir() else "it is not a folder")
    with _context():
        saved = ocp.load_checkpointables(path, {"meta": None})["meta"]
    return parse_meta(saved, path)


def _read_arrays(path: epath.Path, meta: Meta, target: Tree) -> Tree:
    """The trees of `target` and the codec's state; ValueError when a digest does not match, whatever Orbax raises."""
    for name, tree in target.items():
        check_shapes(path, name, meta.shapes.get(name, {}), shapes_of(tree))
    try:
        with _context():
            asked = {**target, **({"codec": None} if meta.codec else {})}
            saved = ocp.load_checkpointables(path, asked) if asked else {}
    except Exception as error:
        asked = out_of_memory(error)
        if asked is None:
            raise
        raise CheckpointError(  # an older one would need as much
            f"the devices' memory is too small for checkpoint {path}: {asked}. Close what else uses them, or split the "
            "state over more (mesh.fsdp)"
        ) from error
    saved["codec"] = {name: np.asarray(array) for name, array in saved.get("codec", {}).items()}
    for name in target:
        digests = meta.digests.get(name, {})
        wrong = [key for key, digest in tree_digests(saved[name]).items() if digest != digests.get(key)]
        if wrong:
            raise ValueError(f"{name}: the digest of {', '.join(wrong)} does not match")
    if meta.codec != {name: array_digest(array) for name, array in saved["codec"].items()}:
        raise ValueError("codec: the digest does not match")
    return saved
