#!/usr/bin/env python
"""Compare methods of control at equal steps on the toy world, by the runs of one YAML file, as compare.py does.

    python scripts/compare_controls.py scripts/compare_controls.yaml             # goes on where it was
    python scripts/compare_controls.py scripts/compare_controls.yaml --limit=5   # five more runs, then the table
    python scripts/compare_controls.py scripts/compare_controls.yaml --limit=0 --save=docs/results/controls

A "subject" of the grid is a kind of control: canny, edges or mask. Learning rates are chosen on those of `selection`,
by controls of the toy world's part "held out"; the best ones run on those of `report`, by controls of its part "test",
which no training and no choice has seen. Each run goes through train_controlnet.py; its scores are those of
`finetuning/control/scoring.py`.
Pictures of the base without control are the floor, real renders the ceiling. The command may run several times at
once: each process takes runs that no other has taken.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from finetuning.settings.reading import parse_or_exit, read_config, run_command
from finetuning.settings.studies import GridConfig

if __name__ == "__main__":
    config = parse_or_exit(GridConfig, __doc__)  # before the slow imports

from finetuning.control.scoring import (
    REAL,
    WITHOUT,
    ControlTest,
    Drawing,
    draw_control_run,
    score_control_run,
)
from finetuning.evaluation.score_table import markdown, write, write_table
from finetuning.run_folder import CONTROLLED, WITHOUT_CONTROL
from finetuning.settings.control import MADE, RENDERED, ControlNetConfig
from finetuning.settings.fields import Config
from finetuning.studies.comparison.answers import control_table, progress
from finetuning.studies.comparison.grid import Grid, GridRun, Point, read_grid
from finetuning.studies.comparison.page import Provenance, save
from finetuning.studies.comparison.results import choose_table, criterion, read_rows, size_and_speed
from finetuning.studies.comparison.running import run_grid, runs_of
from toyworld.controls import Controls
from toyworld.segmentation import load_segmentation

SCORES = ("edge_f1", "edge_iou", "mask_miou")


class ToyControls:
    """Kinds of control on the toy world, scored by how pictures follow their controls.

    Keys of `scoring`: number of images; steps, guidance and precision of the pictures.
    """

    trainer = Path(__file__).resolve().parents[1] / "train_controlnet.py"
    config: type[Config] = ControlNetConfig
    scores: tuple[str, ...] = SCORES

    def faults(self, grid: Grid) -> Iterator[str]:
        """What is wrong with a grid, one message for each fault."""
        if grid.steps.values or grid.strengths.values:
            yield "steps, strengths: controls are scored at the end and at full strength alone; remove them"
        if odd := set(grid.scoring) - {"images", "steps", "guidance", "precision"}:
            yield f"scoring: unknown key {', '.join(sorted(odd))}"
        for name in (*grid.selection.subjects, *grid.report.subjects):
            if name not in (*MADE, *RENDERED):
                yield f"no control {name}; there are: {', '.join(dict.fromkeys((*MADE, *RENDERED)))}"

    def settings(self, run: GridRun, grid: Grid, given: dict[str, Any]) -> dict[str, Any]:
        """The settings of the trainer that follow from the kind of control of a run."""
        return {"dataset_name": "toyworld", "conditioning": run.subject}

    def score(self, run: GridRun, point: Point, grid: Grid) -> dict[str, Any]:
        """Score pictures of a run, pictures of the base without control, and real ones."""
        folder, scoring = run.folder(grid), grid.scoring
        controls = Controls if run.phase == "selection" else unseen_controls
        test = ControlTest.from_run(folder, controls, load_segmentation, count=int(scoring.get("images", 64)))
        drawing = Drawing(
            steps=int(scoring.get("steps", 20)),
            guidance_scale=float(scoring.get("guidance", 3)),
            precision=scoring.get("precision", "no"),
            batch_size=16,
        )
        floor = grid.output_dir / WITHOUT_CONTROL / run.subject
        rows = score_control_run(folder, test, draw_control_run(folder, test, drawing, every=8, floor=floor))
        by_kind = {row["pictures of"]: {name: row[name] for name in SCORES} for row in rows}
        found = {"subject": run.subject, "scoring": scoring, "facts": size_and_speed(folder)}
        return {**found, "tuned": by_kind[CONTROLLED], "base": by_kind[WITHOUT], "real": by_kind[REAL]}


def unseen_controls(kind: str, part: str) -> Controls:
    """The controls of the toy world, with the part "test", which no choice has seen, in the place of "held out"."""
    return Controls(kind, "test" if part == "held out" else part)


def main(argv: Sequence[str] | None = None) -> int:
    return compare(read_config(GridConfig, argv, __doc__))


def compare(config: GridConfig) -> int:
    """Run what is missing, up to the limit, and write the tables of what is there; returns the exit code."""
    comparison = config.comparison
    path, output = Path(comparison.grid), Path(comparison.output_dir) if comparison.output_dir else None
    task = ToyControls()
    grid = read_grid(path, task, output)

    if not run_grid(grid, task, comparison.limit, print):
        return 130
    runs = runs_of(grid, task)
    folder, rows = grid.output_dir / "results", read_rows(runs, grid, SCORES)
    facts = Provenance.of(grid, SCORES, shlex.join(["python", "scripts/compare_controls.py", str(path)]))
    page = f"# Control at equal steps ({facts.steps})\n\n"
    page += f"`{facts.command}`, {facts.date}, {facts.machine}: {progress(rows, facts)}\n"
    if found := control_table(rows, SCORES):
        write_table(folder, "scores", found)
        page += f"{markdown(found)}\nMeans ± standard deviation over seeds.\n"
    if rates := choose_table(rows, facts.choose_by, SCORES, facts.selection):
        page += f"\n## Learning rates, chosen by the largest {criterion(facts.choose_by)}\n\n{markdown(rates)}"
    write(folder / "README.md", page)
    print(page)
    save(folder / "rows", rows, facts)
    if comparison.save:
        save(Path(comparison.save), rows, facts)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(lambda argv: compare(config)))
