"""Caption -> embeddings. The model sees embeddings only, so a T5 can take the default encoder's place by name.

`TextConfig` says which: `ENCODERS` has the class that each of its kinds builds.
"""

from typing import Any, Protocol

import numpy as np

from moc_jax.config import HashConfig, TextConfig
from moc_jax.config.base import Settings
from moc_jax.shapes import Float
from moc_jax.text.hashed import HashedWords

__all__ = ["ENCODERS", "TextEncoder", "build_text_encoder", "encoder_fingerprint"]


class TextEncoder(Protocol):
    """Captions of any length, from the empty one on, up to the most tokens that its config allows."""

    dim: int

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


ENCODERS: dict[type[Settings], type[TextEncoder]] = {HashConfig: HashedWords}


def build_text_encoder(cfg: TextConfig) -> TextEncoder:
    """The encoder that `cfg` names."""
    return ENCODERS[type(cfg)](cfg)


def encoder_fingerprint(cfg: TextConfig) -> str:
    """The encoder's name and a short hash of all that its embeddings depend on; known without building it.

    Limits are not part of it: with equal fingerprints, what two encoders both take they embed alike.
    """
    return f"{cfg.name}-{ENCODERS[type(cfg)].fingerprint(cfg)}"
