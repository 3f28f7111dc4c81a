#!/usr/bin/env python
"""Compare methods of control at equal steps on the toy world, by the pieces of one YAML file, as compare.py does.

    python scripts/compare_controls.py scripts/compare_controls.yaml             # goes on where it was
    python scripts/compare_controls.py scripts/compare_controls.yaml --limit=5   # five more runs, then the table
    python scripts/compare_controls.py scripts/compare_controls.yaml --limit=0 --save=docs/results/controls

A "subject" of the grid is a kind of control: canny, edges or mask. Learning rates are chosen on those of `selection`,
by controls of the toy world's part "held out"; the best ones run on those of `report`, by controls of its part "test",
which no training and no choice has seen. Each run goes through train_controlnet.py; scores: see consistency.py.
Pictures of the base without control are the floor, real renders the ceiling. The command may run several times at
once; each takes what is free.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from finetuning.control.scoring import (
    REAL,
    WITHOUT,
    ControlTest,
    Drawing,
    draw_control_run,
    score_control_run,
)
from finetuning.errors import InputError
from finetuning.evaluation.score_table import markdown, write, write_table
from finetuning.run_folder import CONTROLLED, WITHOUT_CONTROL
from finetuning.settings.control import MADE, RENDERED, ControlNetConfig
from finetuning.settings.fields import run_command
from finetuning.studies.comparison.answers import control_table, progress
from finetuning.studies.comparison.grid import Grid, Piece, Point, read_grid
from finetuning.studies.comparison.page import Facts, save
from finetuning.studies.comparison.results import choose_table, criterion, facts_of, read_rows
from finetuning.studies.comparison.running import pieces_of, run_grid
from toyworld.controls import Controls
from toyworld.segmentation import load_segmentation

SCORES = ("edge_f1", "edge_iou", "mask_miou")


class ToyControls:
    """Kinds of control on the toy world. Keys of `scoring`: images, steps, guidance, precision of the pictures."""

    trainer = Path(__file__).resolve().parents[1] / "train_controlnet.py"
    config = ControlNetConfig
    scores = SCORES

    def faults(self, grid: Grid) -> Iterator[str]:
        if grid.steps.values or grid.strengths.values:
            yield "steps, strengths: controls are scored at the end and at full strength alone; remove them"
        if odd := set(grid.scoring) - {"images", "steps", "guidance", "precision"}:
            yield f"scoring: unknown key {', '.join(sorted(odd))}"
        for name in (*grid.selection.subjects, *grid.report.subjects):
            if name not in (*MADE, *RENDERED):
                yield f"no control {name}; there are: {', '.join(dict.fromkeys((*MADE, *RENDERED)))}"

    def settings(self, piece: Piece, grid: Grid, given: dict[str, Any]) -> dict[str, Any]:
        return {"dataset_name": "toyworld", "conditioning": piece.subject}

    def score(self, piece: Piece, point: Point, grid: Grid) -> dict[str, Any]:
        """Scores of a run's pictures, of those without control, and of real ones."""
        folder, scoring = piece.folder(grid), grid.scoring
        controls = Controls if piece.phase == "selection" else unseen_controls
        test = ControlTest.from_run(folder, controls, load_segmentation, count=int(scoring.get("images", 64)))
        drawing = Drawing(
            steps=int(scoring.get("steps", 20)),
            guidance_scale=float(scoring.get("guidance", 3)),
            precision=scoring.get("precision", "no"),
            batch_size=16,
        )
        floor = grid.output_dir / WITHOUT_CONTROL / piece.subject
        rows = score_control_run(folder, test, draw_control_run(folder, test, drawing, every=8, floor=floor))
        by_kind = {row["pictures of"]: {name: row[name] for name in SCORES} for row in rows}
        found = {"subject": piece.subject, "scoring": scoring, "facts": facts_of(folder)}
        return {**found, "tuned": by_kind[CONTROLLED], "base": by_kind[WITHOUT], "real": by_kind[REAL]}


def unseen_controls(kind: str, part: str) -> Controls:
    """The toy world, measured on the part that no choice has seen."""
    return Controls(kind, "test" if part == "held out" else part)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", type=Path, help="YAML file, see scripts/compare_controls.yaml")
    parser.add_argument("--limit", type=int, metavar="N", help="run at most N pieces of what is missing")
    parser.add_argument("--output_dir", type=Path, metavar="DIR", help="instead of the file's")
    parser.add_argument("--save", type=Path, metavar="PATH", help="also write the rows to PATH.csv and what made them "
                        "to PATH.json, for scripts/summarize.py")  # fmt: skip
    args = parser.parse_args(argv)
    if args.limit is not None and args.limit < 0:
        raise InputError(f"--limit={args.limit}: must be 0 or more")
    task = ToyControls()
    grid = read_grid(args.grid, task, args.output_dir)

    if not run_grid(grid, task, args.limit, print):
        return 130
    pieces = pieces_of(grid, task)
    folder, rows = grid.output_dir / "results", read_rows(pieces, grid, SCORES)
    facts = Facts.of(grid, SCORES, shlex.join(["python", "scripts/compare_controls.py", str(args.grid)]))
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
    if args.save:
        save(args.save, rows, facts)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
