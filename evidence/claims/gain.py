"""Claim a: with most pairs skipped MoC keeps nearly all of what dense attention gains, and has it sooner."""

from collections.abc import Sequence

import numpy as np

from benchmarks.tables import markdown
from evidence import plots
from evidence.claims.worlds import (
    DENSE,
    OWN,
    Arms,
    Claim,
    Evidence,
    best_of,
    curves,
    last_tests,
    of_one_seed,
    percent,
    plain,
    pooled,
)
from evidence.results import Result, updates_to

ENOUGH_SKIPPED, ENOUGH_KEPT = 0.85, 0.95


def gain(worlds: Sequence[Evidence]) -> Claim:
    """The claim, a verdict for each world."""
    rows, verdicts, pictures = [], [], {}
    for world in worlds:
        if (found := world.picking(DENSE, OWN)) is None:
            continue
        arms, where = found
        dense, own = (pooled(last_tests(arms[name])) for name in (DENSE, OWN))
        for arm in filter(plain, arms):
            share, reached = pooled(last_tests(arms[arm]))[0], _reached(arms[arm])
            kept = (
                f"{100 * (share - own[0]) / (dense[0] - own[0]):.0f} %" if dense[1] > own[2] else "dense gains nothing"
            )
            cells = [
                f"{100 * arms[arm][0]['skipped']:.0f} %",
                *(percent(last_tests(arms[n])) for n in (arm, DENSE, OWN)),
            ]
            rows.append([where, arm, *cells, kept, reached, _reached(arms[DENSE])])
        bests = [*dict.fromkeys(filter(None, (best_of(arms), best_of(arms, ENOUGH_SKIPPED))))]
        for best in bests:
            skipped = f"{100 * arms[best][0]['skipped']:.0f} % skipped{of_one_seed(arms[best], arms[DENSE])}"
            verdicts.append(f"{where}, {skipped}: {_kept(arms, best)}; {_sooner(arms, best)}")
        shown = curves(arms, DENSE, *bests, OWN)
        pictures[f"evidence_claim_a_{world.world}"] = lambda shown=shown: plots.over_updates(shown)
        if any("read" in test for of in shown.values() for result in of for test in result["curve"]):
            pictures[f"evidence_claim_a_reading_{world.world}"] = lambda shown=shown: plots.reading(shown)
    head = ["world", "arm", "pairs skipped", "P(correct), %", "dense", "own shot", "of dense's gain"]
    head += ["updates to 50 %", "dense's"]
    says = "With most pairs skipped, MoC keeps nearly all of dense's gain, and has half of it sooner"
    return Claim(
        letter="a", says=says, table=markdown(head, rows) if rows else [], verdicts=verdicts, pictures=pictures
    )


def _kept(arms: Arms, arm: str) -> str:
    (share, low, high), dense, own = (pooled(last_tests(arms[name])) for name in (arm, DENSE, OWN))
    wanted = own[0] + ENOUGH_KEPT * (dense[0] - own[0])
    if max(low, dense[1]) <= own[2]:
        return "**undecided**, as neither has learned to remember"
    verdict = "fails" if high < wanted else "holds" if low >= wanted else "undecided"
    return f"**{verdict}** by {arm}: {100 * share:.0f} % of answers correct, dense {100 * dense[0]:.0f} %"


def _reached(results: Sequence[Result]) -> str:
    return ", ".join("-" if n is None else f"{n:,}" for n in (updates_to(r, 0.5) for r in results))


def _sooner(arms: Arms, arm: str) -> str:
    mine, dense = ([updates_to(r, 0.5) for r in arms[name]] for name in (arm, DENSE))
    reached, others = [n for n in mine if n], [n for n in dense if n]
    if not reached and not others:
        return "sooner: **undecided**, as neither reaches P = 0.5"
    if len(reached) == len(mine) and (not others or max(reached) < min(others)):
        than = (
            f"{np.mean(others) / np.mean(reached):.1f} times as many" if len(others) == len(dense) else "more than its"
        )
        return f"sooner: **holds**, dense takes {than} updates"
    if len(others) == len(dense) and (not reached or max(others) <= min(reached)):
        return "sooner: **fails**"
    return "sooner: **undecided**, as trainings disagree"
