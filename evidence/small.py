"""Recall in minutes on two cores: MoC must remember, and a shot that sees itself alone must not.

python -m evidence.small

Both arms are trained side by side on the small world. It fails unless the lower bound of MoC's 95 % interval lies above
chance and that of the own shot alone does not.
"""

import dataclasses
import pathlib
import sys
from collections.abc import Sequence

import tyro

from evidence.results import Result, finished
from evidence.run import side_by_side
from evidence.stories import CANDIDATES

ARMS = MOC, OWN = "moc 4x2", "own shot"
RATE = 6e-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Where its files are."""

    out: pathlib.Path = pathlib.Path("out/evidence")
    """Results; what is there already is not done again."""
    cache: pathlib.Path = pathlib.Path("cache/evidence")
    """Encoded stories."""


def main(args: Arguments) -> str | None:
    """Trains what has no result yet; what is wrong with the results, or None."""
    argv = [
        "--setting=small",
        f"--out={args.out}",
        f"--cache={args.cache}",
        f"--learning-rates={RATE}",
        "--processes=2",
        "--minutes=60",  # the setting's updates, however slow the machine
        "--backend=reference",  # on a processor, for so few tokens, twice as fast as plain XLA
    ]
    if wrong := side_by_side([*argv, "--arms", *ARMS], [{"JAX_PLATFORMS": "cpu"}] * 2):
        return wrong
    by_arm = {result["arm"]: result for result in finished(args.out / "small")}
    if left := [arm for arm in ARMS if arm not in by_arm]:
        return f"{', '.join(left)}: no result in {args.out / 'small'}; another process may be at work on it"
    for arm in ARMS:
        test = by_arm[arm]["test"]["all"]
        print(f"{arm}: P(correct) {test['share']:.2f}, 95 % interval {test['low']:.2f}..{test['high']:.2f}")
    return verdict(by_arm[MOC], by_arm[OWN])


def verdict(moc: Result, own: Result) -> str | None:
    """What is wrong with the two results; None if they are as they should be."""
    chance = 1 / CANDIDATES
    if moc["test"]["all"]["low"] <= chance:
        return f"MoC's interval reaches down to chance, {chance}: it did not remember"
    if own["test"]["all"]["low"] > chance:
        return f"the own shot alone is above chance, {chance}: something but memory tells the looks"
    return None


def run(argv: Sequence[str]) -> None:
    """The command line."""
    sys.exit(main(tyro.cli(Arguments, args=list(argv), description=__doc__)))


if __name__ == "__main__":
    run(sys.argv[1:])
