"""Tables and plot of the committed results.

python -m benchmarks.report            # all tables
python -m benchmarks.report --write    # also: the plot, and what stands between the markers of README and docs
"""

import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import tyro

from benchmarks import results
from benchmarks.several import several_table
from benchmarks.tables import (
    attention_tables,
    estimate_parts_table,
    estimate_table,
    model_tables,
    quoted_table,
    schedule_best_table,
    schedule_table,
    separated,
    short_table,
    summary_table,
    traffic_table,
)

BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
ROOT = pathlib.Path(__file__).parents[1]
README, PAGE, PLOT = "README.md", "docs/performance.md", "docs/pictures/scaling.png"
_INK, _MUTED, _DENSE = "#1b1b1f", "#6b6b76", "#c2570c"
_MOC = "#2563c9", "#7a4fb5", "#2f8f6b"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Where results are, and what is written of them."""

    results: pathlib.Path = results.FOLDER
    write: bool = False
    """Rewrite what stands between the markers of README.md and docs/performance.md, and draw the plot."""
    root: pathlib.Path = ROOT
    """The repository that --write changes."""


def main(args: Arguments) -> None:
    """Prints all tables; asked to, writes the README's and the page's blocks and the plot."""
    print(report(args.results))
    if not args.write:
        return
    draw(args.results, args.root / PLOT)
    for name, block in blocks(args.results).items():
        file = args.root / name
        file.write_text(with_block(file.read_text(), block))


def blocks(folder: pathlib.Path) -> dict[str, str]:
    """What the committed results say, by the file that shows it."""
    return {README: readme_block(folder), PAGE: page_block(folder)}


def report(folder: pathlib.Path) -> str:
    """Everything measured, in markdown, each table with its commands, date and versions."""
    lines = []
    for script, tables in (("attention", attention_tables), ("model", model_tables)):
        for file in results.load(folder, script):
            entries = list(file["entries"].values())
            lines += [f"## {script}: {file['card']}", "", *tables(entries), "", *_provenance(entries), ""]
    schedules, estimates = (results.load(folder, f"tpu_{name}") for name in ("schedule", "estimate"))
    if schedules:
        tables = separated([schedule_best_table(schedules), schedule_table(schedules)])
        lines += ["## TPUs, by the compiler's schedule", "", *tables, "", *_provenance_of_files(schedules), ""]
    if estimates:
        tables = separated([estimate_table(estimates), *map(estimate_parts_table, estimates)])
        lines += ["## TPUs, the whole operation, estimated", "", *tables, "", *_provenance_of_files(estimates), ""]
    if steps := results.load(folder, "tpu_step"):
        lines += [
            "## TPUs, a layer of a training step",
            "",
            *traffic_table(steps),
            "",
            *_provenance_of_files(steps),
            "",
        ]
    return "\n".join(lines)


def readme_block(folder: pathlib.Path) -> str:
    """What the README shows: the largest setting and the model's steps."""
    attention, model = (results.load(folder, script) for script in ("attention", "model"))
    return "\n".join(summary_table(attention, model)) or "*Not measured yet.*"


def page_block(folder: pathlib.Path) -> str:
    """What docs/performance.md shows: every setting, the plot, the model's steps, and TPUs."""
    lines = []
    for file in results.load(folder, "attention"):
        entries = list(file["entries"].values())
        settings = [e for e in entries if "points" not in e]
        if settings:
            tables = separated([short_table(settings), quoted_table(settings)])
            lines += [
                f"## One layer's attention on one {file['card']}",
                "",
                "Random routes: queries agree on nothing. Correlated ones: neighbors pick alike, as in video.",
                "",
                *tables,
                "",
            ]
        if len(settings) < len(entries):
            lines += [f"![Time against tokens, MoC and dense]({PLOT.removeprefix('docs/')})", ""]
        lines += [*_provenance(entries), ""]
    for file in results.load(folder, "model"):
        entries = list(file["entries"].values())
        lines += [f"## A whole model on one {file['card']}", "", *model_tables(entries), "", *_provenance(entries), ""]
    lines += [*_several_block(folder), *_tpu_block(folder)]
    return "\n".join(lines).strip() or "*Not measured yet.*"


def _several_block(folder: pathlib.Path) -> list[str]:
    """What the page shows of several GPUs."""
    lines: list[str] = []
    plans = {file["chip"]: file["entries"] for file in results.load(folder, "plan")}
    for file in results.load(folder, "scaling"):
        lines += [
            f"## Several {file['card']}s",
            "",
            "A training step of one scene over all GPUs (`context`), by groups of heads x groups of tokens, of a scene"
            " on each (`fsdp`), of one scene four times as long (`long`); and a call of the model (`sampling`). 3.1 B"
            " parameters, 180,504 tokens a scene. Collectives: for how long any ran on the first GPU, and how long"
            " alone. Beside it what `moc-plan` says, and for numbers of GPUs that were not measured that alone.",
            "",
            *several_table(file["entries"], plans.get(file["card"], {})),
            "",
            *_provenance(list(file["entries"].values())),
            "",
        ]
    return lines


