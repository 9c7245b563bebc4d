"""What `moc-sample --help` shows where a checkpoint is named beside it: the values that settings have there."""

import argparse
from collections.abc import Sequence

from moc_jax.checkpoint import saved_config
from moc_jax.config.base import expanded


def saved_values(argv: Sequence[str], sample: Sequence[str]) -> dict[str, str | int | float]:
    """By option: `sample` names settings of a config's `sample`. Empty where `argv` names no checkpoint.

    Raises:
        CheckpointError: there is none that can be read.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--checkpoint")
    first.add_argument("--step", type=int)
    try:
        given, _ = first.parse_known_args(list(argv))
    except argparse.ArgumentError:  # help is what was asked for
        return {}
    if not given.checkpoint:
        return {}
    config, step = saved_config(expanded(given.checkpoint, "--checkpoint"), given.step)
    moc = config.moc_at(step - 1)
    shown = {"checkpoint": given.checkpoint, "step": step, "top_k": moc.top_k, "chunk": moc.chunk.size}
    return shown | {name: getattr(config.sample, name) for name in sample}
