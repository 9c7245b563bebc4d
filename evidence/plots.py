"""Recall over updates and over the gap, and samples of all arms beside the truth."""

import io
import pathlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
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
    """P(correct) over updates, of each training."""
    return _over(
        arms, "updates", lambda result, test: test["updates"], "Recall over updates, at the best learning rate"
    )


def over_flops(arms: Arms) -> Image.Image:
    """The same over what was paid for attention."""

    def paid(result: Result, test: dict[str, Any]) -> float:
        return test["updates"] * result["attention_flops"] / result["dense_flops"]

    return _over(arms, "attended FLOPs, in updates of dense attention", paid, "Recall over attended FLOPs")


def over_seconds(arms: Arms) -> Image.Image:
    """The same over the time that training takes, without compilation and tests."""

    def paid(result: Result, test: dict[str, Any]) -> float:
        return test["updates"] * result["milliseconds"] / 1e3

    return _over(arms, "seconds of training", paid, "Recall over seconds")


def reading(arms: Arms) -> Image.Image:
    """The share of its softmax that the best head of a character's tokens has in the right shot, over updates."""

    def value(test: dict[str, Any]) -> float:
        return 100 * test["read"]["reveal"] if "read" in test else np.nan

    title = "Attention of a character's tokens"
    label = "in the right shot, best head, %"
    return _over(arms, "updates", lambda result, test: test["updates"], title, value, label=label, dotted=None)


def picks(arms: Arms) -> Image.Image:
    """The share of its picks that the best head of a character's tokens has in the right shot, over updates."""

    def value(test: dict[str, Any]) -> float:
        return 100 * float(np.max(test["into_reveal"])) if "into_reveal" in test else np.nan

    chance = [of[0]["levels"][-1].get("into_reveal_by_chance") for of in arms.values()]
    dotted = next((100 * share for share in chance if share), None)
    title, label = "Picks of a character's tokens", "in the right shot, best head, %; dotted: chance"
    return _over(arms, "updates", lambda result, test: test["updates"], title, value, label=label, dotted=dotted)


def switched(results: Sequence[Result]) -> Image.Image:
    """P(correct) of dense weights as MoC over the pairs skipped, at once and after some training; dashed: as dense."""

    def draw(axes: Any) -> None:
        names = dict.fromkeys(name for r in results for name in r["switched"])
        for when, colour, label in (("zero_shot", _COLOURS[0], "at once"), ("tuned", _COLOURS[1], "after 5 % more")):
            for name in names:
                found = [r["switched"][name] for r in results if when in r["switched"].get(name, {})]
                if not found:
                    continue
                share, low, high = _pooled([of[when] for of in found])
                at = 100 * found[0]["skipped"]
                axes.errorbar(at, share, [[share - low], [high - share]], color=colour, marker="o", label=label)
                axes.annotate(name, (at, share), textcoords="offset points", xytext=(5, 5), fontsize=7, color=FAINT)
                label = None  # one entry in the legend
        axes.axhline(_pooled([r["test"]["all"] for r in results])[0], color=FAINT, linestyle="--", linewidth=1)
        axes.set_xlabel("pairs skipped, %; dashed: dense", color=FAINT)

    return _plot(draw, "A dense model, switched")


def _pooled(entries: Sequence[dict[str, Any]]) -> tuple[float, float, float]:
    """Share and interval of all seeds together, in percent."""
    correct, trials = (sum(entry[name] for entry in entries) for name in ("correct", "trials"))
    low, high = interval(correct, trials)
    return 100 * correct / trials, 100 * low, 100 * high


def _share(test: dict[str, Any]) -> float:
    return 100 * test["share"]


def _over(
    arms: Arms,
    over: str,
    at: Callable[[Result, dict[str, Any]], float],
    title: str,
    value: Callable[[dict[str, Any]], float] = _share,
    **how: Any,
) -> Image.Image:
    """A line for each training: recall comes at once, and means of several would hide that."""

    def draw(axes: Any) -> None:
        for (arm, results), colour in zip(arms.items(), _COLOURS * 2):
            for n, result in enumerate(results):
                places, values = ([of(test) for test in result["curve"]] for of in (partial(at, result), value))
                axes.plot(places, values, color=colour, linewidth=1.4, alpha=0.85, label=None if n else arm)
        axes.set_xlabel(over, color=FAINT)

    return _plot(draw, title, **how)


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


def _plot(
    draw: Any, title: str, label: str = "correct, %; dotted: chance", dotted: float | None = 100 / CANDIDATES
) -> Image.Image:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.2, 4.4), dpi=160, layout="constrained", facecolor=PAPER)
    draw(axes)
    if dotted is not None:
        axes.axhline(dotted, color=FAINT, linestyle=":", linewidth=1)
    axes.set_ylim(0, 100)
    axes.set_ylabel(label, color=FAINT)
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
    return _beside({title: Image.open(folder / f"{name}.jpg").convert("RGB") for title, name in files.items()})


def films(folder: pathlib.Path, names: dict[str, str]) -> Image.Image:
    """The middle frames of a film's shots, 16 in a row, below each other for each of `names`: title -> file."""
    strips = {title: Image.open(folder / f"{name}.jpg").convert("RGB") for title, name in names.items()}
    width, height = max(of.width for of in strips.values()), sum(of.height + _HEAD for of in strips.values())
    picture = Image.new("RGB", (width + 2 * _GAP, height), PAPER)
    draw, top = ImageDraw.Draw(picture), 0
    for title, strip in strips.items():
        draw.text((_GAP, top + 8), title, INK)
        picture.paste(strip, (_GAP, top + _HEAD))
        top += strip.height + _HEAD
    return picture


def _beside(strips: dict[str, Image.Image]) -> Image.Image:
    width, height = next(iter(strips.values())).size
    picture = Image.new("RGB", ((width + _GAP) * len(strips) + _GAP, height + _HEAD + _GAP), PAPER)
    draw = ImageDraw.Draw(picture)
    for n, (title, strip) in enumerate(strips.items()):
        left = _GAP + n * (width + _GAP)
        draw.text((left, 8), title, INK)
        picture.paste(strip, (left, _HEAD))
    return picture
