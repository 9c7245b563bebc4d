"""What `moc-sample --help` shows where a checkpoint is named beside it: the values that settings have there."""

import argparse
import dataclasses
import typing
from collections.abc import Sequence

from moc_jax.config.base import Settings, expanded
from moc_jax.tensor_files.places import are_public


def saved_values[S: Settings](
    kind: type[S], argv: Sequence[str], sample: Sequence[str], data: Sequence[str]
) -> S | None:
    """Arguments with the checkpoint's values; None unless help is asked for, of a checkpoint.

    Not checked, since what has to be given is missing.

    Args:
        kind: the program's arguments.
        sample, data: which of them are settings of a config's `sample` and `data`.

    Raises:
        CheckpointError: there is none that can be read.
    """
    if not {"-h", "--help"} & set(argv):
        return None
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--checkpoint")
    first.add_argument("--step", type=int)
    try:
        given, _ = first.parse_known_args(list(argv))
    except argparse.ArgumentError:  # help is what was asked for
        return None
    if not given.checkpoint:
        return None
    import tyro

    from moc_jax.checkpoint import saved_config
    from moc_jax.weights.pipelines import open_pipeline

    place, step = expanded(given.checkpoint, "--checkpoint"), given.step
    if are_public(place):
        config, moc = (opened := open_pipeline(place).config), opened.moc
    else:
        config, step = saved_config(place, step)
        moc = config.moc_at(step - 1)
    values = {"checkpoint": given.checkpoint, "step": step, "top_k": moc.top_k, "chunk": moc.chunk.size}
    values |= {name: getattr(config.sample, name) for name in sample} | {
        name: getattr(config.data, name) for name in data
    }
    arguments = object.__new__(kind)
    for field in dataclasses.fields(typing.cast(type, kind)):
        own = tyro.MISSING if field.default is dataclasses.MISSING else field.default
        object.__setattr__(arguments, field.name, values.get(field.name, own))
    return arguments
