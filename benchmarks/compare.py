"""Today's figures beside the stored ones, marking each that is more than 3 % worse.

    python -m benchmarks.attention --settings multi_shot --out today
    python -m benchmarks.compare today

reads every file in `today`, finds the stored file of the same script and card and, in it, the entries of the same
names. Times, cycles and peak bytes are compared: of each, less is better. The exit status is 1 if one is marked.
Figures vary from card to card and from run to run: before a mark is believed, the base is measured again beside it.
"""

import dataclasses
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import tyro

from benchmarks import results
from benchmarks.tables import markdown
from moc_jax.reading import parse_json

# The figures of results that are costs: milliseconds, cycles and bytes.
COSTS = ("median_ms", "total_ms", "ms", "step_cycles", "peak", "total")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Which figures are compared with which."""

    today: Annotated[pathlib.Path, tyro.conf.Positional]
    """The folder that the benchmarks' --out named."""
    stored: pathlib.Path = results.FOLDER
    tolerance: float = 0.03
    """How much worse a figure may be, as a share of the stored one."""


class NothingToCompare(ValueError):
    """No figure of today has a stored one of the same name."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figure:
    """One cost, stored and today; None where it was not measured."""

    name: str  # card or chip, entry, and the path inside it
    stored: float | None
    today: float | None

    @property
    def change(self) -> float | None:
        """By what share today's is above the stored one, below 0 where it is better; None if there is no pair."""
        return None if not self.stored or self.today is None else self.today / self.stored - 1


def compare(today: pathlib.Path, stored: pathlib.Path) -> list[Figure]:
    """Every cost of today's entries and of the stored entries of the same names.

    Raises:
        NothingToCompare: there is no file of results in `today`, or none of its figures is among the stored ones.
    """
    files = sorted(today.glob("*.json"))
    if not files:
        raise NothingToCompare(f"{today} holds no results; benchmarks write them there with --out {today}")
    found: list[Figure] = []
    for path in files:
        old = _costs(stored / path.name) if (stored / path.name).exists() else {}
        for entry, costs in _costs(path).items():
            names = dict.fromkeys([*costs, *old.get(entry, {})])
            before = old.get(entry, {})
            found += [Figure(name=f"{entry}: {n}", stored=before.get(n), today=costs.get(n)) for n in names]
    if all(figure.change is None for figure in found):
        named = ", ".join(path.name for path in files)
        raise NothingToCompare(f"no figure of {named} is in {stored}: another card, or entries of other names")
    return found


def table(figures: Sequence[Figure], tolerance: float) -> list[str]:
    """Lines of markdown, with a mark at what is worse by more than `tolerance`."""
    rows = [[f.name, _number(f.stored), _number(f.today), *_verdict(f, tolerance)] for f in figures]
    return markdown(["figure", "stored", "today", "change", ""], rows)


def worse(figures: Sequence[Figure], tolerance: float) -> list[Figure]:
    """Those that are worse by more than `tolerance`."""
    return [f for f in figures if f.change is not None and f.change > tolerance]


def _costs(path: pathlib.Path) -> dict[str, dict[str, float]]:
    """Each entry's costs, by their paths in it."""
    file = parse_json(path.read_bytes())
    device = file.get("card") or file["chip"]
    return {f"{device}, {name}": dict(_leaves(entry, ())) for name, entry in file["entries"].items()}


def _leaves(value: Any, path: tuple[str, ...]) -> Iterator[tuple[str, float]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, (*path, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            label = inner.get("part", index) if isinstance(inner, dict) else index
            yield from _leaves(inner, (*path, str(label)))
    elif path and path[-1] in COSTS and isinstance(value, (int, float)):
        yield " ".join(path), float(value)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}" if value < 1e3 else f"{value:,.0f}"


def _verdict(figure: Figure, tolerance: float) -> tuple[str, str]:
    if figure.change is None:
        return "", "new" if figure.stored is None else "not measured today"
    return f"{100 * figure.change:+.1f} %", "**worse**" if figure.change > tolerance else ""


def run(argv: Sequence[str]) -> None:
    """The command line."""
    args = tyro.cli(Arguments, args=list(argv), description=__doc__)
    try:
        figures = compare(args.today, args.stored)
    except NothingToCompare as error:
        sys.exit(f"error: {error}")
    print("\n".join(table(figures, args.tolerance)))
    marked = worse(figures, args.tolerance)
    if marked:
        sys.exit(f"{len(marked)} of {len(figures)} figures are more than {100 * args.tolerance:g} % worse")


if __name__ == "__main__":
    run(sys.argv[1:])
