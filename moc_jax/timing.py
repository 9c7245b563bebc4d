"""How long computations take.

Time is wall-clock time between synchronisations with the device. A sample is as many launches, back to back, as last
`sample_seconds`, so that the host's own work is hidden behind the device's, as it is in a model.
"""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable

import jax

_FEW = 3  # samples of a program too long for more


@dataclasses.dataclass(frozen=True, kw_only=True)
class Effort:
    """How much measuring a program is worth."""

    samples: int = 7
    """Samples; the result is their median."""
    sample_seconds: float = 0.02
    """A sample's launches last at least this long together."""
    budget_seconds: float = 4.0
    """A program that would take longer than this for all samples gets fewer, at least 3."""
    single_seconds: float = 8.0
    """A launch that lasts longer than this is the only sample, after a first one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing:
    """Milliseconds of one launch."""

    median_ms: float
    low_ms: float
    high_ms: float
    samples: int
    launches: int  # per sample


def time_launches(launch: Callable[[], object], effort: Effort) -> Timing:
    """Times `launch`, which starts a computation and returns what to wait for."""

    def sample(launches: int) -> float:
        start = time.perf_counter()
        out = None
        for _ in range(launches):
            out = launch()
        jax.block_until_ready(out)
        return (time.perf_counter() - start) / launches

    sample(1)  # memory is taken, devices find each other, clocks rise
    launches, seconds = 1, sample(1)
    if seconds > effort.single_seconds:
        return _timing([seconds], 1)
    while seconds * launches < effort.sample_seconds:
        launches = max(2 * launches, math.ceil(effort.sample_seconds / seconds))
        seconds = sample(launches)
    affordable = int(effort.budget_seconds / (seconds * launches))
    count = max(min(effort.samples, affordable), min(effort.samples, _FEW))
    return _timing([sample(launches) for _ in range(count)], launches)


def _timing(seconds: list[float], launches: int) -> Timing:
    median, low, high = (1e3 * f(seconds) for f in (statistics.median, min, max))
    return Timing(median_ms=median, low_ms=low, high_ms=high, samples=len(seconds), launches=launches)
