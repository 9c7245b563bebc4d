"""The process that compiles: python -m benchmarks.tpu.worker CHIP KERNEL PASS BLOCKS HEAD_DIM FILE

Its environment says where the listings go (compiler.py sets it). BLOCKS are the fields of `kernels.Blocks` as JSON.
FILE gets, as JSON, the name of the kernel and the bytes that the program needs on the chip.
"""

import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks.tpu.compiler import CHIPS
from benchmarks.tpu.kernels import KERNELS, PASSES, Blocks
from moc_jax.planning.compiled import absent_devices


def main(chip: str, kernel: str, way: str, blocks: str, head_dim: str, file: str) -> None:
    """Compiles for one device."""
    (of,) = (each for each in PASSES if each == way)
    program = KERNELS[kernel](of, Blocks(**json.loads(blocks)), int(head_dim), chip)
    found = {"kernel": program.kernel, "memory": memory(compiled(chip, program.function, program.arguments))}
    pathlib.Path(file).write_text(json.dumps(found))


def compiled(chip: str, function: Callable[..., Any], arguments: Any) -> jax.stages.Compiled:
    """The program for one device of chips that aren't there; arguments are shapes, and kernels know their chip."""
    of = CHIPS[chip]
    devices = absent_devices(of.topology)[:1]
    assert devices[0].num_cores == of.cores
    sharding = jax.sharding.NamedSharding(jax.sharding.Mesh(np.array(devices), "device"), jax.P())
    arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arguments)
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=("tpu",)).compile()


def memory(program: jax.stages.Compiled) -> dict[str, int]:
    """Bytes in HBM: arguments, outputs, temporary, and all together, less what temporary arrays share with outputs."""
    found = program.memory_analysis()
    assert found is not None
    return {
        "arguments": found.argument_size_in_bytes,
        "outputs": found.output_size_in_bytes,
        "temporary": found.temp_size_in_bytes,
        "total": found.total_allocation_bytes,
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
