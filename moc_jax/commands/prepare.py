"""Prepares videos for training, without training: what `moc-train` would do first, kept in `data.cache`.

    moc-prepare --config own_videos --data.source my_videos/ [--any.nested.field value]

What is complete is kept, however it ends: the same command resumes. Several at once, on one host or many that share the
cache, share the work.

    --processes N   so many processes on this host, each with cores of its own (default 1)
    --part I/N      begin with share I of N, counted from 0: one for each host; who is done takes over what is left
    --prune         then remove from the cache what this data needed earlier and no data needs any more
"""

import argparse
import contextlib
from collections.abc import Sequence

from moc_jax.cli import clean_exit, load_config
from moc_jax.config import Config, ConfigError
from moc_jax.showing import printable
from moc_jax.signals import Signals


def main(argv: Sequence[str], signals: Signals | None = None) -> None:
    """Exits with 0 when all is prepared, 2 for a wrong setting, 1 for what went wrong, 130 or 143 after a signal."""
    with clean_exit():
        if {"-h", "--help"} & set(argv):
            print(__doc__)
        own, config = options(argv)

    with contextlib.nullcontext() if signals is None else signals.deferred(line=""):
        from moc_jax.commands.preparing import part_of, prepared, prepared_by
        from moc_jax.data import prune
        from moc_jax.data.buckets import assign_buckets
        from moc_jax.data.caption_store import open_captions
        from moc_jax.processes import join
    with clean_exit():
        part = part_of(own.part)
        if config.mesh.located:
            join(config.mesh)
            manifest = prepared(config, None)
        else:
            manifest = prepared_by(own.processes, config, part)
        lengths, splits = open_captions(manifest, config.text).lengths, ("train", "validation")
        buckets = [assign_buckets(config, manifest, lengths, split) for split in splits if manifest.split(split)]
        print(manifest.summary(), *(each.summary() for each in buckets), sep="\n", flush=True)
        if own.prune:
            for line in prune(manifest):
                print(printable(line), flush=True)


def options(argv: Sequence[str]) -> tuple[argparse.Namespace, Config]:
    """This program's own options, and the config of all others; raises ConfigError as `load_config`, exits as that."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--processes", type=int, default=1)
    first.add_argument("--part", default="0/1")
    first.add_argument("--prune", action="store_true")
    try:
        own, rest = first.parse_known_args(list(argv))
    except argparse.ArgumentError as error:
        raise ConfigError(f"{error.argument_name}: {error.message}") from error
    if not 1 <= own.processes <= 1024:
        raise ConfigError(f"--processes is {own.processes}; it must lie in 1..1024")
    config = load_config(rest)
    if own.prune and "://" in config.data.cache:
        raise ConfigError(
            f"--prune: {config.data.cache} lies in a bucket, where nobody knows which hosts still read it; remove what "
            "is not needed with `gcloud storage rm`"
        )
    return own, config
