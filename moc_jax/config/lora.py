"""Settings of adapters: what is trained beside weights that stay as they are."""

import dataclasses
import fnmatch
from collections.abc import Iterable
from typing import Annotated

from moc_jax.config.base import Below1, Range, Settings, check


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig(Settings, at="model.lora"):
    """Low-rank adapters (LoRA, arXiv 2106.09685, section 4.1): y = x W + b + alpha / rank · dropout(x) A B.

    W and b are frozen; B is 0 before the first step. Others call these settings r, lora_alpha, target_modules and
    lora_dropout.
    """

    rank: Annotated[int, Range(0, 2**12, "0: no adapters, all weights are trained")] = 0
    """Inner width of an adapter."""
    alpha: Annotated[float, Range(0, 1e6, "0: as rank")] = 0.0
    """What A B is multiplied with, times rank."""
    targets: tuple[str, ...] = ("blocks/*",)
    """The linear maps that get adapters, by patterns that their names match as a whole or from a slash on:
    `blocks/*` is all of a block, `q k v out` or `attention/*` one attention of `wan`, `qkv out` those of `mmdit`."""
    dropout: Below1 = 0.0
    """Training: share of an adapter's inputs that are replaced by 0. Which ones depends on the mesh where devices share
    scenes."""

    def check_together(self):
        check(
            not self.rank or bool(self.targets),
            f"model.lora.rank = {self.rank}, but model.lora.targets is empty; name the maps that get adapters",
        )

    def names(self, linear: str) -> bool:
        """Whether the linear map of this name gets an adapter."""
        return any(_matches(linear, pattern) for pattern in self.targets)

    @property
    def scale(self) -> float:
        """What A B is multiplied with."""
        return (self.alpha or self.rank) / self.rank if self.rank else 0.0


def _matches(name: str, pattern: str) -> bool:
    return any(fnmatch.fnmatchcase(name, each) for each in (pattern, f"*/{pattern}"))


def unmatched(cfg: LoraConfig, linear: Iterable[str]) -> list[str]:
    """Patterns that match none of these names."""
    names = list(linear)
    return [pattern for pattern in cfg.targets if not any(_matches(name, pattern) for name in names)]
