"""Caption -> embeddings. The model sees embeddings only, so a T5 can take the default encoder's place by name."""

from typing import Protocol

import numpy as np

from moc_jax.config import TextConfig
from moc_jax.shapes import Float
from moc_jax.text.hashed import HashedWords

__all__ = ["TextEncoder", "build_text_encoder", "encoder_fingerprint"]

_ENCODERS = {"hash": HashedWords}


class TextEncoder(Protocol):
    """Captions of any length from the empty one up to `TextConfig.max_tokens` tokens.

    An encoder's class also has `fingerprint(cfg) -> str`, for `encoder_fingerprint`.
    """

    dim: int

    def __call__(self, caption: str) -> Float[np.ndarray, "L E"]:
        """At least one row, even of the empty caption; float32, float16 or bfloat16, in which it is stored.

        Raises:
            ValueError: the caption is too long; names its length, the limit and the fix.
        """
        ...


def build_text_encoder(cfg: TextConfig) -> TextEncoder:
    """The encoder that `cfg` names."""
    return _ENCODERS[cfg.name](cfg)


def encoder_fingerprint(cfg: TextConfig) -> str:
    """The encoder's name and a short hash of all that its embeddings depend on; known without building it.

    Limits are not part of it: with equal fingerprints, what two encoders both take they embed alike.
    """
    return f"{cfg.name}-{_ENCODERS[cfg.name].fingerprint(cfg)}"
