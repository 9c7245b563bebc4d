"""Small pipelines of Wan with random weights, as diffusers and as the Wan team lay them out.

python -m tests.weights.pipelines FOLDER [--model ti2v-5b] [--names original]
"""

import argparse
import dataclasses
import json
import pathlib
import pickle
import sys
import zipfile

import numpy as np

from moc_jax.config import WanConfig
from moc_jax.tensor_files.places import EXPERTS
from tests.parity import umt5_figures, vae_figures
from tests.parity.umt5_cases import DIM
from tests.weights.folders import arrays, write

MODEL = WanConfig(dim=24, depth=2, heads=2, mlp_dim=32, latent_channels=16, text_dim=DIM)
MODELS = {
    "t2v": MODEL,
    "ti2v-5b": dataclasses.replace(MODEL, latent_channels=48),
    "t2v-a14b": dataclasses.replace(MODEL, boundary=0.875),
    "i2v-a14b": dataclasses.replace(MODEL, boundary=0.9, condition_channels=20),
}
UNIPC = {
    "_class_name": "UniPCMultistepScheduler",
    "flow_shift": 3.0,
    "prediction_type": "flow_prediction",
    "solver_order": 2,
    "solver_type": "bh2",
    "use_flow_sigmas": True,
}
EULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 7.0, "num_train_timesteps": 1000}


def write_pipeline(folder, kind="t2v", names="diffusers", scheduler=UNIPC):
    """All that there is of a pipeline."""
    cfg = MODELS[kind]
    version = "2.2" if cfg.latent_channels == 48 else "2.1"
    spelling = ("diffusers", "original").index(names)
    if cfg.boundary:
        for part, inside in zip(("high", "low"), EXPERTS[names], strict=True):
            write(folder / inside, arrays(cfg, names, part), cfg, names)
    else:
        write(folder / "transformer" if names == "diffusers" else folder, arrays(cfg, names), cfg, names)
    vae, encoder = vae_figures.arrays(version, spelling), umt5_figures.arrays(spelling)
    if names == "original":
        write_pth(folder / f"Wan{version}_VAE.pth", vae)
        write_pth(folder / "models_t5_umt5-xxl-enc-bf16.pth", encoder)
        umt5_figures.write_tokenizer(folder / "google" / "umt5-xxl")
        return folder
    vae_figures.write(folder / "vae", vae)
    umt5_figures.write(folder / "text_encoder", encoder)
    umt5_figures.write_tokenizer(folder / "tokenizer")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    index = {"_class_name": "WanPipeline", "boundary_ratio": cfg.boundary or None}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def write_pth(file, tensors):
    """A file as PyTorch's save writes it, of float32, without PyTorch."""

    def number(n):
        return pickle.BININT + n.to_bytes(4, "little")

    def numbers(of):
        return pickle.MARK + b"".join(map(number, of)) + pickle.TUPLE

    def text(word):
        return pickle.BINUNICODE + len(word.encode()).to_bytes(4, "little") + word.encode()

    entries = []
    for key, (name, x) in enumerate(tensors.items()):
        storage = text("storage") + b"ctorch\nFloatStorage\n" + text(str(key)) + text("cpu") + number(x.size)
        strides = [s // x.itemsize for s in x.strides]
        place = pickle.MARK + storage + pickle.TUPLE + pickle.BINPERSID + number(0) + numbers(x.shape)
        hooks = b"ccollections\nOrderedDict\n" + pickle.EMPTY_TUPLE + pickle.REDUCE
        arguments = pickle.MARK + place + numbers(strides) + pickle.NEWFALSE + hooks + pickle.TUPLE
        entries.append(text(name) + b"ctorch._utils\n_rebuild_tensor_v2\n" + arguments + pickle.REDUCE)
    pickled = pickle.PROTO + b"\x02" + pickle.EMPTY_DICT + pickle.MARK + b"".join(entries) + pickle.SETITEMS
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickled + pickle.STOP)
        for key, x in enumerate(tensors.values()):
            archive.writestr(f"archive/data/{key}", np.ascontiguousarray(x, "<f4").tobytes())


def main(argv):
    """Writes one."""
    parser = argparse.ArgumentParser(prog="python -m tests.weights.pipelines", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=pathlib.Path, help="a new folder")
    parser.add_argument("--model", choices=MODELS, default="t2v")
    parser.add_argument("--names", choices=EXPERTS, default="diffusers")
    args = parser.parse_args(argv)
    args.folder.mkdir(parents=True)
    write_pipeline(args.folder, args.model, args.names)
    print(f"{args.folder}: {args.model} with random weights, as {args.names} has it")


if __name__ == "__main__":
    main(sys.argv[1:])
