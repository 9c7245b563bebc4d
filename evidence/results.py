"""Results on disk: one JSON file per arm, learning rate and seed, in a folder per setting; see `evidence.run`."""

import hashlib
import math
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


def kept_in(cache: pathlib.Path, results: pathlib.Path) -> pathlib.Path:
    """The folder in `cache` of what belongs to a folder of results: states and weights trained for others lie apart."""
    if results.resolve() == RESULTS.resolve():
        return cache
    return cache / f"of-{hashlib.sha256(str(results.resolve()).encode()).hexdigest()[:12]}"


def finished(folder: pathlib.Path) -> list[Result]:
    """All results of a folder that are more than half-way ones."""
    found = [parse_json(path.read_bytes()) for path in sorted(folder.glob("*.json"))]
    return [_numbers(result) for result in found if result["finished"]]


def finite(tree: Any) -> Any:
    """The same with null for NaN, which JSON lacks: after training that diverged, and where nothing was picked."""
    if isinstance(tree, dict):
        return {name: finite(value) for name, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [finite(value) for value in tree]
    return None if isinstance(tree, float) and not np.isfinite(tree) else tree


def _numbers(tree: Any) -> Any:
    """NaN for null, which stands for it in JSON."""
    if isinstance(tree, dict):
        return {name: _numbers(value) for name, value in tree.items()}
    if isinstance(tree, list):
        return [_numbers(value) for value in tree]
    return float("nan") if tree is None else tree


def best_rates(found: Sequence[Result]) -> dict[str, float]:
    """Each arm's learning rate with the most correct answers; of equal ones, that which had half of them correct first.

    Rates are compared by trainings of the same seeds and as many updates. One that has none in common with the best
    so far, beginning with the rate of most trainings, is not compared.
    """
    return {arm: _best_rate([result for result in found if result["arm"] == arm]) for arm in by_arm(found)}


def _best_rate(found: Sequence[Result]) -> float:
    rates: dict[float, dict[tuple[int, int], Result]] = {}
    for result in found:
        rates.setdefault(result["learning_rate"], {})[result["seed"], result["updates"]] = result

    def worth(rate: float, shared: set[tuple[int, int]]) -> tuple[float, float]:
        shares = [rates[rate][key]["test"]["all"]["share"] for key in shared]
        return float(np.mean(shares)), -float(
            np.mean([updates_to(rates[rate][key], 0.5) or math.inf for key in shared])
        )

    best, *others = sorted(rates, key=lambda rate: (-len(rates[rate]), -rate))
    for other in others:
        shared = rates[best].keys() & rates[other].keys()
        if shared and worth(other, shared) > worth(best, shared):
            best = other
    return best


def chosen_of(found: Sequence[Result], choices: Sequence[Result]) -> list[Result]:
    """Of the results, each arm's at its best rate on stories for choices, of the rates it has here; an arm without
    such keeps all."""
    tried = {(result["arm"], result["learning_rate"]) for result in found}
    best = best_rates([choice for choice in choices if (choice["arm"], choice["learning_rate"]) in tried])
    return [result for result in found if best.get(result["arm"], result["learning_rate"]) == result["learning_rate"]]


def switched_of(found: Sequence[Result]) -> list[Result]:
    """Of the results whose weights were switched to other arms, each arm's at the best rate of these."""
    switched = [result for result in found if result.get("switched")]
    return chosen_of(switched, switched)


def by_arm(found: Sequence[Result]) -> dict[str, list[Result]]:
    """Results by arm, the one with most correct answers first."""
    arms: dict[str, list[Result]] = {}
    for result in found:
        arms.setdefault(result["arm"], []).append(result)
    shares = {arm: np.mean([r["test"]["all"]["share"] for r in results]) for arm, results in arms.items()}
    return dict(sorted(arms.items(), key=lambda item: -shares[item[0]]))


def alone(result: Result) -> bool:
    """Whether the run had a GPU for itself, so that its times mean something."""
    commands = (*result.get("earlier_commands", ()), result["command"])
    return not any(re.search(r"--per-gpu[ =](?!1\b)", command) for command in commands)


def pace(results: Sequence[Result]) -> str:
    """Milliseconds of an update, of the runs that had a GPU for themselves."""
    times = [result["milliseconds"] for result in results if alone(result)]
    return f"{np.mean(times):.0f}" if times else "-"


def updates_to(result: Result, share: float) -> int | None:
    """Updates until a test during training had that share correct; None if none had."""
    return next((test["updates"] for test in result["curve"] if test["share"] >= share), None)
