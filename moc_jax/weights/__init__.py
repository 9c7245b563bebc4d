"""Weights that others made and use, from Python and from the command line: `python -m moc_jax.weights`."""

from moc_jax.public_weights import (
    LICENCE,
    PublicWeights,
    WeightsError,
    are_public,
    check_model,
    convert,
    export,
    load,
    open_weights,
)

__all__ = [
    "LICENCE",
    "PublicWeights",
    "WeightsError",
    "are_public",
    "check_model",
    "convert",
    "export",
    "load",
    "open_weights",
]
