"""Claim f: too sparse, motion collapses."""

from collections.abc import Sequence

import numpy as np

from benchmarks.tables import markdown
from evidence.claims.worlds import Claim, Evidence, best_of, last_tests, of_one_seed, percent, plain
from evidence.results import Result

ENOUGH = 0.7  # of the best arm's motion: below it has collapsed


def sparse(worlds: Sequence[Evidence]) -> Claim:
    """The claim, a verdict for each world where anything moves."""
    rows, verdicts = [], []
    for world in worlds:
        arms, where = next(test for test in world.tests if test[0])
        some = {arm: of for arm, of in arms.items() if plain(arm)}
        truth = next((of[0]["truth_dynamic_degree"] for of in some.values()), 0.0)
        if not truth or "still" in world.world:
            continue  # nothing moves there
        found = {arm: _motion(of) for arm, of in some.items()}
        for arm, (motion, consistency) in found.items():
            cells = [percent(last_tests(some[arm])), f"{100 * motion / truth:.0f} %"]
            rows.append([where, arm, f"{100 * some[arm][0]['skipped']:.0f} %", *cells, f"{consistency:.4f}"])
        sparsest = [arm for arm in some if arm.endswith("x1")]
        if not sparsest or len(found) == len(sparsest):
            continue
        best = best_of({arm: of for arm, of in some.items() if arm not in sparsest})
        assert best is not None
        motion, consistency = found[best]
        for arm in sparsest:
            less, steadier = found[arm][0] < ENOUGH * motion, found[arm][1] > consistency
            verdict = "holds" if less and steadier else "fails"
            moved = f"{arm} moves {100 * found[arm][0] / motion:.0f} % as much as {best}"
            verdicts.append(f"{where}: **{verdict}**{of_one_seed(some[arm], some[best])}; {moved}")
    head = ["world", "arm", "pairs skipped", "P(correct), %", "motion of the truth's", "consistency"]
    says = 'Too sparse, motion collapses while "consistency" rises'
    return Claim(letter="f", says=says, table=markdown(head, rows) if rows else [], verdicts=verdicts)


def _motion(results: Sequence[Result]) -> tuple[float, float]:
    """Mean dynamic degree and consistency; NaN where a result has none."""
    motion, consistency = (
        float(np.mean([entry.get(name, np.nan) for entry in last_tests(results)]))
        for name in ("dynamic_degree", "consistency")
    )
    return motion, consistency
