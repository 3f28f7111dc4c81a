"""Writes the tables and plots of a comparison into a folder, with a README.md that shows them."""

from __future__ import annotations

import csv
import json
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetuning.evaluation.score_table import Row, as_csv, as_json, markdown, write, write_table
from finetuning.studies.comparison import plots
from finetuning.studies.comparison.grid import Grid
from finetuning.studies.comparison.results import choose_table, criterion, ends, summary, with_intervals


@dataclass(frozen=True)
class Provenance:
    """Where the rows of a comparison come from.

    Attributes:
        command: the command that made them.
        date, machine: when and where it was last run.
        planned: the number of reported runs in the whole grid.
        selection: {method: its number of runs that choose the learning rate}.
        steps: the number of steps of each run.
        baseline: the method that differences are taken to.
        choose_by: {score: weight} of the scores that chose the learning rates.
        scores: the names of the scores, in the order of the tables.
    """

    command: str
    date: str
    machine: str
    planned: int
    selection: dict[str, int]
    steps: int
    baseline: str
    choose_by: dict[str, float]
    scores: tuple[str, ...]

    @classmethod
    def of(cls, grid: Grid, scores: Sequence[str], command: str) -> Provenance:
        """The provenance of the rows of a grid, as of today and on this machine."""
        planned = len(grid.methods) * len(grid.report.subjects) * len(grid.report.seeds)
        return cls(
            command=command,
            date=time.strftime("%Y-%m-%d"),
            machine=machine(),
            planned=planned,
            selection=grid.selection_counts(),
            steps=grid.last_step,
            baseline=grid.baseline,
            choose_by=grid.choose_by,
            scores=tuple(scores),
        )


def machine() -> str:
    """The name of the processor and its number of cores."""
    model, info = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if info.is_file():
        names = [
            line.split(":")[1].strip()
            for line in info.read_text(encoding="utf-8").splitlines()
            if line.startswith("model name")
        ]
        model = names[0] if names else model
    return f"{model}, {os.cpu_count()} cores"


def save(path: Path, rows: Sequence[Row], provenance: Provenance) -> None:
    """Write the rows as `path`.csv, and their provenance as `path`.json."""
    write(path.with_suffix(".csv"), as_csv(rows))
    write(path.with_suffix(".json"), as_json(vars(provenance)))


def load(path: Path) -> tuple[list[Row], Provenance]:
    """Read what `save` wrote. Missing values are None."""
    with open(path.with_suffix(".csv"), encoding="utf-8", newline="") as file:
        rows = [{name: _value(name, text) for name, text in row.items()} for row in csv.DictReader(file)]
    content = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    return rows, Provenance(**{**content, "scores": tuple(content["scores"])})


def _value(name: str, text: str) -> Any:
    if name in ("phase", "method", "individual"):
        return text
    if not text:
        return None
    return int(text) if name in ("seed", "step", "trained") else float(text)


def write_page(folder: Path, rows: Sequence[Row], provenance: Provenance, grid: Grid) -> str:
    """Write tables and plots of the runs that are done into a folder; returns the text of its README.md."""
    save(folder / "rows", rows, provenance)
    reported = ends(rows, "report")
    text = [
        "# Comparison\n",
        f"`{provenance.command}`, written {provenance.date} on {provenance.machine}: {len(reported)} of "
        f"{provenance.planned} reported runs, {provenance.steps} steps each.\n",
        "Mean ± half the width of the 95 % confidence interval over subjects (Student's t; the seeds of a subject are "
        "averaged first).\n",
    ]
    if reported:
        means, differences = summary(rows, provenance.baseline, provenance.scores)
        write_table(folder, "means", means)
        text += [markdown(with_intervals(means)), f"## Difference to {provenance.baseline}, paired by subject\n"]
        text += [markdown(with_intervals(differences)) if differences else "No other method has run yet.\n"]
        plots.scores(rows, folder / "scores.png")
        plots.tradeoff(rows, folder / "tradeoff.png")
    if table := choose_table(rows, provenance.choose_by, provenance.scores, provenance.selection):
        write_table(folder, "selection", table)
        subjects = ", ".join(grid.selection.subjects)
        text += [f"## Learning rates, chosen on {subjects} by the largest {criterion(provenance.choose_by)}\n"]
        text += [markdown(table)]
        plots.selection(table, criterion(provenance.choose_by), folder / "selection.png")
    page = "\n".join(text)
    write(folder / "README.md", page)
    return page
