"""Tables, plots and contact sheets of results.

python -m evidence.report            # all tables
python -m evidence.report --write    # also: plots and sheets, and what stands between the markers of docs/evidence.md
                                     # and, of films, docs/long.md
"""

import dataclasses
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tyro
from PIL import Image

from benchmarks import results as stored
from benchmarks.report import with_block
from benchmarks.tables import markdown
from evidence import plots
from evidence.claims import claims
from evidence.experiment import interval
from evidence.films import HISTORY_NOISE, picture_of, truth_of
from evidence.results import RESULTS, Result, by_arm, chosen_of, finished, pace, switched_of, updates_to
from evidence.watch import GRADIENT
from evidence.world import CANDIDATES
from moc_jax.sampling.pictures import save_picture

BEGIN, END = "<!-- evidence: begin -->", "<!-- evidence: end -->"
ROOT = pathlib.Path(__file__).parents[1]
PAGE, FILMS_PAGE, PICTURES = "docs/evidence.md", "docs/long.md", "docs/pictures"
TITLES = {
    "full-final": "The full world, final stories",
    "full": "The full world",
    "full-mixed-final": "The full world, learned from mixed stories, final stories",
    "full-mixed": "The full world, learned from mixed stories",
    "full-words-final": "The full world, learned from mixed stories in full words, final stories",
    "full-words": "The full world, learned from mixed stories in full words",
    "still-final": "The still world, final stories",
    "still": "The still world",
    "still-narrow-final": "The still world, a model half as wide, final stories",
    "still-narrow": "The still world, a model half as wide",
    "still-wide-final": "The still world, a model twice as wide, final stories",
    "still-wide": "The still world, a model twice as wide",
    "in-turn": "The still world, learned in turn",
    "video-final": "The video world, final stories",
    "video": "The video world",
    "long-final": "Long scenes of the full world, final stories",
    "long": "Long scenes of the full world",
    "long-still-final": "Long scenes of the still world, final stories",
    "long-still": "Long scenes of the still world",
    "small-final": "The small world, final stories",
    "small": "The small world",
}
"""Of each folder of results, in the page's order."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Where results are, and what is written of them."""

    results: pathlib.Path = RESULTS
    write: bool = False
    """Rewrite what stands between the markers of docs/evidence.md, and draw plots and sheets."""
    root: pathlib.Path = ROOT
    """The repository that --write changes."""


def main(args: Arguments) -> None:
    """Prints all tables; asked to, writes the page's block and its pictures."""
    block = page_block(args.results)
    print(block)
    if not args.write:
        return
    for name, of_page in ((PAGE, block), (FILMS_PAGE, films_block(args.results))):
        page = args.root / name
        page.write_text(with_block(page.read_text(), of_page, BEGIN, END))
    for folder in _folders(args.results):
        for name, picture in pictures(folder).items():
            save_picture(picture, args.root / PICTURES / name)
    for file in stored.load(args.results, "films"):
        shown = {name: e for name, e in file["entries"].items() if e["level"] == HISTORY_NOISE}
        names = {of: picture_of(of) for name, e in shown.items() for of in (truth_of(e), name)}
        save_picture(plots.films(args.results / "films", names), args.root / PICTURES / "films.jpg")
    for claim in claims(args.results):
        for name, picture in claim.pictures.items():
            save_picture(picture(), args.root / PICTURES / f"{name}.png")


def _folders(results: pathlib.Path) -> list[pathlib.Path]:
    return [results / name for name in TITLES if finished(results / name)]


def page_block(results: pathlib.Path) -> str:
    """What docs/evidence.md shows."""
    if not _folders(results):
        return "*Not measured yet.*"
    lines = ["## Claims and verdicts", ""]
    for claim in claims(results):
        lines += claim.lines()
    for folder in _folders(results):
        found = finished(folder)
        chosen = _chosen(folder)
        lines += [f"## {TITLES[folder.name]}", "", *_about(found), "", *main_table(chosen, found), ""]
        lines += ["P(correct) by the gap, in shots:", "", *gap_table(chosen), ""]
        for name in pictures_of(folder):
            lines += [f"![{name.rpartition('.')[0]}](pictures/{name})", ""]
        if reading := reading_table(chosen):
            lines += [
                "What a character's tokens read, the head that reads most in the right shot, and where the gradient of"
            ]
            lines += ["the error in its box lies, at the end of training:", "", *reading, ""]
        lines += ["Picks into the revealing shot, of tokens in the character's box:", "", *picks_table(chosen), ""]
        lines += ["Squared error of the velocity in the character's box, by noise level:", "", *level_table(chosen), ""]
        lines += ["Every training:", "", *trainings_table(found), ""]
        if switched := switched_table(switched_of(found)):
            lines += ["P(correct) of weights trained as one arm and switched to another:", "", *switched, ""]
    return "\n".join(lines).strip()


