"""Plots of a comparison's rows. A method has the same colour in all of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from finetuning.evaluation.score_table import Row, mean_of
from finetuning.evaluation.statistics import mean_and_interval
from finetuning.studies.comparison.results import BASE, LESS_IS_BETTER, by_subject, ends, methods_of, over, where

SHOWN = ("subject", "subject_new", "context", "others", "leak", "drift")
FAR = ("subject", "subject_new")  # scores for which a line of the base model would squeeze all differences
NAMES = {
    "subject": "subject: likeness to it (1 = itself)",
    "subject_new": "subject in new contexts (1 = itself)",
    "context": "context right",
    "others": "other captions right",
    "leak": "leak into the class",
    "drift": "drift of other captions",
    "prior_attributes": "drift of the class: attributes",
    "prior_features": "drift of the class: features",
}
DIRECTIONS = {"context": ", more is better", "others": ", more is better"} | dict.fromkeys(
    LESS_IS_BETTER, ", less is better"
)


def colours(rows: Sequence[Row]) -> dict[str, Any]:
    """A colour for each method, by the order of the methods in all rows of a comparison."""
    return {method: colormaps["tab10"](i % 10) for i, method in enumerate(methods_of(rows))}


def scores(rows: Sequence[Row], path: Path, shown: Sequence[str] = SHOWN) -> None:
    """A panel for each score: means of methods with intervals, subjects as pale dots, the base model as a line."""
    reported, colour = ends(rows, "report"), colours(rows)
    names = methods_of(reported)
    figure = Figure(figsize=(11, 2 * (1.1 + 0.3 * len(names))), layout="constrained")
    axes = figure.subplots(2, 3, sharey=True)
    for axis, score in zip(axes.flat, shown):
        for y, name in enumerate(names):
            values = list(by_subject(reported, name, score).values())
            mean, half = mean_and_interval(values)
            axis.plot(values, [y] * len(values), "o", ms=4, alpha=0.3, color=colour[name])
            axis.errorbar(mean, y, xerr=None if half != half else half, fmt="o", ms=7, color=colour[name], capsize=3)
        if score not in FAR and (base := where(rows, phase="report", method=BASE)):
            axis.axvline(mean_of(base, score), color="0.5", lw=1, ls=":")
        axis.set_title(f"{NAMES.get(score, score)}{DIRECTIONS.get(score, '')}", loc="left", fontsize=10)
        axis.set_yticks(range(len(names)), names)
        _plain(axis, "x")
    axes.flat[0].invert_yaxis()
    title = "Means over subjects with 95 % confidence intervals; pale: subjects; dotted: the base model"
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    _save(figure, path)


def tradeoff(rows: Sequence[Row], path: Path) -> None:
    """Fidelity against its costs: the drift of other captions, and contexts that are no longer right."""
    reported = ends(rows, "report")
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    panels = {"drift": "drift of other captions (less is better)", "context": "context right (more is better)"}
    for axis, (name, title) in zip(axes, panels.items()):
        for method, colour in colours(rows).items():
            if own := where(reported, method=method):
                x, y = [r[name] for r in own], [r["subject_new"] for r in own]
                axis.plot(x, y, "o", ms=4, alpha=0.25, color=colour)
                axis.plot(mean_of(own, name), mean_of(own, "subject_new"), "o", ms=10, color=colour, label=method)
        axis.set_xlabel(title)
        _plain(axis)
    axes[0].set_ylabel(NAMES["subject_new"])
    _legend(axes[1])
    figure.suptitle("Fidelity against its price: a dot a run, large dots the means", x=0.01, ha="left", fontsize=11)
    _save(figure, path)


def trajectories(rows: Sequence[Row], path: Path) -> None:
    """Fidelity against drift and leak during training: a curve for each method, with a dot for each scored step."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    curves = {method: over(rows, method, "step") for method in methods_of(rows)}
    for axis, x in zip(axes, ("drift", "leak")):
        for method, curve in curves.items():
            if len(curve) > 2:
                points = [[row[name] for row in curve] for name in (x, "subject_new")]
                axis.plot(*points, "o-", ms=5, color=colours(rows)[method], label=method)
        axis.set_xlabel(f"{NAMES[x]} (less is better)")
        _plain(axis)
    axes[0].set_ylabel(NAMES["subject_new"])
    _legend(axes[1])
    steps = sorted({row["step"] for curve in curves.values() if len(curve) > 2 for row in curve})
    title = (
        f"While training: after {', '.join(map(str, steps[:-1]))} and {steps[-1]} steps" if steps else "No steps yet"
    )
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    _save(figure, path)