def _tpu_block(folder: pathlib.Path) -> list[str]:
    """What the page shows of TPUs."""
    lines: list[str] = []
    estimates, schedules = (results.load(folder, f"tpu_{name}") for name in ("estimate", "schedule"))
    if estimates:
        lines += [
            "## One layer's attention on TPUs",
            "",
            "180,504 tokens, random routes, **estimated** by the compiler's schedule; no TPU was at hand:",
            "",
            *estimate_table(estimates),
            "",
            *_provenance_of_files(estimates),
            "",
        ]
    if schedules:
        sizes = [(kernel, 1024, 1024) for kernel in ("anchors", "picks")]
        lines += [
            "## The kernels for TPUs, by the compiler's schedule",
            "",
            "Each kernel's tile beside splash attention's in blocks of the same rows, and a step's cycles per 2^20"
            " pairs where they are fewest, of both kernels weighed by the pairs of the scene above:",
            "",
            *separated([schedule_table(schedules, sizes), schedule_best_table(schedules)]),
            "",
            *_provenance_of_files(schedules),
            "",
        ]
    return lines


def _provenance_of_files(files: Sequence[dict[str, Any]]) -> list[str]:
    return _provenance([entry for file in files for entry in file["entries"].values()])


def with_block(text: str, block: str, begin: str = BEGIN, end: str = END) -> str:
    """`text` with `block` between its markers.

    Raises:
        ValueError: the markers are not there, once and in order.
    """
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"the file must hold {begin} once and, after it, {end} once")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{block}\n{end}{rest.split(end)[1]}"


def draw(folder: pathlib.Path, path: pathlib.Path) -> pathlib.Path | None:
    """Time against tokens as a picture; None if scaling was not measured."""
    found = [(file["card"], e) for file in results.load(folder, "attention") for e in file["entries"].values()]
    series = [(card, entry) for card, entry in found if "points" in entry]
    if not series:
        return None
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.2, 4.4), dpi=200, layout="constrained")
    for (card, entry), colour in zip(series, _MOC * len(series)):
        points, several = entry["points"], len(series) > 1
        if (card, entry) == next(s for s in series if s[0] == card):
            _series(axes, points, "dense", "dense attention" + (f", {card}" if several else ""), _DENSE)
        _series(axes, points, "moc", "MoC" + (f" ({entry['backend']}), {card}" if several else ""), colour)
    _axes(axes, *series[0], several=len({card for card, _ in series}) > 1)
    figure.savefig(path)
    pyplot.close(figure)
    return path


def _series(axes: Any, points: Sequence[dict[str, Any]], name: str, label: str, colour: str) -> None:
    """One line with its name at its end; MoC's points say how much faster than dense they are."""
    there = [p for p in points if name in p]
    if not there:
        return
    tokens, times = [p["tokens"] for p in there], [p[name]["median_ms"] for p in there]
    axes.plot(tokens, times, "o-", color=colour, linewidth=2, markersize=5)
    if name == "dense":  # where it was not measured, by its pairs
        last, rest = there[-1], [p for p in points if p["tokens"] > tokens[-1]]
        grown = [times[-1] * p["pairs"]["dense"] / last["pairs"]["dense"] for p in rest]
        axes.plot([tokens[-1], *(p["tokens"] for p in rest)], [times[-1], *grown], ":", color=colour, linewidth=2)
    place = {"textcoords": "offset points", "color": colour}
    ratios = [
        p["dense"]["median_ms"] / p["moc"]["median_ms"] if name == "moc" and "dense" in p else None for p in there
    ]
    for x, y, ratio in zip(tokens, times, ratios):
        if ratio is not None:
            axes.annotate(f"{ratio:.1f}x", (x, y), xytext=(6, -12), fontsize=8, **place)
    offset = (-10, 0) if name == "dense" else (-2, -20)
    axes.annotate(label, (tokens[-1], times[-1]), xytext=offset, ha="right", va="center", weight="bold", **place)


def _axes(axes: Any, card: str, entry: dict[str, Any], *, several: bool) -> None:
    points = entry["points"]
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks([p["tokens"] for p in points], [f"{_short(p['tokens'])}\n{p['shots']}" for p in points])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(lambda ms, _: f"{ms / 1e3:g} s" if ms >= 1e3 else f"{ms:g} ms")
    axes.set_xlabel(
        "tokens, and shots; at the points: how many times as fast as dense; dotted: extrapolated", color=_MUTED
    )
    axes.grid(visible=True, color="#e4e4e8", linewidth=0.8)
    axes.tick_params(colors=_MUTED, length=0)
    axes.margins(y=0.12)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    where = "" if several else f", one {card}"
    title = f"One layer's attention, forward: {entry['heads']} heads of {entry['head_dim']}, bfloat16{where}"
    axes.set_title(title, loc="left", fontsize=10, color=_INK)


def _short(tokens: int) -> str:
    return f"{tokens / 1e6:.2f}M" if tokens >= 1e6 else f"{tokens / 1e3:.0f}k"


def _provenance(entries: Sequence[dict[str, Any]]) -> list[str]:
    """One line per command and date."""
    seen: dict[tuple[str, str], dict[str, str]] = {}
    for entry in entries:
        seen.setdefault((entry["command"], entry["date"]), entry["versions"])
    shown = ("jax", "libtpu", "driver")
    return [
        f"- `{command}`, {date}" + "".join(f", {name} {versions[name]}" for name in shown if name in versions)
        for (command, date), versions in seen.items()
    ]


def run(argv: Sequence[str]) -> None:
    """The command line."""
    main(tyro.cli(Arguments, args=list(argv), description=__doc__))


if __name__ == "__main__":
    run(sys.argv[1:])
