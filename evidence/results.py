"""Results on disk: one JSON file per arm, learning rate and seed, in a folder per setting; see `evidence.run`."""

import pathlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from moc_jax.reading import parse_json

RESULTS = pathlib.Path(__file__).parent / "results"
Result = dict[str, Any]


def name_of(arm: str, learning_rate: float, seed: int) -> str:
    """Of a run's files."""
    return f"{re.sub(r'[^a-z0-9]+', '-', arm)}_{learning_rate:g}_{seed}"


def finished(folder: pathlib.Path) -> list[Result]:
    """All results of a folder that are more than half-way ones."""
    found = [parse_json(path.read_bytes()) for path in sorted(folder.glob("*.json"))]
    return [result for result in found if result["finished"]]


def best_rates(found: Sequence[Result]) -> dict[str, float]:
    """Each arm's learning rate with the most correct answers, over its seeds."""
    shares: dict[tuple[str, float], list[float]] = {}
    for result in found:
        shares.setdefault((result["arm"], result["learning_rate"]), []).append(result["test"]["all"]["share"])
    best: dict[str, float] = {}
    for arm, rate in sorted(shares, key=lambda run: np.mean(shares[run])):
        best[arm] = rate
    return best


def updates_to(result: Result, share: float) -> int | None:
    """Updates until a test during training had that share correct; None if none had."""
    return next((test["updates"] for test in result["curve"] if test["share"] >= share), None)