def films_block(results: pathlib.Path) -> str:
    """What docs/long.md shows of films."""
    lines: list[str] = []
    for file in stored.load(results, "films"):
        entries = list(file["entries"].values())
        lines += [
            "P(correct), by how many shots ago the character was revealed; and how often that shot was shown:",
            "",
        ]
        lines += [*films_table(entries, "by_gap", _recalled), ""]
        lines += [
            "Decibels of the background, against the nearest of the story's places, by shots after the reveals:",
            "",
        ]
        lines += [*films_table(entries, "background_by_shot", lambda db: f"{db:.1f}"), ""]
        lines += ["![films](pictures/films.jpg)", ""]
        commands = {f"`{e['command']}`, {e['date']}, {file['card']}, jax {e['versions']['jax']}" for e in entries}
        lines += [*(f"- {command}" for command in sorted(commands)), ""]
    return "\n".join(lines).strip() or "*Not measured yet.*"


def films_table(entries: Sequence[dict[str, Any]], what: str, cell: Callable[[Any], str]) -> list[str]:
    """A row for each memory and noise level."""
    spans = list(dict.fromkeys(span for entry in entries for span in entry[what]))
    rows = [
        [
            e["memory"] + (", final stories" if e["final"] else ""),
            f"{e['arm']}, seed {e['seed']}",
            f"{e['level']:g}",
            str(e["films"]),
            *(cell(e[what][span]) if span in e[what] else "" for span in spans),
        ]
        for e in entries
    ]
    return markdown(["shown", "trained as", "at t_c", "films", *spans], rows)


def _recalled(of: dict[str, Any]) -> str:
    return f"{_percent([of])}; {100 * of['shown']:.0f} %"


def _chosen(folder: pathlib.Path) -> list[Result]:
    """Each arm's results at its best rate, on stories for choices."""
    found, choices = finished(folder), finished(folder.with_name(folder.name.removesuffix("-final")))
    return chosen_of(found, choices or found)


def _about(found: Sequence[Result]) -> list[str]:
    first = found[0]
    commands = sorted({f"`{r['command']}`, {r['date']}, {r['device']}, jax {r['versions']['jax']}" for r in found})
    return [
        f"{first['stories']:,} stories to train on, {first['held_out']} held out; "
        f"one of {CANDIDATES} candidates by chance. "
        f"The truth moves by {first['truth_dynamic_degree']:.4f} a frame.",
        "",
        *(f"- {command}" for command in commands),
    ]


def _share(entries: Sequence[dict[str, Any]]) -> tuple[float, float, float]:
    """Of all seeds together: the share and Wilson's interval."""
    correct, trials = (sum(entry[name] for entry in entries) for name in ("correct", "trials"))
    return (correct / trials, *interval(correct, trials))


def _percent(entries: Sequence[dict[str, Any]]) -> str:
    share, low, high = _share(entries)
    return f"{100 * share:.0f} ({100 * low:.0f}..{100 * high:.0f})"


def _mean(results: Sequence[Result], name: str) -> float:
    return float(np.mean([r["test"]["all"][name] for r in results]))


def main_table(chosen: Sequence[Result], found: Sequence[Result]) -> list[str]:
    """One row per arm at its best learning rate."""
    head = ["arm", "pairs skipped", "trainings", "rate", "updates", "ms", "P(correct), %", "of each"]
    head += ["of its story, %", "updates to 50 %", "box, dB", "background, dB", "motion"]
    rates = {arm: len({r["learning_rate"] for r in rs}) for arm, rs in by_arm(found).items()}
    rows = []
    for arm, results in by_arm(chosen).items():
        tests = [r["test"]["all"] for r in results]
        reached = [updates_to(r, 0.5) for r in results]
        rows.append(
            [
                arm,
                f"{100 * results[0]['skipped']:.0f} %",
                str(len(results)),
                f"{results[0]['learning_rate']:g} of {rates[arm]}",
                _each([f"{r['updates']:,}" for r in results]),
                pace(results),
                _percent(tests),
                ", ".join(f"{100 * test['share']:.0f}" for test in tests),
                f"{100 * _mean(results, 'of_story'):.0f}",
                ", ".join("-" if n is None else f"{n:,}" for n in reached),
                f"{_mean(results, 'box_psnr'):.1f}",
                f"{_mean(results, 'background_psnr'):.1f}",
                f"{_mean(results, 'dynamic_degree'):.4f}",
            ]
        )
    return markdown(head, rows)


def _each(values: Sequence[str]) -> str:
    """One value if all are equal."""
    return ", ".join(values if len(set(values)) > 1 else values[:1])


