"""How far Wan with adapters is from diffusers with the same: `python -m tests.parity.lora_figures` prints the table.

python -m tests.parity.lora_figures --write     exports adapters, as a run's are exported
python -m tests.parity.make_lora                loads them into diffusers, in an environment of its own
"""

import dataclasses
import functools
import pathlib
import shutil
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moc_jax import models
from moc_jax.config import LoraConfig, MoCConfig
from moc_jax.weights.adapters import export_adapters, load_adapters, open_adapters
from tests.parity.lora_cases import ALPHA, FILES, GOLDEN, NAME, RANK
from tests.parity.numbers import numbers, relative
from tests.parity.wan_cases import CASES
from tests.parity.wan_figures import config, scenes, weights_of

CFG = dataclasses.replace(config(CASES[NAME]), lora=LoraConfig(rank=RANK, alpha=ALPHA))


def adapters():
    """Of none of which A or B is 0."""
    shapes = models.trained(nnx.to_pure_dict(models.abstract(CFG)[1]))
    return jax.tree.map_with_path(lambda path, x: 0.2 * numbers(f"lora{jax.tree_util.keystr(path)}", *x.shape), shapes)


def write(folder):
    """The files that the other environment reads, by names."""
    for names, file in FILES.items():
        with tempfile.TemporaryDirectory() as made:
            export_adapters(CFG, adapters(), pathlib.Path(made) / "lora", names=names)
            shutil.copy(pathlib.Path(made) / "lora" / "pytorch_lora_weights.safetensors", folder / file)


def velocity(file, merge):
    """With the adapters of a file; apart, or merged into the weights."""
    case = CASES[NAME]
    plain = dataclasses.replace(CFG, lora=LoraConfig())
    _, frozen = weights_of(NAME, case, plain)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = models.trained(nnx.to_pure_dict(models.abstract(CFG)[1]))
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes)
    trained = load_adapters(open_adapters(file), CFG, like, "the file")
    params = models.merged(frozen, trained, CFG.lora) if merge else models.joined(frozen, trained)
    graph, inputs = models.abstract(plain if merge else CFG)[0], case.inputs(NAME)

    @jax.jit
    def run(params, video, prompts):
        text, lengths, t = scenes(case, prompts, "own")
        return nnx.merge(graph, params)(video, text, t, lengths, MoCConfig(mode="dense"))

    return np.asarray(run(params, jnp.asarray(inputs["video"]), jnp.asarray(inputs["text"])))


@functools.cache
def golden():
    """What diffusers computed, by names of the file; and without adapters."""
    return dict(np.load(GOLDEN / "lora.npz"))


def main():
    """All cases."""
    if "--write" in sys.argv:
        write(GOLDEN)
        return
    moved = relative(golden()["diffusers"], golden()["none"])
    for names, file in FILES.items():
        for merge in (False, True):
            error = relative(velocity(GOLDEN / file, merge), golden()[names])
            print(f"| {names} | {'merged' if merge else 'apart'} | {error:.1e} | {moved:.2f} |", flush=True)


if __name__ == "__main__":
    main()