def strengths(rows: Sequence[Row], path: Path) -> None:
    """What lowering an adapter's strength does: two scores over the strength α, and one score over the other."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    axes = figure.subplots(1, 3)
    for method, colour in colours(rows).items():
        curve = over(rows, method, "strength")
        if len(curve) < 3:
            continue
        for axis, (x, y) in zip(axes, (("strength", "subject_new"), ("strength", "drift"), ("drift", "subject_new"))):
            axis.plot([row[x] for row in curve], [row[y] for row in curve], "o-", ms=5, color=colour, label=method)
    for axis, (x, y) in zip(axes, (("strength", "subject_new"), ("strength", "drift"), ("drift", "subject_new"))):
        axis.set_xlabel("strength α" if x == "strength" else NAMES[x])
        axis.set_ylabel(NAMES[y])
        _plain(axis)
    _legend(axes[2])
    figure.suptitle("Strength of the trained adapter; 0 is the base model", x=0.01, ha="left", fontsize=11)
    _save(figure, path)


def block_sizes(rows: Sequence[Row], path: Path) -> None:
    """Fidelity over the block size, over the number of trained parameters, and over drift.

    There is a curve for each number of factors, from the methods with names such as "b=8 m=2"; others are diamonds.
    """
    reported = ends(rows, "report")
    sizes: dict[str, list[tuple[int, str]]] = {}
    for name in methods_of(reported):
        match = re.fullmatch(r"b=(\d+) m=(\d+)", name)
        sizes.setdefault(f"m = {match[2]}" if match else name, []).append((int(match[1]) if match else 0, name))
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    order = sorted(sizes, key=lambda label: (not sizes[label][0][0], label if sizes[label][0][0] else ""))
    for i, label in enumerate(order):
        x, names = zip(*sorted(sizes[label]))
        own = [where(reported, method=name) for name in names]
        style: dict[str, Any] = {"color": colormaps["tab20"](2 * i % 20 + i // 10), "label": label}
        style |= {"marker": "o", "ls": "-", "ms": 5} if x[0] else {"marker": "D", "ls": "", "ms": 6}
        y = [mean_of(rows, "subject_new") for rows in own]
        if x[0]:
            axes[0].plot(x, y, **style)
        for axis, score in zip(axes[1:], ("trained", "drift")):
            axis.plot([mean_of(rows, score) for rows in own], y, **style)
    ticks = sorted({b for own in sizes.values() for b, _ in own if b})
    axes[0].set_xscale("log", base=2)
    axes[0].set_xticks(ticks, ticks)
    axes[0].set_xlabel("block size b")
    axes[0].set_ylabel(NAMES["subject_new"])
    axes[1].set_xlabel("trained numbers, thousands")
    axes[1].xaxis.set_major_formatter(lambda n, _: f"{n / 1000:,.0f}")
    axes[2].set_xlabel(f"{NAMES['drift']} (less is better)")
    for axis in axes:
        _plain(axis)
    _legend(axes[2])
    title = "Block size and factors, layers, rate of the scale: means over subjects"
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    _save(figure, path)


def times(rows: Sequence[Row], seconds: dict[str, float], path: Path) -> None:
    """Subject score over seconds of training. seconds: {method: seconds of a step}."""
    figure = Figure(figsize=(8, 4.4), layout="constrained")
    axis = figure.subplots()
    for method, colour in colours(rows).items():
        curve = over(rows, method, "step")
        if len(curve) > 2 and method in seconds:
            x = [row["step"] * seconds[method] for row in curve]
            axis.plot(x, [row["subject_new"] for row in curve], "o-", ms=5, color=colour, label=method)
    axis.set_xlabel("seconds of training")
    axis.set_ylabel(NAMES["subject_new"])
    _plain(axis)
    _legend(axis)
    _save(figure, path)


def selection(table: Sequence[Row], criterion: str, path: Path) -> None:
    """The weighted sum of scores over the learning rate, on the subjects of the selection.

    Rates that were tried on fewer subjects are not joined to the others, because subjects are not equally easy.
    """
    figure = Figure(figsize=(8, 4), layout="constrained")
    axis = figure.subplots()
    for method, colour in colours(table).items():
        own = sorted(where(table, method=method), key=lambda row: float(row["learning rate"]))
        most = max(row["runs"] for row in own)
        for rows, style in (
            ([row for row in own if row["runs"] == most], {"ls": "-", "ms": 5, "label": method}),
            ([row for row in own if row["runs"] < most], {"ls": "", "ms": 4, "mfc": "none", "alpha": 0.6}),
            ([row for row in own if row.get("chosen")], {"ls": "", "ms": 12, "mfc": "none", "mew": 1.6}),
        ):
            rates, totals = [float(row["learning rate"]) for row in rows], [row["total"] for row in rows]
            axis.semilogx(rates, totals, marker="o", color=colour, **style)
    axis.set_xlabel("learning rate")
    axis.set_ylabel(criterion)
    title = "Learning rates on the subjects of the selection; rings: chosen; hollow: tried on fewer"
    axis.set_title(title, loc="left", fontsize=11)
    _plain(axis)
    _legend(axis)
    _save(figure, path)


def _plain(axis: Axes, grid: Literal["both", "x", "y"] = "both") -> None:
    axis.grid(axis=grid, alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def _legend(axis: Axes) -> None:
    if axis.get_legend_handles_labels()[1]:
        axis.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, bbox_inches="tight")
