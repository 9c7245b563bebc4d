"""Mixture of Contexts for long multi-shot video generation (arXiv 2508.21058), in JAX.

    import moc_jax

    table = moc_jax.chunk_table(lengths, shape, cfg.chunk)
    out = moc_jax.moc_attention(q, k, v, table, cfg)

What `__all__` names is loaded when it is first used. Training, sampling, data and checkpoints are subpackages.
"""

import importlib
import sys
import typing

if typing.TYPE_CHECKING:
    from moc_jax.attention.api import moc_attention, route
    from moc_jax.attention.backends import Hopper, Reference, Tpu, Xla
    from moc_jax.attention.residuals import RESIDUALS
    from moc_jax.config import ChunkConfig, ConfigError, MoCConfig
    from moc_jax.cuts import chunk_table_from
    from moc_jax.scene import (
        GLOBAL,
        NO_SHOT,
        PAD,
        TEXT,
        VIDEO,
        ChunkTable,
        Scene,
        SceneLengths,
        SceneShape,
        chunk_table,
    )

__version__ = "0.1.0"  # the only place: the wheel's comes from here, and a clone needs no installation

__all__ = [
    "GLOBAL",
    "NO_SHOT",
    "PAD",
    "RESIDUALS",
    "TEXT",
    "VIDEO",
    "ChunkConfig",
    "ChunkTable",
    "ConfigError",
    "Hopper",
    "MoCConfig",
    "Reference",
    "Scene",
    "SceneLengths",
    "SceneShape",
    "Tpu",
    "Xla",
    "__version__",
    "chunk_table",
    "chunk_table_from",
    "moc_attention",
    "route",
]

_MODULES = {
    "attention.api": ("moc_attention", "route"),
    "attention.backends": ("Hopper", "Reference", "Tpu", "Xla"),
    "attention.residuals": ("RESIDUALS",),
    "cuts": ("chunk_table_from",),
    "config": ("ChunkConfig", "ConfigError", "MoCConfig"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}  # all others are of scene.py


if not typing.TYPE_CHECKING:  # or every name would be an attribute to a type checker

    def __getattr__(name):
        if name not in __all__:
            raise AttributeError(f"module 'moc_jax' has no attribute {name!r}")
        value = getattr(importlib.import_module(f"moc_jax.{_HOME.get(name, 'scene')}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# python -m moc_jax.<module>, before its own imports, which may fail too
if sys.argv[:1] == ["-m"] and (_program := [word for word in sys.orig_argv if "moc_jax." in word]):
    from moc_jax.cli import report_errors_of

    report_errors_of(_program[0][_program[0].index("moc_jax.") :])
