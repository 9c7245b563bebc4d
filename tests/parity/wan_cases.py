"""What the parity of WanDiT is proven on: every variant, small, with odd sizes, two scenes and unequal prompts."""

import dataclasses

import numpy as np

from tests.parity.numbers import numbers

BATCH, FRAMES, ROWS, COLUMNS, TEXT_ROWS = 2, 3, 6, 10, 512
PROMPTS = 7, 19  # rows of each scene's prompt; Wan pads both to TEXT_ROWS


@dataclasses.dataclass(frozen=True)
class Case:
    """A variant in small."""

    heads: int
    head_dim: int
    depth: int
    mlp_dim: int
    channels: int
    condition: int = 0
    text_dim: int = 24
    boundary: float = 0.0
    levels: tuple[float, float] = (0.37, 0.84)
    clean_first_frame: bool = False
    """The first latent frame's tokens stand at t = 0, as Wan 2.2 TI2V-5B takes it."""

    @property
    def networks(self) -> tuple[str, ...]:
        """Names of the sets of weights."""
        return ("high", "low") if self.boundary else ("network",)

    def network_of(self, scene: int) -> str:
        """Which of them a scene is for."""
        return self.networks[0 if self.levels[scene] >= self.boundary else 1]

    def inputs(self, name: str) -> dict[str, np.ndarray]:
        """Latents, condition, prompts without padding, and what the output is multiplied with for the loss."""
        size = BATCH, FRAMES, ROWS, COLUMNS
        return {
            "video": numbers(f"{name}/video", *size, self.channels),
            "condition": numbers(f"{name}/condition", *size, self.condition),
            "text": numbers(f"{name}/text", BATCH, max(PROMPTS), self.text_dim),
            "probe": numbers(f"{name}/probe", *size, self.channels),
        }

    def timesteps(self) -> np.ndarray:
        """0 .. 1000 for each scene's frames."""
        t = np.repeat(np.float32(1000) * np.array(self.levels, np.float32)[:, None], FRAMES, axis=1)
        if self.clean_first_frame:
            t[:, 0] = 0
        return t


CASES = {
    "wan2.1-t2v": Case(heads=3, head_dim=16, depth=2, mlp_dim=80, channels=4),
    "wan2.2-ti2v-5b": Case(heads=2, head_dim=20, depth=2, mlp_dim=56, channels=6, clean_first_frame=True),
    "wan2.2-t2v-a14b": Case(heads=5, head_dim=8, depth=3, mlp_dim=72, channels=4, boundary=0.875, levels=(0.95, 0.5)),
    "wan2.2-i2v-a14b": Case(
        heads=4, head_dim=12, depth=2, mlp_dim=64, channels=4, condition=5, boundary=0.9, levels=(0.9, 0.89)
    ),
}
FULL_SIZE = {  # heads of 128, depth, mlp_dim, channels in and out
    "wan21-1.3b": (12, 30, 8960, 16, 16),
    "wan21-14b": (40, 40, 13824, 16, 16),
    "wan22-5b": (24, 30, 14336, 48, 48),
    "wan22-a14b": (40, 40, 13824, 16, 16),
    "wan22-a14b-i2v": (40, 40, 13824, 36, 16),
}
