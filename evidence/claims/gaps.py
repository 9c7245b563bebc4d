"""Claim c: recall does not fall with the gap."""

from collections.abc import Sequence

import numpy as np

from benchmarks.tables import markdown
from evidence import plots
from evidence.claims.worlds import (
    DENSE,
    LITTLE,
    OWN,
    Claim,
    Entries,
    Evidence,
    best_of,
    curves,
    of_one_seed,
    percent,
    pooled,
)
from evidence.results import Result

NEAR, FAR = 3, 8  # a gap is near up to the one, for recent chunks up to 1, and far from the other on
LEAST = 0.05  # a difference whose interval ends below it is not a fall


def gaps(worlds: Sequence[Evidence]) -> Claim:
    """The claim, a verdict for each world and arm."""
    rows, verdicts, pictures = [], [], {}
    for world in worlds:
        if (found := world.picking()) is None:
            continue
        arms, where = found
        best, recents = best_of(arms), [arm for arm in arms if arm.startswith("recent")]
        assert best is not None
        for arm, falls in ((best, False), *((arm, True) for arm in recents)):
            reach = 1 if falls else NEAR  # as many picks as one shot has chunks
            near, far = (_gap_entries(arms[arm], within) for within in ((1, reach), (FAR, 99)))
            if not near or not far:
                verdicts.append(f"{where}, {arm}: *not measured*, as no recall is so near, or so far")
                continue
            rows.append([where, arm, str(reach), percent(near), percent(far)])
            says = f"{where}, {arm} {'falls' if falls else 'does not fall'}{of_one_seed(arms[arm])}"
            verdict = f"**{_falls(near, far, falls)}**"
            dense = [_gap_entries(arms.get(DENSE, ()), within) for within in ((1, NEAR), (FAR, 99))]
            if not falls and all(dense):
                rows.append([where, DENSE, str(NEAR), *map(percent, dense)])
                if "fails" in verdict and _falls(dense[0], dense[1], True) == "holds":
                    verdict += ", and so does dense attention"
            verdicts.append(f"{says}: {verdict}")
        shown = curves(arms, best, *recents, DENSE, OWN)
        pictures[f"evidence_claim_c_{world.world}"] = lambda shown=shown: plots.over_gap(shown)
    head = ["world", "arm", "shots that are near", "P(correct), %, there", f"{FAR} shots away and more"]
    says = "MoC's recall does not fall with the gap; that of recent chunks does"
    return Claim(
        letter="c", says=says, table=markdown(head, rows) if rows else [], verdicts=verdicts, pictures=pictures
    )


def _gap_entries(results: Sequence[Result], within: tuple[int, int]) -> Entries:
    return [of for r in results for gap, of in r["test"]["by_gap"].items() if within[0] <= int(gap) <= within[1]]


def _falls(near: Entries, far: Entries, wanted: bool) -> str:
    """By the 95 % interval of the difference, Newcombe's of two shares."""
    (a, a_low, a_high), (b, b_low, b_high) = pooled(near), pooled(far)
    if max(a, b) < LITTLE:
        return "undecided, as too little is remembered"
    low, high = a - b - np.hypot(a - a_low, b_high - b), a - b + np.hypot(a_high - a, b - b_low)
    if low > 0 or high < LEAST:
        return "holds" if wanted == (low > 0) else "fails"
    return "undecided"
