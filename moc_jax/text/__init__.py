"""Caption -> embeddings. The model sees embeddings only.

`TextConfig` says by which encoder: `ENCODERS` has the class that each of its kinds builds. The default is `hash`, which
needs no weights; `umt5` is the encoder that Wan's models read.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from moc_jax.config import HashConfig, TextConfig, Umt5Config
from moc_jax.config.base import Settings
from moc_jax.shapes import Float
from moc_jax.text.hashed import HashedWords
from moc_jax.text.umt5 import Umt5, described

__all__ = ["ENCODERS", "TextEncoder", "build_text_encoder", "encoder_fingerprint", "public_encoder"]


class TextEncoder(Protocol):
    """Captions of any length, from the empty one on, up to the most tokens that its config allows."""

    dim: int
    batch_size: int
    """Captions that are best encoded together."""

    def __init__(self, cfg: Any) -> None:
        """`cfg` is the encoder's own config; with a `Reference` where its weights are downloaded."""
        ...

    @staticmethod
    def fingerprint(cfg: Any) -> str:
        """See `encoder_fingerprint`."""
        ...

    def __call__(self, caption: str) -> Float[np.ndarray, "L E"]:
        """At least one row, even of the empty caption; float32, float16 or bfloat16, in which it is stored.

        Raises:
            ValueError: the caption is too long; names its length, the limit and the fix.
        """
        ...

    def check(self, caption: str) -> None:
        """Raises ValueError as `__call__` does, before anything is embedded."""
        ...

    def batch(self, captions: Sequence[str]) -> list[Float[np.ndarray, "_ E"]]:
        """The same for each of several captions, as one program where there is one.

        Raises:
            ValueError: one of the captions is too long.
        """
        ...


ENCODERS: dict[type[Settings], type[TextEncoder]] = {HashConfig: HashedWords, Umt5Config: Umt5}


def public_encoder(place: str) -> str:
    """What a text encoder in public files is, in a line, with its licence; none of its numbers is read.

    Raises:
        WeightsError: it is not whole.
        ConfigError: it is something else, or has no tokenizer.
    """
    return described(place)


def build_text_encoder(cfg: TextConfig) -> TextEncoder:
    """The encoder that `cfg` names."""
    return ENCODERS[type(cfg)](cfg)


def encoder_fingerprint(cfg: TextConfig) -> str:
    """The encoder's name and a short hash of all that its embeddings depend on; known without building it, though
    one from public weights must find them.

    Limits are not part of it: with equal fingerprints, what two encoders both take they embed alike.
    """
    return f"{cfg.name}-{ENCODERS[type(cfg)].fingerprint(cfg)}"
