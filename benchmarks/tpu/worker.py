"""The process that compiles: python -m benchmarks.tpu.worker TOPOLOGY KERNEL BLOCKS HEAD_DIM FILE

Its environment says where the listings go (compiler.py sets it). FILE gets, as JSON, the names of the kernels of each
pass and the bytes that the program needs on the chip.
"""

import json
import pathlib
import sys

import jax
import numpy as np
from jax.experimental import topologies

from benchmarks.tpu.kernels import KERNELS, Blocks


def main(topology: str, kernel: str, blocks: str, head_dim: str, file: str) -> None:
    """Compiles for the first device of the topology."""
    program = KERNELS[kernel](Blocks.parse(blocks), int(head_dim))
    chip = topologies.get_topology_desc(topology, "tpu").devices[:1]
    sharding = jax.sharding.NamedSharding(jax.sharding.Mesh(np.array(chip), "chip"), jax.P())
    arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), program.arguments)
    compiled = jax.jit(program.function).trace(*arguments).lower(lowering_platforms=("tpu",)).compile()
    memory = compiled.memory_analysis()
    found = {
        "passes": program.passes,
        "memory": {
            "arguments": memory.argument_size_in_bytes,
            "outputs": memory.output_size_in_bytes,
            "temporary": memory.temp_size_in_bytes,
        },
    }
    pathlib.Path(file).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
