"""Checkpoints: weights, optimizer, moving average, place in the data, codec and config under one step, or none of it.

    workdir/checkpoints/<step>/{params, ema, optimizer, codec, meta}

Orbax (imported nowhere else) writes in the background and commits a step by one rename. Beside the arrays lie digests
of their bits, computed on the devices and independent of the mesh, so that any damage is seen on restore: the
newest checkpoint that is whole is used, and every other is named in a warning. Restore targets are built from the
current mesh, never from the saved one.
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
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import nnx

import moc_jax
from moc_jax.config import Config, ConfigError, TrainConfig
from moc_jax.config_json import config_from_json, config_to_json
from moc_jax.digest import array_digest, text_digest, tree_digests
from moc_jax.errors import disk_full
from moc_jax.models.mmdit import MMDiT, abstract_model
from moc_jax.processes import attempt, gather, sync
from moc_jax.sharding import key_path

try:  # public since orbax-checkpoint 0.13; the same API under its older name before
    from orbax.checkpoint import v1 as ocp
except ImportError:
    from orbax.checkpoint.experimental import v1 as ocp


def _not_told_twice(record: logging.LogRecord) -> bool:
    """Orbax logs every error of its threads with a traceback, and raises it as well: we tell it once, in words."""
    return record.levelno < logging.ERROR or not ("orbax" in record.pathname or "orbax" in record.getMessage())


for _name in ("absl", "asyncio"):
    logging.getLogger(_name).addFilter(_not_told_twice)


class CheckpointError(RuntimeError):
    """A checkpoint that can't be written or read: the message names it, the cause and what is intact."""


_FATAL = CheckpointError, ConfigError  # an older checkpoint would not be better