def reading_table(chosen: Sequence[Result]) -> list[str]:
    """What a character's tokens read and what its error depends on, at the last test during training."""
    tests = {arm: [r["curve"][-1] for r in of if r["curve"]] for arm, of in by_arm(chosen).items()}
    columns = {
        "softmax in earlier shots, %": ("read", "earlier", 100),
        "in the right one, %": ("read", "reveal", 100),
        "entropy, nats": ("read", "entropy", 1),
        "gradient in earlier shots, %": ("gradient", GRADIENT[0], 100),
        "of the reveals', in the right one, %": ("gradient", GRADIENT[1], 100),
    }

    def cell(of: Sequence[dict[str, Any]], kind: str, name: str, times: int) -> str:
        found = [times * test[kind][name] for test in of if name in test.get(kind, {})]
        return f"{np.mean(found):.{0 if times > 1 else 1}f}" if found else ""

    cells = {head: [cell(of, *column) for of in tests.values()] for head, column in columns.items()}
    known = {head: of for head, of in cells.items() if any(of)}
    rows = [[arm, *row] for arm, *row in zip(tests, *known.values()) if any(row)]
    return markdown(["arm", *known], rows) if rows else []


def gap_table(chosen: Sequence[Result]) -> list[str]:
    """P(correct) of each arm, by gap."""
    gaps = sorted({gap for r in chosen for gap in r["test"]["by_gap"]}, key=int)
    rows = [
        [arm, *(_percent([r["test"]["by_gap"][gap] for r in results]) for gap in gaps)]
        for arm, results in by_arm(chosen).items()
    ]
    return markdown(["arm", *gaps], rows)


def picks_table(chosen: Sequence[Result]) -> list[str]:
    """Mean and best head of each layer at each noise level, beside chance."""
    rows = []
    for arm, results in by_arm(chosen).items():
        for levels in zip(*(r["levels"] for r in results)):
            if "into_reveal" in levels[0]:
                picks = np.mean([level["into_reveal"] for level in levels], axis=0)  # [depth, H]
                layers = (f"{100 * layer.mean():.0f} ({100 * layer.max():.0f})" for layer in picks)
                chance = f"{100 * levels[0]['into_reveal_by_chance']:.0f}"
                rows.append([arm, f"{levels[0]['level']:g}", chance, *layers])
    depth = max((len(row) for row in rows), default=3) - 3
    head = ["arm", "t", "chance, %", *(f"layer {n + 1}, % (best head)" for n in range(depth))]
    return markdown(head, rows)


def level_table(chosen: Sequence[Result]) -> list[str]:
    """Validation loss."""
    levels = [f"t = {level['level']:g}" for level in chosen[0]["levels"]]
    rows = [
        [arm, *(f"{np.mean([level['box_error'] for level in of]):.3f}" for of in zip(*(r["levels"] for r in results)))]
        for arm, results in by_arm(chosen).items()
    ]
    return markdown(["arm", *levels], rows)


def switched_table(found: Sequence[Result]) -> list[str]:
    """Weights under other arms: at once, and after some training as these."""
    rows = []
    for arm, results in by_arm(found).items():
        for other in dict.fromkeys(name for r in results for name in r["switched"]):
            tests = [r["switched"][other] for r in results if other in r["switched"]]
            tuned = [of for of in tests if "tuned" in of]
            after = [_percent([of["tuned"] for of in tuned]), f"{tuned[0]['updates']:,}"] if tuned else ["", ""]
            skipped = f"{100 * tests[0]['skipped']:.0f} %"
            rows.append([arm, other, skipped, _percent([of["zero_shot"] for of in tests]), *after])
    head = [
        "trained as",
        "tested as",
        "pairs skipped",
        "P(correct), %, at once",
        "after training as it",
        "updates of it",
    ]
    return markdown(head, rows) if rows else []


def trainings_table(found: Sequence[Result]) -> list[str]:
    """Each training, at whatever learning rate."""
    rows = []
    for arm, results in by_arm(found).items():
        for r in sorted(results, key=lambda r: (r["learning_rate"], r["seed"])):
            reached = updates_to(r, 0.5)
            half = "-" if reached is None else f"{reached:,}"
            rows.append(
                [
                    arm,
                    f"{r['learning_rate']:g}",
                    str(r["seed"]),
                    f"{r['updates']:,}",
                    _percent([r["test"]["all"]]),
                    half,
                ]
            )
    return markdown(["arm", "rate", "seed", "updates", "P(correct), %", "updates to 50 %"], rows)


def pictures_of(folder: pathlib.Path) -> list[str]:
    """Names of what `pictures` draws."""
    return [f"evidence_{folder.name}_{file}" for file in ("updates.png", "gap.png", "sheet.jpg")]


def pictures(folder: pathlib.Path) -> dict[str, Image.Image]:
    """The plots and the contact sheet of a folder of results, by file name."""
    arms = by_arm(_chosen(folder))
    drawn = (plots.over_updates(arms), plots.over_gap(arms), plots.sheet(folder, arms))
    return dict(zip(pictures_of(folder), drawn))


def run(argv: Sequence[str]) -> None:
    """The command line."""
    main(tyro.cli(Arguments, args=list(argv), description=__doc__))


if __name__ == "__main__":
    run(sys.argv[1:])
