"""How far whole pipelines are from diffusers': `python -m tests.parity.pipeline_figures` prints the table.

make_pipelines.py wrote what is compared with; here no torch is needed. Prompts, a picture and public files go in,
latents and pixels come out; only the noise is given.

    python -m tests.parity.pipeline_figures --transformer out/wan-tuned --against out/diffusers.npz

compares the video of weights of your own for the small Wan 2.1 of tests/weights/pipelines.py instead.
"""

import argparse
import dataclasses
import pathlib
import shutil
import sys
import tempfile
from unittest import mock

import jax
import numpy as np
from PIL import Image

from moc_jax import weights
from moc_jax.codecs import fit_codec
from moc_jax.config import MeshConfig
from moc_jax.sampling import generate
from moc_jax.sampling.storyboard import parse_storyboard
from moc_jax.sharding import make_mesh
from moc_jax.weights.pipelines import open_pipeline
from tests.parity.numbers import relative
from tests.parity.pipeline_cases import CASES, FRAMES, GOLDEN, SHIFTS, STEPS, prompts, spread
from tests.weights.pipelines import EULER, UNIPC, write_pipeline


def scheduler(solver):
    if solver == "euler":
        return EULER | {"shift": SHIFTS[solver]}
    return UNIPC | {"flow_shift": SHIFTS[solver]}


def sampled(folder, name, solver, transformer=None):
    """Latents of the video, and its pixels in [-1, 1]; with another folder's `transformer`."""
    case = CASES[name]
    write_pipeline(folder, name, scheduler=scheduler(solver))
    if transformer is not None:
        shutil.rmtree(folder / "transformer")
        shutil.copytree(transformer, folder / "transformer")
    opened = open_pipeline(str(folder))
    config, (prompt, negative) = opened.config, prompts()[0]
    precise = {part: dataclasses.replace(getattr(config, part), dtype="float32") for part in ("model", "codec", "text")}
    sample = dataclasses.replace(
        config.sample, steps=STEPS, guidance=case.guidance, guidance_low=case.guidance_low, negative_prompt=negative
    )
    data = dataclasses.replace(config.data, height=case.size[0], width=case.size[1])
    config = dataclasses.replace(config, **precise, sample=sample, data=data)
    Image.fromarray(case.picture(name)).save(folder / "first.png")
    shot = {"caption": prompt, "seconds": FRAMES / config.data.fps} | ({"image": "first.png"} if case.image else {})
    board = parse_storyboard({"caption": prompt, "shots": [shot]}, folder=folder)
    codec = fit_codec(config.codec, ())
    noise = case.noise(name)[None]
    with (
        mock.patch.object(generate, "_noises", return_value=(noise, noise)),
        jax.set_mesh(make_mesh(MeshConfig(data=1, distributed=False), jax.devices()[:1])),
    ):
        params = weights.load(opened.weights, jax.sharding.get_mesh())
        (found,) = generate.Sampler(config, codec)(params, [board])
    (latents,) = found.latents
    return latents, codec.decode(latents)


def errors(name, solver, transformer=None, against=None):
    """Relative, of latents and of pixels."""
    with tempfile.TemporaryDirectory() as folder:
        found = sampled(pathlib.Path(folder), name, solver, transformer)
    golden = np.load(against or GOLDEN / f"pipeline-{name}.npz")
    return [relative(spread(x), golden[f"{solver}/{part}"]) for x, part in zip(found, ("latents", "pixels"))]


def main(argv):
    """All cases, or one with other weights."""
    parser = argparse.ArgumentParser(prog="python -m tests.parity.pipeline_figures")
    parser.add_argument("--transformer", type=pathlib.Path, help="a folder of weights, of what `export` writes")
    parser.add_argument("--against", type=pathlib.Path, help="what make_pipelines.py made of the same")
    args = parser.parse_args(argv)
    if args.transformer:
        latents, pixels = errors("t2v", "unipc", args.transformer, args.against)
        print(f"{args.transformer}: latents differ by {latents:.1e}, pixels by {pixels:.1e}")
        return
    for name in CASES:
        for solver in SHIFTS:
            latents, pixels = errors(name, solver)
            print(f"| {name} | {solver} | {latents:.1e} | {pixels:.1e} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
