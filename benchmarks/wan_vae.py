"""How fast Wan's autoencoders encode and decode: `python -m benchmarks.wan_vae`.

At full width with random weights, from and to arrays of the host, as data is prepared and samples decoded: the first
call, which compiles, the median of the others, and the most memory of the device that was in use. With
`--diffusers PYTHON`, an interpreter that has torch and diffusers, what these take on the same card follows. Both are
stored. With `--count` nothing runs: it prints what convolutions keep between two pieces, and the FLOPs of a piece.
"""

import argparse
import json
import os
import pathlib
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
import numpy as np

from benchmarks import results
from moc_jax.codecs import fit_codec
from moc_jax.codecs.wan_vae.names import Tensor, tensors
from moc_jax.codecs.wan_vae.network import Sizes, decode_piece, encode_piece
from moc_jax.config import WanVaeConfig
from moc_jax.tensor_files.safetensors import DTYPES, Written, write_safetensors

SIZES = {"2.1": Sizes(16, 96, 96, shortcuts=False), "2.2": Sizes(48, 160, 256, shortcuts=True)}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", choices=list(SIZES), default="2.1")
    parser.add_argument("--size", nargs=2, type=int, default=(480, 832), metavar=("ROWS", "COLUMNS"))
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--piece", type=int, default=1)
    parser.add_argument("--tile", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--count", action="store_true")
    parser.add_argument("--diffusers", metavar="PYTHON", help="an interpreter that has torch and diffusers")
    args = parser.parse_args()
    if args.count:
        for what, kept, flops in counted(args.version, args.size, args.piece, args.dtype):
            print(f"{what}: {kept / 1e9:.1f} GB between pieces, {flops / 1e12:.1f} TFLOP a piece")
        return

    if args.diffusers:  # torch takes its memory beside jax, which would take nearly all
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.45")
    settings = {"dtype": args.dtype, "piece": args.piece, "tile": args.tile}
    print(f"{jax.devices()[0].device_kind}: {args.frames} frames of {args.size[0]} x {args.size[1]}, {settings}")
    entry = {"version": args.version, "frames": args.frames, "size": args.size, **settings}
    entry["moc_jax"] = _ours(args, settings)
    if args.diffusers:
        script = pathlib.Path(__file__).parents[1] / "tests" / "parity" / "time_vae.py"
        given = {name: getattr(args, name) for name in ("version", "frames", "size", "dtype", "repeats")}
        asked = [args.diffusers, "-P", str(script), json.dumps(given)]  # -P: a module beside it is called numbers
        entry["diffusers"] = json.loads(subprocess.run(asked, check=True, stdout=subprocess.PIPE, text=True).stdout)
        print(json.dumps(entry["diffusers"], indent=1))
    name = f"{args.version}, {args.frames} x {args.size[0]} x {args.size[1]}, {args.dtype}, pieces of {args.piece}"
    name += f", tiles of {args.tile}" if args.tile else ""
    command = shlex.join(["python", "-m", "benchmarks.wan_vae", *sys.argv[1:]])
    path = results.store(results.FOLDER, "wan_vae", name, command, entry)
    print(f"\nresults are in {path}")


def _ours(args: argparse.Namespace, settings: dict[str, Any]) -> dict[str, dict[str, float]]:
    with tempfile.TemporaryDirectory() as folder:
        write(pathlib.Path(folder), SIZES[args.version])
        codec = fit_codec(WanVaeConfig(version=args.version, weights=folder, **settings), ())
        video = np.random.default_rng(0).uniform(-1, 1, (args.frames, *args.size, 3)).astype(np.float32)
        latents, encode = _measured("encode", lambda: codec.encode(video), args.repeats)
        return {"encode": encode, "decode": _measured("decode", lambda: codec.decode(latents), args.repeats)[1]}


def counted(
    version: Literal["2.1", "2.2"], size: Sequence[int], piece: int, dtype: str
) -> Iterator[tuple[str, int, float]]:
    """Of both ways: bytes that are kept between pieces, and FLOPs of a piece as XLA is given it."""
    sizes, stride = SIZES[version], WanVaeConfig(version=version).stride
    weights = {x.name: jax.eval_shape(x.of_file, jax.ShapeDtypeStruct(x.shape, dtype)) for x in tensors(sizes)}
    latent = [n // unit for n, unit in zip(size, stride[1:])]
    ways = ("encode", encode_piece, stride[0], [*size, 3]), ("decode", decode_piece, 1, [*latent, sizes.channels])
    for what, run, frames, rest in ways:
        program = jax.jit(run, static_argnums=1)
        first, later = (jax.ShapeDtypeStruct((1, n, *rest), np.float32) for n in (1, frames * piece))
        _, kept = jax.eval_shape(program, weights, sizes, None, first)
        cost = program.lower(weights, sizes, kept, later).cost_analysis() or {}
        yield what, sum(x.size * x.dtype.itemsize for x in kept.values()), cost["flops"]


def write(folder: pathlib.Path, sizes: Sizes) -> None:
    """Random weights: each position's variance stays what it is."""
    rng, listed = np.random.default_rng(0), list(tensors(sizes))

    def numbers(tensor: Tensor) -> np.ndarray:
        fan_in = max(int(np.prod(tensor.shape[1:])), 1)
        return (rng.standard_normal(tensor.shape, np.float32) / np.sqrt(fan_in)).astype(DTYPES["BF16"])

    headers = [Written(tensor.name, DTYPES["BF16"], tensor.shape) for tensor in listed]
    write_safetensors(folder / "diffusion_pytorch_model.safetensors", headers, map(numbers, listed))


def _measured(what: str, call: Callable[[], np.ndarray], repeats: int) -> tuple[np.ndarray, dict[str, float]]:
    """The last result, and seconds and bytes."""
    out, seconds = np.zeros(0), []
    for _ in range(1 + repeats):
        begin = time.perf_counter()
        out = call()
        seconds.append(time.perf_counter() - begin)
    memory = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
    rest = statistics.median(seconds[1:])
    print(f"  {what}: {rest:.3f} s (at first {seconds[0]:.1f} s), {memory / 1e9:.2f} GB at most so far", flush=True)
    return out, {"seconds": rest, "first_seconds": seconds[0], "peak_bytes": memory}


if __name__ == "__main__":
    main()