@dataclasses.dataclass(frozen=True)
class Restored:
    """A run as it stood after `step` batches."""

    step: int
    state: dict[str, Any]  # as the target given to `restore`, on its shardings
    data_state: dict[str, Any]  # this process's data iterator
    config: Config
    codec_state: dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What sampling needs of a checkpoint."""

    config: Config
    params: dict[str, Any]  # nested, float32, on one device; the moving average where the run kept one
    codec_state: dict[str, np.ndarray]
    step: int

    def model(self) -> MMDiT:
        """The transformer with these weights."""
        return nnx.merge(abstract_model(self.config.model)[0], self.params)


# ------------------------------------------------------------------------------------------------ a run's checkpoints


class Checkpoints:
    """The checkpoints of one run. All processes call every method together."""

    def __init__(self, directory: str, cfg: TrainConfig):
        """`directory` is made if need be; what an interrupted save left there is named in a warning and removed."""
        self.directory = _absolute(directory)
        self._cfg = cfg
        self._pending: tuple[int, Any] | None = None
        for name in self._remove_unfinished():
            warnings.warn(f"checkpoint {self.directory / name} was never finished and was removed", stacklevel=2)

    @functools.cached_property
    def _checkpointer(self) -> ocp.training.Checkpointer:
        """Built after `restore`, since it reads every step's metadata, and damaged ones must be out of its way."""
        policies = ocp.training.preservation_policies
        keep: list[Any] = [policies.LatestN(self._cfg.keep_last)]
        keep += [policies.EveryNSteps(self._cfg.keep_every)] if self._cfg.keep_every else []
        policy: Any = policies.AnyPreservationPolicy(keep)
        return ocp.training.Checkpointer(self.directory, context=_context(), preservation_policy=policy)

    @property
    def steps(self) -> list[int]:
        """Committed steps, oldest first."""
        return _steps(self.directory)

    def save(
        self,
        step: int,
        state: Mapping[str, Any],
        *,
        config: Config,
        codec_state: Mapping[str, np.ndarray],
        data_state: Mapping[str, Any],
    ) -> None:
        """Starts to write a checkpoint; returns as soon as the arrays may be reused.

        Args:
            state: trees of arrays by name: `params`, `optimizer`, and `ema` where one is kept.
            data_state: this process's data iterator, as JSON.

        Raises:
            CheckpointError: this save, or the one before it, found the disk full.
        """
        self.wait()
        codec_state = {name: np.asarray(array) for name, array in codec_state.items()}
        body = {
            "step": step,
            "config": config_to_json(config),
            "data": gather(json.dumps(data_state)),
            "shapes": {name: _shapes(tree) for name, tree in state.items()},
            "digests": {name: tree_digests(tree) for name, tree in state.items()},
            "codec": {name: array_digest(array) for name, array in codec_state.items()},
            "versions": {"moc_jax": moc_jax.__version__}
            | {name: importlib.metadata.version(name) for name in ("jax", "flax", "orbax-checkpoint")},
        }
        text = json.dumps(body)
        items = {**state, "codec": codec_state, "meta": {"body": text, "sha256": text_digest(text)}}
        try:
            self._pending = step, self._checkpointer.save_checkpointables_async(step, items, force=True)
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
        (step, response), self._pending = self._pending, None
        try:
            response.result()
        except Exception as error:
            self._failed(step, error)

    def close(self) -> None:
        """Waits, then releases Orbax's threads."""
        try:
            self.wait()
        finally:
            if "_checkpointer" in vars(self):
                vars(self).pop("_checkpointer").close()

    def restore(self, target: Mapping[str, Any], check: Callable[[Config], None]) -> Restored | None:
        """The newest checkpoint that is whole; None where there has never been one.

        Newer ones are then named in a warning and moved aside as `damaged-<step>`. When none can be read, which may be
        the storage's fault, all stay as they are. To be called before the first `save`.

        Args:
            target: trees of ShapeDtypeStruct with the shardings of the current mesh, by name.
            check: raises when the saved config is not one that this run may go on from.

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
            told = "; ".join(f"step {step}: {problem}" for step, problem in problems.items())
            raise CheckpointError(
                f"none of the checkpoints in {self.directory} can be read ({told}). All were left as they are: if the "
                "storage is at fault, run the same command again once it works; to start anew, give another --workdir"
            )
        aside = sorted(name for name in _entries(self.directory) if name.startswith("damaged-"))
        if aside:
            raise CheckpointError(
                f"{self.directory} holds no checkpoint but {', '.join(aside)}: rename one to its step's number to try "
                "it again, or give another --workdir to start anew"
            )
        return None

    def _restore_step(
        self, step: int, target: Mapping[str, Any], check: Callable[[Config], None]
    ) -> tuple[Restored | None, str]:
        path = self.directory / str(step)
        meta, problem = attempt(lambda: _read_meta(path), _FATAL)
        if meta is None:
            return None, problem
        config = config_from_json(meta["config"], name=f"the config saved in {path}")
        check(config)
        data_state = _own_data_state(meta["data"], path)
        saved, problem = attempt(lambda: _read_arrays(path, meta, target), _FATAL)
        if saved is None:
            return None, problem
        return Restored(step, {name: saved[name] for name in target}, data_state, config, saved["codec"]), ""

    def _set_aside(self, step: int, problem: str, whole: int) -> None:
        path, aside = self.directory / str(step), self.directory / f"damaged-{step}"
        warnings.warn(
            f"checkpoint {path} is damaged ({problem}) and was moved to {aside.name}; that of step {whole} is whole",
            stacklevel=3,
        )
        if jax.process_index() == 0:
            if aside.exists():
                aside.rmtree()
            path.rename(aside)
        sync("set_aside")

    def _remove_unfinished(self) -> list[str]:
        names = sorted(name for name in _entries(self.directory) if ".orbax-checkpoint-tmp" in name)
        if jax.process_index() == 0:
            for name in names:
                (self.directory / name).rmtree(missing_ok=True)
        return names

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
            f"the disk is full: checkpoint {self.directory / str(step)} could not be written; {intact}. Make room "
            "(train.keep_last and train.keep_every say what is kept) and run the same command again"
        ) from error


# ------------------------------------------------------------------------------------------------ weights and codec


def has_checkpoint(directory: str) -> bool:
    """Whether `directory`, a run's workdir, holds one."""
    return bool(_steps(_absolute(directory) / "checkpoints"))


def load_for_sampling(directory: str, step: int | None = None, *, shardings: Any = None) -> Checkpoint:
    """Config, weights and codec of one checkpoint.

    Args:
        directory: a run's workdir, its `checkpoints` folder, or the folder of one step.
        step: which one; None takes the newest that is whole.
        shardings: where the weights shall lie, a tree as theirs; None: on one device. All processes load together.

    Raises:
        CheckpointError: no such checkpoint, a damaged one, or one whose weights do not fit its model's config.
    """

    def load(path: epath.Path) -> Checkpoint:
        meta = _read_meta(path)
        config = config_from_json(meta["config"], name=f"the config saved in {path}")
        name = "ema" if "ema" in meta["digests"] else "params"
        weights = nnx.to_pure_dict(abstract_model(config.model)[1])
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        places = jax.tree.map(lambda _: device, weights) if shardings is None else shardings
        target = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), weights, places)
        saved = _read_arrays(path, meta, {name: target})
        return Checkpoint(config, saved[name], saved["codec"], meta["step"])

    return _newest(directory, step, load)


