"""The settings that attention is tested under: every combination, and a dozen in which every pair of values meets.

Compiling is what tests spend their time on, so they share the configs of `COVERING` wherever they can.
"""

import itertools
from collections.abc import Sequence

import pytest

from moc_jax.config import MoCConfig

_SELF, _TEXT = ("shot", "chunk", "none", "window"), ("all", "own+global", "none")

DENSE = [MoCConfig(mode="dense", visibility=visibility) for visibility in ("scene", "past")]

EVERY = [
    MoCConfig(top_k=1 + i % 4, window=i % 3, self_anchor=own, text_anchor=text, causal_routing=causal, visibility=seen)
    for i, (own, text, causal, seen) in enumerate(itertools.product(_SELF, _TEXT, (True, False), ("scene", "past")))
] + DENSE

# A top_k of 20 is more than there are chunks.
COVERING = [
    MoCConfig(
        top_k=(2, 1, 20, 2, 3)[i % 5],
        window=1 + i % 2,
        self_anchor=own,
        text_anchor=text,
        causal_routing=i % 2 == 0,
        visibility=("scene", "past")[(i + 1) // 2 % 2],
    )
    for i, (own, text) in enumerate(itertools.product(_SELF, _TEXT))
] + DENSE


def half_long(configs: Sequence[MoCConfig]) -> list:
    """Parameters of a test, of which half are left to `make test-long`.

    Not every other one of `COVERING`: those are all causal.
    """
    return [pytest.param(cfg, marks=[pytest.mark.long] * ((i + i // 4) % 2)) for i, cfg in enumerate(configs)]


def name(cfg: MoCConfig) -> str:
    """For test ids."""
    if cfg.mode == "dense":
        return f"dense-{cfg.visibility}"
    own = f"window{cfg.window}" if cfg.self_anchor == "window" else cfg.self_anchor
    order = "causal" if cfg.causal_routing else "any"
    return f"k{cfg.top_k}-{own}-{cfg.text_anchor}-{order}-{cfg.visibility}"


_NAMED = {name(cfg): cfg for cfg in COVERING}
MULTI_SHOT = _NAMED["k2-shot-all-causal-scene"]
SINGLE_SHOT = _NAMED["k2-chunk-all-any-scene"]
PAST = [_NAMED["k1-shot-own+global-any-past"], _NAMED["k20-shot-none-causal-past"], DENSE[1]]
WINDOW = _NAMED["k2-window1-own+global-causal-past"]
NO_ANCHORS = _NAMED["k2-none-none-causal-scene"]
MANY_PICKS = [_NAMED["k20-shot-none-causal-past"], _NAMED["k20-none-own+global-any-scene"]]
