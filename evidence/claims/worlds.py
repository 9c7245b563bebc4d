"""What claims have in common: the results of a world, shares of correct answers and how two are compared."""

import dataclasses
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from PIL import Image

from evidence.experiment import interval
from evidence.results import Result, by_arm, chosen_of, finished, switched_of

WORLDS = ("full", "full-mixed", "still", "video")
SIZES = ("still-narrow", "still-wide")
"""The still world with other models."""
LONG = ("long", "long-still")
LITTLE = 0.25
"""Who remembers the story's four, but not which is which, has as many answers right by chance."""
DENSE, OWN = "dense", "own shot"
Arms = Mapping[str, Sequence[Result]]
Entries = Sequence[dict[str, Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Claim:
    """One of them, and what came of it."""

    letter: str
    says: str
    table: list[str]
    verdicts: list[str]
    pictures: dict[str, Callable[[], Image.Image]] = dataclasses.field(default_factory=dict)

    def lines(self) -> list[str]:
        """As the page shows it."""
        verdicts = self.verdicts or ["*not measured*"]
        found = [f"### {self.letter}. {self.says}", "", *(f"- {verdict}" for verdict in verdicts), ""]
        found += [*self.table, ""] if self.table else []
        for name in self.pictures if self.verdicts else ():
            found += [f"![{name}](pictures/{name}.png)", ""]
        return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evidence:
    """The results of one world, each arm at its best learning rate by the stories for choices."""

    world: str
    final: Arms
    choices: Arms
    switched: tuple[Sequence[Result], Sequence[Result]]
    """Of `tests`, the trainings whose weights were switched to other arms."""

    @property
    def tests(self) -> tuple[tuple[Arms, str], ...]:
        """Results on the final stories, then on those for choices, and words that say which."""
        return (self.final, self.world), (self.choices, f"{self.world}, stories for choices")

    def picking(self, *arms: str) -> tuple[Arms, str] | None:
        """The first of `tests` in which all these arms have results, and some plain MoC."""
        for test in self.tests:
            if any(map(plain, test[0])) and all(arm in test[0] for arm in arms):
                return test
        return None


def evidence(results: pathlib.Path, worlds: Sequence[str]) -> list[Evidence]:
    """Of the worlds that have results."""
    found = []
    for world in worlds:
        choices, final = (finished(results / f"{world}{of}") for of in ("", "-final"))
        if choices or final:
            found.append(
                Evidence(
                    world=world,
                    final=by_arm(chosen_of(final, choices or final)),
                    choices=by_arm(chosen_of(choices, choices)),
                    switched=(switched_of(final), switched_of(choices)),
                )
            )
    return found


def plain(arm: str) -> bool:
    """Whether an arm is MoC with nothing changed."""
    return re.fullmatch(r"moc \d+x\d+", arm) is not None


def last_tests(results: Sequence[Result]) -> Entries:
    """All seeds' answers after training."""
    return [r["test"]["all"] for r in results]


def pooled(entries: Entries) -> tuple[float, float, float]:
    """The share of correct answers of all seeds together, and its interval."""
    correct, trials = (sum(entry[name] for entry in entries) for name in ("correct", "trials"))
    return (correct / trials, *interval(correct, trials))


def percent(entries: Entries) -> str:
    """The same in words."""
    return "{:.0f} ({:.0f}..{:.0f})".format(*(100 * of for of in pooled(entries)))


def above(a: Entries, b: Entries) -> bool:
    """Whether `a` is above `b`: their intervals lie apart, and every seed of `a` is above every one of `b`."""
    shares = [[entry["correct"] / entry["trials"] for entry in of] for of in (a, b)]
    return pooled(a)[1] > pooled(b)[2] and min(shares[0]) > max(shares[1])


def compared(a: Entries, b: Entries) -> str:
    """The verdict on `a` being above `b`."""
    return "holds" if above(a, b) else "fails" if above(b, a) else "undecided"


def of_one_seed(*arms: Sequence[Result]) -> str:
    """What to say behind a verdict that one of these arms has only one seed for."""
    seeds = [{result["seed"] for result in results} for results in arms]
    if min(map(len, seeds)) > 1:
        return ""
    return ", of one seed" if all(of == seeds[0] for of in seeds) else ", of one seed, not the same"


def best_of(arms: Arms, least_skipped: float = 0.0) -> str | None:
    """The plain MoC arm with most correct answers of those that leave out so much."""
    fit = [arm for arm, of in arms.items() if plain(arm) and of[0]["skipped"] >= least_skipped]
    return max(fit, key=lambda arm: pooled(last_tests(arms[arm]))[0], default=None)


def curves(arms: Arms, *names: str) -> dict[str, Sequence[Result]]:
    """Of these arms, those that have results."""
    return {name: arms[name] for name in names if name in arms}
