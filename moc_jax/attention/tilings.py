"""Tilings that were measured: sizes of tiles and blocks that are fastest on a device, kept as JSON (autotune.py).

    {"tilings": [{"backend": "xla", "device": "cpu", "head_dim": 64, "dtype": "bfloat16", "anchors": "shot", "picks": 5,
                  "chunk": 1280, "tokens": 180504, "milliseconds": 812.5, "tiling": {"anchor_tile": 2048, ...}}, ...]}

All but the number of tokens must be as they were measured; of several numbers the nearest counts. What autotuning finds
is kept in the user's cache folder, where later runs of one process find it by themselves.
"""

import dataclasses
import json
import math
import pathlib
import typing
import warnings
from collections.abc import Collection
from typing import Any

import jax

import moc_jax
from moc_jax.attention.backends import Backend, Hopper, Tpu, Xla
from moc_jax.attention.pallas_gpu.device import HopperTiling
from moc_jax.attention.pallas_tpu import tuning
from moc_jax.attention.pallas_tpu.device import target
from moc_jax.attention.pallas_tpu.tuning import Blocks
from moc_jax.attention.routing import sink_slots
from moc_jax.attention.xla import XlaTiling, default_tiling
from moc_jax.config import ConfigError, MoCConfig
from moc_jax.config.base import user_cache
from moc_jax.reading import parse_json
from moc_jax.scene import ChunkTable
from moc_jax.shapes import Array

Tiling = XlaTiling | HopperTiling | Blocks
_Given = dict[str, Any]  # an object of JSON
_TYPES: dict[str, type[Tiling]] = {Xla.name: XlaTiling, Hopper.name: HopperTiling, Tpu.name: Blocks}


def given_tiling(backend: Backend) -> Tiling | None:
    """The tiling that the value names, if it does."""
    return backend.blocks if isinstance(backend, Tpu) else getattr(backend, "tiling", None)


def tiling_of(backend: Backend, q: Array | jax.ShapeDtypeStruct, table: ChunkTable, cfg: MoCConfig) -> Tiling:
    """The tiling that the value computes with, chosen from the shapes where it names none.

    Raises:
        NotImplementedError: the backend has none.
    """
    given = given_tiling(backend)
    if given is not None:
        return given
    match backend:
        case Xla():
            return default_tiling(table.chunk_of.shape[1], table.max_chunk, _picks(cfg, table), cfg)
        case Hopper():
            return backend.tiles
        case Tpu():
            return tuning.blocks(cfg, table, q.shape[-1], q.dtype, target(backend.chip))
    raise NotImplementedError(f"the backend {backend.name} has no tiles; choose one of {', '.join(_TYPES)}")


def with_tiling(backend: Backend, tiling: Tiling) -> Backend:
    """The same with that tiling."""
    match backend, tiling:
        case Xla(), XlaTiling():
            return dataclasses.replace(backend, tiling=tiling)
        case Hopper(), HopperTiling():
            return dataclasses.replace(backend, tiling=tiling)
        case Tpu(), Blocks():
            return dataclasses.replace(backend, blocks=tiling)
    raise TypeError(f"the backend {backend.name} takes no {type(tiling).__name__}")


