"""Answers to the questions of docs/results.md, from the rows, as tables and as sentences that state their n."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from finetuning.evaluation.score_table import Row, markdown
from finetuning.evaluation.statistics import mean_and_interval
from finetuning.studies.comparison.page import Provenance
from finetuning.studies.comparison.results import (
    BASE,
    LESS_IS_BETTER,
    REAL,
    by_subject,
    difference,
    ends,
    methods_of,
    over,
    where,
    with_intervals,
)


def verdict(rows: Sequence[Row], method: str, other: str, scores: Sequence[str]) -> str:
    """A sentence that says on which scores two methods differ by more than the 95 % confidence interval."""
    found = difference(rows, method, other, scores)
    if found["subjects"] < 2:
        return f"**{method} against {other}**: not yet, both have {found['subjects']} subjects."
    sides: dict[str, list[str]] = {"better": [], "worse": []}
    for name in scores:
        mean, half = found[name], found[f"{name} ±"]
        if abs(mean) > half:
            is_better = (mean > 0) != (name in LESS_IS_BETTER)
            sides["better" if is_better else "worse"].append(f"{name} ({mean:+.3f} ± {half:.3f})")
    said = [f"{side} on {', '.join(names)}" for side, names in sides.items() if names]
    rest = [name for name in scores if not any(name == text.split(" ")[0] for side in sides.values() for text in side)]
    said += [f"no difference shown on {', '.join(rest)}"] if rest else []
    return f"**{method} against {other}**, {found['subjects']} subjects: {'; '.join(said)}."


def differences(rows: Sequence[Row], pairs: Sequence[tuple[str, str]], scores: Sequence[str]) -> str:
    """A table of paired differences, with a row for each pair of methods."""
    table = [{"difference": f"{a} − {b}", **difference(rows, a, b, scores)} for a, b in pairs]
    return markdown(with_intervals([row for row in table if row["subjects"]])) if table else ""


def curve_table(rows: Sequence[Row], column: str, scores: Sequence[str]) -> str:
    """A table of means at every scored step or strength, for methods that were scored at several; "" without any."""
    table = []
    for method in methods_of(rows):
        curve = over(rows, method, column)
        for row in curve[1:] if len(curve) > 2 else ():
            table.append({"method": method, column: f"{row[column]:g}", "subjects": f"{row['subjects']}"}
                         | {name: row[name] for name in scores})  # fmt: skip
    return markdown(table) if table else ""


def crossing(curve: Sequence[Row], x: str, y: str, level: float) -> float:
    """The x at which a curve first rises to y = level, interpolated linearly; nan if it does not reach it."""
    for a, b in pairwise(curve):
        if a[y] < level <= b[y]:
            return a[x] + (level - a[y]) / (b[y] - a[y]) * (b[x] - a[x])
    return math.nan


def cost_table(rows: Sequence[Row], column: str, levels: Sequence[float], costs: Sequence[str]) -> str:
    """A table of what given levels of `subject_new` cost: the other scores where a method's curve reaches them."""
    table = []
    for method in methods_of(rows):
        curve = over(rows, method, column)
        if len(curve) > 2:
            row: Row = {"method": method, "subjects": f"{curve[0]['subjects']}"}
            for cost in costs:
                row |= {f"{cost} at {level:g}": crossing(curve, cost, "subject_new", level) for level in levels}
            table.append(row)
    return markdown(table) if table else ""


def cost_verdict(rows: Sequence[Row], column: str, method: str, other: str, level: float, costs: Sequence[str]) -> str:
    """A sentence that compares what a level of `subject_new` costs two methods along their curves, by subject."""
    pairs: dict[str, list[float]] = {cost: [] for cost in costs}
    for individual in by_subject(ends(rows, "report"), method, "subject_new"):
        a, b = (over(where(rows, individual=individual), name, column) for name in (method, other))
        if len(a) > 2 and len(b) > 2:
            for cost in costs:
                pairs[cost].append(crossing(a, cost, "subject_new", level) - crossing(b, cost, "subject_new", level))
    pairs = {cost: [value for value in values if not math.isnan(value)] for cost, values in pairs.items()}
    count = len(pairs[costs[0]])
    if count < 2:
        return (
            f"**{method} against {other} at subject_new = {level:g}**: too few subjects reach it with both ({count})."
        )
    said = []
    for cost, values in pairs.items():
        mean, half = mean_and_interval(values)
        side = "no difference shown" if abs(mean) <= half else "less" if mean < 0 else "more"
        said.append(f"{side} {cost} ({mean:+.3f} ± {half:.3f})".replace("shown ", "shown on "))
    return f"**{method} against {other} at subject_new = {level:g}**, {count} subjects: {'; '.join(said)}."


def time_table(rows: Sequence[Row], seconds: dict[str, float], levels: Sequence[float]) -> str:
    """A table of the seconds of training until the mean of `subject_new` reaches a level.

    seconds: {method: seconds of a step}.
    """
    table = []
    for method in methods_of(rows):
        curve = over(rows, method, "step")
        if len(curve) > 2 and method in seconds:
            row: Row = {"method": method, "subjects": f"{curve[0]['subjects']}", "seconds a step": seconds[method]}
            row |= {f"s to {lv:g}": crossing(curve, "step", "subject_new", lv) * seconds[method] for lv in levels}
            table.append(row)
    return markdown(table) if table else ""


def control_table(rows: Sequence[Row], scores: Sequence[str]) -> list[Row]:
    """Means over seeds ± standard deviation, a row for each kind of control and method; then floor and ceiling."""
    reported, table = ends(rows, "report"), []
    for kind in dict.fromkeys(row["individual"] for row in reported):
        for method in methods_of(reported):
            if own := where(reported, individual=kind, method=method):
                facts = {
                    "learning rate": f"{own[0]['learning_rate']:g}",
                    "trained numbers": f"{int(own[0]['trained']):,}",
                }
                row = {"control": kind, "method": method, **facts, "seeds": f"{len(own)}"}
                table.append(row | {name: _with_deviation(own, name) for name in scores})
        for method, name in ((BASE, "no control (the base)"), (REAL, "real renders")):
            if own := where(rows, phase="report", individual=kind, method=method):
                table.append({"control": kind, "method": name, **{s: _with_deviation(own, s) for s in scores}})
    return table


def _with_deviation(rows: Sequence[Row], score: str) -> str:
    values = np.array([row[score] for row in rows], dtype=float)
    return f"{values.mean():.3f}" + (f" ± {values.std(ddof=1):.3f}" if len(values) > 1 else "")


def progress(rows: Sequence[Row], provenance: Provenance) -> str:
    """A sentence that says how many of the grid's runs are done."""
    counts = {"reported runs": (len(ends(rows, "report")), provenance.planned)}
    if chosen := sum(provenance.selection.values()):
        counts["runs that choose a learning rate"] = (len(ends(rows, "selection")), chosen)
    return " and ".join(f"{count} of {all_} {name}" for name, (count, all_) in counts.items()) + " are there.\n"