def load_codec_state(directory: str) -> tuple[Config, dict[str, np.ndarray]]:
    """Config and codec of the newest checkpoint that is whole in both; arguments and errors of `load_for_sampling`."""

    def load(path: epath.Path) -> tuple[Config, dict[str, np.ndarray]]:
        meta = _read_meta(path)
        config = config_from_json(meta["config"], name=f"the config saved in {path}")
        return config, _read_arrays(path, meta, {})["codec"]

    return _newest(directory, None, load)


def _newest[T](directory: str, step: int | None, load: Callable[[epath.Path], T]) -> T:
    """`load` of the newest checkpoint where it succeeds, or of the one of `step`."""
    given = _absolute(directory)
    root = given / "checkpoints" if (given / "checkpoints").is_dir() else given
    if root.name.isdigit() and (root / "meta").exists():
        root, step = root.parent, int(root.name)
    steps = _steps(root)
    if not steps:
        raise CheckpointError(
            f"no checkpoint in {directory}; give a run's workdir, its checkpoints folder, or one step's folder"
        )
    if step is not None and step not in steps:
        raise CheckpointError(f"no checkpoint of step {step} in {root}; there are steps {steps}")
    for candidate in [step] if step is not None else reversed(steps):
        loaded, problem = attempt(lambda: load(root / str(candidate)), _FATAL)  # noqa: B023
        if loaded is not None:
            return loaded
        problem = f"checkpoint {root / str(candidate)} is damaged ({problem})"
        if step is not None:
            raise CheckpointError(f"{problem}; there are steps {steps}")
        warnings.warn(f"{problem}; trying the one before", stacklevel=3)
    raise CheckpointError(f"none of the checkpoints in {root} is whole: steps {steps}; see the warnings above")


# ------------------------------------------------------------------------------------------------ reading


def _context() -> ocp.Context:
    registry = ocp.handlers.local_registry()
    registry.add(ocp.handlers.JsonHandler, checkpointable_name="meta")
    context = ocp.Context()
    context.checkpointables.registry = registry
    return context


def _read_meta(path: epath.Path) -> dict[str, Any]:
    with _context():
        meta = ocp.load_checkpointables(path, {"meta": None})["meta"]
    if text_digest(meta["body"]) != meta["sha256"]:
        raise ValueError("meta: the digest does not match")
    return json.loads(meta["body"])


def _read_arrays(path: epath.Path, meta: dict[str, Any], target: Mapping[str, Any]) -> dict[str, Any]:
    """The trees of `target` and the codec's state; ValueError when a digest does not match, whatever Orbax raises."""
    for name, tree in target.items():
        _check_shapes(path, name, meta["shapes"].get(name, {}), _shapes(tree))
    with _context():
        saved = ocp.load_checkpointables(path, {**target, "codec": None})
    saved["codec"] = {name: np.asarray(array) for name, array in saved["codec"].items()}
    for name in target:
        wrong = [key for key, digest in tree_digests(saved[name]).items() if digest != meta["digests"][name][key]]
        if wrong:
            raise ValueError(f"{name}: the digest of {', '.join(wrong)} does not match")
    if meta["codec"] != {name: array_digest(array) for name, array in saved["codec"].items()}:
        raise ValueError("codec: the digest does not match")
    return saved


def _shapes(tree: Any) -> dict[str, list[int]]:
    return {"/".join(key_path(path)): list(leaf.shape) for path, leaf in jax.tree.leaves_with_path(tree)}


def _check_shapes(path: epath.Path, name: str, saved: dict[str, list[int]], wanted: dict[str, list[int]]) -> None:
    """Raises CheckpointError naming the first array that only one side has, or that differs."""
    for key in sorted({*saved, *wanted}):
        if saved.get(key) != wanted.get(key):
            raise CheckpointError(
                f"checkpoint {path} is of another model: {name}/{key} is {saved.get(key, 'missing')} there and "
                f"{wanted.get(key, 'missing')} in this one; use the config and the version that it was trained with"
            )


def _own_data_state(states: list[str], path: epath.Path) -> dict[str, Any]:
    if len(states) == jax.process_count():
        return json.loads(states[jax.process_index()])
    if len(set(states)) == 1:  # every process stands at the same place of the same stream
        return json.loads(states[0])
    raise CheckpointError(
        f"checkpoint {path} was written by {len(states)} processes, each with its own place in the data, and cannot "
        f"go on with {jax.process_count()}; start {len(states)} processes"
    )


def _absolute(directory: str) -> epath.Path:
    """Orbax takes no relative paths; a bucket's address is none."""
    return epath.Path(directory if "://" in directory else os.path.abspath(directory))


def _entries(root: epath.Path) -> set[str]:
    return {path.name for path in root.iterdir()} if root.is_dir() else set()


def _steps(root: epath.Path) -> list[int]:
    return sorted(int(name) for name in _entries(root) if name.isdigit())