def _picks(cfg: MoCConfig, table: ChunkTable) -> int:
    return 0 if cfg.mode == "dense" else min(cfg.top_k + sink_slots(table, cfg), table.kind.shape[1])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """What a tiling is for, apart from the number of tokens."""

    backend: str
    device: str  # as JAX calls it; a chip that is compiled for, if it is named
    head_dim: int
    dtype: str
    anchors: str  # `self_anchor`, with its width if it is a window; or "dense"
    picks: int
    chunk: int  # tokens of the longest

    @classmethod
    def of(cls, backend: Backend, q: Array | jax.ShapeDtypeStruct, table: ChunkTable, cfg: MoCConfig) -> "Kind":
        """Of an attention."""
        own = f"window {cfg.window}" if cfg.self_anchor == "window" else cfg.self_anchor
        return cls(
            backend=backend.name,
            device=getattr(backend, "chip", None) or jax.devices()[0].device_kind,
            head_dim=q.shape[-1],
            dtype=str(q.dtype),
            anchors="dense" if cfg.mode == "dense" else own,
            picks=_picks(cfg, table),
            chunk=table.max_chunk,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tuned:
    """The fastest tiling for a kind of attention over so many tokens."""

    kind: Kind
    tokens: int
    milliseconds: float  # forward and backward
    tiling: Tiling


@dataclasses.dataclass(frozen=True)
class Tilings:
    """All that were measured. A static value, as backends are."""

    tuned: tuple[Tuned, ...] = ()

    def chosen(self, backend: Backend, q: Array | jax.ShapeDtypeStruct, table: ChunkTable, cfg: MoCConfig) -> Backend:
        """`backend` with the tiling measured for such an attention; as it is if it names one, or none was measured."""
        if not self.tuned or given_tiling(backend) is not None:
            return backend
        kind, tokens = Kind.of(backend, q, table, cfg), table.chunk_of.shape[1]
        found = [tuned for tuned in self.tuned if tuned.kind == kind]
        if not found:
            return backend
        return with_tiling(backend, min(found, key=lambda t: abs(math.log(t.tokens / tokens))).tiling)

    def updated(self, new: Tuned) -> "Tilings":
        """With `new` in place of what was measured before."""
        kept = [tuned for tuned in self.tuned if (tuned.kind, tuned.tokens) != (new.kind, new.tokens)]
        return Tilings((*kept, new))

    def to_json(self) -> str:
        """What `tilings_from_json` reads."""
        entries = [
            {
                **dataclasses.asdict(tuned.kind),
                "tokens": tuned.tokens,
                "milliseconds": tuned.milliseconds,
                "tiling": dataclasses.asdict(tuned.tiling),
            }
            for tuned in self.tuned
        ]
        return json.dumps({"tilings": entries}, indent=1) + "\n"


def read_tilings(path: str | pathlib.Path, *, name: str = "attention.tilings") -> Tilings:
    """The tilings in a file, which the setting `name` gives.

    Raises:
        ConfigError: it can't be read, or holds something else.
    """
    try:
        return tilings_from_json(pathlib.Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"{name} = {path}: {error}; moc_jax.commands.autotune writes such a file where there is none"
        ) from error


def kept_file() -> pathlib.Path:
    """Where `moc_jax.commands.autotune` keeps what it finds, and `kept_tilings` looks: one file per version of kernels.

    Raises:
        RuntimeError: nothing says where the home folder is.
    """
    return user_cache() / f"tilings-{moc_jax.__version__}-jax-{jax.__version__}.json"


def kept_tilings() -> Tilings:
    """What was measured on this machine, if anything; a file that can't be read is named in a warning."""
    try:
        file = kept_file()
        return read_tilings(file) if file.exists() else Tilings()
    except (OSError, RuntimeError, ConfigError) as error:
        warnings.warn(f"no measured tilings are used: {error}", stacklevel=2)
        return Tilings()


def tilings_from_json(text: str) -> Tilings:
    """What `Tilings.to_json` wrote.

    Raises:
        ValueError: it is something else.
    """
    tree = parse_json(text)
    if not isinstance(tree, dict) or not isinstance(tree.get("tilings"), list):
        raise ValueError("no list of tilings")
    return Tilings(tuple(_tuned(dict(entry), f"tilings[{i}]") for i, entry in enumerate(tree["tilings"])))


def _tuned(entry: _Given, where: str) -> Tuned:
    kind = {field.name: entry.pop(field.name, None) for field in dataclasses.fields(Kind)}
    if kind["backend"] not in _TYPES:
        raise ValueError(f"{where}.backend is {kind['backend']!r}; it must be one of {', '.join(_TYPES)}")
    tiling = _made(_TYPES[kind["backend"]], entry.pop("tiling", None), f"{where}.tiling")
    return Tuned(kind=_made(Kind, kind, where), tiling=tiling, **_checked(Tuned, entry, where, but={"kind", "tiling"}))


def _made[T](kind: type[T], tree: object, where: str) -> T:
    """A dataclass of numbers, strings and other such dataclasses."""
    if not isinstance(tree, dict):
        raise ValueError(f"{where} is {tree!r}; it must be an object")
    return kind(**_checked(kind, tree, where))


def _checked(kind: type, tree: _Given, where: str, but: Collection[str] = ()) -> _Given:
    hints = {name: hint for name, hint in typing.get_type_hints(kind).items() if name not in but}
    if wrong := sorted(hints.keys() ^ tree.keys()):
        what = "is missing" if wrong[0] in hints else "is unknown"
        raise ValueError(f"{where}.{wrong[0]} {what}")
    return {name: _value(hint, tree[name], f"{where}.{name}") for name, hint in hints.items()}


def _value(hint: type, value: object, where: str) -> object:
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _made(hint, value, where)
    value = tuple(value) if isinstance(value, list) else value
    kinds = (int, float) if hint is float else typing.get_args(hint) or (hint,)
    if not any(isinstance(value, typing.get_origin(kind) or kind) for kind in kinds):
        raise ValueError(f"{where} is {value!r}; it must be of type {getattr(hint, '__name__', hint)}")
    return value
