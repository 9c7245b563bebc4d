"""Claim d: what a dense model keeps when it is switched to MoC."""

from collections.abc import Sequence

from benchmarks.tables import markdown
from evidence import plots
from evidence.claims.worlds import DENSE, LITTLE, OWN, Claim, Evidence, last_tests, of_one_seed, percent, pooled


def switches(worlds: Sequence[Evidence]) -> Claim:
    """What was found in each world; there is nothing to hold or fail."""
    rows, verdicts, pictures = [], [], {}
    for world in worlds:
        for (arms, where), switched in zip(world.tests, world.switched, strict=True):
            if not (results := [r for r in switched if r["arm"] == DENSE]):
                continue
            dense, own = pooled(last_tests(results))[0], pooled(last_tests(arms[OWN]))[0] if OWN in arms else None
            best = (-1.0, "")
            for name in dict.fromkeys(name for r in results for name in r["switched"]):
                found = [r["switched"][name] for r in results if name in r["switched"]]
                at_once, tuned = ([of[when] for of in found if when in of] for when in ("zero_shot", "tuned"))
                cells = [f"{100 * found[0]['skipped']:.0f} %", percent(at_once), percent(tuned) if tuned else ""]
                rows.append([where, name, f"{100 * dense:.0f}", *cells])
                after = pooled(tuned or at_once)[0]
                said = f"{name} has {100 * pooled(at_once)[0]:.0f} % correct at once"
                said += f" and {100 * after:.0f} % after 5 % of the updates" if tuned else ""
                if own is not None and dense > own:
                    said += f", {100 * (after - own) / (dense - own):.0f} % of dense's gain"
                best = max(best, (after, said))
            had = f"{where}{of_one_seed(results)}: dense has {100 * dense:.0f} % correct"
            little = "**undecided**, as too little is remembered; " if dense < LITTLE else ""
            verdicts.append(f"{had}; {little}best of what it is switched to, {best[1]}")
            pictures[f"evidence_claim_d_{world.world}"] = lambda results=results: plots.switched(results)
            break
    head = ["world", "switched to", "dense, %", "pairs skipped", "P(correct), %, at once", "after 5 % of the updates"]
    says = "How much of a dense model's recall comes back when it is switched to MoC"
    return Claim(
        letter="d", says=says, table=markdown(head, rows) if rows else [], verdicts=verdicts, pictures=pictures
    )
