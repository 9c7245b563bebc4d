"""Claim e: routes find the shot that showed the character."""

from collections.abc import Sequence

import numpy as np

from benchmarks.tables import markdown
from evidence import plots
from evidence.claims.worlds import Claim, Evidence, best_of, compared, last_tests, of_one_seed, percent, plain
from evidence.results import Result

FOUND = 2.0  # times chance from which on a head's picks are said to find the shot


def routes(worlds: Sequence[Evidence]) -> Claim:
    """The claim, a verdict for each world, and one for each arm that is meant to find more."""
    rows, verdicts, pictures = [], [], {}
    for world in worlds:
        if (found := world.picking()) is None:
            continue
        arms, where = found
        best = best_of(arms)
        assert best is not None
        shown = {(arm, where): results for arm, results in arms.items()}
        others, elsewhere = world.tests[-1]  # changed arms are compared on the stories for choices alone
        shown |= {(arm, elsewhere): results for arm, results in others.items() if arm not in arms}
        for (arm, of), results in shown.items():
            if not arm.startswith("moc") or "into_reveal" not in results[0]["levels"][-1]:
                continue
            picks = np.mean([r["levels"][-1]["into_reveal"] for r in results], axis=0)  # [depth, H]
            layer, head = np.unravel_index(np.argmax(picks), picks.shape)
            chance = results[0]["levels"][-1]["into_reveal_by_chance"]
            begin = ", ".join("-" if n is None else f"{n:,}" for n in (_found_from(r, chance) for r in results))
            place = f"layer {layer + 1}, head {head + 1}"
            cells = [percent(last_tests(results)), f"{100 * results[0]['skipped']:.0f} %", f"{100 * chance:.0f}"]
            rows.append([of, arm, *cells, f"{100 * picks.max():.0f}", place, begin])
            if (arm, of) == (best, where):
                verdict = "holds" if picks.max() >= FOUND * chance else "fails"
                since = f", first after {begin} updates, {place}" if verdict == "holds" else ""
                verdicts.append(f"{of}, routes of {arm} find the shot{of_one_seed(results)}: **{verdict}**{since}")
            elif _mends(arm, best) and best in (against := arms if of == where else others):
                verdict = compared(last_tests(results), last_tests(against[best]))
                seeds = of_one_seed(results, against[best])
                verdicts.append(f"{of}, {arm} is better than {best}{seeds}: **{verdict}**")
        for arm in filter(plain, arms):
            if (random := arm.replace("moc", "random")) in arms:
                verdict = compared(last_tests(arms[arm]), last_tests(arms[random]))
                seeds = of_one_seed(arms[arm], arms[random])
                verdicts.append(f"{where}, {arm} is better than as many random chunks{seeds}: **{verdict}**")
        shown = {arm: of for arm, of in arms.items() if plain(arm) or arm.startswith("random")}
        pictures[f"evidence_claim_e_{world.world}"] = lambda shown=shown: plots.picks(shown)
    head = ["world", "arm", "P(correct), %", "pairs skipped", "picks in the right shot by chance, %", "best head, %"]
    head += ["which", f"{FOUND:g} times chance first after (updates)"]
    says = "Routes find the shot that showed the character"
    return Claim(
        letter="e", says=says, table=markdown(head, rows) if rows else [], verdicts=verdicts, pictures=pictures
    )


def _mends(arm: str, best: str) -> bool:
    """Whether it is meant to make routes better: smaller chunks, a shot's first frame, more descriptors, a schedule."""
    size = int(best.split()[1].split("x")[0])
    changed = any(how in arm for how in ("first frame", "descriptors", "shrinking"))
    return changed or (plain(arm) and int(arm.split()[1].split("x")[0]) < size)


def _found_from(result: Result, chance: float) -> int | None:
    """Updates until a head's picks first lay in the right shot `FOUND` times as often as by chance."""
    tests = (test for test in result["curve"] if "into_reveal" in test)
    return next((test["updates"] for test in tests if np.max(test["into_reveal"]) >= FOUND * chance), None)
