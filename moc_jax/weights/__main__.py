"""Public weights from the command line; no device is touched but for `export`, which reads a checkpoint.

python -m moc_jax.weights check PLACE
python -m moc_jax.weights check PLACE --of autoencoder
python -m moc_jax.weights convert PLACE FOLDER --names original --dtype bfloat16
python -m moc_jax.weights export RUN FOLDER --names diffusers
python -m moc_jax.weights export RUN FOLDER --of lora
python -m moc_jax.weights merge PLACE LORA FOLDER
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from moc_jax import weights
from moc_jax.cli import clean_exit, report_errors_of
from moc_jax.files import prove_new_folder
from moc_jax.public_weights import DTYPE_NAMES
from moc_jax.weights.adapters import convert_adapters, export_adapters, merged, open_adapters


def main(argv: Sequence[str]) -> None:
    """Reads the command line and does what it says."""
    args = _parsed(argv)
    if args.verb != "check":
        prove_new_folder(args.folder, setting="the folder")
    if args.verb == "export":
        _export(args)
        return
    if args.verb != "merge" and args.of == "lora":
        found = open_adapters(args.place)
        print(f"{args.place}: {found.described()}")
        if args.verb == "convert":
            convert_adapters(found, args.folder, names=args.names, dtype=args.dtype)
            print(f"{args.folder}: the same with {args.names} names")
        return
    if args.verb == "check" and args.of != "transformer":
        from moc_jax.codecs import public_autoencoder
        from moc_jax.text import public_encoder

        described = {"autoencoder": public_autoencoder, "text-encoder": public_encoder}[args.of]
        print(f"{args.place}: {described(str(args.place))}")
        return
    found = weights.open_weights(args.place)
    networks = " and ".join(found.tensors)
    types = ", ".join(f"{count} of {dtype}" for dtype, count in found.dtypes.items())
    print(f"{args.place}: {found.parameters:,} parameters ({networks}) with {found.names} names; tensors: {types}")
    print(f"{found.config}")
    print(f"licence: {found.licence}")
    if args.verb == "merge":
        adapters = open_adapters(args.lora)
        print(f"{args.lora}: {adapters.described()}")
        found = merged(found, adapters, args.scale)
    if args.verb != "check":
        weights.convert(found, args.folder, names=args.names or found.names, dtype=args.dtype)
        what = "both together" if args.verb == "merge" else "the same"
        print(f"{args.folder}: {what} with {args.names or found.names} names")


def _export(args: argparse.Namespace) -> None:
    from moc_jax.checkpoint import load_for_sampling, saved_config
    from moc_jax.models import public_tensors

    tensors = public_tensors(saved_config(args.run, args.step)[0].model)
    if args.of == "lora":
        saved = load_for_sampling(args.run, args.step, adapters="alone")
        export_adapters(saved.config.model, saved.params, args.folder, names=args.names, dtype=args.dtype)
    else:
        numbers = sum(math.prod(tensor.shape) for of in tensors.values() for tensor in of)
        size = numbers * DTYPE_NAMES[args.dtype].itemsize
        prove_new_folder(args.folder, setting="the folder", size=size)
        saved = load_for_sampling(args.run, args.step, base=args.base)
        weights.export(saved.config.model, saved.params, args.folder, names=args.names, dtype=args.dtype)
    what = "adapters" if args.of == "lora" else "weights"
    print(f"{args.folder}: the {what} of {args.run} after {saved.step} steps")


def _parsed(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m moc_jax.weights", description=__doc__.split("\n")[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    kinds = "transformer", "autoencoder", "text-encoder", "lora"
    check = verbs.add_parser("check", help="say what weights are, or all that is wrong with them")
    convert = verbs.add_parser("convert", help="write public weights with other names, or in another type")
    merge = verbs.add_parser("merge", help="write public weights with adapters in them")
    export = verbs.add_parser("export", help="write the weights of a run of this package for others")
    for each in (check, convert, merge):
        each.add_argument("place", type=Path, help="a file, a folder of one network, or a folder of a pipeline")
    merge.add_argument("lora", type=Path, help="a file of adapters, or its folder")
    merge.add_argument("--scale", type=float, default=1.0, help="what the adapters are multiplied with")
    export.add_argument("run", help="a run's workdir")
    export.add_argument("--step", type=int, help="of which checkpoint; the newest if not given")
    export.add_argument("--base", default="", help="where the weights that its adapters are beside lie now")
    for each, of in ((check, kinds), (convert, kinds[::3]), (export, kinds[::3])):
        each.add_argument("--of", choices=of, default="transformer", help="lora: adapters; of a run, without its base")
    for each, types in (
        (convert, ["keep", "float32", "bfloat16"]),
        (merge, ["keep", "float32", "bfloat16"]),
        (export, ["float32", "bfloat16"]),
    ):
        each.add_argument("folder", type=Path, help="a new folder")
        names = None if each is merge else "diffusers"
        each.add_argument("--names", choices=["diffusers", "original", "comfyui"], default=names)
        each.add_argument("--dtype", choices=types, default=types[0])
    return parser.parse_args(argv)


if __name__ == "__main__":
    report_errors_of("moc_jax.weights")
    with clean_exit(OSError):
        main(sys.argv[1:])
