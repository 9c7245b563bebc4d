"""Claim b: at equal cost MoC is above dense attention."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from benchmarks.tables import markdown
from evidence import plots
from evidence.claims.worlds import (
    DENSE,
    OWN,
    Arms,
    Claim,
    Entries,
    Evidence,
    best_of,
    compared,
    curves,
    of_one_seed,
    percent,
)
from evidence.dataset import shapes
from evidence.results import Result, alone, pace
from evidence.settings import SETTINGS
from moc_jax.models import matrix_flops


def price(worlds: Sequence[Evidence], long: Sequence[Evidence]) -> Claim:
    """The claim, a verdict for each world and kind of cost."""
    rows, verdicts, pictures = [], [], {}
    kinds = (
        (worlds, "attended FLOPs", lambda r, t: t["updates"] * r["attention_flops"], plots.over_flops, (DENSE,)),
        (worlds, "FLOPs of all kinds", _flops, None, ()),
        (long, "seconds of training", _seconds, plots.over_seconds, (DENSE, OWN)),
    )
    for some, unit, cost, plot, others in kinds:
        for world in some:
            if (found := world.picking(DENSE)) is None:
                continue
            arms, where = found
            best = best_of(arms)
            assert best is not None
            if cost is _seconds and not all(alone(r) for name in (best, DENSE) for r in arms[name]):
                verdicts.append(f"{where}, at equal {unit}: *not measured*, as runs shared a GPU")
                continue
            for words, rows_of in _at_equal_cost(arms, best, cost):
                verdicts.append(f"{where}, at equal {unit}, {words}{of_one_seed(arms[best], arms[DENSE])}")
                rows += [[where, unit, *row] for row in rows_of]
            if plot is not None:
                shown = curves(arms, best, *others)
                pictures[f"evidence_claim_b_{world.world}"] = lambda shown=shown, plot=plot: plot(shown)
    head = ["world", "cost", "arm", "of dense's, per update", "ms per update", "at equal cost", "updates"]
    head += ["P(correct) there, %"]
    says = "At equal attended FLOPs MoC is above dense, and in scenes of 33,792 tokens in seconds too"
    return Claim(
        letter="b", says=says, table=markdown(head, rows) if rows else [], verdicts=verdicts, pictures=pictures
    )


def _at_equal_cost(
    arms: Arms, best: str, cost: Callable[[Result, dict[str, Any]], float]
) -> Iterator[tuple[str, list[list[str]]]]:
    """A verdict and rows where the first of MoC and dense has P = 0.5, if one has, and where the cheaper one's training
    ends."""
    results = [r for name in (best, DENSE) for r in arms[name]]
    half = [cost(r, test) for r in results for test in r["curve"] if test["share"] >= 0.5]
    ends = min(max(cost(r, r["curve"][-1]) for r in arms[name]) for name in (best, DENSE))
    budgets = {"where the first has P = 0.5": min(half, default=0.0), "where the first ends": ends}
    for when, budget in budgets.items():
        if not budget:
            continue
        at = {arm: _within(arms[arm], cost, budget) for arm in (best, DENSE)}
        rows = []
        for arm, (updates, (_, share)) in at.items():
            per_update = cost(arms[arm][0], {"updates": 1}) / cost(arms[DENSE][0], {"updates": 1})
            rows.append([arm, f"{100 * per_update:.0f} %", pace(arms[arm]), when, f"{updates:,.0f}", share])
        yield f"{when}: **{compared(at[best][1][0], at[DENSE][1][0])}** by {best}", rows


def _within(
    results: Sequence[Result], cost: Callable[[Result, dict[str, Any]], float], budget: float
) -> tuple[float, tuple[Entries, str]]:
    """Each seed's last test during training within the budget: mean updates, the tests, and their share."""
    last = []
    for result in results:
        paid = [test for test in result["curve"] if cost(result, test) <= 1.0001 * budget]
        last.append(paid[-1] if paid else result["curve"][0])
    return float(np.mean([test["updates"] for test in last])), (last, percent(last))


def _flops(result: Result, test: dict[str, Any]) -> float:
    """Of the model's forward passes, matrix products counted: what claims about attention alone leave out."""
    setting = SETTINGS[result["setting"]]
    latents = shapes(setting.world, setting.codec, setting.text, range(1)).latents.shape[:-1]
    video = math.prod(latents) // math.prod(setting.model.patch)
    attention = setting.model.depth * setting.model.heads * result["attention_flops"]
    return test["updates"] * (attention + matrix_flops(setting.model, setting.world.text_tokens, video))


def _seconds(result: Result, test: dict[str, Any]) -> float:
    """Of training, by a run's usual pace, which compilation has no part in."""
    return test["updates"] * result["milliseconds"] / 1e3
