"""Plots of a comparison's rows: one colour a method, in all of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure

from ..evaluation import mean_and_interval
from ..score_table import Row, mean_of
from .results import by_subject, ends, methods_of, where

SHOWN = ("subject", "subject_new", "context", "others", "leak", "drift")


def colours(methods: Sequence[str]) -> dict[str, Any]:
    return {method: colormaps["tab10"](i % 10) for i, method in enumerate(methods)}


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, bbox_inches="tight")


def scores(rows: Sequence[Row], path: Path, shown: Sequence[str] = SHOWN) -> None:
    """A panel a score: each method's mean with its interval, its subjects as pale dots."""
    reported = ends(rows, "report")
    names = methods_of(reported)
    figure = Figure(figsize=(11, 2 * (1.1 + 0.36 * len(names))), layout="constrained")
    axes = figure.subplots(2, 3, sharey=True)
    for axis, score in zip(axes.flat, shown):
        for y, (name, colour) in enumerate(colours(names).items()):
            values = list(by_subject(reported, name, score).values())
            mean, half = mean_and_interval(values)
            axis.plot(values, [y] * len(values), "o", ms=4, alpha=0.3, color=colour)
            axis.errorbar(mean, y, xerr=None if half != half else half, fmt="o", ms=7, color=colour, capsize=3)
        axis.set_title(score, loc="left", fontsize=10)
        axis.set_yticks(range(len(names)), names)
        axis.grid(axis="x", alpha=0.25)
        axis.spines[["top", "right", "left"]].set_visible(False)
    axes.flat[0].invert_yaxis()
    figure.suptitle("Means over subjects with 95 % confidence intervals", x=0.01, ha="left", fontsize=11)
    _save(figure, path)


def tradeoff(rows: Sequence[Row], path: Path) -> None:
    """Fidelity against what it costs: drift of other captions, and the context that the prompt asks for."""
    reported = ends(rows, "report")
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    panels = {"drift": "drift (less is better)", "context": "context right (more is better)"}
    for axis, (name, title) in zip(axes, panels.items()):
        for method, colour in colours(methods_of(reported)).items():
            own = where(reported, method=method)
            axis.plot([r[name] for r in own], [r["subject_new"] for r in own], "o", ms=4, alpha=0.25, color=colour)
            axis.plot(mean_of(own, name), mean_of(own, "subject_new"), "o", ms=10, color=colour, label=method)
        axis.set_xlabel(title)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("subject in new contexts (1 = the subject itself)")
    axes[1].legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle("A dot a run, large dots the means", x=0.01, ha="left", fontsize=11)
    _save(figure, path)


def selection(table: Sequence[Row], criterion: str, path: Path) -> None:
    """What each learning rate gives on the subjects of the selection."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    for method, colour in colours(list(dict.fromkeys(row["method"] for row in table))).items():
        own = sorted((float(r["learning rate"]), r["total"], r.get("chosen")) for r in where(table, method=method))
        axis.semilogx([o[0] for o in own], [o[1] for o in own], "o-", ms=5, color=colour, label=method)
        chosen = [o for o in own if o[2]]
        axis.plot([o[0] for o in chosen], [o[1] for o in chosen], "o", ms=12, mfc="none", mew=1.6, color=colour)
    axis.set_xlabel("learning rate")
    axis.set_ylabel(criterion)
    axis.set_title("Learning rates on the subjects of the selection; rings: chosen", loc="left", fontsize=11)
    axis.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    _save(figure, path)
