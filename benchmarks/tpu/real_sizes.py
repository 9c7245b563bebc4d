"""Compiles the whole attention for a TPU at the sizes of real scenes.

    python -m benchmarks.tpu.real_sizes CHIP FILE [SCENE/PART ...]

A program is the router, or attention with its gradients, so that every kernel of the backend is in one, with the shapes
that it really has. The process's environment must be `compiler.environment()`. FILE gets, as JSON, what each program
needs in HBM, or why it doesn't compile.
"""

import dataclasses
import json
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.settings import SETTINGS, Setting, multi_shot
from benchmarks.tpu.worker import compiled, memory
from moc_jax.attention.pallas_tpu import attend, router


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scene:
    """One of the settings, with so many heads."""

    setting: Setting
    heads: int = 12
    dim: int = 128
    dtype: Any = jnp.bfloat16


SCENES = {
    "multi_shot": Scene(setting=SETTINGS["multi_shot"]),  # 180 504 tokens, 154 chunks
    "minutes": Scene(setting=multi_shot(64), heads=1),  # 1 443 640 tokens; heads go one by one
    "single_shot": Scene(setting=SETTINGS["single_shot"]),
    "wan": Scene(setting=SETTINGS["wan"]),
    "float32": Scene(setting=SETTINGS["wan"], heads=2, dtype=jnp.float32),
    "wide_heads": Scene(setting=SETTINGS["wan"], heads=2, dim=256),
    "narrow_heads": Scene(setting=SETTINGS["wan"], heads=2, dim=64),
}
PARTS = ("router", "attention")


def program(scene: Scene, part: str) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A function and the shapes of its arguments."""
    cfg, table = scene.setting.moc, scene.setting.table()
    batch, tokens = table.chunk_of.shape
    chunks = table.kind.shape[1]
    table = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), table)
    q = jax.ShapeDtypeStruct((batch, tokens, scene.heads, scene.dim), scene.dtype)
    phi = jax.ShapeDtypeStruct((batch, scene.heads, chunks, scene.dim), jnp.float32)
    routes = jax.ShapeDtypeStruct((batch, scene.heads, tokens, cfg.top_k), jnp.int32)

    def route(q, phi, table):
        return router.select(q, phi, table, cfg)

    def gradients(q, k, v, d_out, routes, table):
        out, backward = jax.vjp(lambda q, k, v: attend.attend(q, k, v, routes, table, cfg), q, k, v)
        return out, backward(d_out)

    return (route, (q, phi, table)) if part == "router" else (gradients, (q, q, q, q, routes, table))


def main(chip: str, file: str, *names: str) -> None:
    """Compiles the programs named, or all."""
    found: dict[str, dict[str, Any]] = {}
    for name in names or [f"{scene}/{part}" for scene in SCENES for part in PARTS]:
        scene, part = name.split("/")
        begin = time.process_time()
        try:
            found[name] = {"memory": memory(compiled(chip, *program(SCENES[scene], part)))}
        except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as error:
            found[name] = {"error": f"{type(error).__name__}: {error}"}
        found[name]["seconds"] = round(time.process_time() - begin, 1)
        pathlib.Path(file).write_text(json.dumps(found))  # what there is, should a later one take too long


if __name__ == "__main__":
    main(*sys.argv[1:])
