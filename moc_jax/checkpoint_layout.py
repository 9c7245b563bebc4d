"""What a checkpoint says about itself, and which of a run's is read.

None of it is trusted: `meta` must have every field, of the right type, and the step of its folder.
"""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import jax
from etils import epath

import moc_jax
from moc_jax.checkpoint_names import CheckpointError, find_steps
from moc_jax.config import Config, ConfigError
from moc_jax.config_json import config_from_json
from moc_jax.digest import text_digest
from moc_jax.processes import attempt
from moc_jax.reading import parse_json
from moc_jax.sharding import key_path
from moc_jax.showing import shown

FORMAT = 3
"""Of what a checkpoint holds and how its weights lie. 1, which none states: heads had no axis of their own; 2: rotary
pairs were neighbours, and modulation lay in the blocks."""

Tree = dict[str, Any]
"""Arrays, or what stands in their place, or trees of these, by name; or an object of JSON."""

FATAL = CheckpointError, ConfigError  # an older checkpoint would not be better


def newest_readable[T](directory: str, step: int | None, load: Callable[[epath.Path], T]) -> T:
    """`load` of the newest checkpoint where it succeeds, or of the one of `step`; arguments of `load_for_sampling`.

    Raises:
        CheckpointError: no such checkpoint, or one that is damaged.
    """
    root, steps, step = find_steps(directory, step)
    for candidate in [step] if step is not None else reversed(steps):
        loaded, problem = attempt(lambda: load(root / str(candidate)), FATAL)  # noqa: B023
        if loaded is not None:
            return loaded
        problem = f"checkpoint {root / str(candidate)} is damaged ({problem})"
        if step is not None:
            raise CheckpointError(f"{problem}; there are steps {steps}")
        warnings.warn(f"{problem}; trying the one before", stacklevel=3)
    raise CheckpointError(f"none of the checkpoints in {root} is whole: steps {steps}; see the warnings above")


# ------------------------------------------------------------------------------------------------ meta


@dataclasses.dataclass(frozen=True)
class Base:
    """The frozen weights that a checkpoint's adapters are beside, none of which it holds."""

    place: str  # where they lay: public weights, or the folder of another run's checkpoint
    digests: dict[str, int]  # by array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Meta:
    """What a checkpoint says about itself."""

    step: int
    config: Config
    data: list[Tree]  # every process's data iterator
    shapes: dict[str, dict[str, list[int]]]  # by tree and array
    digests: dict[str, dict[str, int]]
    codec: dict[str, str]  # digests, by array
    base: Base | None

    @property
    def trained_on(self) -> str:
        """The fingerprint of the run's data."""
        return str(self.data[0].get("data"))


_FIELDS: Tree = {  # [x]: a list of x; {str: x}: an object of x; {"a": x, "b": y}: one of these fields, or empty
    "step": int,
    "config": str,
    "data": [str],
    "shapes": {str: {str: [int]}},
    "digests": {str: {str: int}},
    "codec": {str: str},
    "base": {"place": str, "digests": {str: int}},
}


def parse_meta(saved: Any, path: epath.Path) -> Meta:
    """What the item `meta` of the checkpoint in `path` says.

    Raises:
        CheckpointError: it is of another format.
        ValueError: it is damaged, or of another step than its folder's name.
        ConfigError: the config is none that this version reads.
    """
    if not _fits(saved, {str: str}) or not {"body", "sha256"} <= saved.keys():
        raise ValueError("meta: it must hold a body and its digest")
    if text_digest(saved["body"]) != saved["sha256"]:
        raise ValueError("meta: the digest does not match")
    body = parse_json(saved["body"])
    _check_format(body, path)
    body = body | {"base": body.get("base") or {}} if isinstance(body, dict) else body  # most have none
    for name, kind in _FIELDS.items():
        if not isinstance(body, dict) or not _fits(body.get(name), kind):
            raise ValueError(f"meta: {name} is missing or not what is written there")
    if str(body["step"]) != path.name:
        raise ValueError(
            f"it holds step {body['step']}, so the folder was renamed or copied; only the name {body['step']} is right"
        )
    data = [parse_json(text) for text in body["data"]]
    if not data or not all(isinstance(state, dict) for state in data):
        raise ValueError("meta: data must hold an object per process")
    config = config_from_json(body["config"], name=f"the config saved in {path}")
    base = Base(body["base"]["place"], body["base"]["digests"]) if body["base"] else None
    return Meta(**{name: body[name] for name in _FIELDS} | {"data": data, "config": config, "base": base})


def _check_format(body: object, path: epath.Path) -> None:
    """Before anything else is read, of which another format may have another form."""
    if not isinstance(body, dict) or not body.keys() & {"step", "format"}:
        return  # damaged, as its fields will show
    found, versions = body.get("format", 1), body.get("versions")
    if type(found) is not int or found < 1:
        raise ValueError(f"meta: format is {shown(found)}, not what is written there")
    if found == FORMAT:
        return
    by = versions.get("moc_jax") if isinstance(versions, dict) else None
    what = f"checkpoint {path} is of format {found}, written by moc_jax {by or 'of an unknown version'}"
    ours = f"but moc_jax {moc_jax.__version__} reads format {FORMAT}"
    fix = (
        "Update moc_jax to resume or to sample it"
        if found > FORMAT
        else "Resume or sample it with the version that wrote it, or train again in another --workdir"
    )
    raise CheckpointError(f"{what}, {ours}. {fix}")


def _fits(value: object, kind: object) -> bool:
    if isinstance(kind, list):
        return isinstance(value, list) and all(_fits(inner, kind[0]) for inner in value)
    if isinstance(kind, dict) and str in kind:
        return isinstance(value, dict) and all(_fits(inner, kind[str]) for inner in value.values())
    if isinstance(kind, dict):
        whole = isinstance(value, dict) and value.keys() in (kind.keys(), set())
        return whole and all(_fits(inner, kind[name]) for name, inner in value.items())
    return type(value) is kind


def own_data_state(meta: Meta, path: epath.Path) -> Tree:
    """This process's place in the data.

    Raises:
        CheckpointError: the checkpoint was written by another number of processes, each with its own.
    """
    if len(meta.data) == jax.process_count():
        return meta.data[jax.process_index()]
    if all(state == meta.data[0] for state in meta.data):  # every process stands at the same place of the same stream
        return meta.data[0]
    raise CheckpointError(
        f"checkpoint {path} was written by {len(meta.data)} processes, each with its own place in the data, and can't "
        f"be resumed by {jax.process_count()}; start {len(meta.data)} processes"
    )


def shapes_of(tree: object) -> dict[str, list[int]]:
    """The shape of every array, by its path."""
    return {"/".join(key_path(path)): list(leaf.shape) for path, leaf in jax.tree.leaves_with_path(tree)}


def check_shapes(path: epath.Path, name: str, saved: dict[str, list[int]], wanted: dict[str, list[int]]) -> None:
    """Raises CheckpointError naming the first array that only one side has, or that differs."""
    for key in sorted({*saved, *wanted}):
        if saved.get(key) != wanted.get(key):
            raise CheckpointError(
                f"checkpoint {path} is of another model: {name}/{key} is {saved.get(key, 'missing')} there and "
                f"{wanted.get(key, 'missing')} in this one; use the config and the version that it was trained with"
            )
