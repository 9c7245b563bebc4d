"""Small public weights, with random numbers, as others have them."""

import json

import ml_dtypes
import numpy as np

from moc_jax.config import WanConfig
from moc_jax.models import public_settings, public_tensors
from moc_jax.tensor_files.safetensors import Written, write_safetensors
from tests.parity.numbers import weight

CFG = WanConfig(dim=48, depth=2, heads=4, mlp_dim=40, latent_channels=2, text_dim=8)
BF16 = np.dtype(ml_dtypes.bfloat16)


def arrays(cfg=CFG, names="diffusers", part="network", dtype=np.float32):
    """The tensors of a network by name; `mixed`: of both types."""
    found = {}
    for i, tensor in enumerate(public_tensors(cfg)[part]):
        kind = (np.float32, BF16)[i % 2] if dtype == "mixed" else dtype
        found[tensor.name(names)] = weight(part, tensor.names[0], tensor.shape).astype(kind)
    return found


def write(folder, tensors, cfg=CFG, names="diffusers", file="diffusion_pytorch_model.safetensors", **settings):
    """A folder of one network; `settings` go into its config.json beside what belongs there."""
    write_tensors(folder / file, tensors)
    (folder / "config.json").write_text(json.dumps({**public_settings(cfg, names), **settings}))
    return folder


def write_tensors(file, tensors):
    """A file of them, by name."""
    file.parent.mkdir(parents=True, exist_ok=True)
    listed = [Written(name, x.dtype, x.shape) for name, x in tensors.items()]
    write_safetensors(file, listed, iter(tensors.values()))


def index(folder, **files):
    """An index, by names of files and of tensors that they hold."""
    places = {name: file for file, names in files.items() for name in names}
    (folder / "m.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
