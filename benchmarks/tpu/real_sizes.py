"""Compiles the whole attention for a TPU at the sizes of real scenes.

    python -m benchmarks.tpu.real_sizes CHIP FILE [SCENE/PART ...]

A program is attention with its routing, forward or with its gradients, so that every kernel of the backend is in one,
with the shapes that it really has. The process's environment must be `compiler.environment()`. FILE gets, as JSON, the
names of each program's kernels and what it needs in HBM, or why it doesn't compile.
"""

import dataclasses
import json
import pathlib
import re
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.settings import SETTINGS, Setting, multi_shot
from benchmarks.tpu.worker import compiled, memory
from moc_jax.attention.api import moc_attention
from moc_jax.attention.pallas_tpu.device import Tpu
from moc_jax.attention.pallas_tpu.tuning import Blocks


@dataclasses.dataclass(frozen=True, kw_only=True)
class SceneProgram:
    """One of the settings, with so many heads."""

    setting: Setting
    heads: int = 12
    dim: int = 128
    dtype: Any = jnp.bfloat16


SCENES = {
    "multi_shot": SceneProgram(setting=SETTINGS["multi_shot"]),  # 180 504 tokens, 154 chunks
    "minutes": SceneProgram(setting=multi_shot(64), heads=1),  # 1 443 640 tokens; heads go one by one
    "single_shot": SceneProgram(setting=SETTINGS["single_shot"]),
    "wan": SceneProgram(setting=SETTINGS["wan"]),
    "float32": SceneProgram(setting=SETTINGS["wan"], heads=2, dtype=jnp.float32),
    "wide_heads": SceneProgram(setting=SETTINGS["wan"], heads=2, dim=256),
    "narrow_heads": SceneProgram(setting=SETTINGS["wan"], heads=2, dim=64),
}
PARTS = ("forward", "gradients")


def program(
    scene: SceneProgram, part: str, chip: str, blocks: Blocks | None = None
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A function and the shapes of its arguments."""
    cfg, table, backend = scene.setting.moc, scene.setting.table(), Tpu(chip=chip, blocks=blocks)
    table = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), table)
    q = jax.ShapeDtypeStruct((*table.chunk_of.shape, scene.heads, scene.dim), scene.dtype)

    def forward(q, k, v, table):
        return moc_attention(q, k, v, table, cfg, backend=backend)

    def gradients(q, k, v, d_out, table):
        out, backward = jax.vjp(lambda q, k, v: forward(q, k, v, table), q, k, v)
        return out, backward(d_out)

    return (forward, (q, q, q, table)) if part == "forward" else (gradients, (q, q, q, q, table))


def kernels(program: jax.stages.Compiled) -> list[str]:
    """Names of the backend's kernels in a program."""
    return sorted(set(re.findall(r"%(moc_[a-z_]*[a-z])", program.as_text() or "")))


def main(chip: str, file: str, *names: str) -> None:
    """Compiles the programs named, or all."""
    found: dict[str, dict[str, Any]] = {}
    for name in names or [f"{scene}/{part}" for scene in SCENES for part in PARTS]:
        scene, part = name.split("/")
        begin = time.process_time()
        try:
            done = compiled(chip, *program(SCENES[scene], part, chip))
            found[name] = {"kernels": kernels(done), "memory": memory(done)}
        except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as error:
            found[name] = {"error": f"{type(error).__name__}: {error}"}
        found[name]["seconds"] = round(time.process_time() - begin, 1)
        pathlib.Path(file).write_text(json.dumps(found))  # what there is, should a later one take too long


if __name__ == "__main__":
    main(*sys.argv[1:])
