"""What the parity of whole pipelines is proven on: every variant, narrow, 50 steps, both samplers."""

import dataclasses
import json
import lzma
import pathlib

import numpy as np

from tests.parity.numbers import numbers
from tests.parity.umt5_cases import DIM
from tests.parity.vae_cases import CASES as VAES

GOLDEN = pathlib.Path(__file__).parent / "golden"
HEADS, HEAD_DIM, DEPTH, MLP_DIM, TEXT_DIM, TEXT_ROWS = 2, 12, 2, 32, DIM, 512
LATENT, STEPS = (3, 4, 6), 50  # latent frames, rows and columns
FRAMES = 4 * (LATENT[0] - 1) + 1
KEPT = 600  # numbers of each result
PROMPT, NEGATIVE = 3, 11  # of the prompts that make_tokens.py wrote


@dataclasses.dataclass(frozen=True)
class Case:
    """A variant."""

    vae: str = "2.1"
    condition: int = 0
    boundary: float = 0.0
    guidance: float = 5.0
    guidance_low: float = 0.0
    image: bool = False

    @property
    def channels(self) -> int:
        """Of latents."""
        return VAES[self.vae].channels

    @property
    def networks(self) -> tuple[str, ...]:
        """Names of the sets of weights."""
        return ("high", "low") if self.boundary else ("network",)

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns of a frame."""
        return LATENT[1] * VAES[self.vae].space, LATENT[2] * VAES[self.vae].space

    def noise(self, name: str) -> np.ndarray:
        """[F, Y, X, Z], of unit variance."""
        return np.float32(np.sqrt(3)) * numbers(f"{name}/noise", *LATENT, self.channels)

    def picture(self, name: str) -> np.ndarray:
        """[Y, X, 3], the first frame in 0..255."""
        return ((numbers(f"{name}/picture", *self.size, 3) + 1) * 127.5).astype(np.uint8)


CASES = {
    "t2v": Case(),
    "ti2v-5b": Case(vae="2.2", image=True),
    "t2v-a14b": Case(boundary=0.875, guidance=4.0, guidance_low=3.0),
    "i2v-a14b": Case(boundary=0.9, guidance=3.5, guidance_low=2.5, condition=20, image=True),
}
SHIFTS = {"unipc": 3.0, "euler": 5.0}


def prompts() -> tuple[list[str], list[list[int]]]:
    """A prompt and what to steer away from, and their ids."""
    tree = json.loads(lzma.decompress((GOLDEN / "prompts.json.xz").read_bytes()))
    return [tree["prompts"][k] for k in (PROMPT, NEGATIVE)], [tree["by_bytes"][k] for k in (PROMPT, NEGATIVE)]


def spread(x: np.ndarray) -> np.ndarray:
    """Some of its numbers, from all over it."""
    return x.reshape(-1)[np.linspace(0, x.size - 1, KEPT).astype(int)]
