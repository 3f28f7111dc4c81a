"""From the score files of a grid to rows, and from rows to chosen rates, means and differences with intervals.

A row is a point of a run: {phase, method, learning_rate, individual, seed, step, strength, scores …}. The base model,
and real pictures where a task has them, are rows as well. Means and their 95 % confidence intervals are over
individuals, after the seeds of each have been averaged, because pictures and seeds of one individual are not
independent.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import yaml
from safetensors import safe_open

from finetuning.errors import InputError
from finetuning.evaluation.score_table import Row, mean_of
from finetuning.evaluation.statistics import mean_and_interval
from finetuning.run_folder import CONFIG, METRICS, read_metrics
from finetuning.studies.comparison.grid import Grid, GridRun

BASE, REAL = "base model", "real pictures"
LESS_IS_BETTER = ("leak", "drift", "prior_attributes", "prior_features")
PARTS = ("unet", "text_encoder", "hint_encoder", "controlnet", ".")  # "." is where diffusers writes a ControlNet


def read_rows(runs: Iterable[GridRun], grid: Grid, scores: Sequence[str]) -> list[Row]:
    """Read a row for each point that is scored, then the rows of the base model and of real pictures.

    A run of the selection that has diverged becomes a row without scores; a reported run that has diverged, none.

    Raises:
        InputError: if a run was scored by other settings than the grid's.
    """
    rows: list[Row] = []
    references: dict[tuple[str, str], Row] = {}
    for run in runs:
        if run.phase == "selection" and run.diverged(grid).is_file():
            key = {"phase": run.phase, "method": run.method.name, "learning_rate": run.learning_rate}
            key |= {"individual": run.subject, "seed": run.seed, "step": grid.last_step, "strength": 1.0}
            rows.append({**key, **dict.fromkeys(scores)})
            continue
        for point in run.points(grid):
            if not (path := run.scores(grid, point)).is_file():
                continue
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["scoring"] != grid.scoring:
                raise InputError(f"{path}: was scored with {found['scoring']}, not {grid.scoring}; remove it")
            key = {"phase": run.phase, "method": run.method.name, "learning_rate": run.learning_rate}
            key |= {"individual": run.subject, "seed": run.seed, "step": point.step, "strength": point.strength}
            rows.append({**key, **{s: found["tuned"][s] for s in scores}, **found["facts"]})
            for method, name in ((BASE, "base"), (REAL, "real")):
                if name in found:
                    key = {"phase": run.phase, "method": method, "individual": run.subject}
                    references[method, run.subject] = {**key, **{s: found[name][s] for s in scores}}
    return [*rows, *references.values()]


def size_and_speed(folder: Path) -> dict[str, float]:
    """The number of parameters that a run has trained, and its median number of images per second."""
    config = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
    trained, parts = 0, set(PARTS)
    if (folder / "model_index.json").is_file():  # a pipeline, which also holds parts that were not trained
        parts = {"unet", "text_encoder"} if config["train_text_encoder"] else {"unet"}
    frozen = ".boft_s" if config.get("boft_scale_learning_rate") == 0 else None
    for path in (p for part in parts for p in (folder / part).glob("*.safetensors")):
        with safe_open(path, "np") as file:
            names = [name for name in file.keys() if frozen is None or not name.endswith(frozen)]  # noqa: SIM118
            trained += sum(int(np.prod(file.get_slice(name).get_shape())) for name in names)
    speeds = [line["images_per_second"] for line in read_metrics(folder / METRICS) if "images_per_second" in line]
    return {"trained": trained, "images_per_second": float(np.median(speeds)) if speeds else float("nan")}


def where(rows: Iterable[Row], **wanted: object) -> list[Row]:
    """The rows whose columns have these values."""
    return [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]


def ends(rows: Iterable[Row], phase: str) -> list[Row]:
    """The rows of a phase at the last step and at full strength, without those of the base model."""
    rows = where(rows, phase=phase)
    last = max((row["step"] for row in rows if row.get("step")), default=0)
    return where(rows, step=last, strength=1.0)


def methods_of(rows: Iterable[Row]) -> list[str]:
    """The names of the methods, in the order of their first rows."""
    return [name for name in dict.fromkeys(row["method"] for row in rows) if name not in (BASE, REAL)]


def choose_rates(grid: Grid, rows: Sequence[Row], scores: Sequence[str]) -> dict[str, float]:
    """{method: its chosen learning rate} for methods whose selection is complete.

    In a grid without a selection, each method has only one rate.
    """
    if not grid.selection.subjects:
        return {method.name: method.learning_rates[0] for method in grid.methods}
    table = choose_table(rows, grid.choose_by, scores, grid.selection_counts())
    return {row["method"]: float(row["learning rate"]) for row in table if "chosen" in row}


def keep_rates(grid: Grid, rows: Sequence[Row], scores: Sequence[str]) -> dict[str, tuple[float, ...]]:
    """{method: its best `selection.keep` rates on the first subject} for methods that have tried all rates there.

    Rates at which a run diverged are the worst.
    """
    first = where(rows, phase="selection", individual=next(iter(grid.selection.subjects), None))
    table, kept = choose_table(first, grid.choose_by, scores, {}), {}
    for method in grid.methods:
        own = where(table, method=method.name)
        if sum(row["runs"] for row in own) == len(method.learning_rates) * len(grid.selection.seeds):
            best = sorted(own, key=lambda row: -math.inf if math.isnan(row["total"]) else row["total"], reverse=True)
            kept[method.name] = tuple(float(row["learning rate"]) for row in best[: grid.selection.keep])
    return kept


def choose_table(
    rows: Iterable[Row], choose_by: dict[str, float], scores: Sequence[str], planned: dict[str, int]
) -> list[Row]:
    """Means over the runs of the selection, a row for each method and rate; the best of a method is marked "chosen".

    Args:
        choose_by: {score: weight}; the rate with the largest weighted sum is the best.
        scores: the names of all scores.
        planned: {method: its number of runs in the selection}. A rate is chosen when all of them are done, among the
            rates that were tried on all subjects.
    """
    selection, table = ends(rows, "selection"), []
    for method in methods_of(selection):
        runs = where(selection, method=method)
        tried: list[Row] = []
        for rate in sorted({row["learning_rate"] for row in runs}):
            own = where(runs, learning_rate=rate)
            means = {s: mean_of(own, s) for s in scores}
            has_diverged = any(row[s] is None for row in own for s in scores)
            total = math.nan if has_diverged else sum((w * means[s] for s, w in choose_by.items()), 0.0)
            tried.append({"method": method, "learning rate": f"{rate:g}", "runs": len(own), "total": total, **means})
        most = max(row["runs"] for row in tried)
        sound = [row for row in tried if not math.isnan(row["total"]) and row["runs"] == most]
        if len(runs) == planned.get(method) and sound:
            best = max(sound, key=lambda row: row["total"])
            is_edge = len(tried) > 1 and best in (tried[0], tried[-1])
            best["chosen"] = "yes, at the edge of what was tried" if is_edge else "yes"
        table += tried
    return table


def criterion(choose_by: dict[str, float]) -> str:
    """The weighted sum that chooses the learning rate, as text, e.g. "subject_new + context − 2 leak"."""
    terms = [f"{'−' if w < 0 else '+'} {'' if abs(w) == 1 else f'{abs(w):g} '}{name}" for name, w in choose_by.items()]
    return " ".join(terms).removeprefix("+ ")


def by_subject(rows: Iterable[Row], method: str, score: str) -> dict[str, float]:
    """{individual: mean over its seeds} of one score of one method."""
    own = where(rows, method=method)
    return {s: mean_of(where(own, individual=s), score) for s in dict.fromkeys(row["individual"] for row in own)}


def over(rows: Sequence[Row], method: str, column: str) -> list[Row]:
    """Means of a method's scores at each value of a column, as a curve that begins with the base model at 0.

    Only runs that are scored at every value count, so that all points of the curve are means over the same runs.

    Args:
        column: "step" or "strength".

    Returns:
        A row for each value, with the number of "subjects"; [] if no run is scored at every value.
    """
    own = where(rows, phase="report", method=method)
    last = max((row["step"] for row in own), default=0)
    own = [r for r in own if r["strength"] == 1] if column == "step" else where(own, step=last)
    values = sorted({row[column] for row in own})
    runs: dict[tuple, dict[float, Row]] = {}
    for row in own:
        runs.setdefault((row["individual"], row["seed"]), {})[row[column]] = row
    whole = [run for run in runs.values() if len(run) == len(values)]
    if not whole:
        return []
    individuals = {run[values[0]]["individual"] for run in whole}
    bases = [row for row in where(rows, phase="report", method=BASE) if row["individual"] in individuals]
    names = [name for name, value in whole[0][values[0]].items() if isinstance(value, float)]
    points: list[tuple[float, list[Row]]] = [(0, bases)]
    points += [(value, [run[value] for run in whole]) for value in values]
    return [
        {**{n: mean_of(part, n) for n in names}, "method": method, column: value, "subjects": len(individuals)}
        for value, part in points
    ]


def summary(rows: Sequence[Row], baseline: str, scores: Sequence[str]) -> tuple[list[Row], list[Row]]:
    """Means with intervals of the reported runs, a row for each method; and those of differences to the baseline."""
    reported, means, differences = ends(rows, "report"), [], []
    bases = where(rows, phase="report", method=BASE)
    facts = dict.fromkeys(("trained", "learning rate", "subjects", "runs"))
    if bases:
        means.append({"method": BASE, **facts, **{s: mean_of(bases, s) for s in scores}})
    for method in methods_of(reported):
        own = where(reported, method=method)
        row: Row = {"method": method, "trained": int(own[0]["trained"])}
        row |= {"learning rate": f"{own[0]['learning_rate']:g}"}
        row |= {"subjects": len({r["individual"] for r in own}), "runs": len(own)}
        for name in scores:
            row[name], row[f"{name} ±"] = mean_and_interval(list(by_subject(reported, method, name).values()))
        means.append(row)
        if method != baseline:
            differences.append({"method": method, **difference(rows, method, baseline, scores)})
    return means, differences


def difference(rows: Sequence[Row], method: str, other: str, scores: Sequence[str]) -> Row:
    """Means with intervals of the differences `method` - `other` at the end, paired by individual.

    Only individuals that both methods have count; "subjects" is their number.
    """
    reported = ends(rows, "report")
    row: Row = {}
    for name in scores:
        a, b = by_subject(reported, method, name), by_subject(reported, other, name)
        pairs = [a[s] - b[s] for s in a if s in b]
        row["subjects"] = len(pairs)
        row[name], row[f"{name} ±"] = mean_and_interval(pairs)
    return row


def with_intervals(rows: Sequence[Row]) -> list[Row]:
    """Rows for readers: a mean and its interval become one text, and whole numbers get separators."""
    result = []
    for row in rows:
        line = {}
        for name, value in row.items():
            half = row.get(f"{name} ±")
            if name.endswith(" ±"):
                continue
            line[name] = f"{value:.3f} ± {half:.3f}" if half is not None and half == half else value
            if isinstance(value, int):
                line[name] = f"{value:,}"
        result.append(line)
    return result
