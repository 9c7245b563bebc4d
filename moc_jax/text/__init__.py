"""Caption -> embeddings. The model sees embeddings only, so a T5 can take the default encoder's place by name."""

from typing import Protocol

import numpy as np

from moc_jax.config import TextConfig
from moc_jax.shapes import Float32
from moc_jax.text.hashed import HashedWords

__all__ = ["TextEncoder", "build_text_encoder"]


class TextEncoder(Protocol):
    """Captions of any length from the empty one up to `TextConfig.max_tokens` tokens."""

    dim: int

    def __call__(self, caption: str) -> Float32[np.ndarray, "L E"]:
        """At least one row: even the empty caption has a begin token.

        Raises:
            ValueError: the caption is too long; names its length, the limit and the fix.
        """
        ...


def build_text_encoder(cfg: TextConfig) -> TextEncoder:
    """The encoder that `cfg` names."""
    return {"hash": HashedWords}[cfg.name](cfg)
