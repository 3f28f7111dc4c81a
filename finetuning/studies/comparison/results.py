"""From the score files of a grid to rows, and from rows to chosen rates, means and differences with intervals.

A row is a point of a run: {phase, method, learning_rate, individual, seed, step, strength, scores …}. What runs are
held against are rows too: the base model and, where a task has them, real pictures. Means and their 95 % confidence
intervals are over individuals, the seeds of one having been averaged: its pictures and seeds are not independent.
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
from finetuning.studies.comparison.grid import Grid, Piece

BASE, REAL = "base model", "real pictures"
LESS_IS_BETTER = ("leak", "drift", "prior_attributes", "prior_features")
PARTS = ("unet", "text_encoder", "hint_encoder", "controlnet", ".")  # "." where diffusers has a ControlNet


def read_rows(pieces: Iterable[Piece], grid: Grid, scores: Sequence[str]) -> list[Row]:
    """One row for each point that is scored, then those of the base model and of real pictures.

    A run of the selection that has diverged is a row without scores; a reported one is none.

    Raises:
        InputError: scored otherwise than the grid says.
    """
    rows, references = [], {}
    for piece in pieces:
        if piece.phase == "selection" and piece.diverged(grid).is_file():
            key = {"phase": piece.phase, "method": piece.method.name, "learning_rate": piece.learning_rate}
            key |= {"individual": piece.subject, "seed": piece.seed, "step": grid.last_step, "strength": 1.0}
            rows.append({**key, **dict.fromkeys(scores)})
            continue
        for point in piece.points(grid):
            if not (path := piece.scores(grid, point)).is_file():
                continue
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["scoring"] != grid.scoring:
                raise InputError(f"{path}: was scored with {found['scoring']}, not {grid.scoring}; remove it")
            key = {"phase": piece.phase, "method": piece.method.name, "learning_rate": piece.learning_rate}
            key |= {"individual": piece.subject, "seed": piece.seed, "step": point.step, "strength": point.strength}
            rows.append({**key, **{s: found["tuned"][s] for s in scores}, **found["facts"]})
            for method, name in ((BASE, "base"), (REAL, "real")):
                if name in found:
                    key = {"phase": piece.phase, "method": method, "individual": piece.subject}
                    references[method, piece.subject] = {**key, **{s: found[name][s] for s in scores}}
    return [*rows, *references.values()]


def facts_of(folder: Path) -> dict[str, float]:
    """Numbers that a run has trained, and its median speed."""
    config = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
    trained, parts = 0, set(PARTS)
    if (folder / "model_index.json").is_file():  # a pipeline, which has what was not trained as well
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
    """The rows of a phase at the last step and full strength; those of the base model are none."""
    rows = where(rows, phase=phase)
    last = max((row["step"] for row in rows if row.get("step")), default=0)
    return where(rows, step=last, strength=1.0)


def methods_of(rows: Iterable[Row]) -> list[str]:
    """Names of the methods in the order of their first row."""
    return [name for name in dict.fromkeys(row["method"] for row in rows) if name not in (BASE, REAL)]


def choose_rates(grid: Grid, rows: Sequence[Row], scores: Sequence[str]) -> dict[str, float]:
    """{method: rate} of the methods whose rates have all been tried; the one rate in a grid without a selection."""
    if not grid.selection.subjects:
        return {method.name: method.learning_rates[0] for method in grid.methods}
    table = choose_table(rows, grid.choose_by, scores, grid.selection_runs())
    return {row["method"]: float(row["learning rate"]) for row in table if "chosen" in row}


def keep_rates(grid: Grid, rows: Sequence[Row], scores: Sequence[str]) -> dict[str, tuple[float, ...]]:
    """{method: its best `selection.keep` rates on the first subject} of the methods that have tried all of them there.

    A rate at which a run diverged comes last.
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
    """Means of the selection, a row a method and rate, the best one of each method marked as "chosen".

    planned: runs of the selection by method; nothing is chosen before all of them are there, and only among the rates
        that were tried on all subjects.
    """
    selection, table = ends(rows, "selection"), []
    for method in methods_of(selection):
        runs, tried = where(selection, method=method), []
        for rate in sorted({row["learning_rate"] for row in runs}):
            own = where(runs, learning_rate=rate)
            means = {s: mean_of(own, s) for s in scores}
            has_diverged = any(row[s] is None for row in own for s in scores)
            total = math.nan if has_diverged else sum(weight * means[s] for s, weight in choose_by.items())
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
    """What chooses the learning rate, e.g. "subject_new + context − 2 leak"."""
    terms = [f"{'−' if w < 0 else '+'} {'' if abs(w) == 1 else f'{abs(w):g} '}{name}" for name, w in choose_by.items()]
    return " ".join(terms).removeprefix("+ ")


def by_subject(rows: Iterable[Row], method: str, score: str) -> dict[str, float]:
    """{individual: mean over seeds} of one score of one method."""
    own = where(rows, method=method)
    return {s: mean_of(where(own, individual=s), score) for s in dict.fromkeys(row["individual"] for row in own)}


def over(rows: Sequence[Row], method: str, column: str) -> list[Row]:
    """Means of a method's scores at each value of `step` or `strength`, from the base model at 0 to the end or beyond.

    Only runs that have every value count, so that a curve is one of the same runs all along; "subjects" says how many.
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
    points = [(0, bases)] + [(value, [run[value] for run in whole]) for value in values]
    return [
        {**{n: mean_of(part, n) for n in names}, "method": method, column: value, "subjects": len(individuals)}
        for value, part in points
    ]


def summary(rows: Sequence[Row], baseline: str, scores: Sequence[str]) -> tuple[list[Row], list[Row]]:
    """Means with intervals of the reported runs, a row a method; and differences to the baseline."""
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
    """Means with intervals of `method` - `other` at the end, over the individuals that both have; "subjects" = n."""
    reported, row = ends(rows, "report"), {}
    for name in scores:
        a, b = by_subject(reported, method, name), by_subject(reported, other, name)
        pairs = [a[s] - b[s] for s in a if s in b]
        row["subjects"] = len(pairs)
        row[name], row[f"{name} ±"] = mean_and_interval(pairs)
    return row


def with_intervals(rows: Sequence[Row]) -> list[Row]:
    """Means and intervals in one column, for reading."""
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
