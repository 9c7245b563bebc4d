"""Recall over updates and over the gap, and samples of all arms beside the truth."""

import io
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from evidence.experiment import interval
from evidence.results import Result, name_of
from evidence.world import CANDIDATES
from moc_jax.sampling.pictures import FAINT, INK, PAPER

Arms = Mapping[str, Sequence[Result]]
_COLOURS = "#2563c9", "#c2570c", "#2f8f6b", "#7a4fb5", "#b3263b", "#1f8ba3", "#8a6d1d", "#5c6470", "#d0559b", "#3d5a1e"
_GAP, _HEAD = 14, 26


def over_updates(arms: Arms) -> Image.Image:
    """P(correct) over updates, the seeds' mean and their range."""

    def draw(axes: Any) -> None:
        for (arm, results), colour in zip(arms.items(), _COLOURS * 2):
            length = min(len(r["curve"]) for r in results)
            updates = [test["updates"] for test in results[0]["curve"][:length]]
            shares = np.array([[100 * test["share"] for test in r["curve"][:length]] for r in results])
            axes.plot(updates, shares.mean(axis=0), color=colour, linewidth=1.8, label=arm)
            axes.fill_between(updates, shares.min(axis=0), shares.max(axis=0), color=colour, alpha=0.15, linewidth=0)
        axes.set_xlabel("updates", color=FAINT)

    return _plot(draw, "Recall over updates, each arm at its best learning rate")


def over_gap(arms: Arms) -> Image.Image:
    """P(correct) over the gap, all seeds together, with 95 % intervals."""

    def draw(axes: Any) -> None:
        for n, ((arm, results), colour) in enumerate(zip(arms.items(), _COLOURS * 2)):
            gaps = sorted(results[0]["test"]["by_gap"], key=int)
            tests = [[r["test"]["by_gap"][gap] for r in results] for gap in gaps]
            correct, trials = (np.array([sum(t[name] for t in of) for of in tests]) for name in ("correct", "trials"))
            share = 100 * correct / trials
            low, high = 100 * np.array([interval(*of) for of in zip(correct, trials)]).T
            at = np.array(list(map(int, gaps))) + 0.03 * (n - len(arms) / 2)
            axes.errorbar(
                at, share, [share - low, high - share], color=colour, linewidth=1.8, elinewidth=0.8, label=arm
            )
        axes.set_xlabel("shots since the reveal", color=FAINT)

    return _plot(draw, "Recall over the gap")


def _plot(draw: Any, title: str) -> Image.Image:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.2, 4.4), dpi=160, layout="constrained", facecolor=PAPER)
    draw(axes)
    axes.axhline(100 / CANDIDATES, color=FAINT, linestyle=":", linewidth=1)
    axes.set_ylim(0, 100)
    axes.set_ylabel("correct, %; dotted: chance", color=FAINT)
    axes.set_facecolor(PAPER)
    axes.grid(visible=True, color="#e4e4e8", linewidth=0.8)
    axes.tick_params(colors=FAINT, length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.set_title(title, loc="left", fontsize=10, color=INK)
    axes.legend(frameon=False, fontsize=8, labelcolor=INK, loc="upper left", bbox_to_anchor=(1, 1))
    written = io.BytesIO()
    figure.savefig(written, format="png")
    pyplot.close(figure)
    return Image.open(written)


def sheet(folder: pathlib.Path, arms: Arms) -> Image.Image:
    """The truth's recalls of some stories, a row each, and beside them what each arm's first seed sampled."""
    files = {"truth": "truth"} | {arm: name_of(arm, rs[0]["learning_rate"], rs[0]["seed"]) for arm, rs in arms.items()}
    strips = {title: Image.open(folder / f"{name}.jpg").convert("RGB") for title, name in files.items()}
    width, height = strips["truth"].size
    picture = Image.new("RGB", ((width + _GAP) * len(strips) + _GAP, height + _HEAD + _GAP), PAPER)
    draw = ImageDraw.Draw(picture)
    for n, (title, strip) in enumerate(strips.items()):
        left = _GAP + n * (width + _GAP)
        draw.text((left, 8), title, INK)
        picture.paste(strip, (left, _HEAD))
    return picture
