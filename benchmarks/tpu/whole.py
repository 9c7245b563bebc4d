"""Compiles the whole attention for a TPU and keeps its text: python -m benchmarks.tpu.whole CHIP PASS FILE

PASS is "forward", routing included, or "backward", which is both passes in one program. The process's environment must
be `compiler.environment()`. FILE gets the compiled program's text.
"""

import pathlib
import sys

import jax
import jax.numpy as jnp

from benchmarks.settings import SETTINGS
from benchmarks.tpu.worker import compiled
from moc_jax.attention.api import moc_attention

SETTING, HEADS, DIM = SETTINGS["multi_shot"], 12, 128


def main(chip: str, way: str, file: str) -> None:
    """The reference scene in bfloat16."""
    table = SETTING.table()
    q = jax.ShapeDtypeStruct((*table.chunk_of.shape, HEADS, DIM), jnp.bfloat16)
    table = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), table)

    def forward(q, k, v, table):
        return moc_attention(q, k, v, table, SETTING.moc)

    def both(q, k, v, d_out, table):
        out, backward = jax.vjp(lambda q, k, v: forward(q, k, v, table), q, k, v)
        return out, backward(d_out)

    program, arguments = (forward, (q, q, q, table)) if way == "forward" else (both, (q, q, q, q, table))
    pathlib.Path(file).write_text(compiled(chip, program, arguments).as_text())


if __name__ == "__main__":
    main(*sys.argv[1:])
