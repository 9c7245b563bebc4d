"""How far Wan's autoencoders are from diffusers' AutoencoderKLWan: `python -m tests.parity.vae_figures` prints it.

make_vae.py wrote what is compared with; here no torch is needed.
"""

import pathlib
import tempfile

import numpy as np

from moc_jax.codecs import fit_codec
from moc_jax.codecs.wan_vae.names import tensors
from moc_jax.codecs.wan_vae.network import Sizes
from moc_jax.config import WanVaeConfig
from tests.parity.numbers import relative, weight
from tests.parity.vae_cases import CASES, spread
from tests.weights.folders import write_tensors

GOLDEN = pathlib.Path(__file__).parent / "golden"
FILE = "diffusion_pytorch_model.safetensors"


def arrays(name, spelling=0):
    """The narrow autoencoder's tensors, by diffusers' names (0) or the Wan team's (1)."""
    case = CASES[name]
    listed = list(tensors(Sizes(case.channels, case.encoder, case.decoder, case.shortcuts)))
    return {tensor.names[spelling]: weight(f"vae/{name}", tensor.name, tensor.shape) for tensor in listed}


def write(folder, named):
    """A folder as diffusers has it."""
    write_tensors(folder / FILE, named)
    return folder


def codec_in(folder, name, **settings):
    """Its codec, in float32 unless said otherwise."""
    return fit_codec(WanVaeConfig(version=name, weights=str(folder), **{"dtype": "float32", **settings}), ())


def errors(name, codec):
    """Relative, and the largest: of latents, and of pixels."""
    case, golden = CASES[name], np.load(GOLDEN / f"vae{name}.npz")
    latents = spread(codec.encode_batch(case.video(name)))
    pixels = spread(np.stack([codec.decode(z) for z in case.latents(name)]))
    pairs = (latents, golden["latents"]), (pixels, golden["pixels"])
    return [(relative(a, b), np.abs(a - b).max()) for a, b in pairs]


def main():
    """Both, a latent frame at a time and two at a time."""
    for name in CASES:
        with tempfile.TemporaryDirectory() as folder:
            write(pathlib.Path(folder), arrays(name))
            for piece in (1, 2):
                codec = codec_in(folder, name, piece=piece)
                (encode, most), (decode, worst) = errors(name, codec)
                print(f"| {name} | {piece} | {encode:.1e} | {most:.1e} | {decode:.1e} | {worst:.1e} |", flush=True)


if __name__ == "__main__":
    main()
