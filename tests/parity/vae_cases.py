"""What the parity of Wan's autoencoders is proven on: both, narrow, with odd sizes and two clips."""

import dataclasses

import numpy as np

from tests.parity.numbers import numbers

BATCH, LATENT = 2, (4, 3, 5)  # latent frames, rows and columns
FRAMES = 4 * (LATENT[0] - 1) + 1
KEPT = 1500  # numbers of each result


@dataclasses.dataclass(frozen=True)
class Case:
    """One of them, narrow."""

    channels: int
    encoder: int
    decoder: int
    space: int
    shortcuts: bool = False

    def video(self, name: str) -> np.ndarray:
        """[B, F, Y, X, 3]"""
        return numbers(f"{name}/video", BATCH, FRAMES, *(self.space * n for n in LATENT[1:]), 3)

    def latents(self, name: str) -> np.ndarray:
        """[B, f, y, x, Z], normalised."""
        return np.float32(1.7) * numbers(f"{name}/latents", BATCH, *LATENT, self.channels)


CASES = {
    "2.1": Case(channels=16, encoder=4, decoder=6, space=8),
    "2.2": Case(channels=48, encoder=4, decoder=6, space=16, shortcuts=True),
}


def spread(x: np.ndarray) -> np.ndarray:
    """Some of its numbers, from all over it."""
    return x.reshape(-1)[np.linspace(0, x.size - 1, KEPT).astype(int)]
